"""sweeps.report on made-up studies: numbers against NumPy, what failed, the page, one-line errors."""

import base64
import csv
import itertools
import json
import re
from pathlib import Path

import numpy as np
import optuna
import programs
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from fdjax.errors import InputError
from fdjax.run import saving
from sweeps import figures, outcome
from sweeps import report as program
from sweeps.storage import open_storage
from sweeps.study import Study, load

ROOT = Path(__file__).resolve().parents[2]
FILE = "sweeps/temperature_alpha.py"
FIXED = {"algorithm": "feddistill", "dataset": "mnist_sample", "num_clients": 5, "rounds": 20}
SPACE = {"temperature": (1.0, 3.0, 10.0), "weight": (0.3, 0.9), "seed": (0, 1, 2)}
ROUNDS = np.arange(1, 15)


@pytest.fixture(autouse=True, scope="module")
def quiet():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


def study(**fields):
    usual = {"name": "made_up", "paper": "A. & B. <2020>", "question": "Which?", "runtime": "3 min", "fixed": FIXED}
    return Study(**usual | {"space": SPACE} | fields)


def history(temperature, weight, seed):
    rng = np.random.default_rng([int(temperature), int(10 * weight), seed])
    return 0.9 - 0.02 * temperature - 0.1 * weight + 0.05 * rng.normal(size=len(ROUNDS))


def finished(params, values, distributions, metric="central_accuracy", **more):
    kept = {"round": ROUNDS[: len(values)].tolist(), metric: list(values)} | more
    return create_trial(
        value=float(values[-1]), params=params, distributions=distributions,
        intermediate_values=dict(enumerate(map(float, values), 1)),
        user_attrs={
            "evaluations": kept, "bytes": (1e6 * ROUNDS[: len(values)]).tolist(), "worker": f"w{params.get('seed')}",
            "seconds": 2.0, "compile_seconds": 0.5, "settings": {"model": "2nn", "data_dir": "/somewhere"},
        },
    )  # fmt: skip


def stopped(plan, params, state, **attributes):
    return create_trial(state=state, params=params, distributions=plan.distributions, user_attrs=attributes)


def grid(plan):
    points = [dict(zip(SPACE, values, strict=True)) for values in itertools.product(*SPACE.values())]
    return [finished(params, history(**params), plan.distributions) for params in points]


def keep(plan, trials, storage=None):
    """The trials in a storage, with what a sweep writes beside them."""
    storage = storage or optuna.storages.InMemoryStorage()
    stored = optuna.create_study(study_name=plan.name, storage=storage, direction=plan.direction)
    for name in ("paper", "question", "runtime"):
        stored.set_user_attr(name, getattr(plan, name))
    stored.set_user_attr("description", plan.description())
    versions = {"fdjax": "0.1.0", "jax": "9.9.9", "none": None}
    environment = {"versions": versions, "device": "1 x cpu", "machine": "m", "revision": "abcdef123456"}
    stored.set_user_attr("environment", environment)
    stored.add_trials(trials)
    return storage


def read(plan, trials):
    return outcome.read(plan, keep(plan, trials), plan.name)


def cells(results):
    headers, rows = outcome.table(results)
    return [dict(zip(headers, row, strict=True)) for row in rows]


def expected(temperature, weight, of):
    values = np.array([of(history(temperature, weight, seed)) for seed in SPACE["seed"]])
    return f"{100 * values.mean():.2f} ± {100 * values.std(ddof=1):.2f}"


