"""Studies: what they ask, what their trials give, and what is wrong with bad ones."""

import json
import re

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState
from sweep_cases import TINY, finish

from fdjax.algorithms import ALGORITHMS
from fdjax.errors import InputError
from fdjax.run import runner
from sweeps import run, storage
from sweeps.study import Study, load


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/x.db"


@pytest.mark.exhaustive
def test_every_trial_is_the_run_alone(url):
    trials = finish(TINY, url)
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 8
    assert [t.params for t in trials] == [TINY.point(n) for n in range(8)]
    assert len({tuple(t.params.values()) for t in trials}) == 8
    for trial in (trials[0], trials[7]):
        alone = runner.run(TINY.settings(trial.params), progress=False)
        assert trial.value == pytest.approx(alone.final["central_accuracy"], abs=1e-5)
        assert trial.intermediate_values == pytest.approx(
            dict(zip((1, 2), alone.evaluations["central_accuracy"][1:], strict=True)), abs=1e-5
        )
        np.testing.assert_allclose(
            trial.user_attrs["evaluations"]["central_loss"], alone.evaluations["central_loss"], rtol=1e-5
        )
        sent = np.add(alone.rounds["bytes_up"], alone.rounds["bytes_down"])
        assert trial.user_attrs["bytes"] == [0, *sent.tolist()]
        assert trial.user_attrs["settings"]["seed"] == trial.params["seed"]
    stamps = [t.datetime_complete for t in trials]
    assert [t.datetime_complete for t in finish(TINY, url)] == stamps  # a second run has nothing to do


def test_a_trial_that_diverges_has_failed_and_says_why(url):
    study = TINY._replace(space={"learning_rate": (0.1, 3e38)}, objective="central_loss", direction="minimize")
    good, bad = finish(study, url)
    assert (good.state, bad.state) == (TrialState.COMPLETE, TrialState.FAIL)
    assert bad.user_attrs["reason"] == "central_loss is nan after round 1"
    assert np.isfinite(good.value)


@pytest.mark.exhaustive
def test_a_trial_that_diverges_does_not_win_by_another_metric(url):
    """Clients whose models are all no numbers are very much alike."""
    study = TINY._replace(space={"learning_rate": (0.1, 3e38)}, objective="client_std", direction="minimize")
    good, bad = finish(study, url)
    assert (good.state, bad.state) == (TrialState.COMPLETE, TrialState.FAIL)
    assert bad.user_attrs["reason"] == "central_loss is nan after round 1"


def test_static_params_are_grouped_and_what_cannot_work_has_failed(url):
    fixed = dict(TINY.fixed) | {"partition": "iid"}
    study = TINY._replace(space={"batch_size": (5, 10), "train_fraction": (1.0, 0.01)}, fixed=fixed)
    good, bad, other, worse = finish(study, url)
    assert [good.state, other.state] == [TrialState.COMPLETE] * 2
    assert [bad.state, worse.state] == [TrialState.FAIL] * 2
    assert "client" in bad.user_attrs["reason"]


@pytest.mark.exhaustive
def test_a_batch_is_made_anew_for_trials_that_do_not_fit(url):
    """Data that differ between trials, of which the first batch has one kind."""
    study = TINY._replace(space={"beta": (0.5, 1.0), "mu": (0.0, 1.0)})
    trials = finish(study, url, size=2)
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 4
    alone = runner.run(study.settings(trials[3].params), progress=False)
    assert trials[3].user_attrs["evaluations"]["central_loss"] == pytest.approx(
        alone.evaluations["central_loss"], rel=1e-5
    )


def test_a_group_that_fits_nowhere_has_failed(url):
    fixed = dict(TINY.fixed) | {"memory_limit": 1e-7}
    trials = finish(TINY._replace(fixed=fixed, space={"mu": (0.0, 1.0)}), url)
    assert [t.state for t in trials] == [TrialState.FAIL] * 2
    assert re.match(r"a round needs .* GB on a device .* GB are free", trials[0].user_attrs["reason"])


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


