"""What an evaluation tests: a subsample or all of the test set in one compiled function, and what is switched off."""

import functools

import chex
import engine_cases as cases
import jax
import numpy as np
import pytest

from fdjax.engine import evaluate
from fdjax.engine.layout import first_rounds


def begun(name, **layout):
    _, simulation = cases.simulation(name, **layout)
    federation, hparams = cases.federation(), cases.hparams_of(name)
    state, _ = simulation.run(cases.begin(simulation, federation, hparams), federation, hparams, 2)
    return simulation, state, federation, hparams


def personal_logits(state, federation):
    """z [C, M, K] of every client's own logistic regression on the test set, and its labels."""
    test, clients = jax.device_get((federation.test, state.clients[0]))
    x = (test.x.astype(float) - 0.25) / 1.5
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], clients) for i in range(len(federation.client))]
    return np.stack([cases.Logistic(params)(x) for params in each]), test.y


def test_the_order_of_the_test_set_is_drawn_by_the_data_seed():
    order = np.asarray(cases.federation().test_order)
    assert sorted(order) == list(range(cases.TESTS))
    assert order.tolist() != sorted(order)


@pytest.mark.parametrize("examples", [1, 10, 23, cases.TESTS])
def test_personal_models_on_a_subsample(examples):
    simulation, state, federation, hparams = begun("local")
    scalars, clients = jax.device_get(simulation.evaluate(state, federation, hparams, np.int32(examples)))
    z, y = personal_logits(state, federation)
    part = np.asarray(federation.test_order)[:examples]
    accuracy = (z[:, part].argmax(-1) == y[part]).mean(1)
    loss = np.stack([cases.cross_entropy(each[part], y[part]) for each in z]).mean(1)
    np.testing.assert_allclose(clients["local_accuracy"], accuracy, rtol=1e-6)
    np.testing.assert_allclose(clients["local_loss"], loss, rtol=1e-4)
    trained = np.asarray(federation.train_holdings.count) > 0
    np.testing.assert_allclose(scalars["local_accuracy"], accuracy[trained].mean(), rtol=1e-6)
    assert scalars["local_examples"] == examples


@pytest.mark.parametrize("examples", [7, 30, cases.TESTS])
def test_an_ensemble_votes_on_the_same_subsample(examples):
    simulation, state, federation, hparams = begun("ensemble")
    scalars, clients = jax.device_get(simulation.evaluate(state, federation, hparams, np.int32(examples)))
    z, y = personal_logits(state, federation)
    part = np.asarray(federation.test_order)[:examples]
    trained = np.asarray(federation.train_holdings.count) > 0
    mean = cases.softmax(z[trained][:, part]).mean(0)
    np.testing.assert_allclose(scalars["central_accuracy"], (mean.argmax(-1) == y[part]).mean(), rtol=1e-6)
    np.testing.assert_allclose(scalars["central_loss"], cases.cross_entropy(np.log(mean), y[part]).mean(), rtol=1e-4)
    np.testing.assert_allclose(clients["local_accuracy"], (z[:, part].argmax(-1) == y[part]).mean(1), rtol=1e-6)
    assert scalars["local_examples"] == examples


def test_a_subsample_and_all_are_one_function():
    simulation, state, federation, hparams = begun("feddistill")
    some, _ = simulation.evaluate(state, federation, hparams, np.int32(5))
    with jax.no_tracing():
        everything, _ = simulation.evaluate(state, federation, hparams, np.int32(cases.TESTS))
    assert some["central_loss"] == everything["central_loss"]  # the central model is tested in full
    assert some["local_loss"] != everything["local_loss"]
    assert some["own_loss"] == everything["own_loss"]


SWITCHED_OFF = [
    ("feddistill", {"central_eval": False}, ("local", "own")),
    ("feddistill", {"full_eval": False}, ("central", "own")),
    ("feddistill", {"own_eval": False, "full_eval": False}, ("central",)),
    ("fedavg", {"central_eval": False}, ("own",)),
    ("fedavg", {"full_eval": False, "own_eval": False}, ("central", "local")),  # which are the same
    ("ensemble", {"central_eval": False}, ("local", "own")),
    ("ensemble", {"central_eval": False, "full_eval": False}, ("own",)),
    ("ensemble", {"own_eval": False}, ("central", "local")),
]


@pytest.mark.parametrize(("name", "off", "left"), SWITCHED_OFF, ids=str)
def test_what_is_switched_off_is_not_there(name, off, left):
    algorithm, simulation = cases.simulation(name, **off)
    federation, hparams = cases.federation(), cases.hparams_of(name)
    state = jax.eval_shape(simulation.init, 0, federation)
    scalars, clients = jax.eval_shape(simulation.pure.evaluate, state, federation, hparams, 5)
    assert {kind for kind in ("central", "local", "own") if f"{kind}_accuracy" in scalars} == {*left}
    assert ("worst_client" in scalars) == ("own" in left) == ("own_accuracy" in clients)
    assert ("local_examples" in scalars) == ("local" in left)
    assert algorithm.name == name


def test_a_federation_without_an_order_is_tested_as_it_lies():
    simulation, state, federation, hparams = begun("local")
    federation = federation._replace(test_order=None)
    algorithm, _ = cases.simulation("local")
    layout = simulation.pure.evaluate.args[1]
    compiled = jax.jit(functools.partial(evaluate.evaluate, algorithm, layout))
    _, clients = compiled(state, federation, hparams, 4)
    z, y = personal_logits(state, federation)
    np.testing.assert_allclose(clients["local_accuracy"], (z[:, :4].argmax(-1) == y[:4]).mean(1), rtol=1e-6)


def test_supersteps_of_two_lengths_are_one_function():
    _, simulation = cases.simulation("feddistill")
    federation, hparams = cases.federation(), cases.hparams_of("feddistill")

    def run(state, rounds):
        state, report = simulation.run(state, federation, hparams, 3, np.int32(rounds))
        return state, first_rounds(jax.device_get(report), rounds)

    whole, report = run(simulation.init(0, federation), 3)
    state = simulation.init(0, federation)
    with jax.no_tracing():
        state, first = run(state, 2)
        state, second = run(state, 1)
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(whole))
    chex.assert_trees_all_equal(jax.tree.map(lambda *x: np.concatenate(x), first, second), report)
    expected = simulation.run(simulation.init(0, federation), federation, hparams, 3)  # a scan of three rounds
    chex.assert_trees_all_close(jax.device_get((whole, report)), jax.device_get(expected), rtol=1e-5, atol=1e-6)
