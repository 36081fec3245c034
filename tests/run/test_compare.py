"""Runs side by side: how they are grouped, what their differences are worth, what is said of those that do not fit."""

import json
import math
import shutil
import subprocess

import numpy as np
import programs
import pytest
from PIL import Image

from fdjax import compare
from fdjax.errors import InputError
from fdjax.run import comparison

BASE = {
    "algorithm": "fedavg",
    "dataset": "synthetic",
    "partition": "natural",
    "alpha": 1.0,
    "rounds": 4,
    "model": "mclr",
}


def result(seed=0, values=(0.1, 0.5, 0.8), rounds=(0, 2, 4), sent=100.0, metric="central_accuracy", **changed):
    return {
        "settings": BASE | {"seed": seed} | changed,
        "setup": {},
        "rounds": {f"bytes_{way}": [sent * r for r in range(1, rounds[-1] + 1)] for way in ("up", "down")},
        "evaluations": {"round": list(rounds), metric: list(values)},
    }


def folder(path, *results):
    path.mkdir(parents=True)
    named = {"result": results[0]} if len(results) == 1 else {"results": list(results)}
    (path / "results.json").write_text(json.dumps(named))
    return path


def groups_of(*paths):
    return comparison.group([run for path in paths for run in comparison.read(path)])


def ended(values, **changed):
    """Runs of seeds 0, 1 ... that end at these values."""
    return [result(seed, (0.1, 0.2, value), **changed) for seed, value in enumerate(values)]


def test_runs_that_differ_by_their_seeds_are_one_group(tmp_path):
    paths = [folder(tmp_path / "a", *ended([0.5, 0.6])), folder(tmp_path / "b", result(5, devices=8, lifting="chunk"))]
    paths.append(folder(tmp_path / "c", *ended([0.7, 0.8], learning_rate=0.5)))
    groups = groups_of(*paths)
    assert [(each.label, [run.seed for run in each.runs]) for each in groups] == [
        ("fedavg, learning_rate=None", [0, 1, 5]),
        ("fedavg, learning_rate=0.5", [0, 1]),
    ]


def test_differences_are_paired_by_seed(tmp_path):
    first = folder(tmp_path / "a", *ended([0.5, 0.6, 0.7, 0.1]))
    other = folder(tmp_path / "b", *reversed(ended([0.52, 0.65, 0.71], algorithm="fedprox")))
    found = comparison.difference(*groups_of(first, other), "central_accuracy")
    np.testing.assert_allclose(found.differences, [0.02, 0.05, 0.01])


def t_by_hand(d):
    """Two-sided p of the paired t-test, by integrating Student's density over its tail."""
    n = len(d)
    t = abs(np.mean(d)) / (np.sqrt(np.sum((d - np.mean(d)) ** 2) / (n - 1)) / np.sqrt(n))
    x = np.linspace(0, t, 200_001)
    c = math.gamma(n / 2) / (math.sqrt((n - 1) * math.pi) * math.gamma((n - 1) / 2))
    return 1 - 2 * float(np.trapezoid(c * (1 + x**2 / (n - 1)) ** (-n / 2), x))