def test_a_row_is_a_configuration_over_its_seeds_best_first():
    results = read(study(), grid(study()))
    lines = cells(results)
    assert len(lines) == 6
    for line in lines:
        params = float(line["temperature"]), float(line["weight"])
        assert line["seeds"] == "3"
        assert line["last"] == expected(*params, lambda values: values[-1])
        assert line["mean of last 10"] == expected(*params, lambda values: values[-10:].mean())
        assert line["bytes"] == "14.00 MB"
        assert "best on a validation split" not in line
    means = [
        np.mean([history(row.params["temperature"], row.params["weight"], s)[-1] for s in range(3)])
        for row in results.rows
    ]
    assert means == sorted(means, reverse=True)
    assert outcome.status(results) == ["18 of 18 trials are complete; 0 pruned, 0 failed, 0 running, 0 waiting."]


def test_the_lowest_loss_is_best_and_no_percentage():
    low = study(objective="central_loss", direction="minimize", space={"weight": (0.3, 0.9), "seed": (0, 1)})
    points = [(0.3, 0, 2.0), (0.3, 1, 2.5), (0.9, 0, 1.0), (0.9, 1, 1.5)]
    trials = [
        finished({"weight": w, "seed": s}, [9.0, value], low.distributions, "central_loss") for w, s, value in points
    ]
    lines = cells(read(low, trials))
    assert [(line["weight"], line["last"]) for line in lines] == [("0.9", "1.25 ± 0.35"), ("0.3", "2.25 ± 0.35")]
    assert lines[0]["mean of last 2"] == "5.125 ± 0.18"


def test_the_best_round_is_that_of_the_validation_split_and_not_of_the_test_set():
    plan = study(space={"weight": (0.3, 0.9), "seed": (0, 1)})
    split = {(0.3, 0): [0.1, 0.7, 0.7], (0.3, 1): [0.9, None, 0.2], (0.9, 0): [0.1, 0.2, 0.3]}
    test = {(0.3, 0): [0.95, 0.5, 0.6], (0.3, 1): [0.8, 0.7, 0.4], (0.9, 0): [0.1, 0.2, 0.3], (0.9, 1): [0.3, 0.3, 0.3]}
    trials = [
        finished(
            {"weight": w, "seed": s}, values, plan.distributions,
            **({"validation_accuracy": split[w, s]} if (w, s) in split else {}),
        )
        for (w, s), values in test.items()
    ]  # fmt: skip
    best, worst = cells(read(plan, trials))
    chosen = np.array([0.5, 0.8])
    assert best["best on a validation split"] == f"{100 * chosen.mean():.2f} ± {100 * chosen.std(ddof=1):.2f}"
    assert worst["best on a validation split"] == ""


def test_what_did_not_finish_is_counted_and_said():
    plan, trials = study(), grid(study())
    params = [trial.params for trial in trials]
    reason = "InputError: it does\nnot fit"
    unfinished = [
        stopped(plan, params[-1], TrialState.PRUNED),
        stopped(plan, params[-2], TrialState.FAIL, reason=reason),
        stopped(plan, params[-3], TrialState.FAIL, reason=reason),
        stopped(plan, params[-4], TrialState.FAIL),
        stopped(plan, params[-4], TrialState.FAIL, worker="a|1|1.0|b"),
        stopped(plan, params[-5], TrialState.RUNNING),
        stopped(plan, params[-5], TrialState.WAITING),
    ]
    results = read(plan, [*trials[:13], trials[0], *unfinished])
    lines = outcome.status(results)
    assert lines[0] == "14 of 18 trials are complete; 1 pruned, 2 failed, 1 running, 1 waiting."
    assert lines[1] == "Failed: InputError: it does not fit (2 trials: 15, 16)."
    assert lines[2].startswith("1 complete trials have the params of another complete trial")
    assert lines[3] == "Not counted: 2 trials that workers gave up; other trials stand for them."
    seeds = {(line["temperature"], line["weight"]): line["seeds"] for line in cells(results)}
    assert seeds == {("1", "0.3"): "3", ("1", "0.9"): "3", ("3", "0.3"): "3", ("3", "0.9"): "3", ("10", "0.3"): "1"}
    changed = study(fixed=FIXED | {"rounds": 5})
    assert outcome.status(results._replace(study=changed))[-1].startswith("The study file has been changed since")


