"""A validation split: nobody trains on it, every evaluation tests it, and without it nothing changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from choices import some

from fdjax import __main__ as command
from fdjax import data
from fdjax.contract import Context
from fdjax.data.federation import examples
from fdjax.errors import InputError
from fdjax.run import experiment, runner, settings
from tests import engine_cases as cases

SMALL = {
    "dataset": "synthetic", "num_clients": 4, "samples_per_client": 30, "model": "mclr", "batch_size": 8,
    "rounds": 2,
}  # fmt: skip


def build(**fields):
    return experiment.build(settings.make(**SMALL | fields))


def rows(x):
    return {row.tobytes() for row in np.asarray(x)}


def last_scalars(simulation, federation, hparams, rounds):
    """The state and the scalars of an evaluation after so many rounds."""
    state = cases.begin(simulation, federation, hparams)
    state, _ = simulation.run(state, federation, hparams, rounds)
    return state, jax.device_get(simulation.evaluate(state, federation, hparams)[0])


@pytest.mark.parametrize("proxy", [{}, {"proxy": "held_out", "proxy_size": 12}])
def test_nobody_holds_a_validation_example(proxy):
    whole, split = build(**proxy), build(validation_fraction=0.25, **proxy)
    have = len(whole.source.train_y)
    assert len(split.federation.validation.y) == round(0.25 * have)
    train, held_out = (jax.device_get(part) for part in (split.federation.train, split.federation.validation))
    assert rows(train.x).isdisjoint(rows(held_out.x))
    assert rows(train.x) | rows(held_out.x) == rows(whole.federation.train.x)
    np.testing.assert_array_equal(held_out.scale, train.scale)
    order, start, count = jax.device_get(split.federation.train_holdings)
    of_clients = np.concatenate([order[s : s + n] for s, n in zip(start, count, strict=True)])
    assert sorted(of_clients) == list(range(have - round(0.25 * have)))
    if proxy:
        np.testing.assert_array_equal(split.federation.proxy.x, whole.federation.proxy.x)
        assert rows(split.federation.proxy.x).isdisjoint(rows(held_out.x))


def test_the_split_is_drawn_by_the_data_seed():
    source = cases.source(40)._replace(train_owner=np.arange(40))
    one, again, other = (data.take_validation(source, 0.2, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.validation[0], again.validation[0])
    assert rows(one.validation[0]) != rows(other.validation[0])
    np.testing.assert_array_equal(source.train_x[one.train_owner], one.train_x)
    assert data.take_validation(source, 0.0, 3) is source


def test_without_a_split_nothing_is_added():
    plain = build()
    assert plain.federation.validation is None
    state = plain.simulation.init(0, plain.federation)
    scalars, _ = plain.simulation.evaluate(state, plain.federation, plain.hparams)
    assert not [name for name in scalars if name.startswith("validation")]
    assert build(validation_fraction=0.25).simulation is plain.simulation  # rounds are compiled by shapes alone


ONE, TWO = [("mclr", 7)], [("mclr", 3), ("wide", 4)]


# fedavg and feddistill have a central model, fd only the clients', the ensemble their mean; fedgkt's clients predict.
@pytest.mark.parametrize("name", some(["fedavg", "feddistill", "fd", "ensemble"], "feddistill"))
@pytest.mark.parametrize("cohorts", some([ONE, TWO], TWO), ids=["one", "two"])
def test_accuracy_and_loss_on_the_split(name, cohorts):
    if name == "fedavg" and len(cohorts) > 1:
        pytest.skip("fedavg serves one architecture")
    sizes = tuple(size for _, size in cohorts)
    algorithm, simulation = cases.simulation(name, cohorts=tuple(cohorts), participants=sizes)
    federation, (x, y) = cases.federation(cohort_sizes=sizes), _split()
    federation = federation._replace(validation=cases.replicated(examples(x, y, cases.source(1)), federation))
    state, scalars = last_scalars(simulation, federation, cases.hparams_of(name), 2)
    if name in ("fedavg", "feddistill"):
        logits = algorithm.central(_context(cases.model()), state.server, (x - 0.25) / 1.5)
        expected = _score(logits, y)
    else:
        logits = _personal(algorithm, state, federation, cohorts, (x - 0.25) / 1.5)
        assert len(logits) == 6  # a client without examples has no model of its own to speak of
        mean = np.log(np.mean([cases.softmax(z) for z in logits], axis=0))
        expected = _score(mean, y) if name == "ensemble" else np.mean([_score(z, y) for z in logits], axis=0)
    np.testing.assert_allclose(scalars["validation_accuracy"], expected[0], rtol=1e-5)
    np.testing.assert_allclose(scalars["validation_loss"], expected[1], rtol=1e-4)


def test_clients_that_predict_with_the_server():
    algorithm, simulation = cases.simulation("fedgkt")
    federation, (x, y) = cases.federation(), _split()
    federation = federation._replace(validation=cases.replicated(examples(x, y, cases.source(1)), federation))
    state, scalars = last_scalars(simulation, federation, cases.hparams_of("fedgkt"), 1)
    logits = _personal(algorithm, state, federation, (("2nn", 7),), (x - 0.25) / 1.5)
    scores = np.array([_score(z, y) for z in logits])
    np.testing.assert_allclose(scalars["validation_accuracy"], scores[:, 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(scalars["validation_loss"], scores[:, 1].mean(), rtol=1e-4)


def _split():
    """Of a size that no batch divides."""
    source = cases.source(23, seed=5)
    return source.train_x, source.train_y


def _score(z, y):
    z = np.asarray(z, np.float64)
    return (z.argmax(1) == y).mean(), cases.cross_entropy(z, y).mean()


def _context(model, cohort=0):
    return Context(model, cohort, jnp.int32(0), {}, jnp.int32(1), jax.random.key(0), None)


def _personal(algorithm, state, federation, cohorts, x):
    """Logits of every client that holds an example."""
    counts = np.split(np.asarray(federation.train_holdings.count), np.cumsum([size for _, size in cohorts])[:-1])
    return [
        algorithm.personal(_context(cases.model(kind), j), state.server, jax.tree.map(lambda p, i=i: p[i], clients), x)
        for j, ((kind, _), clients, count) in enumerate(zip(cohorts, state.clients, counts, strict=True))
        for i in np.flatnonzero(count)
    ]


def test_a_run_records_it():
    result = runner.run(settings.make(validation_fraction=0.25, **SMALL, devices=1), progress=False)
    assert len(result.evaluations["validation_accuracy"]) == len(result.evaluations["validation_loss"]) == 3
    assert "accuracy on the validation split, %" in command.summary([result])


@pytest.mark.parametrize(
    ("fraction", "message"),
    [
        (1.0, "--validation_fraction=1.0: expected a number of at least 0 and below 1"),
        (-0.1, "--validation_fraction=-0.1: expected a number"),
        (float("nan"), "--validation_fraction=nan: expected a number"),
        (0.001, "--validation_fraction=0.001 of 108 training examples holds out 0; expected 1 to 107"),
        (0.999, "--validation_fraction=0.999 of 108 training examples holds out 108; expected 1 to 107"),
    ],
)
def test_bad_fractions_are_one_line(fraction, message):
    with pytest.raises(InputError) as error:
        build(validation_fraction=fraction)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