def wilcoxon_by_hand(d):
    """Two-sided p: of all signs of the ranks, how many give a rank sum as extreme."""
    ranks = np.argsort(np.argsort(np.abs(d))) + 1
    signs = (np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1
    sums, there = signs @ ranks, ranks[d > 0].sum()
    return min(1.0, 2 * min(np.mean(sums <= there), np.mean(sums >= there)))


def test_tests_are_those_of_their_definitions(tmp_path):
    rng = np.random.default_rng(1)
    for n in (3, 5, 8):
        d = rng.normal(0.02, 0.03, n)
        paths = [folder(tmp_path / f"a{n}", *ended([0.5] * n))]
        paths.append(folder(tmp_path / f"b{n}", *ended((0.5 + d).tolist(), algorithm="fedprox")))
        found = comparison.difference(*groups_of(*paths), "central_accuracy")
        assert found.p_t == pytest.approx(t_by_hand(d), abs=1e-8)
        assert found.p_wilcoxon == pytest.approx(wilcoxon_by_hand(d), abs=1e-12)


def test_limits_of_the_tests(tmp_path):
    def p(a, b, name):
        paths = folder(tmp_path / f"{name}a", *ended(a)), folder(tmp_path / f"{name}b", *ended(b, algorithm="fedprox"))
        found = comparison.difference(*groups_of(*paths), "central_accuracy")
        return found.p_t, found.p_wilcoxon

    assert p([0.5, 0.6, 0.7], [0.5, 0.6, 0.7], "same") == (1.0, 1.0)
    assert np.isnan(p([0.5, 0.6], [0.6, 0.7], "few")).all()
    assert np.isnan(p([0.5, 0.6, 0.7], [0.6, 0.7, math.nan], "nan")).all()


def test_holm():
    p = [0.01, 0.04, math.nan, 0.03, 0.005]
    np.testing.assert_allclose(comparison.holm(p), [0.03, 0.06, math.nan, 0.06, 0.02])
    assert comparison.holm([0.7, 0.6]) == [1.0, 1.0]
    assert comparison.holm([0.2]) == [0.2]


def test_a_table_says_all_of_it(tmp_path):
    first = folder(tmp_path / "a", *ended([0.5, 0.6, 0.7]))
    other = folder(tmp_path / "b", *ended([0.55, 0.7, 0.72], algorithm="fedprox", sent=50.0))
    headers, rows = compare.table(groups_of(first, other), "central_accuracy", [0.65])
    one, two = (dict(zip(headers, row, strict=True)) for row in rows)
    assert one["central accuracy, %"] == "60.00 ± 10.00"
    assert (one["bytes"], two["bytes"]) == ("800 B", "400 B")
    assert two["difference to fedavg, %"] == "5.67 ± 4.04 (n = 3)"
    assert (two["p, paired t"], two["p, Wilcoxon"]) == ("0.136", "0.250")
    assert one["rounds to 0.65"] == "3.8 (1 of 3)"
    assert two["rounds to 0.65"] == "3.8 ± 0.0 (2 of 3)"
    assert one["bytes to 0.65"] == "760 B (1 of 3)"
    assert compare.table(groups_of(first), "central_accuracy", [])[0] == [
        "run", "seeds", "central accuracy, %", "rounds", "bytes",
    ]  # fmt: skip


def test_few_seeds_cannot_tell(tmp_path, capsys):
    paths = folder(tmp_path / "a", *ended([0.5])), folder(tmp_path / "b", *ended([0.6], algorithm="fedprox"))
    compare.write(tmp_path, groups_of(*paths), "central_accuracy", [])
    text = capsys.readouterr().out
    assert "cannot tell" in text
    assert "Fewer than 3 seeds in common cannot tell a difference from chance" in text


def test_other_data_are_warned_of(tmp_path):
    paths = folder(tmp_path / "a", *ended([0.5])), folder(tmp_path / "b", *ended([0.6], alpha=0.1, rounds_=1))
    (warning,) = comparison.warnings_of(groups_of(*paths))
    assert "are of different data (alpha=1.0 and 0.1)" in warning


def test_seeds_that_stopped_are_told_and_drawn_as_far_as_all_came(tmp_path):
    early = result(1, (0.1, 0.7), (0, 2))
    groups = groups_of(folder(tmp_path / "a", result(0), early))
    (warning,) = comparison.warnings_of(groups)
    assert "ended after different rounds" in warning
    (_, _, _, [(_, rounds, values, _)]), _ = compare.panels(groups, "central_accuracy")
    assert (rounds, values) == ([0, 2], [10.0, pytest.approx(60.0)])
    assert compare.table(groups, "central_accuracy", [])[1][0][3] == "2 to 4"


def test_latex_is_what_latex_takes(tmp_path):
    text = compare.latex(["a_b", "x, %"], [["r & d", "1 ± 2"]], ["note"])
    assert r"a\_b" in text
    assert r"x, \%" in text
    assert r"r \& d" in text
    assert r"1 $\pm$ 2" in text
    if shutil.which("pdflatex"):
        (tmp_path / "t.tex").write_text(
            rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{text}\end{{document}}"
        )
        subprocess.run(["pdflatex", "-halt-on-error", "t.tex"], cwd=tmp_path, check=True, capture_output=True)


def bad_folders(tmp_path):
    good = folder(tmp_path / "runs" / "good", *ended([0.5]))
    broken = folder(tmp_path / "broken", result())
    (broken / "results.json").write_text('{"result": {')
    (folder(tmp_path / "other", result()) / "results.json").write_text('{"rows": [1, 2]}')
    (folder(tmp_path / "list", result()) / "results.json").write_text("[]")
    (folder(tmp_path / "none", result()) / "results.json").write_text('{"results": []}')
    folder(tmp_path / "half", {"settings": BASE, "rounds": {}, "evaluations": {}})
    folder(tmp_path / "own", result(metric="own_accuracy", algorithm="fedprox"))
    both = result(algorithm="fedntd")
    both["evaluations"]["own_accuracy"] = [0.0, 0.1, 0.2]
    folder(tmp_path / "both", both)
    folder(tmp_path / "twin", *ended([0.9]))
    (tmp_path / "empty").mkdir()
    return good


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["missing"], "missing holds no results.json, as a run leaves it in its --out"),
        (["empty"], "empty holds no results.json"),
        (["runs"], "runs holds no results.json, as a run leaves it in its --out; give "),
        (["broken"], "broken/results.json is no JSON"),
        (["other"], "other/results.json is not of a run of fdjax"),
        (["list"], "list/results.json is not of a run of fdjax"),
        (["half"], "half/results.json is not of a run of fdjax"),
        (["runs/good", "runs/good"], "is given twice; leave one out"),
        (["runs/good", "twin"], "both have seed 0 of the same setting; leave one out"),
        (["runs/good", "--metric=central_acuracy"], "(did you mean 'central_accuracy'?)"),
        (
            ["runs/good", "both", "--metric=own_accuracy"],
            "good: unknown metric 'own_accuracy' (did you mean 'central_accuracy'?)",
        ),
        (["runs/good", "own"], "good and the others have no metric of evaluations in common"),
        (["runs/good", "--targets=80"], "expected accuracies above 0 and at most 1"),
        (["runs/good", "--targets="], "expected accuracies above 0 and at most 1"),
        (["none"], "none/results.json is not of a run of fdjax"),
        (["runs/good", "--out=runs/good"], "is a run's folder, whose table and curves stay; choose another folder"),
        ([], "give the folders of runs, e.g. fdjax-compare runs/a runs/b"),
    ],
)
def test_folders_that_do_not_fit_are_told_in_one_line(given, told, tmp_path, monkeypatch):
    from absl import flags

    bad_folders(tmp_path)
    named = dict(text.removeprefix("--").split("=") for text in given if text.startswith("--"))
    named["out"] = str(tmp_path / named.get("out", "out"))
    values = type("Flags", (), {"metric": None, "targets": None} | named)
    monkeypatch.setattr(compare.flags, "FLAGS", values)
    with pytest.raises(InputError) as error:
        compare.main(*(str(tmp_path / text) for text in given if not text.startswith("--")))
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    assert flags is compare.flags


