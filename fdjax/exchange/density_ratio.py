"""Kernel-based density ratios: how much likelier an example is among known ones than among auxiliary ones.

Kanamori, Suzuki, Sugiyama, "Statistical Analysis of Kernel-Based Least-Squares Density-Ratio Estimation" (Machine
Learning 2012), KuLSIF. Of m known examples y_j and A auxiliary ones x_i, with k(a, b) = exp(-|a - b|^2 / (2 width^2)):

    (K / A + lambda I) alpha = -(1 / (A m lambda)) sum_j k(x_i, y_j),    K = k(x_i, x_i')
    r(z) = sum_i alpha_i k(z, x_i) + (1 / (m lambda)) sum_j k(z, y_j)

Where all auxiliary examples are far from everything, as uniform noise is from pictures, the first sum vanishes and r is
a kernel density estimate. The system is solved by conjugate gradients, products alone: its eigenvalues lie between
lambda and lambda + 1.
"""

import jax
import jax.numpy as jnp
from jax import lax

from fdjax.types import Array

_STEPS = 50  # with lambda = 1/16 an error falls by a factor of 0.61 a step


def kernel(a: Array, b: Array, width: Array | float) -> jax.Array:
    """k(a, b) [N, L] of rows [N, D] and [L, D]."""
    between = jnp.matmul(a, b.T, precision=lax.Precision.HIGHEST)
    squared = jnp.sum(jnp.square(a), -1)[:, None] + jnp.sum(jnp.square(b), -1)[None] - 2 * between
    return jnp.exp(-jnp.maximum(squared, 0) / (2 * jnp.square(width)))


def ratios(
    known: Array, count: Array, auxiliary: Array, points: Array, width: Array | float, penalty: float
) -> jax.Array:
    """r [N] of `points` [N, D]; of `known` [L, D] the first `count` are there; `penalty` is lambda."""
    share = jnp.where(jnp.arange(len(known)) < count, 1 / jnp.maximum(count, 1), 0)
    size = len(auxiliary)
    system = kernel(auxiliary, auxiliary, width) / size
    near = kernel(auxiliary, known, width) @ share
    alpha = _solve(lambda v: system @ v + penalty * v, -near / (size * penalty))
    return kernel(points, auxiliary, width) @ alpha + kernel(points, known, width) @ share / penalty


def _solve(product, right: Array) -> jax.Array:
    """x with product(x) = right, by conjugate gradients."""

    def step(_, carry):
        x, residual, direction, size = carry
        image = product(direction)
        length = _ratio(size, direction @ image)
        residual, x = residual - length * image, x + length * direction
        new = residual @ residual
        return x, residual, residual + _ratio(new, size) * direction, new

    return lax.fori_loop(0, _STEPS, step, (jnp.zeros_like(right), right, right, right @ right))[0]


def _ratio(a: Array, b: Array) -> jax.Array:
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)


def quantile(values: Array, count: Array, share: Array) -> jax.Array:
    """The quantile of the first `count` of `values` [L], interpolated linearly; of none it is inf."""
    rising = jnp.sort(jnp.where(jnp.arange(len(values)) < count, values, jnp.inf))
    at = share * jnp.maximum(count - 1, 0)
    low = jnp.floor(at).astype(jnp.int32)
    below, above = rising[low], rising[jnp.minimum(low + 1, jnp.maximum(count - 1, 0))]
    return jnp.where(count > 0, below + (at - low) * (above - below), jnp.inf)


def spread(x: Array, count: Array) -> jax.Array:
    """The root of the mean squared distance between two of the first `count` of `x` [L, D]."""
    share = jnp.where(jnp.arange(len(x)) < count, 1 / jnp.maximum(count, 1), 0)
    centered = x - (share @ x)[None]
    return jnp.sqrt(2 * share @ jnp.sum(jnp.square(centered), -1))
