"""Matrices sent as factors of a rank that their own spectrum asks for, under shapes that do not change.

What is sent of an [m, n] matrix A of rank r are U_r [m, r], the singular values [r] and V_r [r, n]: r (m + n + 1)
numbers. Here A_r = U_r S_r V_r itself goes on, masked and not cut, and these are counted. The decomposition is
Jacobi's, of A^T A: LAPACK in a round waits for threads that other host devices hold.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fdjax.types import Array, PyTree

_SWEEPS, _SMALL = 8, 1e-6  # at most so many, until what is beside the diagonal is so small a part of what is on it


def truncated(tree: PyTree, energy: Array) -> tuple[PyTree, jax.Array]:
    """Every matrix at the least rank r with sum_{i <= r} s_i^2 > energy sum_i s_i^2, and how many numbers are sent.

    A leaf of more axes is one of its last axis; one of fewer than two is sent as it is, and so is one of which the
    factors are no smaller, so that an energy of 1 is exact. Source: Wu et al. (2022), FedKD, equation of its section 3.
    """
    leaves, structure = jax.tree.flatten(tree)
    found = [_truncated(leaf, energy) for leaf in leaves]
    return jax.tree.unflatten(structure, [leaf for leaf, _ in found]), sum((size for _, size in found), jnp.int32(0))


def _truncated(leaf: jax.Array, energy: Array) -> tuple[jax.Array, jax.Array]:
    whole = jnp.int32(leaf.size)
    if leaf.ndim < 2:
        return leaf, whole
    m, n = math.prod(leaf.shape[:-1]), leaf.shape[-1]
    matrix = leaf.reshape(m, n)
    tall = matrix if n <= m else matrix.T
    values, vectors = eigenvectors(tall.T @ tall)
    order = jnp.argsort(-values)
    values, vectors = jnp.maximum(values[order], 0), vectors[order]
    share = jnp.cumsum(values) / jnp.maximum(jnp.sum(values), jnp.finfo(jnp.float32).tiny)
    rank = jnp.where(jnp.sum(values) > 0, jnp.minimum(1 + jnp.sum(share <= energy), len(values)), 0)
    kept = vectors * (jnp.arange(len(values)) < rank)[:, None]
    lower = (tall @ kept.T) @ kept
    size = rank * (m + n + 1)
    lower = (lower if n <= m else lower.T).reshape(leaf.shape)
    return jnp.where(size < whole, lower, leaf), jnp.minimum(size, whole)


def eigenvectors(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues [n] and eigenvectors [n, n], a row each, of a symmetric matrix; by rotations, n / 2 at once.

    A row is paired with the one half the matrix further on, their common number is rotated away, and rows and columns
    move on by one place, as at a round-robin tournament, until each has met each other one; that is a sweep.
    """
    size = len(matrix)
    half = (size + 1) // 2
    a = jnp.pad(matrix, (0, 2 * half - size))
    top, bottom = np.arange(half), np.arange(half, 2 * half)
    moved = np.concatenate([top[:1], bottom[:1], top[1:-1], bottom[1:], top[-1:]]) if half > 1 else np.arange(2)

    def turn(rows: jax.Array, c: jax.Array, s: jax.Array) -> jax.Array:
        p, q = rows[:half], rows[half:]
        return jnp.concatenate([c[:, None] * p - s[:, None] * q, s[:, None] * p + c[:, None] * q])[moved]

    def step(_, carry):
        a, vectors = carry
        diagonal, common = jnp.diagonal(a), jnp.diagonal(a[:half, half:])
        apart = (diagonal[half:] - diagonal[:half]) / jnp.where(common == 0, 1, 2 * common)
        t = jnp.where(apart >= 0, 1.0, -1.0) / (jnp.abs(apart) + jnp.sqrt(1 + apart**2))
        t = jnp.where(common == 0, 0, t)
        c = lax.rsqrt(1 + t**2)
        return turn(turn(a, c, t * c).T, c, t * c), turn(vectors, c, t * c)

    def sweep(carry):
        return carry[0] + 1, lax.fori_loop(0, 2 * half - 1, step, carry[1])

    def goes_on(carry):
        sweeps, (a, _) = carry
        beside = jnp.where(jnp.eye(2 * half, dtype=bool), 0, jnp.abs(a))
        return (sweeps < _SWEEPS) & (jnp.max(beside) > _SMALL * jnp.max(jnp.diagonal(a)))

    _, (a, vectors) = lax.while_loop(goes_on, sweep, (jnp.int32(0), (a, jnp.eye(2 * half))))
    # A row that was padded has no part in the others; it is the one of which the first `size` numbers are 0.
    order = jnp.argsort(jnp.sum(vectors[:, :size] ** 2, 1) < 0.5, stable=True)[:size]
    return jnp.diagonal(a)[order], vectors[order, :size]
