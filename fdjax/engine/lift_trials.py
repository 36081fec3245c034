"""From one trial to many, each device running whole trials by itself; clients are lifted inside, see `lift`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from fdjax.types import PyTree

TRIALS = "trials"


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
