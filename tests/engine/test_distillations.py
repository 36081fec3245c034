"""Accuracy before and after each distillation of a round, against what evaluations of the same params give."""

import csv

import chex
import engine_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdjax
from fdjax.algorithms import ALGORITHMS
from fdjax.contract import Upload, own_model, predict_with_own_model
from fdjax.errors import InputError
from fdjax.exchange.wrappers import without_traffic
from fdjax.run import report, runner, settings

ALL = (len(cases.COUNTS),)
BEFORE, AFTER = "before_distillation_accuracy", "after_distillation_accuracy"
CLIENTS, SERVER = {BEFORE, AFTER}, {f"server_{BEFORE}", f"server_{AFTER}"}
WHERE = {  # who distils by itself in a round
    **dict.fromkeys(("fedmd",), CLIENTS),
    **dict.fromkeys(("dsfl", "mhat", "cfd", "fedgems"), CLIENTS | SERVER),
    **dict.fromkeys(("feddf", "fedbe", "fedad", "fedaux", "fedftg", "fedzkt", "fedgkt", "feddkc"), SERVER),
}


class Rounds:
    """Rounds of a method one by one, each with the metrics of it and the evaluation after it, if there are any."""

    def __init__(self, name, hparams=None, watched=True, participants=ALL, evaluates=True, **more):
        flag = {"before_distillation": True} if watched else {}
        _, self.simulation = cases.simulation(name, participants=participants, full_eval=False, **flag, **more)
        self.federation = cases.federation(devices=more.get("devices", 1))
        self.hparams = cases.hparams_of(name)
        self.state = cases.begin(self.simulation, self.federation, self.hparams)
        self.hparams |= {n: np.asarray(v, self.hparams[n].dtype) for n, v in (hparams or {}).items()}
        self.before, self.evaluates = None, evaluates
        self.evaluation = self.evaluated(self.state)

    def evaluated(self, state):
        if not self.evaluates:
            return None
        return jax.device_get(self.simulation.evaluate(state, self.federation, self.hparams)[0])

    def one(self):
        """The round's metrics; what was before it stays in `before`."""
        self.before = jax.tree.map(jnp.copy, self.state), self.evaluation
        self.state, report = self.simulation.run(self.state, self.federation, self.hparams, 1)
        self.evaluation = self.evaluated(self.state)
        return {name: value[0] for name, value in jax.device_get(report.metrics).items()}


def test_clients_and_server_of_dsfl():
    rounds = Rounds("dsfl")
    first, second = rounds.one(), rounds.one()
    old, new = rounds.before[1], rounds.evaluation
    assert second[AFTER] == pytest.approx(new["own_accuracy_weighted"], abs=1e-6)  # distilling ends a round
    assert second[f"server_{BEFORE}"] == pytest.approx(old["central_accuracy"], abs=1e-6)
    assert second[f"server_{AFTER}"] == pytest.approx(new["central_accuracy"], abs=1e-6)
    assert first[f"server_{BEFORE}"] != first[f"server_{AFTER}"]
    assert second[BEFORE] != second[AFTER]


@pytest.mark.exhaustive
def test_the_digest_of_fedmd():
    rounds = Rounds("fedmd", {"learning_rate": 0.0, "digest_learning_rate": 0.1, "digest_epochs": 3})  # no revisit
    told = [rounds.one() for _ in range(2)][-1]
    assert told[BEFORE] == pytest.approx(rounds.before[1]["own_accuracy_weighted"], abs=1e-6)
    assert told[AFTER] == pytest.approx(rounds.evaluation["own_accuracy_weighted"], abs=1e-6)
    assert told[BEFORE] != told[AFTER]


@pytest.mark.parametrize(
    ("name", "epochs"), [("dsfl", ("distill_epochs",)), ("fedmd", ("digest_epochs",)), ("feddf", ("server_steps",))]
)
def test_a_distillation_of_no_epochs_changes_nothing(name, epochs):
    told = Rounds(name, dict.fromkeys(epochs, 0), evaluates=False).one()
    found = [key for key in told if key.endswith(BEFORE)]
    assert {*found} == {key for key in WHERE[name] if key.endswith(BEFORE)}
    for key in found:
        assert told[key] == told[key.replace(BEFORE, AFTER)]


