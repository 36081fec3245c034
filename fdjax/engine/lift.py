"""From one client to many, and from one trial to many: the only place where either is vmapped, mapped or sharded.

Clients are rows of a stacked pytree, in order of their work. A row of zeros is a client without examples: it runs no
step and weighs nothing, so rows are padded with zeros to fill the last chunk.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from fdjax.types import Array, PyTree

AXIS = "clients"
TRIALS = "trials"

One = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]  # (shared, row) -> (kept, partial)

KINDS = {
    "vmap": "all clients at once on one device",
    "chunk": "chunks of clients one after another on one device",
    "shard_map": "chunks on every device of the mesh, of one host or of several",
    "pmap": "the same under pmap",
    "loop": "a Python loop, uncompiled around the client, that names the client, round and stage of a failure",
}


class Lifting(NamedTuple):
    """How one client becomes many. All kinds give the same numbers, to the rounding of a sum's order."""

    kind: str
    mesh: Mesh
    chunk: int  # clients vmapped together on one device; of no meaning to vmap and loop
    narrow: tuple[tuple[float, int], ...] = ()
    # (share, chunk), shares rising: the clients of most work, up to this share of all, in narrower chunks of their own
    ordered: bool = False  # sum partials chunk by chunk whoever computed them: bitwise equal on 1, 2, 4 devices


def make_mesh(devices: list[Any] | None = None) -> Mesh:
    """A mesh over `devices` (all of every host's, if not given) whose one axis is the clients'."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)


def over_clients(
    one: One, shared: PyTree, rows: PyTree, lifting: Lifting, *, stage: str = "", names: Array | None = None
) -> tuple[PyTree, PyTree]:
    """Run `one(shared, row) -> (kept, partial)` for every row: kept stacked `[S, ...]`, and the sum of partials.

    Memory follows the chunk, and a client waits only for others of like work. A chunk of one is not vmapped at all,
    which keeps native convolutions native. `stage` and `names` [S] (client ids) are what a failure under `loop` says.
    """
    (size,) = {leaf.shape[0] for leaf in jax.tree.leaves(rows)}
    if lifting.kind == "loop":
        return _loop(one, shared, rows, size, stage, names)
    parts, start = [], 0
    for share, chunk in (*lifting.narrow, (1.0, lifting.chunk)):
        stop = round(share * size)
        if start < stop:
            part = jax.tree.map(lambda x, start=start, stop=stop: x[start:stop], rows) if stop - start < size else rows
            parts.append(_in_chunks(one, shared, part, stop - start, lifting._replace(chunk=chunk)))
            start = stop
    if len(parts) == 1:
        return parts[0]
    kept, totals = zip(*parts, strict=True)
    return jax.tree.map(lambda *x: jnp.concatenate(x), *kept), jax.tree.map(lambda *x: sum(x[1:], x[0]), *totals)


def _in_chunks(one: One, shared: PyTree, rows: PyTree, size: int, lifting: Lifting) -> tuple[PyTree, PyTree]:
    devices = lifting.mesh.size
    most = size if lifting.ordered else -(-size // devices)  # a sum in order is of the same chunks on any devices
    chunk = size if lifting.kind == "vmap" else min(lifting.chunk, most)
    turns = -(-size // (chunk * devices))  # chunks that each device runs
    deal, collect = _dealing(devices, turns)

    @jax.jit  # traced once, for its shapes and for its use
    def one_chunk(shared, rows):
        if chunk == 1:
            kept, partial = one(shared, jax.tree.map(lambda x: x[0], rows))
            return jax.tree.map(lambda x: x[None], kept), partial
        kept, partial = jax.vmap(one, in_axes=(None, 0))(shared, rows)
        return kept, jax.tree.map(lambda x: jnp.sum(x, axis=0), partial)

    def on_device(shared, rows):  # rows [turns, chunk, ...] -> kept, and the sum, or with `ordered` all [turns, ...]
        if lifting.ordered:
            return lax.map(lambda rows: one_chunk(shared, rows), rows)
        _, partial = jax.eval_shape(one_chunk, shared, jax.tree.map(lambda x: x[0], rows))

        def turn(total, rows):
            kept, partial = one_chunk(shared, rows)
            return jax.tree.map(jnp.add, total, partial), kept

        total, kept = lax.scan(turn, _zeros(partial), rows)
        return kept, total if devices == 1 else lax.psum(total, AXIS)

    def into_chunks(x):
        padding = turns * devices * chunk - size
        x = jnp.concatenate([x, jnp.zeros((padding, *x.shape[1:]), x.dtype)]) if padding else x
        return deal(x.reshape(turns * devices, chunk, *x.shape[1:]))

    kept, total = _spread(on_device, lifting)(shared, jax.tree.map(into_chunks, rows))
    kept = jax.tree.map(lambda x: collect(x).reshape(-1, *x.shape[3:])[:size], kept)
    return kept, _sum_in_order(jax.tree.map(collect, total)) if lifting.ordered else total


def _spread(on_device, lifting: Lifting):
    """`on_device` for rows [devices, ...] of every device: kept [devices, ...], sums as they are (ordered: as kept)."""
    if lifting.kind == "pmap":
        out = (0, 0 if lifting.ordered else None)
        return jax.pmap(on_device, AXIS, in_axes=(None, 0), out_axes=out, devices=list(lifting.mesh.devices.flat))

    def rank_reduced(shared, rows):
        kept, total = on_device(shared, jax.tree.map(lambda x: x[0], rows))
        return jax.tree.map(lambda x: x[None], kept), jax.tree.map(
            lambda x: x[None], total
        ) if lifting.ordered else total

    if lifting.kind != "shard_map":
        return rank_reduced
    ours = PartitionSpec(AXIS)
    # check_vma would psum the gradient of replicated parameters over devices: clients training on each other's data.
    return jax.shard_map(
        rank_reduced,
        mesh=lifting.mesh,
        in_specs=(PartitionSpec(), ours),
        out_specs=(ours, ours if lifting.ordered else PartitionSpec()),
        check_vma=False,
    )


def _dealing(devices: int, turns: int):
    """Chunks of falling work to devices and back: there and back again like the turns of a plough, so work is even."""
    order = np.arange(turns * devices).reshape(turns, devices)
    order[1::2] = order[1::2, ::-1]
    there = order.T.ravel()
    back = np.argsort(there)

    def deal(x):  # [turns * devices, ...] -> [devices, turns, ...]
        return (x if devices == 1 else x[there]).reshape(devices, turns, *x.shape[1:])

    def collect(x):
        x = x.reshape(turns * devices, *x.shape[2:])
        return x if devices == 1 else x[back]

    return deal, collect


def make_trial_mesh(devices: list[Any]) -> Mesh:
    """A mesh over `devices` whose one axis is the trials': each device runs whole trials by itself."""
    return jax.make_mesh((len(devices),), (TRIALS,), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)


