"""benchmarks.speed: the work that peers are given is the work that the simulator does, and a tiny run writes its files.

The peers themselves live in an environment of their own; here a NumPy loop in float64 stands in for them.
"""

import json
from pathlib import Path

import jax
import numpy as np
import programs
import pytest
from choices import some

from benchmarks import speed_checkouts, speed_suites
from benchmarks.peers import PEERS
from benchmarks.speed import Verdict
from benchmarks.speed_suites import DISTILL, LEARNING_RATE, SUITES, Case, Fdjax, make_work
from fdjax.engine import lift

ROOT = Path(__file__).resolve().parents[2]


def softmax(z):
    p = np.exp(z - z.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def numpy_round(ours, work, distill):
    """Softmax regression on the given batches, averaged over clients: (kernel, bias, mean loss)."""
    kernels, biases, losses = [], [], []
    for client, batches in enumerate(ours.batches()):
        W, b = (np.array(ours.first.server["Dense_0"][name], np.float64) for name in ("kernel", "bias"))
        for index in batches:
            x, y = work.x[index].astype(np.float64), np.eye(speed_suites.CLASSES)[work.y[index]]
            z = x @ W + b
            loss = -np.sum(y * np.log(softmax(z)), axis=1)
            slope = softmax(z) - y
            if distill:
                T, weight = distill["temperature"], distill["weight"]
                teacher = {name: value[client] for name, value in ours.teacher["Dense_0"].items()}
                q, p = softmax((x @ teacher["kernel"] + teacher["bias"]) / T), softmax(z / T)
                loss = (1 - weight) * loss + weight * T**2 * np.sum(q * np.log(q / p), axis=1)
                slope = (1 - weight) * slope + weight * T * (p - q)
            W, b = W - LEARNING_RATE * x.T @ slope / len(x), b - LEARNING_RATE * slope.mean(0)
            losses.append(loss.mean())
        kernels.append(W)
        biases.append(b)
    return np.mean(kernels, axis=0), np.mean(biases, axis=0), np.mean(losses)


@pytest.mark.parametrize(("algorithm", "shared"), [("fedavg", True), ("feddistill", False)])
def test_a_loop_over_the_batches_ends_where_the_simulator_does(algorithm, shared):
    case = Case("mclr", batch=4, clients=5, steps=3, shape=(6,), algorithm=algorithm, shared=shared)
    work = make_work(case)
    ours = Fdjax(case, work, lift.make_mesh(jax.devices()[:2]))
    assert ours.batches().shape == (5, 3, 4)
    kernel, bias, loss = numpy_round(ours, work, DISTILL if algorithm == "feddistill" else None)
    np.testing.assert_allclose(ours.after["Dense_0"]["kernel"], kernel, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours.after["Dense_0"]["bias"], bias, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours.metrics["train_loss"], [loss], rtol=1e-5)
    ended = {"Dense_0": {"kernel": kernel, "bias": bias}}
    assert ours.distance(ended) < 1e-5
    assert ours.distance(ours.first.server) == pytest.approx(1)
    z = work.x.astype(np.float64)[:1000] @ kernel + bias
    p = softmax(z)[np.arange(len(z)), work.y[:1000]]
    assert ours.loss(ended) == pytest.approx(-np.log(p).mean(), rel=1e-5)
    once = ours.after
    assert ours() > 0  # and every repeat is the same round
    jax.tree.map(np.testing.assert_array_equal, ours.after, once)


def test_a_verdict_compares_the_median_with_the_target():
    assert Verdict("s", "c", "m", [1.0, 3.0, 2.0], target=2.0).met
    assert not Verdict("s", "c", "m", [1.0, 3.0, 1.9], target=2.0).met
    assert Verdict("s", "c", "m", [1.0, 1.3, 1.1], target=1.2, at_least=False).met
    assert Verdict("s", "c", "m", [1.0]).row()[-2:] == ["", ""]
    for suite in SUITES.values():
        assert set(suite.targets) <= set(suite.peers) <= set(PEERS)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("**/*.py")), ids=lambda path: path.name)
def test_programs_stay_small(path):
    assert len(path.read_text().splitlines()) < (151 if path.name.endswith("_worker.py") else 400)


