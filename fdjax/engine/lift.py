"""From one client to many: with `lift_trials`, the only place where either is vmapped, mapped or sharded.

Clients are rows of a stacked pytree, in order of their work. A row of zeros is a client without examples: it weighs
nothing, so rows are padded with zeros to fill the last chunk. Where all clients of a cohort run, each device takes
those whose states it holds.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from fdjax.types import Array, PyTree

AXIS = "clients"


class Partials(NamedTuple):
    """What one client adds to the totals over all clients, by how it is combined: a pytree each."""

    sum: PyTree = ()
    min: PyTree = ()
    max: PyTree = ()


class _Combine(NamedTuple):
    """How partials of one kind are combined: two of them, those of an axis, those of the devices, and none at all."""

    two: Callable[[Any, Any], Any]
    axis: Callable[..., Any]
    devices: Callable[..., Any]
    identity: Callable[[np.dtype], Any]


def _largest(dtype: np.dtype) -> Any:
    return jnp.inf if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo(dtype).max


def _smallest(dtype: np.dtype) -> Any:
    return -jnp.inf if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo(dtype).min


_COMBINES = Partials(
    sum=_Combine(jnp.add, jnp.sum, lax.psum, lambda dtype: 0),
    min=_Combine(jnp.minimum, jnp.min, lax.pmin, _largest),
    max=_Combine(jnp.maximum, jnp.max, lax.pmax, _smallest),
)

Client = Callable[[PyTree, PyTree], tuple[PyTree, Partials]]  # (shared, row) -> (kept, partials)

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


class Stored(NamedTuple):
    """States of clients as they are stored: of all of a cohort in the rows of its `Rows`, of some in their order."""

    tree: PyTree


class Rows(Protocol):
    """Which row each client of a cohort is stored in; see `fdjax.engine.storage`."""

    @property
    def clients(self) -> int: ...
    @property
    def devices(self) -> int: ...
    def deal(self, x: Array, /) -> Array: ...
    def collect(self, x: Array, /) -> Array: ...


def make_mesh(devices: list[Any] | None = None) -> Mesh:
    """A mesh over `devices` (all of every host's, if not given) whose one axis is the clients'."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)


def combine(*partials: Partials) -> Partials:
    """Partials or totals together, such as those of several cohorts."""
    return _by_kind(lambda how, *x: functools.reduce(how.two, x), *partials)


def identity_unless(present: Array, partials: Partials) -> Partials:
    """`partials`, or where `present` [] is false what changes no total: 0, or the largest or smallest number."""
    return _by_kind(lambda how, x: jnp.where(present, x, jnp.asarray(how.identity(x.dtype), x.dtype)), partials)


def _by_kind(function: Callable[..., Any], *partials: Partials) -> Partials:
    """`function(how it is combined, leaf of each of partials)` for every leaf."""
    return Partials(
        *(jax.tree.map(functools.partial(function, how), *kind) for how, *kind in zip(_COMBINES, *partials))
    )


def over_clients(
    client: Client,
    shared: PyTree,
    rows: PyTree,
    lifting: Lifting,
    *,
    storage: Rows | None = None,
    stage: str = "",
    names: Array | None = None,
) -> tuple[PyTree, Partials]:
    """Run `client(shared, row) -> (kept, partials)` for every row: kept stacked `[S, ...]`, and the totals.

    Memory follows the chunk, and a client waits only for others of like work. A chunk of one is not vmapped at all,
    which keeps native convolutions native. `stage` and `names` [S] (client ids) are what a failure under `loop` says.

    With `storage` these are all clients of a cohort: what is `Stored` in `rows` lies in its rows, and what the client
    wraps so in `kept` is left there. A client sees its state without the wrapping.
    """
    one = _unwrapping(client)
    if storage is not None and storage.devices > 1:
        return _where_stored(one, shared, rows, storage, lifting)
    (size,) = {leaf.shape[0] for leaf in jax.tree.leaves(rows)}
    if lifting.kind == "loop":
        return _loop(one, shared, rows, size, stage, names)
    parts = [
        _in_chunks(one, shared, _slice(rows, start, stop, size), stop - start, lifting._replace(chunk=chunk))
        for start, stop, chunk in _parts(size, lifting)
    ]
    return _concatenated(parts, axis=0)


def _unwrapping(client: Client) -> Client:
    def one(shared, row):
        return client(shared, jax.tree.map(lambda x: x.tree if isinstance(x, Stored) else x, row, is_leaf=_is_stored))

    return one


def _is_stored(x: Any) -> bool:
    return isinstance(x, Stored)


def _parts(size: int, lifting: Lifting) -> list[tuple[int, int, int]]:
    """(start, stop, chunk) of each part of the rows, the narrower chunks first."""
    parts, start = [], 0
    for share, chunk in (*lifting.narrow, (1.0, lifting.chunk)):
        stop = round(share * size)
        if start < stop:
            parts.append((start, stop, chunk))
            start = stop
    return parts


def _slice(rows: PyTree, start: int, stop: int, size: int) -> PyTree:
    return rows if stop - start == size else jax.tree.map(lambda x: x[start:stop], rows)


def _concatenated(parts: list[tuple[PyTree, Partials]], axis: int) -> tuple[PyTree, Partials]:
    if len(parts) == 1:
        return parts[0]
    kept, totals = zip(*parts, strict=True)
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis), *kept), combine(*totals)