def test_curves_are_the_mean_and_std_over_seeds():
    results = read(study(), grid(study()))
    row = results.rows[0]
    each = np.array([history(row.params["temperature"], row.params["weight"], seed) for seed in range(3)])
    rounds, sent, mean, std = outcome.curve(row, results.objective)
    np.testing.assert_array_equal(rounds, ROUNDS)
    np.testing.assert_array_equal(sent, 1e6 * ROUNDS)
    np.testing.assert_allclose(mean, each.mean(0))
    np.testing.assert_allclose(std, each.std(0, ddof=1))


def test_everything_is_written_and_the_page_needs_no_other_file(tmp_path, capsys):
    results = read(study(), grid(study()))
    program.write(results, tmp_path, "python -m sweeps.report --study=made_up.py")
    pictures = ["heatmap.png", "curves.png", "bytes.png", "importance.png"]
    assert {file.name for file in tmp_path.iterdir()} == {"table.md", "results.csv", "report.html", *pictures}
    page = (tmp_path / "report.html").read_text()
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(image) for image in images] == [(tmp_path / name).read_bytes() for name in pictures]
    assert len(re.findall(r"<img|<script|<link|<iframe", page)) == len(images)
    assert not re.search(r"https?:|href=|url\(|@import", page)
    for text in ("Which?", "A. &amp; B. &lt;2020&gt;", "3 min; 6 s of finished trials", "jax 9.9.9", "abcdef123456",
                 "18 of 18 trials are complete", "--study=made_up.py", "model=2nn", "mnist_sample"):  # fmt: skip
        assert text in page, text
    assert "/somewhere" not in page
    first = cells(results)[0]
    assert first["last"] in page
    assert first["last"] in (tmp_path / "table.md").read_text()
    assert first["last"] in capsys.readouterr().out
    with (tmp_path / "results.csv").open() as file:
        line = next(csv.DictReader(file))
    last = [history(float(line["temperature"]), float(line["weight"]), seed)[-1] for seed in range(3)]
    np.testing.assert_allclose(
        [float(line["last_mean"]), float(line["last_std"])], [np.mean(last), np.std(last, ddof=1)]
    )


