"""One client's training and testing against NumPy in float64."""

import functools

import chex
import engine_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fdjax import keys
from fdjax.client import local, losses
from fdjax.types import Examples

N, F, K = 60, cases.FEATURES, cases.CLASSES
BATCH, RATE, MOMENTUM = 5, 0.3, 0.9
MODEL = cases.model()


def loss(params, x, y):
    return losses.cross_entropy(MODEL.apply(params, x), y)


def data_of(count, start=11):
    """A client that holds `count` of N examples, in an order of its own, from `start` on."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(N, F)).astype(np.float32), rng.integers(0, K, N).astype(np.int32)
    examples = Examples(x, y, np.float32([1.0]), np.float32([0.0]))
    order = rng.permutation(N).astype(np.int32)
    held = order[start : start + count]
    data = jax.device_put(local.ClientData(examples, order, np.int32(start), np.int32(count)))
    return data, x[held].astype(float), y[held]


def hparams(learning_rate=RATE):
    return {"learning_rate": np.float32(learning_rate), "round": np.int32(0)}


def epochs_of(number):
    return np.int32(number)


@functools.cache
def fit(batch_size=BATCH, momentum=None):
    """The jitted `local.fit` of logistic regression: (params, data, hparams, key, epochs) -> (params, loss)."""
    training = cases.training(batch_size, momentum=momentum)
    return jax.jit(lambda p, d, h, k, e: local.fit(training, loss, p, d, h, k, epochs=e))


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(1))


@pytest.mark.parametrize("momentum", [None, MOMENTUM])
@pytest.mark.parametrize(("count", "epochs"), [(23, 3), (20, 2), (5, 4), (3, 2), (1, 3)])
def test_fit_is_sgd(params, count, epochs, momentum):
    """Also the last, short batch of an epoch: its gradient is the mean over what it holds."""
    data, x, y = data_of(count)
    key = jax.random.key(count)
    trained, mean = fit(momentum=momentum)(params, data, hparams(), key, epochs_of(epochs))
    expected = cases.Logistic(params)
    orders = [cases.epoch_order(key, e, count) for e in range(epochs)]
    expected_loss = expected.fit(x, y, orders, BATCH, RATE, momentum or 0.0)
    chex.assert_trees_all_close(trained, expected.params(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mean, expected_loss, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [12, 64])
def test_a_batch_of_all_examples_is_the_full_gradient(params, batch_size):
    count, epochs = 12, 4
    data, x, y = data_of(count)
    trained, mean = fit(batch_size)(params, data, hparams(), jax.random.key(0), epochs_of(epochs))
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
    training = cases.training(count)
    visited = jax.jit(
        lambda key, e: local.fit(training, lambda p, x, y: x[:, 0], params, data, hparams(0), key, epochs=e)[1]
    )
    for epochs in (1, 2, 5):
        assert visited(jax.random.key(0), epochs_of(epochs)) == np.float32((2.0**count - 1) / count)
    one, two = (cases.epoch_order(jax.random.key(0), epoch, count).tolist() for epoch in (0, 1))
    assert one != two


def test_a_client_without_examples_trains_nothing(params):
    data, _, _ = data_of(0)
    trained, mean = fit()(params, data, hparams(), jax.random.key(0), epochs_of(3))
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
        return local.fit(
            cases.training(BATCH), loss, params, data._replace(count=count), hparams(), key, epochs=epochs_of(2)
        )

    trained, means = side_by_side(counts, many)
    for i, count in enumerate(counts):
        alone, mean = fit()(params, data_of(count)[0], hparams(), many[i], epochs_of(2))
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], trained), alone, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(means[i], mean, rtol=1e-5)
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[1], trained), params)


def test_new_epochs_counts_and_rates_compile_nothing(params):
    data, _, _ = data_of(23)
    key = jax.random.key(0)
    fit()(params, data, hparams(), key, epochs_of(1))
    with jax.no_tracing():
        longer, _ = fit()(params, data_of(7, start=3)[0], hparams(0.01), key, epochs_of(9))
    assert cases.all_finite(longer)


def test_the_optimiser_starts_fresh_and_sees_the_hparams(params):
    """Two calls of one epoch forget the momentum that one call of two epochs keeps; the round reaches the schedule."""
    data, _, _ = data_of(3)  # one batch, so that the order of examples is of no matter
    key = jax.random.key(0)
    momentum = fit(momentum=MOMENTUM)
    twice = momentum(momentum(params, data, hparams(), key, epochs_of(1))[0], data, hparams(), key, epochs_of(1))[0]
    plain = fit()(params, data, hparams(), key, epochs_of(2))[0]
    at_once = momentum(params, data, hparams(), key, epochs_of(2))[0]
    chex.assert_trees_all_close(twice, plain, rtol=1e-4, atol=1e-6)
    assert np.abs(at_once["Dense_0"]["bias"] - plain["Dense_0"]["bias"]).max() > 1e-3

    decayed = local.Training(BATCH, lambda h: optax.sgd(h["learning_rate"] * 0.5 ** h["round"]))
    third = local.fit(decayed, loss, params, data, hparams() | {"round": np.int32(3)}, key, epochs=epochs_of(1))[0]
    eighth = fit()(params, data, hparams(RATE / 8), key, epochs_of(1))[0]
    chex.assert_trees_all_close(third, eighth, rtol=1e-5, atol=1e-7)


def test_augmentation_draws_anew_for_every_step(params):
    """The last epoch's loss reads out what the augmentation drew, as x is its draw and the loss is x."""
    data, _, _ = data_of(2 * BATCH)
    training = cases.training(BATCH)._replace(augment=lambda key, x: x * 0 + jax.random.uniform(key))
    drawn = jax.jit(
        lambda key, e: local.fit(training, lambda p, x, y: x[:, 0], params, data, hparams(0), key, epochs=e)[1]
    )
    key = jax.random.key(5)
    expected = [
        np.mean([jax.random.uniform(keys.stream(jax.random.fold_in(key, e), "augment", step)) for step in range(2)])
        for e in range(3)
    ]
    actual = [drawn(key, epochs_of(e + 1)) for e in range(3)]
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert len(set(map(float, actual))) == 3


