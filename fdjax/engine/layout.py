"""What a simulation carries from round to round, and how its clients are laid out."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from fdjax.data.federation import replicated
from fdjax.engine import lift
from fdjax.types import Array, Cohort, Federation, Holdings, PyTree


class State(NamedTuple):
    """Everything that changes between rounds."""

    server: PyTree
    clients: tuple[PyTree, ...]  # one stacked pytree [C_j, ...] a cohort, rows as in the federation
    round: jax.Array  # [] int32: rounds done
    root: jax.Array  # [2] uint32: the root key's data; a typed key on several devices would miss jit's fast path


class Layout(NamedTuple):
    """What is static about a simulation besides its algorithm."""

    cohorts: tuple[Cohort, ...]
    participants: tuple[int, ...]  # per round, of each cohort
    mesh: Mesh
    chunk: int = 1  # clients vmapped together on one device
    narrow: tuple[tuple[float, int], ...] = ()  # see lift.Lifting
    eval_batch: int = 500
    own_batch: int = 500  # the same for the clients' own test parts, which may be small
    full_eval: bool = True  # test every personal model on the full test set too: C passes over it
    kind: str = "shard_map"  # one of lift.KINDS
    ordered_sums: bool = False  # bitwise the same sums on any number of devices, for memory of all chunks' partials
    drop_nonfinite: bool = False  # leave a client out of a round in which its numbers are not finite

    @property
    def lifting(self) -> lift.Lifting:
        """How clients are lifted."""
        return lift.Lifting(self.kind, self.mesh, self.chunk, self.narrow, self.ordered_sums)

    @property
    def slices(self) -> list[slice]:
        """The rows of each cohort."""
        bounds = np.cumsum((0, *(cohort.size for cohort in self.cohorts)))
        return [slice(int(low), int(high)) for low, high in itertools.pairwise(bounds)]


class Row(NamedTuple):
    """One client, as it is lifted."""

    client: Array
    start: Array
    count: Array
    state: PyTree


def rows_of(federation: Federation, holdings: Holdings, part: slice, state: PyTree) -> Row:
    """The rows of a cohort."""
    return Row(federation.client[part], holdings.start[part], holdings.count[part], state)


def compiler(layout: Layout) -> Callable[..., Any]:
    """jax.jit whose results have one placement, or the second superstep would compile anew; nothing under `loop`."""
    if layout.kind == "loop":
        return lambda function, **options: function
    return functools.partial(jax.jit, out_shardings=replicated(layout.mesh))
