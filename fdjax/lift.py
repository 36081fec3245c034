"""From one client to many: the only place where clients are vmapped, mapped, sharded or summed.

Clients are rows of a stacked pytree, in order of their work. A row of zeros is a client without examples: it runs no
step and weighs nothing, so rows are padded with zeros to fill the last chunk.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from fdjax.types import PyTree

AXIS = "clients"


def make_mesh(devices: list[Any] | None = None) -> Mesh:
    """A mesh over `devices` (all of this host's, if not given) whose one axis is the clients'."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)


def over_clients(
    one: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    shared: PyTree,
    rows: PyTree,
    *,
    chunk: int,
    mesh: Mesh,
) -> tuple[PyTree, PyTree]:
    """Run `one(shared, row) -> (kept, partial)` for every row: kept stacked `[S, ...]`, and the sum of partials.

    Each device takes every `devices`-th chunk of `chunk` neighbouring rows, vmaps within a chunk and runs its chunks
    one after another, so memory follows the chunk, and clients wait only for others of like work. A chunk of one is
    not vmapped at all, which keeps native convolutions native.
    """
    (size,) = {leaf.shape[0] for leaf in jax.tree.leaves(rows)}
    chunk = min(chunk, -(-size // mesh.size))
    chunks = -(-size // (chunk * mesh.size))
    padding = chunks * mesh.size * chunk - size

    def deal(x):  # [S, ...] -> [devices, chunks, chunk, ...]
        x = jnp.concatenate([x, jnp.zeros((padding, *x.shape[1:]), x.dtype)]) if padding else x
        return jnp.swapaxes(x.reshape(chunks, mesh.size, chunk, *x.shape[1:]), 0, 1)

    def collect(x):  # and back
        return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[3:])[:size]

    @jax.jit  # traced once, for its shapes and for its use
    def one_chunk(shared, rows):
        if chunk == 1:
            kept, partial = one(shared, jax.tree.map(lambda x: x[0], rows))
            return jax.tree.map(lambda x: x[None], kept), partial
        kept, partial = jax.vmap(one, in_axes=(None, 0))(shared, rows)
        return kept, jax.tree.map(lambda x: jnp.sum(x, axis=0), partial)

    def on_device(shared, rows):
        rows = jax.tree.map(lambda x: x[0], rows)
        _, partial = jax.eval_shape(one_chunk, shared, jax.tree.map(lambda x: x[0], rows))
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), partial)

        def step(total, rows):
            kept, partial = one_chunk(shared, rows)
            return jax.tree.map(jnp.add, total, partial), kept

        total, kept = lax.scan(step, zero, rows)
        return jax.tree.map(lambda x: x[None], kept), lax.psum(total, AXIS)

    # check_vma would psum the gradient of replicated parameters over devices: clients training on each other's data.
    sharded = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(AXIS)),
        out_specs=(PartitionSpec(AXIS), PartitionSpec()),
        check_vma=False,
    )
    kept, total = sharded(shared, jax.tree.map(deal, rows))
    return jax.tree.map(collect, kept), total
