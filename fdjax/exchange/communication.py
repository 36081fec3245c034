"""Bytes on the simulated network, counted from the pytrees that are sent."""

from typing import NamedTuple

import jax
import numpy as np

from fdjax.types import PyTree


class Traffic(NamedTuple):
    """Bytes of one round: of one participant of each cohort, and of all participants together."""

    up: tuple[int, ...]
    down: tuple[int, ...]
    participants: tuple[int, ...]

    @property
    def round_up(self) -> int:
        """Bytes that all participants of a round send."""
        return sum(n * b for n, b in zip(self.participants, self.up, strict=True))

    @property
    def round_down(self) -> int:
        """Bytes that all participants of a round receive."""
        return sum(n * b for n, b in zip(self.participants, self.down, strict=True))


def size(tree: PyTree) -> int:
    """Bytes of a pytree of arrays or of their shapes and dtypes."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
