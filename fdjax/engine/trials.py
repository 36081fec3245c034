"""Many trials of one simulation as one compiled call: hparams, seeds and partitions are rows of arrays [T, ...].

Trials are shared out over devices, and on each run in chunks of `width` that are vmapped together. What does not differ
between trials is stored once, and computed once for a chunk. A trial gives the numbers that it gives alone, to the
rounding of a sum's order.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from fdjax.contract import HParams
from fdjax.engine import lift_trials, plan
from fdjax.engine.layout import Layout
from fdjax.engine.simulation import Pure
from fdjax.exchange import traffic
from fdjax.types import Array, Federation, PyTree


class Inputs(NamedTuple):
    """What a trial starts from. With bools as its leaves, it says which of them differ between trials."""

    seed: Array | bool  # [] int32
    federation: Federation
    hparams: HParams


class Seen(NamedTuple):
    """What a superstep of one trial gives to see."""

    report: PyTree  # of its rounds
    scalars: dict[str, Any]  # of the evaluation after it
    clients: dict[str, Any]


class Running(NamedTuple):
    """Trials under way, on their devices."""

    places: list[int]  # [devices * rows]: number of the trial in each row, -1 for none
    turns: np.ndarray  # [devices] int32: chunks with a trial in them
    arrays: tuple[PyTree, PyTree, PyTree]  # state, federation, hparams

    @property
    def numbers(self) -> list[int]:
        """The trials that are under way, in order."""
        return sorted(number for number in self.places if number >= 0)


class Trials(NamedTuple):
    """Compiled calls for up to `slots` trials at once."""

    start: Callable[[Sequence[Inputs]], tuple[Running, Mapping[int, PyTree]]]  # also the report of each one's set-up
    step: Callable[[Running, int], tuple[Running, Mapping[int, Seen]]]  # so many rounds
    keep: Callable[[Running, Collection[int]], Running]  # go on with these alone
    slots: int
    scalars: tuple[str, ...]  # what an evaluation gives
    why: str  # how trials are laid out, in words


class _Calls(NamedTuple):
    """A simulation as it is lifted over trials, and which leaves differ between them."""

    begin: Callable[..., tuple[PyTree, PyTree]]  # (seed, federation, hparams) -> state and the set-up's report, or ()
    superstep: Callable[..., tuple[PyTree, Seen]]  # (rounds, state, federation, hparams)
    inputs: Inputs  # of bools, and so are the following
    setup: PyTree
    state: PyTree
    seen: Seen

    @property
    def arrays(self) -> tuple[PyTree, PyTree, PyTree]:
        """Which leaves of `Running.arrays` differ."""
        return self.state, self.inputs.federation, self.inputs.hparams


class _Grid(NamedTuple):
    """Where trials lie: rows [devices * rows], those of a device one after another, `width` of them vmapped at once."""

    mesh: Mesh
    rows: int
    width: int

    def deal(self, numbers: Sequence[int]) -> list[int]:
        """The trial of each row, dealt out evenly, the empty rows (-1) last on each device."""
        by_device = [numbers[device :: self.mesh.size] for device in range(self.mesh.size)]
        return [number for dealt in by_device for number in (*dealt, *[-1] * (self.rows - len(dealt)))]

    def turns(self, places: Sequence[int]) -> np.ndarray:
        """[devices] int32: chunks with a trial in them."""
        trials = (np.reshape(places, (self.mesh.size, -1)) >= 0).sum(1)
        return (-(-trials // self.width)).astype(np.int32)

    def sharding(self, varies: bool) -> NamedSharding:
        """The placement of a leaf."""
        return NamedSharding(self.mesh, lift_trials.trial_specs(varies))


def differ(trials: Sequence[Inputs]) -> Inputs:
    """Which leaves differ between these trials."""
    return jax.tree.map(lambda x, *others: any(y is not x and not np.array_equal(y, x) for y in others), *trials)


def compile_trials(
    pure: Pure, layout: Layout, like: Inputs, varies: Inputs, rounds: int, slots: int, devices: int = 0, memory: int = 0
) -> Trials:
    """Up to `slots` trials like `like` that differ in no more than `varies`, compiled for supersteps of `rounds`.

    `devices`: 0 for all of this host. `memory`: bytes that a device may use, 0 for what is free; fewer trials run at
    once where `slots` of them do not fit. Raises InputError where not a single trial fits.
    """
    local = jax.local_devices()
    mesh = lift_trials.make_trial_mesh(local[: min(slots, devices or len(local))])
    shapes = jax.tree.map(lambda x, v: jax.ShapeDtypeStruct((slots,) * v + x.shape, x.dtype), like, varies)
    calls, state = _calls(pure, rounds, shapes, varies)
    free = memory or plan.free_bytes(mesh)
    fitting, why = _fitting(slots, (state, *shapes), (calls.state, *varies), mesh, free)
    rows = -(-fitting // mesh.size)
    arrays = state, shapes.federation, shapes.hparams
    grid, superstep, of_length, needed = _fit_width(calls, arrays, rounds, mesh, rows, layout, free)
    why += f" on {mesh.size} device{'s' * (mesh.size > 1)}, {grid.width} vmapped at once on each; {needed / 1e9:.2g} GB"
    return Trials(
        start=_start(calls, grid),
        step=_step(calls, superstep, of_length, rounds),
        keep=_keep(calls, grid),
        slots=fitting,
        scalars=tuple(calls.seen.scalars),
        why=why,
    )


def _calls(pure: Pure, rounds: int, shapes: Inputs, varies: Inputs) -> tuple[_Calls, PyTree]:
    """The calls to lift, and the shapes of the states of all trials."""

    def begin(seed, federation, hparams):
        state = pure.init(seed, federation)
        return (state, ()) if pure.setup is None else pure.setup(state, federation, hparams)

    def superstep(rounds, state, federation, hparams):
        state, report = pure.run(state, federation, hparams, rounds)
        return state, Seen(report, *pure.evaluate(state, federation, hparams))

    alone = jax.tree.map(lambda x, v: jax.ShapeDtypeStruct(x.shape[1:] if v else x.shape, x.dtype), shapes, varies)
    (slots,) = {x.shape[0] for x, v in zip(*map(jax.tree.leaves, (shapes, varies)), strict=True) if v}

    def stacked(x, v):
        return jax.ShapeDtypeStruct((slots, *x.shape), x.dtype) if v else x

    first, _ = jax.eval_shape(begin, *alone)
    state_varies, setup_varies = lift_trials.what_varies(begin, tuple(shapes), tuple(varies))
    step = functools.partial(superstep, rounds)
    while True:  # what differs after a superstep differs before the next one
        state = jax.tree.map(stacked, first, state_varies)
        after, seen_varies = lift_trials.what_varies(step, (state, *shapes[1:]), (state_varies, *varies[1:]))
        before, state_varies = state_varies, jax.tree.map(lambda a, b: a or b, state_varies, after)
        if state_varies == before:
            return _Calls(begin, superstep, varies, setup_varies, state_varies, seen_varies), state


def _fitting(slots: int, shapes: PyTree, varies: PyTree, mesh: Mesh, free: int | None) -> tuple[int, str]:
    """How many trials' arrays take a third of what is free at most, and the number of trials in words."""
    differing = jax.tree.map(lambda x, v: x if v else None, shapes, varies)
    trial = traffic.size(differing) // slots
    room = slots if free is None else max(1, free // 3 // max(trial, 1)) * mesh.size
    if room >= slots:
        return slots, f"{slots} trials"
    return room, f"{slots} trials in batches of {room}, for a trial takes {trial / 1e6:.3g} MB"


def _fit_width(
    calls: _Calls, arrays: PyTree, rounds: int, mesh: Mesh, rows: int, layout: Layout, free: int | None
) -> tuple[_Grid, Callable[..., Any], Callable[..., Any], int]:
    """The grid whose chunks fit in memory, the superstep lifted on it, that of `rounds` compiled, and what it needs."""
    compiled: dict[int, tuple[Callable[..., Any], Callable[..., Any]]] = {}

    def needed_by(width: int) -> int:
        grid = _Grid(mesh, rows, width)
        lifted = _lifted_superstep(calls, grid)

        def placed(x, v):
            shape = (rows * mesh.size, *x.shape[1:]) if v else x.shape
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=grid.sharding(v))

        turns = jax.ShapeDtypeStruct((mesh.size,), np.int32, sharding=grid.sharding(True))
        of_length = lifted.lower(rounds, turns, *jax.tree.map(placed, arrays, calls.arrays)).compile()
        compiled[width] = lifted, of_length
        return plan.needed_bytes(of_length)

    share_work = not all(jax.tree.leaves(calls.state.clients))
    widest = _width(layout, rows, share_work)
    width, needed = plan.fit_chunk(widest, free or 1 << 62, needed_by, may_change=True)
    return _Grid(mesh, rows, width), *compiled[width], needed


