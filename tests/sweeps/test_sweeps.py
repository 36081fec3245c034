"""Studies: what they ask, that their trials end once and right whatever happens to workers and storage."""

import os
import subprocess
import sys
import time

import numpy as np
import optuna
import pytest
import sqlalchemy.exc
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from benchmarks import sweep_kills
from fdjax.errors import InputError
from fdjax.run import runner
from sweeps import run, storage
from sweeps.study import Study, load

optuna.logging.set_verbosity(optuna.logging.WARNING)

TINY = Study(
    name="tiny", paper="", question="", runtime="",
    fixed={"algorithm": "fedprox", "dataset": "synthetic", "num_clients": 4, "samples_per_client": 10,
           "model": "mclr", "partition_seed": 0, "rounds": 2, "eval_every": 1},
    space={"learning_rate": (0.01, 0.1), "mu": (0.0, 1.0), "seed": (0, 1)},
)  # fmt: skip


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/x.db"


def finish(study, url, size=8):
    shared = run.open_study(study.check(), url)
    run.work(study, shared, size)
    return shared.trials


def test_every_trial_is_the_run_alone(url):
    trials = finish(TINY, url)
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 8
    assert [t.params for t in trials] == [TINY.point(n) for n in range(8)]
    assert len({tuple(t.params.values()) for t in trials}) == 8
    for trial in (trials[0], trials[7]):
        alone = runner.run(TINY.settings(trial.params), progress=False)
        assert trial.value == pytest.approx(alone.final["central_accuracy"], abs=1e-5)
        assert trial.intermediate_values == pytest.approx(
            dict(zip((1, 2), alone.evaluations["central_accuracy"], strict=True)), abs=1e-5
        )
        np.testing.assert_allclose(
            trial.user_attrs["evaluations"]["central_loss"], alone.evaluations["central_loss"], rtol=1e-5
        )
        sent = np.add(alone.rounds["bytes_up"], alone.rounds["bytes_down"])
        assert trial.user_attrs["bytes"] == sent.tolist()
        assert trial.user_attrs["settings"]["seed"] == trial.params["seed"]
    stamps = [t.datetime_complete for t in trials]
    assert [t.datetime_complete for t in finish(TINY, url)] == stamps  # a second run has nothing to do


def test_trials_left_behind_are_run_again(url):
    """By a worker that was killed: with its name, without, released, and with half of the params."""
    shared = run.open_study(TINY, url)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = storage._place()
    for name in (f"{here}|{dead.pid}|1.0|a", "elsewhere|1|1.0|b", ""):
        shared.ask().set_user_attr("worker", name)
    half = shared.ask()
    half._suggest("learning_rate", TINY.distributions["learning_rate"])
    half.set_user_attr("worker", "")
    trials = finish(TINY, url, size=3)
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 8
    assert [t.params for t in trials] == [TINY.point(n) for n in range(8)]


def test_who_holds_a_trial(url):
    shared = run.open_study(TINY, url)
    worker = storage.Worker(shared)
    nameless, mine, beating, silent = (shared.ask() for _ in range(4))
    worker.take(mine._trial_id)
    beating.set_user_attr("worker", "elsewhere|1|1.0|b")
    silent.set_user_attr("worker", "elsewhere|1|1.0|c")
    shared.set_user_attr("beat elsewhere|1|1.0|b", time.time() - storage.GRACE / 2)
    shared.set_user_attr("beat elsewhere|1|1.0|c", time.time() - 2 * storage.GRACE)
    # Its own too: a worker looks when it holds nothing, so it lost hold of that one.
    assert [t.number for t in worker.left_behind(shared.trials)] == [mine.number, silent.number]
    started = shared.trials[nameless.number].datetime_start.timestamp()
    assert started > time.time() - storage.UNNAMED  # it was asked for just now


def test_one_trial_too_many_is_not_run(url):
    shared = run.open_study(TINY, url)
    for _ in range(9):
        shared.ask().set_user_attr("worker", "")
    trials = finish(TINY, url)
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 8 + [TrialState.FAIL]
    assert trials[8].user_attrs["reason"].startswith("one too many")


def test_a_trial_that_diverges_has_failed_and_says_why(url):
    study = TINY._replace(space={"learning_rate": (0.1, 3e38)}, objective="central_loss", direction="minimize")
    good, bad = finish(study, url)
    assert (good.state, bad.state) == (TrialState.COMPLETE, TrialState.FAIL)
    assert bad.user_attrs["reason"] == "central_loss is nan after round 1"
    assert np.isfinite(good.value)


def test_a_trial_that_diverges_does_not_win_by_another_metric(url):
    """Clients whose models are all no numbers are very much alike."""
    study = TINY._replace(space={"learning_rate": (0.1, 3e38)}, objective="client_std", direction="minimize")
    good, bad = finish(study, url)
    assert (good.state, bad.state) == (TrialState.COMPLETE, TrialState.FAIL)
    assert bad.user_attrs["reason"] == "central_loss is nan after round 1"


