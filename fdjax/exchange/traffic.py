"""Bytes on the simulated network, counted from what is really sent.

Arrays count by their shapes, once and for all; what is coded or ragged is counted by the clients as they send it. A
compiled round returns `Sent`: how many participants took part and sent, and the bytes that they counted. `Traffic`
turns that into bytes on the host, in whole numbers that no float32 could hold.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from fdjax.types import Array, PyTree


class Known(NamedTuple):
    """A part of an upload that the server has already: delivered, but not counted."""

    tree: PyTree


class Sent(NamedTuple):
    """What crossed the network in one exchange with one cohort; [R] each for the rounds of a superstep."""

    participants: Array  # int32: that hold examples, so that they receive
    up: Array | tuple[()]  # float32: bytes of their uploads, where clients count them; () where arrays say it
    down: Array | tuple[()]  # float32: the same of what they received
    senders: Array  # int32: participants that were not dropped, so that they send


class Sizes(NamedTuple):
    """Bytes of one exchange for one participant of one cohort; None where clients count them."""

    exchange: str
    cohort: int
    up: int | None
    down: int | None


class Traffic(NamedTuple):
    """Bytes for one participant of each cohort, exchange by exchange."""

    round: tuple[tuple[Sizes, ...], ...]  # exchange by exchange, cohort by cohort
    setup: tuple[tuple[Sizes, ...], ...]
    participants: tuple[int, ...]  # of a round, of each cohort; at most so many where their number is drawn
    sizes: tuple[int, ...]  # clients of each cohort, who all take part in the set-up

    def per_participant(self, way: str) -> tuple[int, ...] | None:
        """Bytes "up" or "down" of a round for one participant of each cohort; None if clients count any of them."""
        columns = [[getattr(sizes, way) for sizes in cohort] for cohort in zip(*self.round, strict=True)]
        if any(size is None for column in columns for size in column):
            return None
        return tuple(sum(column) for column in columns)


def count_bytes(sizes: Sequence[Sequence[Sizes]], sent: Sequence[Sequence[Sent]]) -> dict[str, np.ndarray]:
    """Bytes {"up", "down"} of all participants together, float64, of the shape that `sent` has ([R], or [])."""
    total = {}
    for way, who in (("up", "senders"), ("down", "participants")):
        parts = [
            getattr(counted, way) if size is None else np.asarray(getattr(counted, who), np.float64) * size
            for exchange, its_sent in zip(sizes, sent, strict=True)
            for size, counted in zip((getattr(s, way) for s in exchange), its_sent, strict=True)
        ]
        total[way] = np.sum([np.asarray(part, np.float64) for part in parts], axis=0)
    return total


def flags(number: int) -> int:
    """Bytes of so many flags, a bit each."""
    return -(-number // 8)


def size(tree: PyTree) -> int:
    """Bytes of a pytree of arrays or of their shapes and dtypes; what is `Known` takes none."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Known))
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves if not isinstance(leaf, Known))