def test_no_key_is_used_twice(params):
    with jax.debug_key_reuse(True):
        fit()(params, data_of(7)[0], hparams(), jax.random.key(0), epochs_of(2))


def test_examples_are_scaled_as_they_are_taken(rng):
    images = rng.integers(0, 256, (6, 4, 3, 2)).astype(np.uint8)
    scale, shift = np.float32([1 / 255, 2 / 255]), np.float32([-0.5, 0.25])
    examples = jax.device_put(Examples(images, np.arange(6, dtype=np.int32), scale, shift))
    data = local.ClientData(examples, jnp.array([5, 3, 1, 0]), jnp.int32(1), jnp.int32(3))
    x, y = data.take(jnp.array([2, 0, 1]))
    assert x.dtype == jnp.float32
    np.testing.assert_array_equal(y, [0, 3, 1])
    np.testing.assert_allclose(x, images[[0, 3, 1]].astype(float) * scale + shift, atol=1e-6)


@functools.cache
def scorer(batch_size):
    return jax.jit(lambda p, d: local.test(MODEL.apply, p, d, batch_size))


@pytest.mark.parametrize("count", [0, 1, 7, 8, 23, 40])
def test_test_counts_all_examples_once(params, count):
    data, x, y = data_of(count)
    score = scorer(8)(params, data)
    z = cases.Logistic(params)(x)
    assert score.count == count
    assert score.correct == (z.argmax(1) == y).sum()
    np.testing.assert_allclose(score.loss, cases.cross_entropy(z, y).sum(), rtol=1e-5)
    accuracy, mean_loss = score.mean()
    assert accuracy == np.float32((z.argmax(1) == y).sum() / max(count, 1))
    np.testing.assert_allclose(mean_loss, cases.cross_entropy(z, y).sum() / max(count, 1), rtol=1e-5)


def test_test_is_the_same_for_any_batch(params):
    data, _, _ = data_of(23)
    scores = [scorer(size)(params, data) for size in (1, 8, 23, 100)]
    for score in scores[1:]:
        assert (score.correct, score.count) == (scores[0].correct, scores[0].count)
        np.testing.assert_allclose(score.loss, scores[0].loss, rtol=1e-5)


@pytest.mark.parametrize(("count", "steps"), [(0, 0), (1, 1), (4, 1), (5, 1), (6, 2), (10, 2), (11, 3)])
def test_batches(count, steps):
    assert local.batches(count, 5) == steps
