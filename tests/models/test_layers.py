"""Pooling against NumPy, and the bias's gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdjax.errors import InputError
from fdjax.models.layers import Conv, avg_pool, max_pool


def numpy_pool(x, g):
    """Max and mean over 2x2 windows and their gradients, equal maxima sharing, window by window."""
    batch, height, width, channels = x.shape
    top, mean = (np.zeros((batch, height // 2, width // 2, channels)) for _ in range(2))
    dtop, dmean = np.zeros(x.shape), np.zeros(x.shape)
    for b, i, j, c in np.ndindex(top.shape):
        here = b, slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2), c
        top[b, i, j, c], mean[b, i, j, c] = x[here].max(), x[here].mean()
        most = x[here] == x[here].max()
        dtop[here] = g[b, i, j, c] * most / most.sum()
        dmean[here] = g[b, i, j, c] / 4
    return (top, dtop), (mean, dmean)


@pytest.mark.parametrize("size", [(4, 6), (5, 4), (7, 3), (2, 2)])
@pytest.mark.parametrize("distinct", [True, False])
def test_pooling(rng, size, distinct):
    x = rng.normal(size=(3, *size, 2)) if distinct else rng.integers(0, 2, (3, *size, 2))
    x = x.astype(np.float32)
    g = rng.normal(size=(3, size[0] // 2, size[1] // 2, 2)).astype(np.float32)
    for pool, expected in zip((max_pool, avg_pool), numpy_pool(x, g)):
        y, pull = jax.vjp(pool, jnp.asarray(x))
        np.testing.assert_allclose(y, expected[0], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(pull(g)[0], expected[1], rtol=1e-6, atol=1e-7)
        many = jax.jit(jax.vmap(lambda x, g, pool=pool: jax.vjp(pool, x)[1](g)[0]))(x[None], g[None])
        np.testing.assert_allclose(many[0], expected[1], rtol=1e-6, atol=1e-7)


def test_pooling_needs_a_window():
    with pytest.raises(InputError, match="smaller than the 2x2"):
        max_pool(jnp.zeros((1, 1, 4, 2)))


def test_bias_gradient_is_the_sum(rng):
    module = Conv(3)
    x = jnp.asarray(rng.normal(size=(2, 5, 5, 1)), jnp.float32)
    params = module.init(jax.random.key(0), x)
    g = jnp.asarray(rng.normal(size=(2, 3, 3, 3)), jnp.float32)
    gradient = jax.grad(lambda p: jnp.sum(g * module.apply(p, x)))(params)
    np.testing.assert_allclose(gradient["params"]["bias"], g.sum((0, 1, 2)), rtol=1e-5, atol=1e-5)


def test_a_diverged_window_stays_visible():
    x = jnp.full((1, 2, 2, 1), jnp.nan)
    y, pull = jax.vjp(max_pool, x)
    assert jnp.isnan(y).all()
    assert not jnp.isfinite(pull(jnp.ones_like(y))[0]).all()