def test_feddf_begins_with_what_fedavg_ends_with():
    fused, averaged = Rounds("feddf"), Rounds("fedavg", watched=False)
    told = fused.one()
    averaged.one()
    assert told[f"server_{BEFORE}"] == pytest.approx(averaged.evaluation["central_accuracy"], abs=1e-6)
    assert told[f"server_{AFTER}"] == pytest.approx(fused.evaluation["central_accuracy"], abs=1e-6)


@pytest.mark.exhaustive
def test_a_server_that_is_tested_with_the_clients_parts():
    rounds = Rounds("fedgkt")
    told = [rounds.one() for _ in range(2)][-1]
    old_server = rounds.evaluated(rounds.state._replace(server=rounds.before[0].server))
    assert told[f"server_{BEFORE}"] == pytest.approx(old_server["own_accuracy_weighted"], abs=1e-6)
    assert told[f"server_{AFTER}"] == pytest.approx(rounds.evaluation["own_accuracy_weighted"], abs=1e-6)
    assert told[f"server_{BEFORE}"] != told[f"server_{AFTER}"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["dsfl", "fedgkt"])
def test_some_participants_on_two_devices(name):
    one, two = (Rounds(name, participants=(cases.PARTICIPANTS,), devices=devices).one() for devices in (1, 2))
    for key in WHERE[name]:
        assert one[key] == pytest.approx(two[key], abs=1e-5), key


def test_nothing_else_changes():
    watched, plain = (Rounds("dsfl", watched=watched, evaluates=False) for watched in (True, False))
    told, known = watched.one(), plain.one()
    assert told.keys() - known.keys() == WHERE["dsfl"]
    assert known == {name: told[name] for name in known}
    chex.assert_trees_all_equal(watched.state, plain.state)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", sorted(WHERE))
def test_which_methods_tell_what(name):
    _, simulation = cases.simulation(name, participants=ALL, before_distillation=True)
    federation, hparams = cases.federation(), cases.hparams_of(name)
    state = simulation.shapes(federation)
    _, report = jax.eval_shape(lambda *args: simulation.pure.run(*args, 1), state, federation, hparams)
    assert {key for key in report.metrics if "_distillation_" in key} == WHERE[name]


def test_these_are_all_methods_that_distil():
    assert {name for name, method in ALGORITHMS.items() if method.distils} == WHERE.keys()


@pytest.mark.parametrize("name", sorted({*ALGORITHMS} - {*WHERE}))
def test_all_others_refuse(name):
    with pytest.raises(InputError, match=f"a round of {name} has no distillation of its own.*leave it out"):
        settings.make(algorithm=name, before_distillation=True, dataset="mnist_sample", model="mclr", proxy="held_out")


def test_a_method_that_says_that_it_distils_and_does_not():
    def wait(ctx, received, params, data):
        return params, Upload(()), {}

    algorithm = fdjax.Algorithm(
        lambda ctx, params: (), own_model, (without_traffic(wait),), personal=predict_with_own_model, name="idle"
    )
    simulation = cases.bind(algorithm, cases.task(), ALL, before_distillation=True)
    federation = cases.federation()
    with pytest.raises(InputError, match="idle says that it distils, but no fit of a round"):
        simulation.run(simulation.init(0, federation), federation, {}, 1)


@pytest.mark.exhaustive
def test_seeds_as_one_batch_and_a_run_with_a_folder_tell_the_same(tmp_path):
    small = {
        "algorithm": "dsfl", "dataset": "synthetic", "num_clients": 3, "samples_per_client": 20, "model": "mclr",
        "rounds": 2, "proxy": "held_out", "proxy_size": 12, "devices": 1,
        "before_distillation": True,
    }  # fmt: skip
    batch = fdjax.run_seeds([0, 1], **small)
    alone = runner.run(settings.make(**small, seed=1), tmp_path, progress=False)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["round"] != "0"]
    for name in (BEFORE, AFTER):
        assert [float(row[name]) for row in rows] == report.result_dict(alone)["rounds"][name]
        np.testing.assert_allclose(batch[1].rounds[name], alone.rounds[name], atol=1e-6)
        assert len(batch[0].rounds[name]) == 2
        assert all(0 <= value <= 1 for value in batch[0].rounds[name])