def test_the_program(tmp_path):
    first = folder(tmp_path / "a", *ended([0.5, 0.6, 0.7]))
    other = folder(tmp_path / "b", *ended([0.55, 0.7, 0.72], algorithm="fedprox"))
    out = tmp_path / "out"
    ran = programs.run_here("fdjax.compare", str(first), str(other), "--targets=0.65", f"--out={out}")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith((out / "table.md").read_text().rstrip("\n"))
    assert "\\toprule" in (out / "table.tex").read_text()
    with Image.open(out / "curves.png") as picture:
        assert picture.size[0] > 1000
    refused = programs.run_here("fdjax.compare", str(tmp_path / "nowhere"))
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")


def test_what_falls_reaches_a_target_from_above_and_is_no_percentage(tmp_path):
    """Of a loss, and of a user's metric that says so: 1 at round 1, half-way from 2 to 0 between rounds 0 and 2."""
    for metric, more in (("central_loss", {}), ("own_brier", {"metrics": {"brier": {"better": "lower", "unit": ""}}})):
        runs = [result(seed, (2.0, 0.0, 0.5), metric=metric) | more for seed in (0, 1)]
        headers, rows = compare.table(groups_of(folder(tmp_path / metric, *runs)), metric, [1.0])
        cells = dict(zip(headers, rows[0], strict=True))
        assert cells["rounds to 1"].startswith("1.0")
        assert cells[metric.replace("_", " ")].startswith("0.5")


def test_what_is_told_of_a_run_alone_makes_no_other_group_and_own_things_go_by_name(tmp_path):
    own = {"algorithm": "near@3f2a91c04b7d"}
    paths = [folder(tmp_path / "a", result(0, **own)), folder(tmp_path / "b", result(1, targets="0.5", **own))]
    assert [each.label for each in groups_of(*paths)] == ["near"]
    paths.append(folder(tmp_path / "c", result(1, algorithm="near@000000000000")))
    assert {each.label for each in groups_of(*paths)} == {"near@3f2a91c04b7d", "near@000000000000"}
