"""benchmarks.dsfl_era and benchmarks.fedmd_figure2: tiny runs write their files, and count what was sent."""

import gzip
import json
from pathlib import Path

import numpy as np
import programs
import pytest

from benchmarks import dsfl_era, fedmd_figure2
from fdjax.data.holdings import from_counts
from fdjax.data.sources import load
from fdjax.run import experiment, runner, settings

TINY = {
    "dataset": "mnist_sample", "train_fraction": 0.1, "partition": "dirichlet_a", "alpha": 1.0, "min_size": 1,
    "num_clients": 3, "model": "mclr", "proxy": "held_out", "proxy_size": 20, "proxy_per_round": 10, "devices": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    """The embedded MNIST sample in the form of Fashion-MNIST's files."""
    folder, sample = tmp_path_factory.mktemp("fashion"), load("mnist_sample")
    for stem, x, y in (("train", sample.train_x, sample.train_y), ("t10k", sample.test_x, sample.test_y)):
        for kind, array in (("images-idx3", x[..., 0]), ("labels-idx1", y.astype(np.uint8))):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (folder / f"{stem}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes(), 1))
    return folder


@pytest.fixture(scope="module")
def era(fashion, tmp_path_factory):
    out = tmp_path_factory.mktemp("era")
    flags = [f"--{name}={value}" for name, value in TINY.items() if name != "dataset"]
    done = programs.run(
        "benchmarks.dsfl_era", *flags, f"--out={out}", f"--fashion_dir={fashion}", "--rounds=3", "--seeds=1",
        "--eval_every=3", "--budgets=0.01,0.1", "--target_mnist=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out, json.loads((out / "results.json").read_text()), (out / "table.md").read_text()


@pytest.mark.exhaustive
def test_era_writes_its_files(era, fashion):
    out, told, table = era
    for picture in ("curves.png", "clients.png"):
        assert (out / picture).stat().st_size > 0
    methods = ("DS-FL, ERA", "DS-FL, SA", "FedAvg")
    assert list(told["runs"]) == [f"{data}, {m}" for data in ("MNIST", "Fashion-MNIST") for m in methods]
    assert {len(runs) for runs in told["runs"].values()} == {1}
    assert told["runs"]["Fashion-MNIST, FedAvg"][0]["settings"]["train_fraction"] == pytest.approx(0.01)
    assert "ERA less SA at the end" in table
    assert str(fashion) not in table + json.dumps(told)


@pytest.mark.exhaustive
def test_bytes_are_rounds_times_a_round(era):
    """DS-FL: n K floats up; down the same and the ids of the subset. FedAvg: the parameters each way."""
    _, told, _ = era
    n, K, clients, P = 10, 10, 3, 784 * 10 + 10
    expected = {"DS-FL, ERA": (4 * n * K, 4 * n * K + 4 * n), "FedAvg": (4 * P, 4 * P)}
    for method, (up, down) in expected.items():
        run = told["runs"][f"MNIST, {method}"][0]
        assert run["rounds"]["bytes_up"] == [clients * up * r for r in (1, 2, 3)]
        assert run["rounds"]["bytes_down"] == [clients * down * r for r in (1, 2, 3)]


@pytest.mark.exhaustive
def test_methods_share_the_federation(era):
    """FedAvg's clients hold what DS-FL's do: the open data are nobody's."""
    _, told, _ = era
    used = [told["runs"][f"MNIST, {m}"][0]["settings"] for m in ("DS-FL, ERA", "DS-FL, SA", "FedAvg")]
    same = ("seed", "partition_seed", "proxy", "proxy_size", "partition", "alpha", "num_clients", "train_fraction")
    assert len({tuple(one[name] for name in same) for one in used}) == 1
    assert [one.get("aggregation") for one in used] == ["era", "sa", None]


def test_accuracy_within_bytes_and_bytes_to_accuracy():
    result = runner.run(
        settings.make(algorithm="fedavg", rounds=4, eval_every=2, **TINY | {"proxy_per_round": 0}), progress=False
    )
    a_round = 2 * 3 * 4 * 7850
    assert dsfl_era.sent(result) == [0, 2 * a_round, 4 * a_round]
    result = result._replace(evaluations=result.evaluations | {"central_accuracy": [0.1, 0.3, 0.5]})
    for budget, value in ((2 * a_round - 1, None), (2 * a_round, 0.3), (4 * a_round - 1, 0.3), (9 * a_round, 0.5)):
        assert dsfl_era.within(result, "central_accuracy", budget) == value
    for target, needed in ((0.3, 2 * a_round), (0.31, 4 * a_round), (0.51, None)):
        assert dsfl_era.bytes_to(result, "central_accuracy", target) == needed


@pytest.mark.skipif(Path("/usr/share/datasets/fashion-mnist").is_dir(), reason="Debian's Fashion-MNIST is installed")
def test_without_fashion_mnist_the_other_half_is_printed(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
    flags = [f"--{name}={value}" for name, value in TINY.items() if name != "dataset"]
    done = programs.run_here(
        "benchmarks.dsfl_era", *flags, f"--out={tmp_path}", "--rounds=1", "--seeds=1", "--methods=fedavg"
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("Fashion-MNIST is left out")]
    assert "apt-get install dataset-fashion-mnist" in line
    assert list(json.loads((tmp_path / "results.json").read_text())["runs"]) == ["MNIST, FedAvg"]


@pytest.fixture(scope="module")
def figure(tmp_path_factory):
    out = tmp_path_factory.mktemp("figure")
    done = programs.run(
        "benchmarks.fedmd_figure2", f"--out={out}", "--models=mclr:2,2nn:1", "--train_fraction=0.05", "--proxy_size=60",
        "--pretrain_epochs=1", "--private_epochs=1", "--rounds=3", "--eval_every=2", "--seeds=2", "--devices=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out, done.stdout, json.loads((out / "results.json").read_text())


@pytest.mark.exhaustive
def test_figure_writes_its_files(figure):
    out, printed, told = figure
    assert (out / "curves.png").stat().st_size > 0
    assert "stand in for writers" in printed
    assert "The paper says about 20 %" in (out / "table.md").read_text()
    assert [p["model"] for p in told["parties"]] == ["mclr", "mclr", "2nn"]
    for party in told["parties"]:
        assert np.shape(party["fedmd"]) == np.shape(party["alone"]) == (2, 3)
        assert np.shape(party["pooled"]) == (2,)


@pytest.mark.exhaustive
def test_figure_begins_before_collaboration(figure):
    """FedMD and its control share transfer learning, and part where the first consensus is digested."""
    _, _, told = figure
    fedmd, alone = (np.array([p[kind] for p in told["parties"]]) for kind in ("fedmd", "alone"))
    np.testing.assert_array_equal(fedmd[:, :, 0], alone[:, :, 0])
    assert np.all(np.any(fedmd[:, :, 1:] != alone[:, :, 1:], axis=(0, 1)))


@pytest.mark.exhaustive
def test_transfer_learning_is_what_the_set_up_leaves(figure):
    """The figure's round 0 is the state after the method's set-up, tested by hand here."""
    _, _, told = figure
    names = ("models", "num_clients", "train_fraction", "proxy", "proxy_size", "pretrain_epochs", "private_epochs",
             "partition", "labels_per_client", "optimizer", "learning_rate", "batch_size", "distill_batch_size",
             "devices")  # fmt: skip
    used = told["runs"]["FedMD"][0]["settings"]
    built = experiment.build(settings.make(algorithm="fedmd", **{name: used[name] for name in names}))
    state = built.simulation.init(used["seed"], built.federation)
    state, _ = built.simulation.setup(state, built.federation, built.hparams)
    accuracy = built.simulation.evaluate(state, built.federation, built.hparams)[1]["local_accuracy"]
    by_id = np.asarray(accuracy)[np.argsort(np.asarray(built.federation.client))]
    np.testing.assert_allclose([party["fedmd"][0][0] for party in told["parties"]], by_id, atol=2e-3)


@pytest.mark.exhaustive
def test_figure_counts_bytes(figure):
    """All public examples in every round: no ids, n K floats each way, three parties. The set-up sends nothing."""
    _, _, told = figure
    run = told["runs"]["FedMD"][0]
    assert run["rounds"]["bytes_up"] == run["rounds"]["bytes_down"] == [3 * 4 * 60 * 10 * r for r in (1, 2, 3)]
    assert run["setup"] == {"bytes_up": 0, "bytes_down": 0}
    assert run["evaluations"]["round"] == [0, 2, 3]
    assert run["settings"]["rounds"] == 3
    (pooled, _) = told["runs"]["pooled"]
    assert pooled["evaluations"]["round"] == [0]
    assert pooled["rounds"]["bytes_up"] == []


def test_everything_for_everyone():
    one = from_counts(np.array([4, 1, 7]), np.array([2, 0, 1]))
    all_of_it = fedmd_figure2.everything_for_everyone(one)
    for start, count in zip(all_of_it.start, all_of_it.count, strict=True):
        assert all_of_it.order[start : start + count].tolist() == [4, 1, 7]


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("dsfl_era", ["--methods=erra"], "unknown method 'erra' (did you mean 'era'?)"),
        ("dsfl_era", ["--datasets=cifar10"], "unknown data set of --datasets 'cifar10'"),
        ("dsfl_era", ["--budgets=2,none"], "--budgets: 'none', expected a number above 0"),
        ("dsfl_era", ["--target_mnist=-1"], "--target_mnist: '-1.0', expected a number above 0"),
        ("dsfl_era", ["--datasets=fashion_mnist", "--fashion_dir=/no/such"], "no train-images-idx3-ubyte[.gz] in '/no"),
        ("fedmd_figure2", ["--models=mclr"], "--models=mclr: 'mclr' is not of the form name:clients"),
        ("fedmd_figure2", ["--models=mclr:2", "--resume"], "holds no checkpoint to resume"),
        ("fedmd_figure2", ["--models=mclr:2", "--writers=no.npz", "--data_dir=/no"], "mnist: data_dir '/no' is no fo"),
    ],
)
@pytest.mark.exhaustive
def test_what_cannot_work_is_one_line(name, given, message, tmp_path):
    done = programs.run(f"benchmarks.{name}", f"--out={tmp_path}", "--seeds=1", "--rounds=1", *given)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert message in line
    assert "Traceback" not in done.stderr


@pytest.mark.exhaustive
def test_a_figure_is_not_written_over(figure):
    out, _, _ = figure
    done = programs.run("benchmarks.fedmd_figure2", f"--out={out}", "--models=mclr:2")
    assert done.returncode == 2
    assert "use --overwrite" in done.stderr