def _width(layout: Layout, rows: int, share_work: bool) -> int:
    """Trials to vmap together on a device: on a CPU as many as keep a chunk's parameters in a core's cache.

    Where trials share work, as they do the teachers of FedDistill, it is done once for four of them at least.
    """
    if layout.lifting.mesh.devices.flat[0].platform != "cpu":
        return rows
    clients = min(max(layout.participants), layout.lifting.chunk)
    bytes_of_chunk = plan.COPIES * plan.largest([cohort.model for cohort in layout.cohorts]) * clients
    widest = max(4 if share_work else 1, plan.CACHE_BYTES // bytes_of_chunk)
    return -(-rows // -(-rows // widest))


def _lifted_superstep(calls: _Calls, grid: _Grid) -> Any:
    @functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
    def superstep(rounds, turns, *arrays):
        trial = functools.partial(calls.superstep, rounds)
        out = calls.state, calls.seen
        return lift_trials.over_trials(trial, calls.arrays, out, grid.mesh, grid.width)(turns, *arrays)

    return superstep


def _start(calls: _Calls, grid: _Grid) -> Callable[[Sequence[Inputs]], tuple[Running, Mapping[int, PyTree]]]:
    out = calls.state, calls.setup
    lifted = lift_trials.over_trials(calls.begin, tuple(calls.inputs), out, grid.mesh, grid.width)
    begin = jax.jit(lifted)

    def start(trials: Sequence[Inputs]) -> tuple[Running, Mapping[int, PyTree]]:
        places = grid.deal(range(len(trials)))
        rows = [trials[max(number, 0)] for number in places]  # an empty row has the inputs of the first trial

        def put(v, *leaves):
            value = np.stack([np.asarray(x) for x in leaves]) if v else np.asarray(leaves[0])
            return jax.device_put(value, grid.sharding(v))

        inputs, turns = jax.tree.map(put, calls.inputs, *rows), grid.turns(places)
        state, setup = begin(turns, *inputs)
        running = Running(places, turns, (state, inputs.federation, inputs.hparams))
        return running, _by_trial(places, setup, calls.setup)

    return start


def _step(
    calls: _Calls, superstep: Callable[..., Any], of_length: Callable[..., Any], length: int
) -> Callable[[Running, int], tuple[Running, Mapping[int, Seen]]]:
    def step(running: Running, rounds: int) -> tuple[Running, Mapping[int, Seen]]:
        call = of_length if rounds == length else functools.partial(superstep, rounds)
        state, seen = call(running.turns, *running.arrays)
        running = running._replace(arrays=(state, *running.arrays[1:]))
        return running, _by_trial(running.places, seen, calls.seen)

    return step


def _by_trial(places: Sequence[int], outputs: PyTree, varies: PyTree) -> dict[int, Any]:
    """The outputs of each trial, on the host."""
    outputs = jax.device_get(outputs)
    return {
        number: jax.tree.map(lambda x, v, row=row: x[row] if v else x, outputs, varies)
        for row, number in enumerate(places)
        if number >= 0
    }


def _keep(calls: _Calls, grid: _Grid) -> Callable[[Running, Collection[int]], Running]:
    permute = jax.jit(
        lambda arrays, index: jax.tree.map(lambda x, v: x[index] if v else x, arrays, calls.arrays),
        donate_argnums=0,
        out_shardings=jax.tree.map(grid.sharding, calls.arrays),
    )

    def keep(running: Running, numbers: Collection[int]) -> Running:
        """Rows move only if that saves a device a turn."""
        places = grid.deal(sorted(numbers))
        turns = grid.turns(places)
        if np.array_equal(turns, running.turns):
            return running._replace(places=[n if n in numbers else -1 for n in running.places])
        index = np.asarray([running.places.index(number) if number >= 0 else 0 for number in places])
        return Running(places, turns, permute(running.arrays, index))

    return keep