def test_a_picture_that_cannot_be_written_costs_nothing_but_itself(tmp_path, capsys, monkeypatch):
    """It was a traceback, and no page."""
    monkeypatch.setattr(saving, "_unsaved", [])
    (tmp_path / "heatmap.png").mkdir()
    program.write(read(study(), grid(study())), tmp_path, "")
    told = capsys.readouterr()
    assert told.err.startswith(f"error: {tmp_path}/heatmap.png cannot be written: Is a directory")
    assert "No heatmap.png: it could not be written." in told.out
    page = (tmp_path / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 3
    assert "No heatmap.png: it could not be written." in page


def test_twenty_configurations_are_printed_and_all_are_in_the_files(tmp_path, capsys):
    many = study(space={"weight": tuple(np.linspace(0, 1, 23).tolist())})
    trials = [finished({"weight": w}, [w, w], many.distributions) for w in many.space["weight"]]
    program.write(read(many, trials), tmp_path, "")
    printed = capsys.readouterr().out
    assert printed.count("| 2.00 MB") == 20
    assert "3 more configurations are in" in printed
    assert (tmp_path / "table.md").read_text().count("| 2.00 MB") == 23
    assert (tmp_path / "report.html").read_text().count("2.00 MB</td>") == 23
    for sentence in ("No heatmap: it takes exactly two params", "No importance of params: fewer than two"):
        assert sentence in printed


def test_a_search_has_a_history_and_few_trials_no_importance(tmp_path):
    space = {"temperature": FloatDistribution(1, 10, log=True), "weight": FloatDistribution(0, 1)}
    plan = study(space=space, search="random", trials=9)
    trials = [finished(plan.point(n), [0.0, 0.1 * n], plan.distributions) for n in range(9)]
    drawn, missing = figures.draw(read(plan, trials), tmp_path)
    assert [figure.path.name for figure in drawn] == ["curves.png", "bytes.png", "history.png"]
    assert missing[0] == "No heatmap: 9 configurations are too few for 9 x 9 cells."
    assert missing[1].startswith("No importance of params: 9 finished trials are too few")


def test_the_param_that_matters_is_the_important_one():
    plan = study()
    points = [dict(zip(SPACE, values, strict=True)) for values in itertools.product(*SPACE.values())]
    trials = [finished(p, [0.1 * p["temperature"] + 0.001 * p["weight"]], plan.distributions) for p in points]
    found = figures.importances(read(plan, trials))
    assert set(found) == set(SPACE)
    assert max(found, key=found.get) == "temperature"
    alike = [finished(p, [0.5], plan.distributions) for p in points]
    assert figures.importances(read(plan, alike)).startswith("No importance of params:")


def test_trials_that_kept_only_what_they_reported():
    plan = study()
    bare = create_trial(
        value=0.5, params={"temperature": 1.0, "weight": 0.3, "seed": 0}, distributions=plan.distributions,
        intermediate_values={2: 0.1, 4: 0.5},
    )  # fmt: skip
    (line,) = cells(read(plan, [bare]))
    assert line == {
        "row": "1",
        "temperature": "1",
        "weight": "0.3",
        "seeds": "1",
        "last": "50.00",
        "mean of last 2": "30.00",
    }


@pytest.mark.parametrize("given", ["sqlite:///{}/none.db", "journal:{}/none.log"])
def test_a_storage_that_is_not_there_is_not_made(given, tmp_path):
    with pytest.raises(InputError, match=r"there is no file .*none\.(db|log); run the study first") as error:
        program._storage(given.format(tmp_path))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_bad_input_is_one_line():
    plan, failed = study(), {"reason": "InputError: no\nsuch file"}
    with pytest.raises(InputError, match=r"^no study 'other' in the storage; it has made_up: run the study first"):
        outcome.read(plan, keep(plan, grid(plan)), "other")
    with pytest.raises(InputError, match=r"^study made_up has 0 trials and none is finished$"):
        read(plan, [])
    with pytest.raises(
        InputError, match=r"^study made_up has 1 trials and none .*; 1 failed: InputError: no such file$"
    ):
        read(plan, [stopped(plan, grid(plan)[0].params, TrialState.FAIL, **failed)])
    with pytest.raises(InputError, match=r"^--study=none.py: no such file"):
        load("none.py")


@pytest.mark.parametrize(
    "kind", ["sqlite:///{}/study.db", pytest.param("journal:{}/study.log", marks=pytest.mark.exhaustive)]
)
def test_the_program(kind, tmp_path):
    url, plan = kind.format(tmp_path), load(str(ROOT / FILE)).smaller()
    storage = open_storage(url)
    points = [plan.point(number) for number in range(plan.total)]
    keep(plan, [finished(p, [0.1, 0.2 + 0.01 * n], plan.distributions) for n, p in enumerate(points)], storage)
    if kind.startswith("sqlite"):
        storage.engine.dispose()
    done = programs.run_here(
        "sweeps.report", f"--study={FILE}", "--smoke", f"--storage={url}", f"--out={tmp_path / 'out'}"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"{plan.total} of {plan.total} trials are complete" in done.stdout
    assert (tmp_path / "out" / "report.html").is_file()
    other = programs.run_here("sweeps.report", f"--study={FILE}", f"--storage={url}", f"--out={tmp_path / 'out'}")
    assert (other.returncode, other.stdout) == (2, "")
    name = json.dumps(plan.name)[1:-1]
    assert other.stderr == (
        f"error: no study 'temperature_alpha' in the storage; it has {name}: run the study first, or give --name\n"
    )
