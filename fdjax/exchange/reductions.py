"""What the server makes of many uploads, as sums (or least or largest numbers) of partials.

A partial is computed for one client; partials add, so the same reduction works across a chunk, a scan, devices, cohorts
and hosts, and no two uploads need to exist at once; `stack` and the reductions of `robust` do need all of them.

Throughout: an upload of weight 0 leaves no trace, also when it is not finite; without any weight a mean is 0.
Every function takes the context that the engine gives it, and makes no use of it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fdjax.contract import Exchange, Reduction
from fdjax.types import Array, PyTree


def _same(upload: PyTree) -> PyTree:
    return upload


class Averaged(NamedTuple):
    """A partial of a mean, or its total: what is averaged, times its weight, and the weight."""

    value: PyTree
    weight: Array


def weighted_mean(each: Callable[[PyTree], PyTree] = _same) -> Reduction:
    """sum_k w_k f(x_k) / sum_k w_k, leaf by leaf; w_k = n_k unless the engine is told otherwise.

    f = `each`: the upload itself, or jax.nn.softmax to average the probabilities of uploaded logits.

    Source: McMahan et al. (2017), Algorithm 1, last line of the server.
    """

    def partial(ctx, upload, weight):
        return Averaged(jax.tree.map(lambda x: jnp.where(weight > 0, weight * x, 0), each(upload)), weight)

    def finish(ctx, total):
        weighted, weight = total
        return jax.tree.map(lambda x: _ratio(x, weight), weighted)

    return Reduction(partial, finish)


def mean(each: Callable[[PyTree], PyTree] = _same) -> Reduction:
    """(1/S) sum_k f(x_k) over the S clients with a weight above 0, leaf by leaf.

    f = `each`: the upload itself (FedMD and FedDF average logits so, DS-FL uploaded probabilities), or jax.nn.softmax
    to average the probabilities of uploaded logits, which is not the softmax of their average.
    """
    weighted = weighted_mean(each)
    return Reduction(lambda ctx, upload, weight: weighted.partial(ctx, upload, _present(weight)), weighted.finish)


def nothing() -> Reduction:
    """For exchanges in which clients send nothing: the summary is ()."""
    return Reduction(_nothing_of, lambda ctx, total: ())


def _nothing_of(ctx, upload, weight):
    return ()


def sends_nothing(exchange: Exchange) -> bool:
    """Whether it is reduced by `nothing`."""
    return isinstance(exchange.reduce, Reduction) and exchange.reduce.partial is _nothing_of


def stack(each: Callable[[PyTree], PyTree] = _same) -> Reduction:
    """Every participant's f(x_k), as a `Stack` [S, ...] with ids and weights; f = `each`."""
    return Reduction(lambda ctx, upload, weight: each(upload), lambda ctx, stacked: stacked, "stack")


def minimum(each: Callable[[PyTree], PyTree] = _same) -> Reduction:
    """min_k f(x_k), element by element over the participants; f = `each`."""
    return Reduction(lambda ctx, upload, weight: each(upload), lambda ctx, least: least, "min")


def maximum(each: Callable[[PyTree], PyTree] = _same) -> Reduction:
    """max_k f(x_k), element by element over the participants; f = `each`."""
    return Reduction(lambda ctx, upload, weight: each(upload), lambda ctx, most: most, "max")


class Weighted(NamedTuple):
    """Values and their own weights, of a shape that broadcasts against the values."""

    value: PyTree  # most reductions want an array
    weight: Array


def elementwise_mean() -> Reduction:
    """sum_k s_k x_k / sum_k s_k element by element, for uploads `Weighted(x_k, s_k >= 0)`; 0 where all s_k are 0.

    - certainty-weighted, Sattler et al. (2021), FedAUX: x_k logits `[M, K]`, s_k(x) certainties `[M, 1]`
    - class-weighted, Gong et al. (2021), FedAD: x_k logits `[M, K]`, s_k = n_k^c numbers of examples by class `[1, K]`

    The engine's weight says only whether a client is there.
    """

    def partial(ctx, upload, weight):
        x, s = upload
        counts = weight > 0
        return Weighted(jnp.where(counts & (s > 0), s * x, 0), jnp.where(counts, s, 0))

    return Reduction(partial, lambda ctx, total: _ratio(total.value, total.weight))