def trial_axes(varies: PyTree) -> PyTree:
    """vmap's axes of a pytree of bools that says which leaves differ between trials."""
    return jax.tree.map(lambda v: 0 if v else None, varies)


def trial_specs(varies: PyTree) -> PyTree:
    """Its partition: leaves that differ are shared out over devices, the others are everywhere."""
    return jax.tree.map(lambda v: PartitionSpec(TRIALS) if v else PartitionSpec(), varies)


def what_varies(one: Callable[..., PyTree], args: tuple[PyTree, ...], varies: tuple[PyTree, ...]) -> PyTree:
    """Which leaves of `one(*args)` differ between trials if those of args marked in `varies`, [T, ...], do.

    What does not differ is computed once for all trials that run together: the teachers of FedDistill, which know
    nothing of temperature and weight, or the order of the examples.
    """
    found = []

    @jax.custom_batching.custom_vmap
    def probe(out):
        return out

    @probe.def_vmap
    def _(size, batched, out):
        found.append(batched[0])
        return out, batched[0]

    out = jax.eval_shape(jax.vmap(lambda *args: probe(one(*args)), in_axes=trial_axes(varies)), *args)
    return found[0] if found else jax.tree.map(lambda _: False, out)


def over_trials(
    one: Callable[..., PyTree], varies: tuple[PyTree, ...], varies_out: PyTree, mesh: Mesh, width: int
) -> Callable[..., PyTree]:
    """`lifted(turns, *args)`: `one` for every trial, `width` of them vmapped together on a device.

    Leaves marked in `varies` are [T, ...], the trials of each device one after another; `turns` [devices] int32 is how
    many chunks of trials each device runs, so trials that ended cost nothing: their rows are zeros.
    """
    vmapped = jax.vmap(one, in_axes=trial_axes(varies), out_axes=trial_axes(varies_out))

    def on_device(turns, *args):
        (most,) = {x.shape[0] for x, v in zip(*map(jax.tree.leaves, (args, varies)), strict=True) if v}
        if most == width:
            return vmapped(*args)

        def chunk(i):
            part = jax.tree.map(lambda x, v: lax.dynamic_slice_in_dim(x, i * width, width) if v else x, args, varies)
            return vmapped(*part)

        def turn(i, done):
            return jax.tree.map(
                lambda all_, new, v: lax.dynamic_update_slice_in_dim(all_, new, i * width, 0) if v else new,
                done, chunk(i), varies_out,
            )  # fmt: skip

        def room(x, v):
            return jnp.zeros((most, *x.shape[1:]) if v else x.shape, x.dtype)

        nothing = jax.tree.map(room, jax.eval_shape(chunk, 0), varies_out)
        return lax.fori_loop(0, turns[0], turn, nothing)

    # check_vma=False as for clients: shared parameters are replicated, and their gradients are nobody else's business.
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(PartitionSpec(TRIALS), *trial_specs(varies)),
        out_specs=trial_specs(varies_out),
        check_vma=False,
    )


def _zeros(shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _sum_in_order(partials: PyTree) -> PyTree:
    """[chunks, ...] summed from the first to the last, so that chunks of padding at the end change no bit."""
    if not jax.tree.leaves(partials):  # clients that are made, say, add nothing
        return partials
    first = jax.tree.map(lambda x: jnp.zeros_like(x[0]), partials)
    return lax.scan(lambda total, partial: (jax.tree.map(jnp.add, total, partial), ()), first, partials)[0]


def _loop(one: One, shared: PyTree, rows: PyTree, size: int, stage: str, names: Array | None):
    kept, total = [], None
    compiled = jax.jit(one)
    for i in range(size):
        row = jax.tree.map(lambda x, i=i: x[i], rows)
        try:
            mine, partial = jax.block_until_ready(compiled(shared, row))
        except Exception as error:
            who = f"row {i}" if names is None else f"client {int(names[i])}"
            error.add_note(f"{who}, {stage or 'unnamed stage'}\n  row: {_shapes(row)}\n  shared: {_shapes(shared)}")
            raise
        kept.append(mine)
        total = partial if total is None else jax.tree.map(jnp.add, total, partial)
    return jax.tree.map(lambda *x: jnp.stack(x), *kept), total


def _shapes(tree: PyTree) -> str:
    leaves = jax.tree.leaves_with_path(tree)
    return ", ".join(f"{jax.tree_util.keystr(p, simple=True, separator='/')} {jax.typeof(x)}" for p, x in leaves)
