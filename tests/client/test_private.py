"""DP-SGD against loops over examples in NumPy, float64."""

import functools

import engine_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fdjax import keys
from fdjax.client import private
from fdjax.client.training import fit, supervised
from fdjax.contract import Context

B = 11  # not a whole number of microbatches


@functools.cache
def net(name, shape):
    """A model, its loss on a batch and its first params."""
    model = cases.model(name, shape)
    loss = supervised(model, cases.training(4))
    return model, lambda p, x, y: (loss(p, x, y, jax.random.key(1)), ()), jax.jit(model.init)(jax.random.key(0))


def batch(name="mclr", shape=(cases.FEATURES,)):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, *shape)).astype(np.float32)
    y = np.arange(B, dtype=np.int32) % cases.CLASSES
    weight = (np.arange(B) < B - 2).astype(np.float32)
    return *net(name, shape), x, y, weight


@functools.cache
def compiled(loss):
    """`clipped_gradient` of a loss, and the gradient of its sum."""
    clipped = jax.jit(lambda *args: private.clipped_gradient(loss, *args))
    return clipped, jax.jit(jax.grad(lambda p, x, y: loss(p, x, y)[0].sum()))


def example_by_example(loss, params, x, y, weight, clip):
    """sum_i min(1, S / |g_i|) g_i, one gradient after another."""
    total, scaled = jax.tree.map(lambda p: np.zeros(p.shape), params), 0
    _, gradient = compiled(loss)
    for i in np.flatnonzero(weight):
        g = jax.tree.map(lambda a: np.asarray(a, np.float64), gradient(params, x[i : i + 1], y[i : i + 1]))
        norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(g)))
        scaled += norm > clip
        scale = min(1, clip / norm)
        total = jax.tree.map(lambda t, a, scale=scale: t + scale * a, total, g)
    return total, scaled


@pytest.mark.parametrize(
    ("name", "shape"), [("mclr", (cases.FEATURES,)), ("2nn", (cases.FEATURES,)), ("cnn", (16, 16, 1))]
)
@pytest.mark.parametrize("clip", [1.2, np.inf])
def test_gradients_are_clipped_one_by_one(name, shape, clip):
    """By outer products where all layers are dense, else by microbatches; what does not count leaves no trace."""
    _, loss, params, x, y, weight = batch(name, shape)
    assert (private._dense_layers(loss, params, x, y) is None) == (name == "cnn")
    expected, scaled = example_by_example(loss, params, x, y, weight, clip)
    x[weight == 0] = np.nan
    values, _, found = compiled(loss)[0](params, x, y, weight, np.float32(clip))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, expected)
    assert values.shape == (B,)
    assert scaled or clip == np.inf


def test_logistic_regression_by_its_formula():
    """g_i = (x_i, 1) (p_i - e_y), clipped, in NumPy alone."""
    _, loss, params, x, y, weight = batch()
    mine = cases.Logistic(params)
    slope = cases.softmax(mine(x.astype(np.float64))) - np.eye(cases.CLASSES)[y]
    norm = np.sqrt(((x.astype(np.float64) ** 2).sum(1) + 1) * (slope**2).sum(1))
    s = weight * np.minimum(1, 0.9 / norm)
    _, _, found = compiled(loss)[0](params, x, y, weight, np.float32(0.9))
    np.testing.assert_allclose(found["Dense_0"]["kernel"], x.T @ (s[:, None] * slope), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["Dense_0"]["bias"], (s[:, None] * slope).sum(0), rtol=1e-4, atol=1e-6)


def test_draws_are_normal():
    draws = np.asarray(private._normal(jax.random.key(3), 400_000), np.float64)
    assert abs(draws.mean()) < 0.006
    assert abs(draws.std() - 1) < 0.005
    assert stats.kstest(draws, "norm").pvalue > 0.001
    assert abs(stats.kurtosis(draws)) < 0.03
    assert 4.2 < np.abs(draws).max() < 6
    others = np.asarray(private._normal(jax.random.key(4), 400_000))
    for lag in (1, 2, 64, 1000):
        assert abs(np.corrcoef(draws[lag:], draws[:-lag])[0, 1]) < 0.007
    assert abs(np.corrcoef(draws, others)[0, 1]) < 0.007


class _Examples:
    def __init__(self, x, y):
        self.x, self.y, self.count = jnp.asarray(x), jnp.asarray(y), jnp.int32(len(y))

    def take(self, position):
        return self.x[position], self.y[position]


@functools.cache
def fitting(is_private, batch_size):
    """A compiled fit of logistic regression: (epochs, key, hparams) -> (params, loss)."""
    model, _, params, x, y, _ = batch()
    training = cases.training(batch_size)._replace(private=is_private)

    @jax.jit
    def run(epochs, key, hparams):
        ctx = Context(model, 0, jnp.int32(0), hparams, jnp.int32(0), key, None)
        return fit(training, supervised(model, training), params, _Examples(x, y), ctx, epochs=epochs)

    return run


def trained(clip, noise, *, is_private=True, batch_size=4, epochs=1, key=None):
    _, _, params, x, y, _ = batch()
    hparams = {"learning_rate": 0.5, "clip": clip, "noise_multiplier": noise}
    hparams = {name: np.float32(value) for name, value in hparams.items()}
    key = jax.random.key(5) if key is None else key
    end, loss = fitting(is_private, batch_size)(np.int32(epochs), key, hparams)
    return params, end, loss, x, y


def test_without_noise_and_clipping_it_is_sgd():
    """On whole clients, as batches are others."""
    _, plain, loss, *_ = trained(1, 0, is_private=False, batch_size=16, epochs=3)
    _, found, same, *_ = trained(np.inf, 0, batch_size=16, epochs=3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, plain)
    np.testing.assert_allclose(loss, same, rtol=1e-6)


def test_steps_are_of_samples_drawn_anew():
    """Three steps of 4 of 11 examples, each its own sample without replacement, written as a loop."""
    params, found, _, x, y = trained(0.8, 0)
    mine, epoch = cases.Logistic(params), jax.random.fold_in(jax.random.key(5), 0)
    for index in range(3):
        who = np.asarray(keys.shuffle(keys.stream(epoch, "sample", index), B)(jnp.arange(4)))
        assert len({*who.tolist()}) == 4
        a = x[who].astype(np.float64)
        slope = cases.softmax(mine(a)) - np.eye(cases.CLASSES)[y[who]]
        norm = np.sqrt(((a**2).sum(1) + 1) * (slope**2).sum(1))
        slope *= np.minimum(1, 0.8 / norm)[:, None]
        mine.W, mine.b = mine.W - 0.5 * a.T @ slope / 4, mine.b - 0.5 * slope.mean(0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, mine.params())


def test_noise_of_a_step_has_the_deviation_that_it_says():
    """eta z S / b on every number, over 60 fits of one step."""

    def difference(key):
        exact, noisy = (trained(0.8, z, batch_size=16, key=key)[1] for z in (0, 3.0))
        return jax.tree.map(lambda a, b: a - b, exact, noisy)

    differences = jax.jit(jax.vmap(difference))(jax.random.split(jax.random.key(5), 60))
    draws = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(differences)]) / (0.5 * 3.0 * 0.8 / B)
    assert draws.size == 1680
    assert abs(draws.mean()) < 0.1
    assert abs(draws.std() - 1) < 0.07  # 4 deviations of 1680 draws
