"""Reductions that a few wrong uploads cannot carry away; they need every upload at once, a stack.

Throughout: uploads count alike, since the weight is what a client says of itself; an upload of weight 0 is ignored; one
that is not finite is as far out as can be; without any upload the summary is 0.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from fdjax.contract import Reduction
from fdjax.errors import InputError
from fdjax.types import Array, PyTree

_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def coordinate_median() -> Reduction:
    """The median of every coordinate over the clients; of an even number, the mean of the middle two.

    Finite while fewer than half of the uploads are not. Source: Yin et al. (2018), definition 1.
    """
    return _stacked(
        lambda uploads, weights: jax.tree.map(lambda x: _middle(x, _column(weights > 0, x), _half), uploads)
    )


def trimmed_mean(fraction: float) -> Reduction:
    """Mean of every coordinate over the clients but for its b largest and b smallest values, b = floor(fraction S).

    Source: Yin et al. (2018), definition 2. Raises `InputError` unless 0 <= fraction < 1/2.
    """
    _check_fraction("trimmed_mean", fraction)
    return _stacked(
        lambda uploads, weights: jax.tree.map(
            lambda x: _middle(x, _column(weights > 0, x), lambda n: _share(fraction, n)), uploads
        )
    )


def geometric_median(iterations: int = 32, rows: bool = False) -> Reduction:
    """argmin_y sum_k ||x_k - y||, by `iterations` steps of Weiszfeld's algorithm from the coordinate median.

        T(y) = sum_k (x_k / d_k) / sum_k (1 / d_k),  d_k = ||x_k - y||,  over the k with d_k > 0
        y <- (1 - s) T(y) + s y,  s = min(1, m / ||sum_k (x_k - y) / d_k||),  m = number of k with d_k = 0

    Source: Weiszfeld (1937); Vardi and Zhang (2000), equations 2.5 to 2.7, whose s lets y leave an upload it has met.
    Pillutla et al. (2022), RFA, weigh by n_k and bound d_k from below instead.

    Args:
      iterations: static.
      rows: whether each vector of the last axis (one proxy example's K outputs) has a median of its own; if not, the
        whole upload is one vector.
    """

    def solve(parts, present):
        weigh = present.astype(jnp.float32)

        def step(_, y):
            squared = sum(jnp.sum(jnp.square(x - at[None]), axis=-1) for x, at in zip(parts, y, strict=True))
            apart = weigh * (squared > 0)
            pull = apart / jnp.sqrt(jnp.where(squared > 0, squared, 1))
            total = jnp.sum(pull, axis=0)
            target = [_combine(pull / jnp.where(total > 0, total, 1)[None], x) for x in parts]
            moved = [jnp.where((total > 0)[:, None], t - at, 0) for t, at in zip(target, y, strict=True)]
            force = total * jnp.sqrt(sum(jnp.sum(jnp.square(move), axis=-1) for move in moved))
            met = jnp.sum(weigh - apart, axis=0)
            stay = jnp.where(force > met, met / jnp.where(force > 0, force, 1), 1)
            return [at + (1 - stay)[:, None] * move for at, move in zip(y, moved, strict=True)]

        return lax.fori_loop(0, iterations, step, [_middle(x, present[..., None], _half) for x in parts])

    return _of_vectors(solve, rows)


def filtered_mean(fraction: float, threshold: float = 0.0, rows: bool = False) -> Reduction:
    """The mean of what is left when the uploads that spread most along their main direction are dropped, one by one.

        mu = mean of x_k;  (lambda, u) = top eigenpair of (1/S) sum_k (x_k - mu)(x_k - mu)'
        while lambda > threshold and fewer than floor(fraction S_0) are dropped: drop argmax_k ((x_k - mu) . u)^2

    u is never formed: the projections are those of the S x S Gram matrix's top eigenvector, times sqrt(S lambda), or
    with fewer coordinates than clients those on u u'. Where directions tie, those on all of them.

    Source: Diakonikolas et al. (2017), "Being robust (in high dimensions) can be practical", whose filter drops all
    that exceed a tail bound for a known covariance; we drop the worst and bound their number, as the covariance of
    clients is not known. Chang et al. (2019), Cronus, filter so.

    Args:
      fraction: of the uploads that may be dropped, static, 0 <= fraction < 1/2.
      threshold: a variance in units of the uploads squared, below which nothing is dropped.
      rows: as for `geometric_median`; Cronus filters the K outputs of every proxy example by themselves.
    """
    _check_fraction("filtered_mean", fraction)

    def solve(parts, present, number):
        # Around the median, because an outlier's square would swamp the others' in float32.
        centers = [_middle(x, present[..., None], _half) for x in parts]
        parts = [jnp.where(present[..., None], x - at[None], 0) for x, at in zip(parts, centers, strict=True)]
        squares = [_einsum("sgd,sgd->gs", x, x) for x in parts]
        kept = present.T & jnp.isfinite(sum(squares[1:], squares[0]))
        allowed = _share(fraction, number)

        project = _projections(parts, kept)

        def drop(_, kept):
            size = jnp.sum(kept, axis=1)
            ones = kept / jnp.maximum(size, 1)[:, None]
            along, spread = project(kept, ones)
            worst = jnp.argmax(jnp.where(kept, along, -1), axis=1)
            wide = (spread / jnp.maximum(size, 1) > threshold) & (number - size < allowed)
            return kept & ~(wide[:, None] & (jnp.arange(kept.shape[1])[None] == worst[:, None]))

        kept = lax.fori_loop(0, _share(fraction, len(present)), drop, kept).T
        share = kept / jnp.maximum(jnp.sum(kept, axis=0, keepdims=True), 1)
        return [_combine(share, x) + at for x, at in zip(parts, centers, strict=True)]

    return _of_vectors(solve, rows, count=True)


def _projections(parts: list[jax.Array], kept: jax.Array):
    """A function of (kept [G, S], weights of the mean [G, S]): squared projections [G, S] on the main direction, and
    the variance along it [G], both times S; from the covariance where coordinates are fewer than clients."""
    if len(parts) == 1 and parts[0].shape[2] < parts[0].shape[0]:
        x = jnp.where(kept.T[..., None], parts[0], 0)

        def by_covariance(kept, weights):
            centered = jnp.where(kept.T[..., None], x - _einsum("gs,sgd->gd", weights, x)[None], 0)
            covariance = _einsum("sgd,sge->gde", centered, centered)
            top = _top_projector(covariance)
            return _einsum("sgd,gde,sge->gs", centered, top, centered), jnp.sum(top * covariance, axis=(1, 2))

        return by_covariance
    gram = jnp.where(_pairs(kept), sum(_einsum("sgd,tgd->gst", x, x) for x in parts), 0)

    def by_gram(kept, weights):
        row = _einsum("gst,gt->gs", gram, weights)
        grand = jnp.sum(row * weights, axis=1)[:, None, None]
        centered = jnp.where(_pairs(kept), gram - row[:, :, None] - row[:, None, :] + grand, 0)
        top = _top_projector(centered)
        return jnp.diagonal(top, axis1=1, axis2=2), jnp.sum(top * centered, axis=(1, 2))

    return by_gram


def _top_projector(matrices: jax.Array) -> jax.Array:
    """v v' for the top eigenvector v of each positive semidefinite A [G, S, S], 0 for zeros: A^(2^20) over its trace.

    Not `eigh`: of a batch, jaxlib 0.10's waits on its own thread pool, and two host devices on two cores wait for ever.
    """

    def normal(x):
        return x / jnp.maximum(jnp.trace(x, axis1=1, axis2=2), jnp.finfo(x.dtype).tiny)[:, None, None]

    def square(_, x):
        return normal(jnp.matmul(x, x, precision=lax.Precision.HIGHEST))

    return lax.fori_loop(0, 20, square, normal(matrices))


def _stacked(finish: Callable[[PyTree, jax.Array], PyTree]) -> Reduction:
    """The reduction of `finish(uploads [S, ...], weights [S])`."""
    return Reduction(
        lambda ctx, upload, weight: upload, lambda ctx, stack: finish(stack.partials, stack.weight), "stack"
    )


def _of_vectors(solve: Callable, rows: bool, count: bool = False) -> Reduction:
    """Uploads as parts `[S, G, D]` of G vectors: `solve(parts, who is present and finite [S, G])` -> parts `[G, D]`.

    With `count` it is also told how many are present, finite or not.
    """

    def summarise(leaves, weights):
        parts = [x.reshape(x.shape[0], -1, x.shape[-1] if x.ndim > 1 else 1) for x in leaves]
        parts = parts if rows else [x.reshape(x.shape[0], 1, -1) for x in parts]
        present = (weights > 0)[:, None]
        for x in parts:
            present = present & jnp.all(jnp.isfinite(x), axis=-1)
        parts = [jnp.where(present[..., None], x, 0) for x in parts]
        extra = (jnp.sum(weights > 0),) if count else ()
        return [
            y.reshape(x.shape[1:]).astype(x.dtype) for x, y in zip(leaves, solve(parts, present, *extra), strict=True)
        ]

    def finish(uploads, weights):
        leaves, structure = jax.tree.flatten(uploads)
        summary = [summarise([leaf], weights)[0] for leaf in leaves] if rows else summarise(leaves, weights)
        return jax.tree.unflatten(structure, summary)

    return _stacked(finish)


def _middle(x: jax.Array, present: jax.Array, trim: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Mean over axis 0 of those `present` `[S, ...]`, but for the `trim(n)` largest and smallest of each coordinate."""
    ordered = jnp.sort(jnp.where(present, x, jnp.nan), axis=0)  # NaN comes last
    n = jnp.sum(present, axis=0, keepdims=True)
    b = trim(n)
    rank = _column(jnp.arange(x.shape[0]), x)
    kept = (rank >= b) & (rank < n - b)
    return jnp.sum(jnp.where(kept, ordered / jnp.maximum(n - 2 * b, 1), 0), axis=0)


def _half(n: jax.Array) -> jax.Array:
    """How many to trim on each side for the median."""
    return jnp.maximum((n - 1) // 2, 0)


def _share(fraction: float, n: Array | int) -> jax.Array:
    """floor(fraction n), and 3 of 10 at 0.3, whatever the rounding."""
    return jnp.floor(fraction * jnp.asarray(n, jnp.float32) + 1e-3).astype(jnp.int32)


def _combine(coefficients: jax.Array, x: jax.Array) -> jax.Array:
    """sum_s c[s, g] x[s, g, :]."""
    return _einsum("sg,sgd->gd", coefficients, x)


def _column(v: jax.Array, x: jax.Array) -> jax.Array:
    """`[S]` -> `[S, 1, ...]` of x's rank."""
    return v.reshape(-1, *(1,) * (x.ndim - 1))


def _pairs(kept: jax.Array) -> jax.Array:
    return kept[:, :, None] & kept[:, None, :]


def _check_fraction(name: str, fraction: float) -> None:
    if not 0 <= fraction < 0.5:
        raise InputError(f"{name} takes a fraction of the clients in [0, 0.5); got {fraction}")
