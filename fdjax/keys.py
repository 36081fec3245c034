"""Randomness: a wide tree of typed keys, and a shuffle that needs no memory.

A key is found from the root by name and number, `root -> purpose -> round -> client id`, so what a client draws depends
on neither its neighbours, nor the chunk, nor the number of devices.
"""

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fdjax.types import Array

_SWAP_ROUNDS = 24
_UNROLLED = 8  # of them in a step of the loop: 1, 4 and 8 take about the same time, and fewer steps are fewer calls


def stream(key: jax.Array, purpose: str, *numbers: Array | int) -> jax.Array:
    """The key for `purpose`, and for each of `numbers` (a round, a client id) below it."""
    key = jax.random.fold_in(key, zlib.crc32(purpose.encode()))
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key


class Shuffle(NamedTuple):
    """A random permutation of `[0, count)` for a traced `count`, evaluated one position at a time."""

    offset: jax.Array  # [24] uint32 in [0, count)
    salt: jax.Array  # [24] uint32
    count: jax.Array  # [] uint32

    def __call__(self, position: jax.Array) -> jax.Array:
        """Where each of `position` (any shape, values in [0, count)) goes."""

        def swap_or_not(x, drawn):
            offset, beyond, salt = drawn
            partner = jnp.where(offset >= x, offset - x, beyond - x)
            mixed = (jnp.maximum(x, partner) ^ salt) * jnp.uint32(0x9E3779B1)
            mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x85EBCA77)
            return jnp.where(mixed >> 31, partner, x), None

        # A loop, because XLA:CPU fuses what is unrolled into the gather of the examples: it then computes all rounds
        # anew for every feature of an example, and in jaxlib 0.12 LLVM does not come to an end.
        drawn = self.offset, self.offset + self.count, self.salt
        x, _ = lax.scan(swap_or_not, position.astype(jnp.uint32), drawn, unroll=_UNROLLED)
        return x.astype(jnp.int32)


def shuffle(key: jax.Array, count: Array | int) -> Shuffle:
    """A permutation of `[0, count)`; the key is consumed.

    `jax.random.permutation` sorts a buffer as long as the largest client for every client; this one costs 24 arithmetic
    steps for each example used, so a client pays for its own examples alone.

    Round r pairs x with (offset_r - x) mod count and swaps the pair on a hash bit of its larger member: a permutation
    whatever the hash.

    Source: Hoang, Morris, Rogaway, "An Enciphering Scheme Based on a Card Shuffle" (2012), swap-or-not; the hash (two
    multiplications) and the 24 rounds are ours, chosen for shuffling and not for secrecy.
    """
    size = jnp.maximum(jnp.asarray(count), 1).astype(jnp.uint32)
    offset, salt = jax.random.bits(key, (2, _SWAP_ROUNDS), jnp.uint32)
    return Shuffle(offset % size, salt, size)
