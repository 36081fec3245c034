"""One client's training against NumPy in float64."""

import functools

import chex
import engine_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from client_cases import MODEL, F, K, N, context, data_of

from fdjax import keys
from fdjax.client import losses, training
from fdjax.client.data import Paired
from fdjax.exchange import reductions
from fdjax.method import Training

BATCH, RATE, MOMENTUM = 5, 0.3, 0.9
SUPERVISED = training.supervised(MODEL, cases.training(BATCH))


@functools.cache
def fit(batch_size=BATCH, momentum=None):
    """The jitted `training.fit` of logistic regression: (params, data, key, epochs, rate) -> (params, loss)."""
    how = cases.training(batch_size, momentum=momentum)
    loss = training.supervised(MODEL, how)
    compiled = jax.jit(lambda p, d, k, e, rate: training.fit(how, loss, p, d, context(k, rate), epochs=e))
    return lambda p, d, k, e, rate=RATE: compiled(p, d, k, np.int32(e), np.float32(rate))


def fit_once(how, loss, params, data, key, epochs, rate=RATE, round=0, **more):
    """`training.fit` as it is, for a training or a loss of one test alone."""
    ctx = context(key, np.float32(rate), np.int32(round))
    return training.fit(how, loss, params, data, ctx, epochs=epochs, **more)


def an_examples_own_number(params, x, y, key):
    """A loss that says which examples were visited, and learns nothing."""
    return x[:, 0]


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(1))


@pytest.mark.parametrize("momentum", [None, MOMENTUM])
@pytest.mark.parametrize(("count", "epochs"), [(23, 3), (20, 2), (5, 4), (3, 2), (1, 3)])
def test_fit_is_sgd(params, count, epochs, momentum):
    """Also the last, short batch of an epoch: its gradient is the mean over what it holds."""
    data, x, y = data_of(count)
    key = jax.random.key(count)
    trained, mean = fit(momentum=momentum)(params, data, key, epochs)
    expected = cases.Logistic(params)
    orders = [cases.epoch_order(key, e, count) for e in range(epochs)]
    expected_loss = expected.fit(x, y, orders, BATCH, RATE, momentum or 0.0)
    chex.assert_trees_all_close(trained, expected.params(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mean, expected_loss, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [12, 64])
def test_a_batch_of_all_examples_is_the_full_gradient(params, batch_size):
    count, epochs = 12, 4
    data, x, y = data_of(count)
    trained, mean = fit(batch_size)(params, data, jax.random.key(0), epochs)
    W, b = (np.array(params["Dense_0"][name], np.float64) for name in ("kernel", "bias"))
    for _ in range(epochs):
        slope = (cases.softmax(x @ W + b) - np.eye(K)[y]) / count
        last = cases.cross_entropy(x @ W + b, y).mean()
        W, b = W - RATE * x.T @ slope, b - RATE * slope.sum(0)
    chex.assert_trees_all_close(trained, {"Dense_0": {"kernel": W, "bias": b}}, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mean, last, rtol=1e-5)


def test_epochs_visit_every_example_once_in_new_order(params):
    """With a loss that is an example's own number and no learning, the loss of an epoch says what was visited."""
    count = 10
    data, _, _ = data_of(count)
    first = np.zeros(N, np.float32)
    first[np.asarray(data.order[11:21])] = 2.0 ** np.arange(count)
    data = data._replace(examples=data.examples._replace(x=jnp.tile(first[:, None], F)))
    visited = jax.jit(
        lambda key, e: fit_once(cases.training(count), an_examples_own_number, params, data, key, e, rate=0)[1]
    )
    for epochs in (1, 2, 5):
        assert visited(jax.random.key(0), np.int32(epochs)) == np.float32((2.0**count - 1) / count)
    one, two = (cases.epoch_order(jax.random.key(0), epoch, count).tolist() for epoch in (0, 1))
    assert one != two


def test_a_client_without_examples_trains_nothing(params):
    data, _, _ = data_of(0)
    trained, mean = fit()(params, data, jax.random.key(0), 3)
    chex.assert_trees_all_equal(trained, params)
    assert mean == 0


def test_clients_of_any_size_train_side_by_side(params):
    """vmapped, an empty client and small ones stand still while larger ones go on."""
    counts = np.array([23, 0, 1, 5, 12], np.int32)
    data, _, _ = data_of(0)
    many = jax.random.split(jax.random.key(0), len(counts))

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0))
    def side_by_side(count, key):
        mine = data._replace(count=count)
        return fit_once(cases.training(BATCH), SUPERVISED, params, mine, key, np.int32(2))

    trained, means = side_by_side(counts, many)
    for i, count in enumerate(counts):
        alone, mean = fit()(params, data_of(count)[0], many[i], 2)
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], trained), alone, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(means[i], mean, rtol=1e-5)
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[1], trained), params)