BAD = [
    ({"space": {"temprature": (1.0,)}}, r"unknown setting 'temprature' \(did you mean 'temperature'"),
    ({"space": {"mu": FloatDistribution(0, 1)}}, r"study tiny: a grid needs values of mu, not a distribution"),
    ({"space": {"seed": 3}}, r"study tiny: seed=3 is no list of values; give \(3,\)"),
    ({"space": {"models": (["mclr:4"],)}}, r"study tiny: models has \['mclr:4'\] among its values"),
    ({"fixed": {"algorithm": "fedporx"}}, r"unknown algorithm 'fedporx' \(did you mean 'fedprox'"),
    ({"fixed": {"algorithm": "fedprox", "rounds": "2"}}, r"--rounds='2': expected a whole number of at least 1"),
    ({"space": {"mu": ()}}, r"study tiny: mu has no values"),
    ({"space": {"rounds": (1, 2)}}, r"study tiny: rounds is both fixed and searched"),
    ({"space": {"mu": (0.1, -1.0)}}, r"--mu=-1.0: expected a finite number of at least 0"),
    ({"search": "tpe"}, r"study tiny: a tpe search of 0 trials"),
    ({"search": "bayes"}, r"unknown search 'bayes'"),
    ({"direction": "up"}, r"unknown direction 'up'"),
    ({"objective": "central_loss"}, r"direction='maximize' of central_loss, which is better when it is smaller; give"),
    ({"direction": "minimize"}, r"direction='minimize' of central_accuracy, .* larger; give direction='maximize'$"),
    ({"objective": "central_calibration_error"}, r"of central_calibration_error, which is better when it is smaller"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_studies(changes, message):
    with pytest.raises(InputError, match=message):
        TINY._replace(**changes).check()


def test_an_objective_that_nothing_measures(url):
    with pytest.raises(InputError, match=r"unknown objective 'accuracy'.*known: central_accuracy, central_loss"):
        finish(TINY._replace(objective="accuracy", space={"seed": (0,)}), url)


def test_bad_files_and_storages(tmp_path):
    with pytest.raises(InputError, match=r"no such file; .* Ours, by name: .*temperature_alpha"):
        load("sweeps/none.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(InputError, match=r"defines no STUDY"):
        load(str(tmp_path / "empty.py"))
    with pytest.raises(InputError, match=r"--storage=nothing://x: .*; give sqlite:///"):
        storage.open_storage("nothing://x")


@pytest.mark.parametrize("name", ["temperature_alpha", "dsfl_temperature_alpha", "fedprox_learning_rate_mu",
                                  "fedprox_random", "fedprox_tpe", "partition_seeds", "fedntd_clients"])  # fmt: skip
def test_shipped_studies(name):
    study = load(f"sweeps/{name}.py").check()
    assert study.name == name
    assert study.runtime
    assert 2 <= study.smaller().check().total < study.total


def own_method(folder, name, more=""):
    """A file of a user's own: FedProx under a name, and its record."""
    path = folder / "my.py"
    path.write_text(
        "from fdjax.algorithms import fedprox\n"
        f"METHOD = fedprox.METHOD._replace(name={name!r}, hparams={{**fedprox.METHOD.hparams}})\n{more}"
    )
    return str(path)


@pytest.mark.exhaustive
def test_a_users_own_method_in_a_study(tmp_path, url, monkeypatch):
    """In `fixed` and in `space`, by file; its hparams are dimensions; all workers have the same file or none."""
    path = own_method(tmp_path, "mine")
    study = TINY._replace(
        fixed={n: v for n, v in TINY.fixed.items() if n != "algorithm"},
        space={"algorithm": ("fedprox", path), "mu": (0.0, 1.0)},
    ).check()
    trials = finish(study, url)
    by_point = {(t.params["algorithm"], t.params["mu"]): t for t in trials}
    for mu in (0.0, 1.0):
        assert by_point[path, mu].value == by_point["fedprox", mu].value
        assert by_point[path, mu].user_attrs["settings"]["algorithm"].startswith("mine@")
    shared = run.open_study(study, url)
    assert list(shared.user_attrs["files"]) == [path]
    own_method(tmp_path, "mine", "# changed\n")
    with pytest.raises(InputError, match=r"was begun with other files: .*my.py=mine@\w+, now mine@\w+; give the new"):
        run.open_study(study, url)
    monkeypatch.setattr(Study, "files", lambda self: {path: "mine@other"})
    with run.Worker(study, shared) as worker:
        runner = run.Runner(worker, 1, bar=None)
        monkeypatch.undo()
        with pytest.raises(InputError, match=r"my.py was changed while the study ran \(mine@other, now mine@\w+\)"):
            runner.run([])


def test_a_users_own_method_in_a_study_by_value():
    method = ALGORITHMS["fedprox"]._replace(name="mine")
    study = TINY._replace(fixed={**TINY.fixed, "algorithm": method}).check()
    described = json.loads(json.dumps(study.description()))
    assert described["fixed"]["algorithm"].startswith("mine@")
    assert study.settings(study.point(0)).method.name == "mine"