def test_a_tiny_run_writes_its_files(tmp_path):
    suites = "--suite=logistic,scale,gpu"
    done = programs.run_here("benchmarks.speed", suites, "--smoke", "--peers=", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "gpu: skipped, JAX's backend here is 'cpu'" in done.stdout
    for name, cases in {"logistic": 1, "scale": 2}.items():
        told = json.loads((tmp_path / f"speed_{name}" / "results.json").read_text())
        assert told["suite"] == name
        assert told["gemm_gflops"] > 0
        assert told["versions"]["jax"] == jax.__version__
        assert len(told["results"]) == cases
        for result in told["results"]:
            assert len(result["ms_per_step"]["fdjax"]) == 1
            assert result["compile_s"] > 0
            assert result["compiled_bytes"]["temp"] > 0
            assert np.isfinite(result["loss"]["fdjax"])
        assert "fdjax ms/step" in (tmp_path / f"speed_{name}" / "table.md").read_text()
    measures = [verdict["measure"] for verdict in told["verdicts"]]
    assert measures[0] == "slowest / fastest client step"
    assert (tmp_path / "speed_scale" / "ratios.png").stat().st_size > 0


@pytest.mark.exhaustive
def test_a_checkout_against_itself_does_the_same_work(tmp_path):
    done = programs.run(
        "benchmarks.speed", "--suite=logistic", "--smoke", f"--against={ROOT}", f"--out={tmp_path}", "--devices=1"
    )
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "speed_against" / "results.json").read_text())
    assert [version.split(",")[0] for version in told["checkouts"].values()] == [str(ROOT)] * 2
    (result,) = told["results"]
    assert result["weights_differ"] == 0
    assert result["chunks"][0] == result["chunks"][1]
    for what in ("steps", "compilations"):
        (pair,) = result[what]
        assert np.shape(pair) == (2, 2)
        assert np.all(np.array(pair) > 0)
    table = (tmp_path / "speed_against" / "table.md").read_text()
    assert "ms a client step" in table
    assert "s of compiling a superstep" in table


class FakeCheckout:
    """Answers as a worker does: it needs so many wall seconds, and half of that of the processor's."""

    def __init__(self, name, seconds, moved=1.0):
        self.name, self.seconds, self.moved, self.asked = name, seconds, moved, []

    def ask(self, do, **given):
        self.asked.append(do)
        if do == "load":
            return {"chunk": "2", "temp_bytes": 8}
        if do == "save":
            np.savez(given["path"], **{"first/w": np.zeros(4), "after/w": np.full(4, self.moved)})
        return {"seconds": [self.seconds, self.seconds / 2]}


def test_two_checkouts_take_turns_and_their_times_are_those_of_a_client_step():
    case = Case("mclr", batch=4, clients=5, steps=3, shape=(6,))
    this, other = FakeCheckout("this", 3.0), FakeCheckout("other", 2.0, moved=1.25)
    result = speed_checkouts.time_case("logistic", case, [this, other], 2, 3, chunk=0)
    assert this.asked == other.asked == ["load", *["compile"] * 3, *["run"] * 2, "save"]
    np.testing.assert_allclose(result["steps"], [[[3e3 / 15, 1.5e3 / 15], [2e3 / 15, 1e3 / 15]]] * 2)
    assert result["compilations"] == [([3.0, 1.5], [2.0, 1.0])] * 3
    assert result["weights_differ"] == pytest.approx(0.25)
    assert "| logistic | mclr B=4 5x3 |" in " ".join(speed_checkouts.tables([result]).split())


def test_ratios_are_this_checkout_over_the_other_by_each_clock():
    pairs = [([2.0, 3.0], [1.0, 2.0]), ([1.0, 1.0], [4.0, 1.0])]
    assert speed_checkouts.ratios(pairs, 0) == [2.0, 0.25]
    assert speed_checkouts.ratios(pairs, 1) == [1.5, 1.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--suite=cnn"], "unknown suite 'cnn'"),
        *some([
            (["--suite=gpu", "--peers="], "suite 'gpu' needs a GPU"),
            (["--peers=flower"], "unknown peer 'flower'"),
            (["--against=/no/such"], "--against=/no/such: no checkout of fdjax"),
            (["--peers=pfl", "--peer_python=nowhere/python"], "run `make bench-venv`"),
        ]),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line(given, message):
    done = programs.run_here("benchmarks.speed", *given, "--smoke")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert message in line
    assert "Traceback" not in done.stderr
