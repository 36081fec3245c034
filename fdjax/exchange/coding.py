"""Soft labels in few bits: constrained quantisation, and the size of what an adaptive arithmetic coder sends.

Symbols are whole numbers `[n, K]` that sum to L = 2^b - 1 in every row; they stand for the probabilities symbols / L.
A row of zeros stands for one that was never sent.
"""

import jax
import jax.numpy as jnp

from fdjax.exchange import traffic
from fdjax.exchange.proxy import SoftLabels
from fdjax.exchange.wrappers import Codec
from fdjax.types import Array

BITS = ("1", "2", "4", "32")  # of each number of a label; with 32 they are floats, which are not coded


def levels(bits: int) -> int:
    """L, the largest symbol."""
    return 2**bits - 1


def quantise(probabilities: Array, bits: int) -> jax.Array:
    """argmin over symbols s of ||s / L - p||, row by row: `[n, K]` -> int32 `[n, K]`; bits = 1 is the argmax, one-hot.

    s_i = floor(L p_i), and the L - sum_i s_i largest remainders are rounded up instead, of equals the first.
    """
    scaled = levels(bits) * jnp.asarray(probabilities)
    floor = jnp.floor(scaled)
    missing = levels(bits) - jnp.sum(floor, axis=-1, keepdims=True)
    rank = jnp.argsort(jnp.argsort(floor - scaled, axis=-1, stable=True), axis=-1)
    return (floor + (rank < missing)).astype(jnp.int32)


def coded_bytes(symbols: Array, known: Array, bits: int) -> jax.Array:
    """Bytes of `symbols` [n, K] for a receiver that has `known` [n, K] of the same examples, to float32's rounding.

    The code: for each row a flag, whether it is as known; a row that is not has its symbols coded from the first to the
    last but one (the last is L less their sum), each a number from 0 to r, where r is L less the symbols before it, and
    none where r = 0. Flags, and the symbols of each pair (position, r), have a Krichevsky-Trofimov estimator of their
    own, (n_s + 1/2) / (n + A / 2) for an alphabet of A, which the receiver can follow. An arithmetic coder spends
    ceil(-log2 P) + 1 bits on a message of probability P; we count floor(-log2 P / 8) + 2 bytes, never less.
    """
    symbols, known = jnp.asarray(symbols, jnp.int32), jnp.asarray(known, jnp.int32)
    top = levels(bits)
    changed = jnp.any(symbols != known, axis=-1)
    number = jnp.sum(changed)
    flags = jnp.stack([number, len(changed) - number])
    body = symbols[:, :-1]
    left = top - (jnp.cumsum(body, axis=-1) - body)
    position = jnp.broadcast_to(jnp.arange(body.shape[1]), body.shape)
    counts = jnp.zeros((body.shape[1], top + 1, top + 1)).at[position, left, body].add(changed[:, None] * 1.0)
    nats = _estimator(flags, jnp.int32(2)) + jnp.sum(_estimator(counts, jnp.arange(top + 1)[None] + 1))
    return jnp.floor(nats / jnp.log(2.0) / 8) + 2


def quantised_labels(bits: int, memory: str) -> Codec:
    """The codec of `SoftLabels` of probabilities [n, K]: quantised to `bits`, and only changes are sent.

    A client's state has what was last sent of every proxy example as its entry `memory`, uint8 symbols [M, K], at first
    `nothing_sent`. Ids are not counted, nor are labels that are not given. Source: Sattler et al. (2022), CFD.
    """

    def encode(ctx, tree: SoftLabels) -> SoftLabels:
        return tree._replace(labels=quantise(tree.labels, bits).astype(jnp.uint8))

    def decode(ctx, code: SoftLabels) -> SoftLabels:
        return code._replace(labels=code.labels / levels(bits))

    def count(ctx, code: SoftLabels, known):
        at = slice(None) if isinstance(code.ids, tuple) else code.ids
        number, after = coded_bytes(code.labels, known[at], bits), known.at[at].set(code.labels)
        return jnp.where(code.given, number, 0), jnp.where(code.given, after, known)

    return Codec(encode, decode, count, memory)


def labels_as_they_are() -> Codec:
    """The codec of `SoftLabels` in full precision: 4 bytes a number, none where labels are not given; no memory."""

    def count(ctx, code: SoftLabels, known):
        return jnp.where(code.given, float(traffic.size(code.labels)), 0), known

    return Codec(lambda ctx, tree: tree, lambda ctx, code: code, count)


def labels_in(bits: str, memory: str) -> Codec:
    """The codec of `SoftLabels` in one of `BITS`: `labels_as_they_are` in the most, or else `quantised_labels`."""
    return labels_as_they_are() if bits == BITS[-1] else quantised_labels(int(bits), memory)


def with_ids(codec: Codec) -> Codec:
    """The codec of `SoftLabels` with the ids counted too, which are all that is sent where no labels are given."""

    def count(ctx, code: SoftLabels, known):
        number, after = codec.count(ctx, code, known)
        return number + traffic.size(code.ids), after

    return codec._replace(count=count)


def nothing_sent(examples: int, classes: int) -> jax.Array:
    """The memory of `quantised_labels` before anything is sent."""
    return jnp.zeros((examples, classes), jnp.uint8)


def _estimator(counts: jax.Array, alphabet: jax.Array) -> jax.Array:
    """-log P of a sequence with `counts` [..., S] of symbols, `alphabet` [...] of which can occur, in any order."""
    lgamma, half = jax.lax.lgamma, alphabet * 0.5
    counts = counts * 1.0
    return (
        lgamma(jnp.sum(counts, axis=-1) + half)
        - lgamma(jnp.broadcast_to(half, counts.shape[:-1]))
        - jnp.sum(lgamma(counts + 0.5) - lgamma(jnp.full_like(counts, 0.5)), axis=-1)
    )
