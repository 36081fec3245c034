"""benchmarks.privacy_utility: one table of all methods over noise, and its picture."""

import json

import programs
import pytest


@pytest.mark.exhaustive
def test_a_tiny_table_over_noise(tmp_path):
    done = programs.run(
        "benchmarks.privacy_utility", "--num_clients=4", "--train_fraction=0.05", "--proxy_size=40", "--seeds=1",
        "--rounds=1", "--eval_every=1", "--local_epochs=1", "--noises=0,2", f"--out={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert len(runs) == 12
    for name, (run,) in runs.items():
        plain, final = name.endswith("noise 0"), run["final"]
        assert run["settings"]["membership"]
        assert (run["privacy"]["epsilon"] is None) == plain  # infinite
        assert (run["settings"]["clip"] is None) == plain
        assert ("consensus_auc" in final) == ("DS-FL" in name or "FedMD" in name)
        assert ("upload_auc" in final) == (run["settings"]["privacy"] == "example")
    held = {tuple(run["holdings"]["n_k"]) for (run,) in runs.values()}
    assert len(held) == 1
    table = (tmp_path / "table.md").read_text()
    assert "FD, example given the models: one example more or less in the means, given the models" in table
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize("noises", ["0,x", "-1", "1,inf"])
def test_noises_that_are_none(noises, tmp_path):
    done = programs.run_here("benchmarks.privacy_utility", f"--noises={noises}", f"--out={tmp_path}")
    assert done.returncode == 2
    assert "expected numbers of at least 0" in done.stderr
