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
from jax.scipy.sparse.linalg import cg

from fdjax.types import Array

_STEPS, _TOLERANCE = 50, 1e-7  # with lambda = 1/16 an error falls by a factor of 0.61 a step


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
    largest = jnp.maximum(jnp.max(near), jnp.finfo(near.dtype).tiny)  # or the squares of far examples would underflow
    right = near / largest / (-size * penalty)
    alpha = largest * cg(lambda v: system @ v + penalty * v, right, tol=_TOLERANCE, maxiter=_STEPS)[0]
    return kernel(points, auxiliary, width) @ alpha + kernel(points, known, width) @ share / penalty


def quantile(values: Array, count: Array, share: Array) -> jax.Array:
    """The quantile of the first `count` of `values` [L], interpolated linearly; of none it is inf."""
    there = jnp.where(jnp.arange(len(values)) < count, values, jnp.nan)
    return jnp.where(count > 0, jnp.nanquantile(there, share), jnp.inf)


def spread(x: Array, count: Array) -> jax.Array:
    """The root of the mean squared distance between two of the first `count` of `x` [L, D]."""
    share = jnp.where(jnp.arange(len(x)) < count, 1 / jnp.maximum(count, 1), 0)
    centered = x - (share @ x)[None]
    return jnp.sqrt(2 * share @ jnp.sum(jnp.square(centered), -1))