def class_mean() -> Reduction:
    """sum_k c_k W_k / sum_k c_k class by class, for uploads `Weighted` of a tree of `[..., K]` and of counts c_k `[K]`.

    Where nobody counts a class it is the mean of all. The engine's weight says only whether a client is there.

    Source: Wang et al. (2020), FedMA, the output layer.
    """

    def row(counts, x):
        return counts.reshape(*(1,) * (x.ndim - 1), -1)

    def partial(ctx, upload, weight):
        counts = jnp.where(weight > 0, jnp.maximum(upload.weight, 1e-6), 0)  # the least is what is left if all are 0
        return Weighted(jax.tree.map(lambda x: jnp.where(weight > 0, row(counts, x) * x, 0), upload.value), counts)

    return Reduction(partial, lambda ctx, total: jax.tree.map(lambda x: _ratio(x, row(total.weight, x)), total.value))


class ByLabel(NamedTuple):
    """Sums or means by label, and of how many."""

    value: Array  # [K, D]
    count: Array  # [K]


def nothing_by_label(classes: int, length: int) -> ByLabel:
    """Zeros [K, D], [K]: the sums of no examples, or means of which there is none as yet."""
    return ByLabel(jnp.zeros((classes, length)), jnp.zeros(classes))


def sum_by_label(values: Array, labels: Array, num_labels: int, mask: Array | None = None) -> ByLabel:
    """S[l] = sum_{i: y_i = l} v_i and its number of terms: values `[B, D]`, labels `[B]` -> `[K, D]`, `[K]`.

    `mask` `[B]` leaves out what is 0 there, also when it is not finite. Sums of batches add.
    """
    member = jax.nn.one_hot(labels, num_labels)
    if mask is not None:
        member = member * (mask > 0)[:, None]
        values = jnp.where((mask > 0)[:, None], values, 0)
    return ByLabel(member.T @ values, jnp.sum(member, axis=0))


def label_mean(by_example: bool = False, each: Callable[[PyTree], PyTree] = _same) -> Reduction:
    """Means by label of f(x_k) = `ByLabel(sum [K, D], count [K])`; the summary is `ByLabel(mean, count)`; f = `each`.

    - by client: F[l] = (1/S_l) sum_k sum_k[l] / count_k[l] over the S_l clients that hold l, and count = S_l
      (Jeong et al. 2018, FD; Tan et al. 2022, FedProto, in its code)
    - `by_example`: F[l] = sum_k sum_k[l] / sum_k count_k[l], and count = sum_k count_k[l] (FedProto, in its text)

    A label that nobody holds has mean 0 and count 0. The engine's weight says only whether a client is there.
    """

    def partial(ctx, upload, weight):
        upload = each(upload)
        holds = (weight > 0) & (upload.count > 0)
        size = upload.count if by_example else jnp.ones_like(upload.count)
        value = upload.value if by_example else _ratio(upload.value, upload.count[:, None])
        return ByLabel(jnp.where(holds[:, None], value, 0), jnp.where(holds, size, 0))

    return Reduction(partial, lambda ctx, total: ByLabel(_ratio(total.value, total.count[:, None]), total.count))


def era(mean: Array, temperature: Array | float) -> jax.Array:
    """softmax(mean / T) over the last axis: entropy reduction aggregation, on the mean of probabilities.

    The softmax is over probabilities, not their logarithms: no two of its values differ by more than a factor
    e^(1/T), and the entropy may rise. Of a mean of logits it is what some re-implementations call ERA.

    Source: Itahara et al. (2021), DS-FL, T = 0.1.
    """
    return jax.nn.softmax(mean / temperature)


def enhanced_era(probabilities: Array, beta: Array | float) -> jax.Array:
    """p_c^beta / sum_c p_c^beta over the last axis, beta >= 0; all 0 stays 0. beta = 1 is the identity.

    Source: SCARLET's Enhanced ERA (beta = 2); Chen and Chao (2021), FedBE, sharpen so with beta = 1 / 0.5.
    """
    top = jnp.max(probabilities, axis=-1, keepdims=True)
    power = jnp.where(top > 0, _ratio(probabilities, top) ** beta, 0)  # of ratios, or a large beta would underflow
    return _ratio(power, jnp.sum(power, axis=-1, keepdims=True))


def _present(weight: Array) -> jax.Array:
    return (jnp.asarray(weight) > 0).astype(jnp.float32)


def _ratio(total: Array, weight: Array) -> jax.Array:
    # Not total / weight, which XLA turns into this on one device alone, an ulp away from what several devices do.
    return jnp.where(weight > 0, total * (1 / jnp.where(weight > 0, weight, 1)), 0)