def _where_stored(
    client: Client, shared: PyTree, rows: PyTree, storage: Rows, lifting: Lifting
) -> tuple[PyTree, Partials]:
    """All clients of a cohort, each on the device that holds its state: no state goes anywhere."""
    devices = storage.devices

    def of_device(x):  # [rows, ...] -> [devices, rows of a device, ...]
        return x.reshape(devices, -1, *x.shape[1:])

    dealt = jax.tree.map(
        lambda x: jax.tree.map(of_device, x) if _is_stored(x) else of_device(storage.deal(x)), rows, is_leaf=_is_stored
    )
    (size,) = {leaf.shape[1] for leaf in jax.tree.leaves(dealt)}

    def part(start, stop, chunk):
        chunk = min(chunk, stop - start)
        chunks = -(-(stop - start) // chunk)

        def into_chunks(x):
            x = x if stop - start == size else x[:, start:stop]
            padding = chunks * chunk - (stop - start)
            x = jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2))) if padding else x
            return x.reshape(devices, chunks, chunk, *x.shape[2:])

        on_device = _on_device(client, chunk, lifting)
        kept, totals = _spread(on_device, lifting)(shared, jax.tree.map(into_chunks, dealt))
        kept = jax.tree.map(lambda x: x.reshape(devices, chunks * chunk, *x.shape[3:])[:, : stop - start], kept)
        if not lifting.ordered:
            return kept, totals
        by_rank = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), totals)
        return kept, _in_order(by_rank)

    kept, totals = _concatenated([part(*bounds) for bounds in _parts(size, lifting)], axis=1)

    def all_rows(x):
        return x.reshape(-1, *x.shape[2:])

    return jax.tree.map(
        lambda x: jax.tree.map(all_rows, x) if _is_stored(x) else storage.collect(all_rows(x)),
        kept,
        is_leaf=_is_stored,
    ), totals


def _on_device(client: Client, chunk: int, lifting: Lifting):
    """A device's part: (shared, rows [chunks, chunk, ...]) -> kept, and totals, or with `ordered` all [chunks, ...]."""

    @jax.jit  # traced once, for its shapes and for its use
    def run_chunk(shared, rows):
        if chunk == 1:
            kept, partials = client(shared, jax.tree.map(lambda x: x[0], rows))
            return jax.tree.map(lambda x: x[None], kept), partials
        kept, partials = jax.vmap(client, in_axes=(None, 0))(shared, rows)
        return kept, _by_kind(lambda how, x: how.axis(x, axis=0), partials)

    def on_device(shared, rows):
        if lifting.ordered:
            # A chunk by itself, or what it is fused with, which depends on how many there are, may cost its last bit.
            return lax.map(
                lambda rows: lax.optimization_barrier(run_chunk(*lax.optimization_barrier((shared, rows)))), rows
            )
        _, shapes = jax.eval_shape(run_chunk, shared, jax.tree.map(lambda x: x[0], rows))

        def next_chunk(totals, rows):
            kept, partials = run_chunk(shared, rows)
            return combine(totals, partials), kept

        totals, kept = lax.scan(next_chunk, _nothing(shapes), rows)
        return kept, totals if lifting.mesh.size == 1 else _over_devices(totals)

    return on_device