def test_static_params_are_grouped_and_what_cannot_work_has_failed(url):
    study = TINY._replace(space={"batch_size": (5, 10), "mu": (0.0, 1.0), "participation": (1.0, 0.5)})
    trials = finish(study, url)
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 8
    one = TINY._replace(
        name="one", space={"train_fraction": (1.0, 0.01)}, fixed=dict(TINY.fixed) | {"partition": "iid"}
    )
    good, bad = finish(one, url)
    assert (good.state, bad.state) == (TrialState.COMPLETE, TrialState.FAIL)
    assert "client" in bad.user_attrs["reason"]


def test_a_batch_is_made_anew_for_trials_that_do_not_fit(url):
    """Data that differ between trials, of which the first batch has one kind."""
    study = TINY._replace(space={"beta": (0.5, 1.0), "mu": (0.0, 0.5, 1.0)})
    trials = finish(study, url, size=2)
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 6
    alone = runner.run(study.settings(trials[3].params), progress=False)
    assert trials[3].user_attrs["evaluations"]["central_loss"] == pytest.approx(
        alone.evaluations["central_loss"], rel=1e-5
    )


def test_a_group_that_fits_nowhere_has_failed(url):
    fixed = dict(TINY.fixed) | {"memory_limit": 1e-7}
    trials = finish(TINY._replace(fixed=fixed, space={"mu": (0.0, 1.0)}), url)
    assert [t.state for t in trials] == [TrialState.FAIL] * 2
    assert "GB are free" in trials[0].user_attrs["reason"]


