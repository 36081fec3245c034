"""benchmarks.feddf_drift, one_shot, local_distillation and fedmd_optimizer_state: the files, and what is paired."""

import json

import numpy as np
import programs
import pytest

TINY = ["--model=mclr", "--train_fraction=0.1", "--num_clients=4", "--seeds=1", "--rounds=2", "--batch_size=8"]


def results(folder):
    return json.loads((folder / "results.json").read_text())["runs"]


@pytest.mark.exhaustive
def test_feddf_and_fedavg_have_the_same_start_and_private_data(tmp_path):
    done = programs.run(
        "benchmarks.feddf_drift", "--dataset=mnist_sample", "--min_size=1", "--local_epochs=2", "--proxy_size=100",
        "--server_steps=10", *TINY, f"--out={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = {name: of_seeds[0] for name, of_seeds in results(tmp_path).items()}
    assert [run["settings"]["algorithm"] for run in runs.values()] == ["fedavg", "feddf", "feddf"]
    assert {run["settings"]["proxy"] for run in runs.values()} == {"held_out"}
    first, *others = (run["evaluations"]["central_accuracy"][0] for run in runs.values())
    assert others == [first] * 2  # before the first round
    assert len({tuple(run["rounds"]["bytes_up"]) for run in runs.values()}) == 1
    table = (tmp_path / "table.md").read_text()
    assert "batches of 128, up to 10 steps, patience 1000" in table


@pytest.mark.exhaustive  # ten compilations
def test_methods_that_distil_locally_have_the_same_start(tmp_path):
    done = programs.run(
        "benchmarks.local_distillation", "--dataset=mnist_sample", "--local_epochs=1", "--proxy_size=100",
        "--eval_every=1", "--target_accuracy=0.1", *TINY,
        "--num_clients=12", "--participation=0.5", f"--out={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = {name: of_seeds[0] for name, of_seeds in results(tmp_path).items()}
    first = runs["FedAvg"]
    for run in runs.values():
        assert run["by_class"][0] == first["by_class"][0]  # before the first round
        assert np.shape(run["by_class"]) == (3, 10)
    assert runs["FedGKD"]["accuracy"] == runs["FedGKD, cached"]["accuracy"]
    assert runs["FedSSD"]["down"] == runs["FedAvg"]["down"] + 40
    assert "seeds 0 to 0" in (tmp_path / "table.md").read_text()


@pytest.mark.exhaustive
def test_fedmd_with_fresh_and_kept_optimizers(tmp_path):
    done = programs.run(
        "benchmarks.fedmd_optimizer_state", "--models=mclr:4", "--proxy_size=100", "--revisits=1,3",
        "--pretrain_epochs=2", "--private_epochs=2", "--eval_every=2", *TINY, f"--out={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = {name: of_seeds[0]["evaluations"]["local_accuracy"] for name, of_seeds in results(tmp_path).items()}
    assert [*runs] == ["fresh, 1 epochs", "kept, 1 epochs", "fresh, 3 epochs", "kept, 3 epochs"]
    for mode in ("fresh", "kept"):  # transfer learning is the same, whatever the revisit
        assert runs[f"{mode}, 1 epochs"][0] == runs[f"{mode}, 3 epochs"][0]
    assert not np.allclose(runs["fresh, 3 epochs"][-1], runs["kept, 3 epochs"][-1], atol=0)


def test_revisits_that_cannot_be(tmp_path):
    done = programs.run_here("benchmarks.fedmd_optimizer_state", "--revisits=2,x", f"--out={tmp_path}")
    assert done.returncode != 0
    assert "--revisits=2,x: expected different whole numbers of epochs, such as 2,50" in done.stderr


@pytest.mark.exhaustive  # most of it FedMA's matching
def test_one_round_of_each(tmp_path):
    done = programs.run(
        "benchmarks.one_shot", "--train_fraction=0.1", "--num_clients=3", "--seeds=1", "--batch_size=32",
        "--proxy_size=50", "--local_epochs=2", "--server_steps=10", "--distill_epochs=2",
        "--sweeps=1", f"--out={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = {name: of_seeds[0] for name, of_seeds in results(tmp_path).items()}
    assert {name: run["settings"]["algorithm"] for name, run in runs.items()} == {
        "local": "local", "FedAvg": "fedavg", "FedMA": "fedma", "FedDF": "feddf", "FedAD": "fedad",
        "ensemble": "ensemble",
    }  # fmt: skip
    assert {run["settings"]["rounds"] for run in runs.values()} == {1}
    rows = [line.split("|")[1:-1] for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("|")]
    up = {row[0].strip(): float(row[3]) for row in rows[2:]}
    assert up["local"] == 0 < up["FedMA"] < up["FedAvg"] == up["FedDF"]  # narrower nets
    assert (tmp_path / "accuracy.png").exists()
