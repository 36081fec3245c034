"""Runs that are stopped, killed and resumed; runs that must not start."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from PIL import Image
from run_cases import SMALL

from fdjax.engine.layout import State
from fdjax.engine.storage import Storage
from fdjax.errors import InputError
from fdjax.exchange.traffic import Sizes, Traffic
from fdjax.run import experiment, report, runner, settings
from fdjax.run.checkpoint import Checkpoints
from fdjax.run.record import Recording
from fdjax.run.report import write_json
from fdjax.run.settings import FOLDERS

ROOT = Path(__file__).resolve().parents[2]
# Clients keep a state from round to round, their optimisers'.
STATEFUL = SMALL | {"participation": 0.5, "momentum": 0.9, "optimizer_state": "kept"}


def small(rounds=6, learning_rate=0.05, **fields):
    return settings.make(hparams={"learning_rate": learning_rate}, **STATEFUL | {"rounds": rounds} | fields)


def run(chosen, out=None, **options):
    return runner.run(chosen, out, progress=False, **options)


def final_state(chosen, out):
    built = experiment.build(chosen)
    checkpoints = Checkpoints(out / "checkpoints")
    then = [Storage(*each) for each in checkpoints.record()["storages"]]
    state = checkpoints.restore(built.simulation.shapes(built.federation), then, built.layout.storages)
    checkpoints.close()
    return built.simulation.fetch(state)


def history(result):
    return result.rounds, result.evaluations, result.clients, result.traffic


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    return out, run(small(), out)


def test_history(undisturbed):
    _, result = undisturbed
    assert result.evaluations["round"] == [0, 1, 2, 3, 4, 5, 6]
    assert {len(values) for values in result.evaluations.values()} == {7}
    assert {len(values) for values in result.rounds.values()} == {6}
    assert {len(values) for values in result.clients.values()} == {4}
    P = 60 * 10 + 10
    assert result.rounds["bytes_up"] == result.rounds["bytes_down"] == [r * 2 * 4 * P for r in range(1, 7)]
    assert result.final == {name: values[-1] for name, values in result.evaluations.items()}
    assert 0 < result.compile_seconds < result.seconds


def test_clients_are_listed_in_order_of_their_ids(undisturbed):
    """Rows of a federation are in order of work instead."""
    chosen = settings.make(**SMALL | {"rounds": 1, "partition": "labels", "labels_per_client": 3, "partition_seed": 3})
    built = experiment.build(chosen)
    ids = np.asarray(built.federation.client)
    assert ids.tolist() != [0, 1, 2, 3]
    state = built.simulation.init(chosen.seed, built.federation)
    state, _ = built.simulation.run(state, built.federation, built.hparams, 1, np.int32(1))
    _, clients = built.simulation.evaluate(state, built.federation, built.hparams, np.int32(0))
    expected = dict(zip(ids.tolist(), np.asarray(clients["own_loss"]).tolist(), strict=True))
    np.testing.assert_array_equal(run(chosen).clients["own_loss"], [expected[i] for i in range(4)])


def test_resumes_as_if_never_stopped(undisturbed, tmp_path):
    whole, result = undisturbed
    run(small(rounds=3), tmp_path)
    resumed = run(small(), tmp_path, resume=True)
    assert history(resumed) == history(result)
    chex.assert_trees_all_equal(final_state(small(), tmp_path), final_state(small(), whole))


def test_resuming_a_finished_run_gives_its_results(undisturbed, monkeypatch):
    out, result = undisturbed
    monkeypatch.setattr(Recording, "add_superstep", None)  # so that no further round can be recorded
    assert history(run(small(), out, resume=True)) == history(result)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_a_checkpoint(undisturbed, tmp_path, monkeypatch, number):
    _, result = undisturbed
    add_superstep, handler = Recording.add_superstep, signal.getsignal(number)

    def add_and_stop(recording, done, *more):
        add_superstep(recording, done, *more)
        if done == 2:
            signal.raise_signal(number)

    monkeypatch.setattr(Recording, "add_superstep", add_and_stop)
    with pytest.raises(runner.InterruptedRun) as stop:
        run(small(), tmp_path)
    assert (stop.value.round, stop.value.out) == (2, tmp_path)
    assert signal.getsignal(number) is handler
    monkeypatch.undo()
    assert history(run(small(), tmp_path, resume=True)) == history(result)


def test_a_second_signal_stops_at_once(tmp_path, monkeypatch):
    def stop_twice(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Recording, "add_superstep", stop_twice)
    with pytest.raises(KeyboardInterrupt):
        run(small(), tmp_path)


def test_supersteps_of_any_length_agree(undisturbed):
    _, result = undisturbed
    longer = run(small(rounds=5, eval_every=2))
    assert longer.evaluations["round"] == [0, 2, 4, 5]
    for name, values in longer.rounds.items():
        np.testing.assert_allclose(values, result.rounds[name][:5], rtol=1e-5, err_msg=name)
    expected = [result.evaluations["central_loss"][r] for r in (0, 2, 4, 5)]
    np.testing.assert_allclose(longer.evaluations["central_loss"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 4}, "batch_size=8, not 4"),
        ({"learning_rate": 0.1}, "learning_rate=0.05, not 0.1"),
        ({"seed": 1}, "seed=0, not 1"),
        ({"algorithm": "fedprox"}, "algorithm=fedavg, not fedprox"),
        ({"alpha": 0.5, "model": "2nn"}, r"alpha=None, not 0.5 \(1 more differ\)"),
        ({"schedule": "cosine"}, "schedule=constant, not cosine"),
    ],
)
def test_another_configuration_is_refused_before_anything_is_built(undisturbed, monkeypatch, change, named):
    out, _ = undisturbed
    monkeypatch.setattr(runner, "build", lambda _: pytest.fail("built although refused"))
    with pytest.raises(InputError, match=named) as error:
        run(small(**change), out, resume=True)
    assert "\n" not in str(error.value)


def test_a_run_may_go_on_elsewhere(undisturbed, monkeypatch):
    """For more rounds, on other devices, with another limit of memory."""
    out, _ = undisturbed
    monkeypatch.setattr(runner, "build", lambda chosen: pytest.fail(f"goes on with {chosen.devices} devices"))
    with pytest.raises(pytest.fail.Exception, match="goes on with 2 devices"):
        run(small(rounds=9, devices=2, memory_limit=8.0), out, resume=True)


def test_a_run_that_goes_on_on_other_devices_is_the_same_to_the_bit(tmp_path):
    """Of seven clients, whose states are shared out over two devices and then over four; sums are in order."""
    same = {"num_clients": 7, "ordered_sums": True, "chunk": 1, "eval_every": 2, "local_eval": "own"}
    whole = run(small(4, **same, devices=4), tmp_path / "four")
    run(small(2, **same, devices=2), tmp_path / "two")
    moved = run(small(4, **same, devices=4), tmp_path / "two", resume=True)
    assert moved.rounds["bytes_up"] == whole.rounds["bytes_up"]
    np.testing.assert_allclose(moved.rounds["train_loss"], whole.rounds["train_loss"], rtol=1e-6)
    expected, found = (final_state(small(4, **same, devices=4), tmp_path / name) for name in ("four", "two"))
    chex.assert_trees_all_equal(found, expected)


def test_an_existing_run_is_not_run_over(undisturbed, monkeypatch):
    out, _ = undisturbed
    monkeypatch.setattr(runner, "build", lambda _: pytest.fail("built although refused"))
    with pytest.raises(InputError, match="holds 6 rounds already; use --resume"):
        run(small(), out)
    with pytest.raises(InputError, match="is at round 6 already; give --rounds=6 or more"):
        run(small(rounds=4), out, resume=True)


def test_what_a_killed_save_left_is_ignored(undisturbed, tmp_path):
    _, result = undisturbed
    run(small(rounds=3), tmp_path)
    torn = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
    (torn / "state").mkdir(parents=True)
    (torn / "state" / "_METADATA").write_text("{")
    assert history(run(small(), tmp_path, resume=True)) == history(result)


def test_a_checkpoint_of_other_dtypes_is_refused(tmp_path):
    def state(dtype):
        return State({"w": jnp.ones(3, dtype)}, (), jnp.int32(1), jnp.zeros(2, jnp.uint32))

    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(state(jnp.bfloat16), {})
    with pytest.raises(InputError, match="other dtypes"):
        checkpoints.restore(state(jnp.float32))
    chex.assert_trees_all_equal(checkpoints.restore(state(jnp.bfloat16)), state(jnp.bfloat16))
    checkpoints.close()


def test_a_diverging_run_says_so_and_goes_on(capsys, tmp_path):
    result = run(small(learning_rate=1e38))
    assert not np.isfinite(result.final["central_loss"])
    assert capsys.readouterr().err.count("the run diverged; lower the learning rates") == 1
    write_json(tmp_path / "results.json", {"losses": result.evaluations["central_loss"]})
    assert json.loads((tmp_path / "results.json").read_text())["losses"][-1] is None


# The whole program, killed for real.

MANY = 60
FLAGS = [f"--{name}={value}" for name, value in (STATEFUL | {"rounds": MANY, "learning_rate": 0.05}).items()]


@pytest.fixture(scope="module")
def program():
    """Starts `python -m fdjax` on the same small problem in a process of its own."""
    started = []

    def start(out, *more):
        command, pipe = [sys.executable, "-m", "fdjax", *FLAGS, f"--out={out}", *more], subprocess.PIPE
        started.append(
            subprocess.Popen(command, cwd=ROOT, env=programs.environment(), text=True, stdout=pipe, stderr=pipe)
        )
        return started[-1]

    yield start
    for process in started:  # whatever a failed test left behind
        if process.poll() is None:
            process.kill()
            process.communicate()


def finish(process):
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    return stdout


def when_saved(process, out, rounds):
    """Waits until a checkpoint of `rounds` rounds or more is complete."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        folders = [path.parent.name for path in (out / "checkpoints").glob("*/commit_success.txt")]
        if max((int(name) for name in folders if name.isdigit()), default=0) >= rounds:
            return
        time.sleep(0.005)
    pytest.fail(f"no checkpoint before the end: {process.communicate()}")


