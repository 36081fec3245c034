"""Where the states of a cohort's clients lie: in rows that are shared out over the devices.

Clients are ranked by falling work, and dealt to the devices in turns, so that each has clients of all sizes and works
on its own rows when all of them train or are tested. A single device has its clients in order of rank.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fdjax.engine.lift import AXIS, Lifting
from fdjax.types import Array, PyTree


class Storage(NamedTuple):
    """The rows of one cohort: units of neighbours by rank, unit i being the next one of device i mod `devices`.

    Rows without a client fill up the last turn, and what is stored there means nothing.
    """

    clients: int  # C_j
    devices: int
    unit: int  # clients
    units: int  # of each device

    @property
    def rows(self) -> int:
        """Rows of all devices."""
        return self.devices * self.units * self.unit

    def row(self, rank: Any) -> Any:
        """The row of each client; a rank that nobody has, C_j or more, is of no row at all."""
        if self.devices == 1:
            return rank
        unit = rank // self.unit
        row = ((unit % self.devices) * self.units + unit // self.devices) * self.unit + rank % self.unit
        xp = np if isinstance(rank, np.ndarray) else jnp
        return xp.where(rank < self.clients, row, self.rows)

    def deal(self, x: Array) -> Array:
        """From [C_j, ...] by rank to [rows, ...]; rows without a client are zeros."""
        if self.devices == 1:
            return x
        xp = np if isinstance(x, np.ndarray) else jnp
        padding = ((0, self.rows - self.clients), *((0, 0),) * (x.ndim - 1))
        turns = xp.pad(x, padding).reshape(self.units, self.devices, self.unit, *x.shape[1:])
        return turns.swapaxes(0, 1).reshape(self.rows, *x.shape[1:])

    def collect(self, x: Array) -> Array:
        """From [rows, ...] to [C_j, ...] by rank."""
        if self.devices == 1:
            return x
        turns = x.reshape(self.devices, self.units, self.unit, *x.shape[1:])
        return turns.swapaxes(0, 1).reshape(self.rows, *x.shape[1:])[: self.clients]


def storage(clients: int, lifting: Lifting) -> Storage:
    """The storage of a cohort: whole chunks for each device, and the chunks themselves as units for sums in order."""
    devices = lifting.mesh.size
    if devices == 1:
        return Storage(clients, 1, 1, clients)
    if lifting.ordered:  # chunks of the same clients on any number of devices
        unit = min(lifting.chunk, clients)
        return Storage(clients, devices, unit, -(-clients // (unit * devices)))
    share = -(-clients // devices)
    chunk = min(lifting.chunk, share)
    return Storage(clients, devices, 1, -(-share // chunk) * chunk)


def by_rows(mesh: Mesh) -> NamedSharding:
    """Rows shared out over the devices of `mesh`, if it has several."""
    return NamedSharding(mesh, PartitionSpec(AXIS) if mesh.size > 1 else PartitionSpec())


def keep_by_rows(clients: PyTree, mesh: Mesh) -> PyTree:
    """The same, stored so inside of a compiled function; trials, whose mesh is one device, are left alone."""
    return clients if mesh.size == 1 else jax.lax.with_sharding_constraint(clients, by_rows(mesh))


def on_host(storages: Sequence[Storage], clients: tuple[PyTree, ...], mesh: Mesh) -> tuple[PyTree, ...]:
    """All states on every host, [C_j, ...] by rank: to look at, for on the way they are all on each device."""
    gather = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
    return tuple(
        jax.tree.map(lambda x, s=s: np.asarray(s.collect(jax.device_get(gather(x)))), c)
        for s, c in zip(storages, clients, strict=True)
    )


def placed(storages: Sequence[Storage], clients: tuple[PyTree, ...], mesh: Mesh) -> tuple[PyTree, ...]:
    """Stored states from states on the host, [C_j, ...] by rank; every device gets its own rows and no others."""

    def place(s: Storage, x: np.ndarray) -> jax.Array:
        rank = np.arange(s.clients)
        client = np.zeros(s.rows, int)  # any will do for a row without one
        client[np.asarray(s.row(rank))] = rank

        def part(index: Any) -> np.ndarray:
            return np.asarray(x)[client[index[0]]]

        return jax.make_array_from_callback((s.rows, *x.shape[1:]), by_rows(mesh), part)

    return tuple(jax.tree.map(lambda x, s=s: place(s, x), c) for s, c in zip(storages, clients, strict=True))
