"""Pooling and dense layers against NumPy, and the bias's gradient."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdjax.errors import InputError
from fdjax.models.layers import Conv, Dense, avg_pool, matmul, max_pool


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


def numpy_matmul(x, kernel, g):
    """x @ kernel, and the dx and dkernel of sum(g * y), in float64."""
    x, kernel, g = (a.astype(np.float64) for a in (x, kernel, g))
    return x @ kernel, g @ kernel.T, x.T @ g


def all_three(x, kernel, g):
    y, pull = jax.vjp(matmul, x, kernel)
    return y, *pull(g)


@pytest.mark.parametrize("shared", ["all", "", "x", "kernel", "g"])
def test_matmul(rng, shared):
    shapes = {"x": (4, 7), "kernel": (7, 5), "g": (4, 5)}
    axes = [None if shared in ("all", name) else 0 for name in shapes]
    args = [rng.normal(size=(3, *s) if a == 0 else s).astype(np.float32) for a, s in zip(axes, shapes.values())]
    if shared == "all":
        actual, expected = jax.jit(all_three)(*args), numpy_matmul(*args)
    else:
        actual = jax.jit(jax.vmap(all_three, in_axes=axes))(*args)
        rows = [np.broadcast_to(a, (3, *a.shape)) if axis is None else a for a, axis in zip(args, axes)]
        expected = [np.stack(leaves) for leaves in zip(*(numpy_matmul(*row) for row in zip(*rows)))]
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)


def test_second_derivatives_of_matmul(rng):
    x, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4, 7), (7, 5)))

    def second(product):
        def value(x, kernel):
            dx, dk = jax.grad(lambda x, kernel: jnp.sum(jnp.sin(product(x, kernel))), (0, 1))(x, kernel)
            return jnp.sum(jnp.cos(dx)) + jnp.sum(jnp.cos(dk))

        return jax.grad(value, (0, 1))(x, kernel)

    for actual, expected in zip(second(matmul), second(jnp.matmul)):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_input_gradient_is_multiplied_in_the_fast_order(rng):
    x, kernel, g = (rng.normal(size=s).astype(np.float32) for s in ((32, 96), (96, 64), (32, 64)))
    compiled = jax.jit(lambda x, kernel, g: all_three(x, kernel, g)[1]).lower(x, kernel, g).compile().as_text()
    (line,) = [line for line in compiled.splitlines() if " dot(" in line]
    assert "f32[96,32]" in line.split(" dot(")[0]


def test_dense_is_linens(rng):
    x = jnp.asarray(rng.normal(size=(4, 7)), jnp.float32)
    ours, linens = Dense(5, name="dense"), nn.Dense(5, name="dense")
    params = ours.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, params, linens.init(jax.random.key(0), x))
    params = jax.tree.map(lambda p: p + 1, params)
    np.testing.assert_allclose(ours.apply(params, x), linens.apply(params, x), rtol=1e-6)