def test_new_epochs_counts_and_rates_compile_nothing(params):
    data, _, _ = data_of(23)
    key = jax.random.key(0)
    fit()(params, data, key, 1)
    with jax.no_tracing():
        longer, _ = fit()(params, data_of(7, start=3)[0], key, 9, 0.01)
    assert cases.all_finite(longer)


def test_the_optimiser_starts_fresh_and_sees_rate_and_round(params):
    """Two calls of one epoch forget the momentum that one call of two epochs keeps; the round reaches the schedule."""
    data, _, _ = data_of(3)  # one batch, so that the order of examples is of no matter
    key = jax.random.key(0)
    momentum = fit(momentum=MOMENTUM)
    twice = momentum(momentum(params, data, key, 1)[0], data, key, 1)[0]
    plain = fit()(params, data, key, 2)[0]
    at_once = momentum(params, data, key, 2)[0]
    chex.assert_trees_all_close(twice, plain, rtol=1e-4, atol=1e-6)
    assert np.abs(at_once["Dense_0"]["bias"] - plain["Dense_0"]["bias"]).max() > 1e-3

    decayed = Training(BATCH, lambda learning_rate, round: optax.sgd(learning_rate * 0.5**round))
    third = fit_once(decayed, SUPERVISED, params, data, key, np.int32(1), round=3)[0]
    eighth = fit()(params, data, key, 1, RATE / 8)[0]
    chex.assert_trees_all_close(third, eighth, rtol=1e-5, atol=1e-7)


def test_a_rate_that_is_given_goes_before_that_of_the_hyperparameters(params):
    data, _, _ = data_of(3)
    given, mean = fit_once(
        cases.training(BATCH), SUPERVISED, params, data, jax.random.key(0), np.int32(2), rate=9.0,
        learning_rate=np.float32(RATE),
    )  # fmt: skip
    usual, usual_mean = fit()(params, data, jax.random.key(0), 2)
    chex.assert_trees_all_close((given, mean), (usual, usual_mean), rtol=1e-6, atol=1e-7)


def test_augmentation_draws_anew_for_every_step(params):
    """The last epoch's loss reads out what the augmentation drew, as x is its draw and the loss is x."""
    data, _, _ = data_of(2 * BATCH)
    drawing = cases.training(BATCH)._replace(augment=lambda key, x: x * 0 + jax.random.uniform(key))
    drawn = jax.jit(lambda key, e: fit_once(drawing, an_examples_own_number, params, data, key, e, rate=0)[1])
    key = jax.random.key(5)
    expected = [
        np.mean([jax.random.uniform(keys.stream(jax.random.fold_in(key, e), "augment", step)) for step in range(2)])
        for e in range(3)
    ]
    actual = [drawn(key, np.int32(e + 1)) for e in range(3)]
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert len(set(map(float, actual))) == 3


def test_no_key_is_used_twice(params):
    with jax.debug_key_reuse(True):
        fit()(params, data_of(7)[0], jax.random.key(0), 2)


def test_probabilities_are_learned_from_by_soft_cross_entropy(params, rng):
    """`from_probabilities` of one-hot targets is `supervised` of labels."""
    _, x, y = data_of(7)
    for loss, target in (
        (SUPERVISED, y),
        (training.from_probabilities(MODEL), np.eye(K, dtype=np.float32)[y]),
    ):
        actual = loss(params, x.astype(np.float32), jnp.asarray(target), None)
        np.testing.assert_allclose(actual, cases.cross_entropy(cases.Logistic(params)(x), y), rtol=1e-5)
    target = rng.dirichlet(np.ones(K), 7).astype(np.float32)
    actual = training.from_probabilities(MODEL)(params, x.astype(np.float32), target, None)
    expected = -(target * cases.log_softmax(cases.Logistic(params)(x))).sum(-1)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_an_account_of_training_counts_every_example_of_every_epoch(params):
    """And not those that fill up a short batch: the sums by label of what was predicted on the way."""
    count, epochs = 7, 3
    data, _, y = data_of(count)
    key = jax.random.key(2)
    paired = Paired(data, jnp.arange(count) * 1.0)

    def loss(params, x, target, key):
        y, number = target
        return losses.cross_entropy(MODEL.apply(params, x), y), number

    def observe(number, target, weight):
        return reductions.sum_by_label(number[:, None], target[0], K, weight)

    nothing = reductions.ByLabel(jnp.zeros((K, 1)), jnp.zeros(K))
    trained, mean, seen = training.fit_observing(
        cases.training(BATCH), loss, observe, nothing, params, paired, context(key, np.float32(RATE)), epochs=epochs
    )
    numbers = [np.arange(count)[y == label].sum() for label in range(K)]
    np.testing.assert_allclose(seen.value[:, 0], epochs * np.array(numbers), rtol=1e-6)
    np.testing.assert_array_equal(seen.count, epochs * np.bincount(y, minlength=K))
    chex.assert_trees_all_close((trained, mean), fit()(params, data, key, epochs), rtol=1e-6, atol=1e-7)