def results(out):
    result = json.loads((out / "results.json").read_text())["result"]
    return {key: value for key, value in result.items() if not key.endswith("seconds")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder and the standard output of a run of the program that nothing disturbed, in this process."""
    out = tmp_path_factory.mktemp("whole") / "deep" / "out"
    done = programs.run_here("fdjax", *FLAGS, f"--out={out}")
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_what_is_coded_is_told_in_the_mean():
    """What clients count has no size of its own; what arrays count has, unless some participant held no example."""
    sizes = ((Sizes("digest", 0, None, 80), Sizes("digest", 1, None, 40)),)
    setup = {"bytes_up": 7.0, "bytes_down": 5.0}  # is no part of a round
    rounds = {"bytes_up": [37.0, 67.0, 127.0], "bytes_down": [245.0, 485.0, 725.0]}
    result = runner.Result(small(), rounds, {}, {}, Traffic(sizes, (), (2, 2), (4, 4)), 0.0, 0.0, setup)
    assert report.result_dict(result)["bytes_per_participant"] == {"up": 10.0, "down": (80, 40)}
    fewer = result._replace(rounds=rounds | {"bytes_down": [245.0, 445.0, 685.0]})
    assert report.bytes_of_one_client(fewer, "down") == (685.0 - 5.0) / 3 / 4


def test_a_run_leaves_table_results_and_curves(whole):
    out, stdout = whole
    files = {"table.md", "results.json", "results.parquet", "curves.png", "metrics.csv"}
    assert {p.name for p in out.iterdir()} == files | {"checkpoints", ".lock"}
    table = (out / "table.md").read_text()
    assert table.strip() in stdout
    assert "fedavg, synthetic, natural" in table
    assert f"round {MANY}" in table

    content = json.loads((out / "results.json").read_text())
    assert content.keys() == {"versions", "device", "machine", "revision", "result"}
    assert content["versions"]["jax"] == jax.__version__
    found = content["result"]
    assert found["setup"] == {}
    every = small(rounds=MANY).public()  # the flags of the file, and every default; folders stay on their machine
    assert found["settings"] == {k: v for k, v in every.items() if k not in FOLDERS}
    assert found["participants"] == [2]
    assert found["bytes_per_participant"] == {"up": [4 * 610], "down": [4 * 610]}
    assert found["rounds"]["bytes_up"][:2] == [2 * 4 * 610, 2 * 2 * 4 * 610]
    assert "train_loss" in found["rounds"]
    assert found["evaluations"]["round"] == list(range(MANY + 1))
    expected = {"central_accuracy", "own_accuracy", "own_accuracy_weighted", "worst_client"}
    assert expected <= found["final"].keys()
    assert found["final"] == {name: values[-1] for name, values in found["evaluations"].items()}
    assert {len(values) for values in found["clients"].values()} == {4}
    assert f"{100 * found['final']['central_accuracy']:.2f}" in table
    with Image.open(out / "curves.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 200


def test_killed_and_resumed_as_if_never_killed(program, whole, tmp_path):
    killed = tmp_path / "killed"
    victim = program(killed, "--checkpoint_every=1")
    when_saved(victim, killed, 3)
    victim.kill()
    _, stderr = victim.communicate(timeout=600)
    assert victim.returncode == -signal.SIGKILL, stderr
    assert not (killed / "results.json").exists()
    stdout = finish(program(killed, "--resume", "--checkpoint_every=1000"))
    assert f"round {MANY}" in stdout
    # Through JSON a float is exact, so this compares every round and every client bit for bit.
    assert results(killed) == results(whole[0])


def test_ctrl_c_ends_in_one_line_a_checkpoint_and_what_there_is(tmp_path, monkeypatch):
    add_superstep = Recording.add_superstep

    def add_and_stop(recording, done, *more):
        add_superstep(recording, done, *more)
        if done == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Recording, "add_superstep", add_and_stop)
    stopped = programs.run_here("fdjax", *FLAGS, f"--out={tmp_path}")
    assert stopped.returncode == 130, stopped.stderr
    assert "Traceback" not in stopped.stderr
    again = f"the same command with --out={tmp_path} --resume (and no --overwrite) goes on"
    assert stopped.stderr.splitlines()[-1] == f"stopped after round 3; {again}"
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest() == 3
    assert len(checkpoints.record()["rounds"]["train_loss"]) == 3
    checkpoints.close()
    assert f"round 3 of {MANY}, stopped" in stopped.stdout
    assert len(results(tmp_path)["rounds"]["train_loss"]) == 3
    assert (tmp_path / "table.md").read_text().strip() in stopped.stdout
    assert (tmp_path / "curves.png").is_file()