def test_what_breaks_twice_is_not_tried_again(url, monkeypatch):
    study = TINY._replace(space={"mu": (0.0, 1.0)})
    monkeypatch.setattr(run, "_run_together", lambda *_: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            finish(study, url)
    trials = run.open_study(study, url).trials
    assert [t.state for t in trials] == [TrialState.FAIL] * 2
    assert trials[0].user_attrs["reason"] == "ZeroDivisionError: division by zero"


def test_a_pruner_does_not_see_what_a_dead_worker_reported(url):
    pruner = optuna.pruners.ThresholdPruner(lower=2.0, n_warmup_steps=2)
    study = TINY._replace(space={"mu": (0.0,)}, pruner=pruner, fixed=dict(TINY.fixed) | {"rounds": 4})
    shared = run.open_study(study, url)
    trial = shared.ask()
    for done in (1, 2, 3):
        trial.report(0.1, done)
    trial.set_user_attr("worker", "")
    (after,) = finish(study, url)
    assert after.state == TrialState.PRUNED
    assert after.user_attrs["evaluations"]["round"] == [1, 2]


def test_a_killed_child_that_nobody_waited_for_is_dead(url):
    shared = run.open_study(TINY, url)
    worker = storage.Worker(shared)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    created = storage.psutil.Process(child.pid).create_time()
    shared.ask().set_user_attr("worker", f"{storage._place()}|{child.pid}|{created:.2f}|a")
    assert worker.left_behind(shared.trials) == []
    child.kill()
    while storage.psutil.Process(child.pid).status() != storage.psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert [t.number for t in worker.left_behind(shared.trials)] == [0]
    child.wait()


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_pruner_is_described_with_what_it_wraps():
    first, second = (
        TINY._replace(pruner=optuna.pruners.PatientPruner(optuna.pruners.PercentilePruner(p), patience=1))
        for p in (25.0, 50.0)
    )
    again = first._replace(pruner=optuna.pruners.PatientPruner(optuna.pruners.PercentilePruner(25.0), patience=1))
    assert first.description() == again.description() != second.description()


def test_tpe_in_batches_with_pruning_on_a_journal(tmp_path):
    pruner = optuna.pruners.ThresholdPruner(lower=2.0, n_warmup_steps=2)  # whatever is seen after round 2
    study = TINY._replace(
        search="tpe", trials=6, space={"mu": FloatDistribution(0.0, 1.0)}, pruner=pruner,
        fixed=dict(TINY.fixed) | {"rounds": 4},
    )  # fmt: skip
    trials = finish(study, f"journal:{tmp_path}/x.log", size=4)
    assert [t.state for t in trials] == [TrialState.PRUNED] * 6
    assert all(sorted(t.intermediate_values) == [1, 2] for t in trials)
    assert len({t.params["mu"] for t in trials}) == 6


def test_random_points_follow_from_the_number():
    space = {"learning_rate": FloatDistribution(1e-3, 1.0, log=True), "mu": FloatDistribution(0.0, 1.0)}
    study = TINY._replace(search="random", trials=200, space=space).check()
    points = [study.point(n) for n in range(200)]
    assert points[::7] == [study.point(n) for n in range(0, 200, 7)]
    rates, mus = np.log10([p["learning_rate"] for p in points]), np.asarray([p["mu"] for p in points])
    assert -3 <= rates.min() < -2.8 < -0.2 < rates.max() <= 0
    assert abs(np.corrcoef(rates, mus)[0, 1]) < 0.2


def test_a_study_of_other_settings_or_code_wants_another_name(url, monkeypatch):
    run.open_study(TINY, url)
    other = TINY._replace(fixed=dict(TINY.fixed) | {"rounds": 3})
    with pytest.raises(InputError, match=r"other settings: fixed.rounds=2, now 3; give the new one another --name"):
        run.open_study(other, url)
    monkeypatch.setattr(run, "fingerprint_of_code", lambda: "new")
    with pytest.raises(InputError, match=r"was begun with other code: \w{12}, now new; give"):
        run.open_study(TINY, url)


def test_results_wait_for_the_storage(monkeypatch, capsys):
    slept, answers = [], iter([OSError(28, "No space left on device"), sqlalchemy.exc.OperationalError("x", {}, None)])
    monkeypatch.setattr(storage.time, "sleep", slept.append)

    def write():
        for error in answers:
            raise error
        return "written"

    assert storage.patiently(write) == "written"
    assert slept == [1.0, 2.0]
    assert "No space left on device" in capsys.readouterr().err


BAD = [
    ({"space": {"temprature": (1.0,)}}, r"unknown hparam of fedprox 'temprature'.*known: learning_rate, local_ep"),
    ({"space": {"mu": FloatDistribution(0, 1)}}, r"study tiny: a grid needs values of mu, not a distribution"),
    ({"space": {"seed": 3}}, r"study tiny: seed=3 is no list of values; give \(3,\)"),
    ({"space": {"models": (["mclr:4"],)}}, r"study tiny: models has \['mclr:4'\] among its values"),
    ({"fixed": {"algorithm": "fedporx"}}, r"unknown algorithm 'fedporx' \(did you mean 'fedprox'"),
    ({"fixed": {"algorithm": "fedprox", "rounds": "2"}}, r"study tiny: .*; give values of the types"),
    ({"space": {"mu": ()}}, r"study tiny: mu has no values"),
    ({"space": {"rounds": (1, 2)}}, r"study tiny: rounds is both fixed and searched"),
    ({"space": {"mu": (0.1, -1.0)}}, r"--mu=-1.0: expected a finite number of at least 0"),
    ({"search": "tpe"}, r"study tiny: a tpe search of 0 trials"),
    ({"search": "bayes"}, r"unknown search 'bayes'"),
    ({"direction": "up"}, r"unknown direction 'up'"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_studies(changes, message):
    with pytest.raises(InputError, match=message):
        TINY._replace(**changes).check()


def test_an_objective_that_nothing_measures(url):
    with pytest.raises(InputError, match=r"unknown objective 'accuracy'.*known: central_accuracy, central_loss"):
        finish(TINY._replace(objective="accuracy", space={"seed": (0,)}), url)


def test_bad_files_and_storages(tmp_path):
    with pytest.raises(InputError, match=r"no such file; .* Shipped here: .*sweeps/temperature_alpha.py"):
        load("sweeps/none.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(InputError, match=r"defines no STUDY"):
        load(str(tmp_path / "empty.py"))
    with pytest.raises(InputError, match=r"--storage=nothing://x: .*; give sqlite:///"):
        storage.open_storage("nothing://x")


@pytest.mark.parametrize("name", ["temperature_alpha", "dsfl_temperature_alpha", "fedprox_learning_rate_mu",
                                  "fedprox_random", "fedprox_tpe", "partition_seeds"])  # fmt: skip
def test_shipped_studies(name):
    study = load(f"sweeps/{name}.py").check()
    assert study.name == name
    assert study.runtime
    assert 2 <= study.smaller().check().total < study.total


def test_killed_workers_cost_no_trial_and_double_none(tmp_path):
    """Three kills; `python -m benchmarks.sweep_kills` has fifty."""
    calm, wild = (f"sqlite:///{tmp_path}/{name}.db" for name in ("calm", "wild"))
    os.environ["JAX_PLATFORMS"] = "cpu"
    sweep_kills.undisturbed(calm, 8)
    sweep_kills.disturbed(wild, kills=3, batch=2, trials=8, seconds=6.0)
    expected, found = sweep_kills.values(calm), sweep_kills.values(wild)
    assert sorted(expected) == sorted(found) == list(range(8))
    assert set(sweep_kills.states(wild)[:8]) == {"COMPLETE"}
    for number, (params, values, losses) in expected.items():
        assert found[number][0] == params
        assert found[number][1] == pytest.approx(values, abs=1e-5)
        assert found[number][2] == pytest.approx(losses, rel=1e-5)
