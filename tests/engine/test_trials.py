"""Trials as rows of one compiled call: where they lie, and what is computed once for all of them."""

import engine_cases as cases
import jax
import numpy as np
import pytest
from choices import some

from fdjax.engine import lift, lift_trials, trials
from fdjax.engine.layout import Layout
from fdjax.types import Cohort

RATES = (0.1, 0.2, 0.3, 0.4, 0.5)


@pytest.fixture(scope="module")
def fedavg():
    """A simulation, what its trials start from, and what each gives alone after two rounds and three."""
    _, simulation = cases.simulation("fedavg", kind="chunk")  # trials have the devices to themselves
    federation = cases.federation()
    inputs = [
        trials.Inputs(np.int32(seed), federation, cases.hparams_of("fedavg", learning_rate=rate))
        for seed, rate in enumerate(RATES)
    ]

    def alone(one):
        state = simulation.init(one.seed, one.federation)
        state, first = simulation.run(state, one.federation, one.hparams, 2)
        state, _ = simulation.run(state, one.federation, one.hparams, 1)
        return jax.device_get((first.metrics, simulation.evaluate(state, one.federation, one.hparams)))

    return simulation, inputs, list(map(alone, inputs))


def compiled(fedavg, slots=5, **options):
    simulation, inputs, _ = fedavg
    lifting = lift.Lifting("chunk", cases.mesh(1), 3)
    layout = Layout(cases.model(), (Cohort(cases.model(), 7),), (cases.PARTICIPANTS,), lifting)
    return trials.compile_trials(simulation.pure, layout, inputs[0], trials.differ(inputs), 2, slots, **options)


def test_what_differs():
    federation = cases.federation()
    other = federation._replace(client=federation.client + 1)
    hparams = {"a": np.float32(1), "b": np.float32(2)}
    found = trials.differ(
        [trials.Inputs(0, federation, hparams), trials.Inputs(0, other, hparams | {"b": np.float32(3)})]
    )
    assert not found.seed
    assert found.hparams == {"a": False, "b": True}
    assert found.federation.client
    assert not any(jax.tree.leaves(found.federation._replace(client=False)))


@pytest.mark.parametrize("devices", some([1, 2, 4], 2))
def test_every_trial_gives_what_it_gives_alone(fedavg, devices):
    _, inputs, alone = fedavg
    batch = compiled(fedavg, devices=devices)
    running, setups = batch.start(inputs)
    assert setups == dict.fromkeys(range(5), ())
    running, first = batch.step(running, 2)
    running, last = batch.step(running, 1)
    assert running.numbers == list(range(5))
    for number, (metrics, evaluation) in enumerate(alone):
        found = first[number].report.metrics, (last[number].scalars, last[number].clients)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, (metrics, evaluation))


def test_trials_that_stop_leave_the_others_alone(fedavg):
    _, inputs, alone = fedavg
    batch = compiled(fedavg, devices=2)
    running, _ = batch.step(batch.start(inputs)[0], 2)
    running = batch.keep(running, [1, 4])
    assert running.numbers == [1, 4]
    assert running.turns.sum() <= 2
    _, last = batch.step(running, 1)
    assert last.keys() == {1, 4}
    for number, seen in last.items():
        np.testing.assert_allclose(seen.clients["own_loss"], alone[number][1][1]["own_loss"], rtol=1e-5)


@pytest.mark.exhaustive
def test_fewer_trials_than_rows(fedavg):
    _, inputs, alone = fedavg
    batch = compiled(fedavg, slots=4, devices=2)
    _, first = batch.step(batch.start(inputs[:1])[0], 2)
    assert first.keys() == {0}
    np.testing.assert_allclose(first[0].report.metrics["train_loss"], alone[0][0]["train_loss"], rtol=1e-5)


def test_a_stopped_trial_costs_nothing():
    """Rows without a trial are in no turn of a device."""
    mesh = lift_trials.make_trial_mesh(jax.devices()[:2])
    grid = trials._Grid(mesh, rows=4, width=1)
    places = grid.deal([0, 3, 4])
    assert places == [0, 4, -1, -1, 3, -1, -1, -1]
    assert grid.turns(places).tolist() == [2, 1]
    assert grid._replace(width=2).turns(grid.deal([])).tolist() == [0, 0]
    lifted = lift_trials.over_trials(lambda x: x + 1.0, (True,), True, mesh, 1)
    out = jax.jit(lifted)(np.asarray([2, 1], np.int32), np.arange(8.0, dtype=np.float32))
    assert out.tolist() == [1, 2, 0, 0, 5, 0, 0, 0]  # what is in no turn is not computed


def test_what_trials_share_is_computed_once():
    """Teachers of FedDistill do not depend on the temperature: the compiled superstep trains one set of them."""
    _, simulation = cases.simulation("feddistill")
    federation = cases.federation()
    init = jax.eval_shape(simulation.init, 0, federation)
    varies = {name: name in ("temperature", "weight") for name in cases.hparams_of("feddistill")}
    hparams = {n: np.stack([x, x + 1]) if varies[n] else x for n, x in cases.hparams_of("feddistill").items()}
    nothing = jax.tree.map(lambda _: False, (init, federation))
    state, report = lift_trials.what_varies(
        lambda state, federation, hparams: simulation.pure.run(state, federation, hparams, 1),
        (init, federation, hparams),
        (*nothing, varies),
    )
    assert all(jax.tree.leaves(state.server))
    assert not any(jax.tree.leaves(state.clients))
    assert report.metrics["train_loss"]
    assert not report.metrics["teacher_loss"]