def _in_chunks(client: Client, shared: PyTree, rows: PyTree, size: int, lifting: Lifting) -> tuple[PyTree, Partials]:
    devices = lifting.mesh.size
    most = size if lifting.ordered else -(-size // devices)  # a sum in order is of the same chunks on any devices
    chunk = size if lifting.kind == "vmap" else min(lifting.chunk, most)
    chunks = -(-size // (chunk * devices))  # that each device runs
    deal, collect = _dealing(devices, chunks)

    def into_chunks(x):
        padding = chunks * devices * chunk - size
        x = jnp.concatenate([x, jnp.zeros((padding, *x.shape[1:]), x.dtype)]) if padding else x
        return deal(x.reshape(chunks * devices, chunk, *x.shape[1:]))

    on_device = _on_device(client, chunk, lifting)
    kept, totals = _spread(on_device, lifting)(shared, jax.tree.map(into_chunks, rows))
    kept = jax.tree.map(lambda x: collect(x).reshape(-1, *x.shape[3:])[:size], kept)
    return kept, _in_order(jax.tree.map(collect, totals)) if lifting.ordered else totals


def _over_devices(totals: Partials) -> Partials:
    return Partials(
        *(how.devices(kind, AXIS) if jax.tree.leaves(kind) else kind for how, kind in zip(_COMBINES, totals))
    )


def _nothing(shapes: Partials) -> Partials:
    """The totals of no client."""
    return _by_kind(lambda how, x: jnp.full(x.shape, how.identity(x.dtype), x.dtype), shapes)


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
    by_device = PartitionSpec(AXIS)
    # check_vma would psum the gradient of replicated parameters over devices: clients training on each other's data.
    return jax.shard_map(
        rank_reduced,
        mesh=lifting.mesh,
        in_specs=(PartitionSpec(), by_device),
        out_specs=(by_device, by_device if lifting.ordered else PartitionSpec()),
        check_vma=False,
    )


def _dealing(devices: int, chunks: int):
    """Chunks of falling work to devices and back, in turns of alternating direction, so that work is even."""
    order = np.arange(chunks * devices).reshape(chunks, devices)
    order[1::2] = order[1::2, ::-1]
    to_devices = order.T.ravel()
    back = np.argsort(to_devices)

    def deal(x):  # [chunks * devices, ...] -> [devices, chunks, ...]
        return (x if devices == 1 else x[to_devices]).reshape(devices, chunks, *x.shape[1:])

    def collect(x):
        x = x.reshape(chunks * devices, *x.shape[2:])
        return x if devices == 1 else x[back]

    return deal, collect


def _in_order(partials: Partials) -> Partials:
    """[chunks, ...] combined from the first to the last, so that chunks of padding at the end change no bit."""
    if not jax.tree.leaves(partials):  # clients that are initialised, say, add nothing
        return partials
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), partials)
    return lax.scan(lambda totals, chunk: (combine(totals, chunk), ()), _nothing(shapes), partials)[0]


def _loop(client: Client, shared: PyTree, rows: PyTree, size: int, stage: str, names: Array | None):
    all_kept, totals = [], Partials()
    compiled = jax.jit(client)
    for i in range(size):
        row = jax.tree.map(lambda x, i=i: x[i], rows)
        try:
            kept, partials = jax.block_until_ready(compiled(shared, row))
        except Exception as error:
            who = f"row {i}" if names is None else f"client {int(names[i])}"
            error.add_note(f"{who}, {stage or 'unnamed stage'}\n  row: {_shapes(row)}\n  shared: {_shapes(shared)}")
            raise
        all_kept.append(kept)
        totals = combine(totals, partials) if i else partials
    return jax.tree.map(lambda *x: jnp.stack(x), *all_kept), totals


def _shapes(tree: PyTree) -> str:
    leaves = jax.tree.leaves_with_path(tree)
    return ", ".join(f"{jax.tree_util.keystr(p, simple=True, separator='/')} {jax.typeof(x)}" for p, x in leaves)
