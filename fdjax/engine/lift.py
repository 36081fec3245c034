"""From one client to many, and from one trial to many: the only place where either is vmapped, mapped or sharded.

Clients are rows of a stacked pytree, in order of their work. A row of zeros is a client without examples: it weighs
nothing, so rows are padded with zeros to fill the last chunk.
"""

import functools
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
    client: Client, shared: PyTree, rows: PyTree, lifting: Lifting, *, stage: str = "", names: Array | None = None
) -> tuple[PyTree, Partials]:
    """Run `client(shared, row) -> (kept, partials)` for every row: kept stacked `[S, ...]`, and the totals.

    Memory follows the chunk, and a client waits only for others of like work. A chunk of one is not vmapped at all,
    which keeps native convolutions native. `stage` and `names` [S] (client ids) are what a failure under `loop` says.
    """
    (size,) = {leaf.shape[0] for leaf in jax.tree.leaves(rows)}
    if lifting.kind == "loop":
        return _loop(client, shared, rows, size, stage, names)
    parts, start = [], 0
    for share, chunk in (*lifting.narrow, (1.0, lifting.chunk)):
        stop = round(share * size)
        if start < stop:
            part = jax.tree.map(lambda x, start=start, stop=stop: x[start:stop], rows) if stop - start < size else rows
            parts.append(_in_chunks(client, shared, part, stop - start, lifting._replace(chunk=chunk)))
            start = stop
    if len(parts) == 1:
        return parts[0]
    kept, totals = zip(*parts, strict=True)
    return jax.tree.map(lambda *x: jnp.concatenate(x), *kept), combine(*totals)


def _in_chunks(client: Client, shared: PyTree, rows: PyTree, size: int, lifting: Lifting) -> tuple[PyTree, Partials]:
    devices = lifting.mesh.size
    most = size if lifting.ordered else -(-size // devices)  # a sum in order is of the same chunks on any devices
    chunk = size if lifting.kind == "vmap" else min(lifting.chunk, most)
    chunks = -(-size // (chunk * devices))  # that each device runs
    deal, collect = _dealing(devices, chunks)

    @jax.jit  # traced once, for its shapes and for its use
    def run_chunk(shared, rows):
        if chunk == 1:
            kept, partials = client(shared, jax.tree.map(lambda x: x[0], rows))
            return jax.tree.map(lambda x: x[None], kept), partials
        kept, partials = jax.vmap(client, in_axes=(None, 0))(shared, rows)
        return kept, _by_kind(lambda how, x: how.axis(x, axis=0), partials)

    def on_device(shared, rows):  # rows [chunks, chunk, ...] -> kept, and totals, or with `ordered` all [chunks, ...]
        if lifting.ordered:
            return lax.map(lambda rows: run_chunk(shared, rows), rows)
        _, shapes = jax.eval_shape(run_chunk, shared, jax.tree.map(lambda x: x[0], rows))

        def next_chunk(totals, rows):
            kept, partials = run_chunk(shared, rows)
            return combine(totals, partials), kept

        totals, kept = lax.scan(next_chunk, _nothing(shapes), rows)
        return kept, totals if devices == 1 else _over_devices(totals)

    def into_chunks(x):
        padding = chunks * devices * chunk - size
        x = jnp.concatenate([x, jnp.zeros((padding, *x.shape[1:]), x.dtype)]) if padding else x
        return deal(x.reshape(chunks * devices, chunk, *x.shape[1:]))

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
    in_order = min(devices, chunks) == 1  # and a gather for each leaf would be compiled for nothing

    def deal(x):  # [chunks * devices, ...] -> [devices, chunks, ...]
        return (x if in_order else x[to_devices]).reshape(devices, chunks, *x.shape[1:])

    def collect(x):
        x = x.reshape(chunks * devices, *x.shape[2:])
        return x if in_order else x[back]

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


def what_varies(function: Callable[..., PyTree], args: tuple[PyTree, ...], varies: tuple[PyTree, ...]) -> PyTree:
    """Which leaves of `function(*args)` differ between trials if those of args marked in `varies`, [T, ...], do.

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

    out = jax.eval_shape(jax.vmap(lambda *args: probe(function(*args)), in_axes=trial_axes(varies)), *args)
    return found[0] if found else jax.tree.map(lambda _: False, out)


def over_trials(
    function: Callable[..., PyTree], varies: tuple[PyTree, ...], varies_out: PyTree, mesh: Mesh, width: int
) -> Callable[..., PyTree]:
    """`lifted(chunks, *args)`: `function` for every trial, `width` of them vmapped together on a device.

    Leaves marked in `varies` are [T, ...], the trials of each device one after another; `chunks` [devices] int32 is how
    many chunks of trials each device runs, so trials that ended cost nothing: their rows are zeros.
    """
    vmapped = jax.vmap(function, in_axes=trial_axes(varies), out_axes=trial_axes(varies_out))

    def on_device(chunks, *args):
        (most,) = {x.shape[0] for x, v in zip(*map(jax.tree.leaves, (args, varies)), strict=True) if v}
        if most == width:
            return vmapped(*args)

        def chunk(i):
            part = jax.tree.map(lambda x, v: lax.dynamic_slice_in_dim(x, i * width, width) if v else x, args, varies)
            return vmapped(*part)

        def next_chunk(i, done):
            return jax.tree.map(
                lambda all_, new, v: lax.dynamic_update_slice_in_dim(all_, new, i * width, 0) if v else new,
                done, chunk(i), varies_out,
            )  # fmt: skip

        def room(x, v):
            return jnp.zeros((most, *x.shape[1:]) if v else x.shape, x.dtype)

        nothing = jax.tree.map(room, jax.eval_shape(chunk, 0), varies_out)
        return lax.fori_loop(0, chunks[0], next_chunk, nothing)

    # check_vma=False as for clients: shared parameters are replicated, and their gradients are nobody else's business.
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(PartitionSpec(TRIALS), *trial_specs(varies)),
        out_specs=trial_specs(varies_out),
        check_vma=False,
    )


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
