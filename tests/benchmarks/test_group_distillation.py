"""benchmarks.group_distillation: the files, and what is paired."""

import json

import programs
import pytest


@pytest.mark.exhaustive  # four programs to compile
def test_every_question_has_a_figure_and_rows(tmp_path):
    done = programs.run(
        "benchmarks.group_distillation", "--model=mclr", "--models=mclr:4,mclr:2", "--num_clients=6", "--seeds=2",
        "--rounds=1", "--eval_every=1", "--train_fraction=0.1", "--proxy_size=50", f"--out={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {f"question{n}.png" for n in (1, 2, 3)} <= {file.name for file in tmp_path.iterdir()}
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    first = {name: of_seeds[0]["evaluations"]["local_accuracy"][0] for name, of_seeds in runs.items()}
    assert len(first) == 29
    assert len({*first.values()}) == 1  # before the first round
    same = ("RQ1, proxy: similarity", "RQ2, proxy: constant, 0.5", "RQ3, proxy: teacher alone")
    assert len({json.dumps(runs[name][0]["rounds"]) for name in same}) == 1
    assert (tmp_path / "table.md").read_text().count("| proxy ") == 16
