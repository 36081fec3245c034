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
from fdjax.engine import compiling, lift_trials, plan
from fdjax.engine.layout import Layout, first_rounds
from fdjax.engine.simulation import Pure
from fdjax.exchange import traffic
from fdjax.types import Array, Federation, PyTree


class Inputs(NamedTuple):
    """What a trial starts from. With bools as its leaves, it says which of them differ between trials."""

    seed: Array | bool  # [] int32
    federation: Federation
    hparams: HParams
    examples: Array | bool | None = None  # [] int32: of the test set, until the last evaluation; None: all of them


class Seen(NamedTuple):
    """What a superstep of one trial gives to see."""

    report: PyTree  # of its rounds
    scalars: dict[str, Any]  # of the evaluation after it
    clients: dict[str, Any]


class Running(NamedTuple):
    """Trials under way, on their devices."""

    places: list[int]  # [devices * rows]: number of the trial in each row, -1 for none
    turns: np.ndarray  # [devices] int32: chunks with a trial in them
    arrays: tuple[PyTree, PyTree, PyTree, PyTree]  # state, federation, hparams, examples

    @property
    def numbers(self) -> list[int]:
        """The trials that are under way, in order."""
        return sorted(number for number in self.places if number >= 0)


class Trials(NamedTuple):
    """Compiled calls for up to `slots` trials at once."""

    start: Callable[[Sequence[Inputs]], tuple[Running, Mapping[int, PyTree]]]  # also the report of each one's set-up
    look: Callable[..., Mapping[int, Seen]]  # (running, last=False): an evaluation, and no report
    step: Callable[..., tuple[Running, Mapping[int, Seen]]]  # (running, rounds, last=True), `rounds` at most
    # those compiled for; `last`: the evaluation after them is the last one
    keep: Callable[[Running, Collection[int]], Running]  # go on with these alone
    change: Callable[[Running, Mapping[int, HParams]], Running]  # go on with other values of hparams that differ
    slots: int
    scalars: tuple[str, ...]  # what an evaluation gives
    why: str  # how trials are laid out, in words


class _Calls(NamedTuple):
    """A simulation as it is lifted over trials, and which leaves differ between them."""

    init: Callable[..., PyTree]  # (seed, federation) -> state
    setup: Callable[..., tuple[PyTree, PyTree]] | None  # (state, federation, hparams) -> state and report
    superstep: Callable[..., tuple[PyTree, PyTree]]  # (count, state, federation, hparams) -> state and report
    evaluate: Callable[..., tuple[PyTree, PyTree]]  # (state, federation, hparams, examples) -> scalars and clients
    inputs: Inputs  # of bools, and so are the following
    setup_report: PyTree
    state: PyTree
    seen: Seen

    @property
    def arrays(self) -> tuple[PyTree, PyTree, PyTree, PyTree]:
        """Which leaves of `Running.arrays` differ."""
        return self.state, self.inputs.federation, self.inputs.hparams, self.inputs.examples


class _Compiled(NamedTuple):
    """The same, lifted and compiled; each takes the turns first."""

    init: Callable[..., PyTree]
    setup: Callable[..., tuple[PyTree, PyTree]] | None
    superstep: Callable[..., tuple[PyTree, PyTree]]
    evaluate: Callable[..., tuple[PyTree, PyTree]]


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
    """Up to `slots` trials like `like` that differ in no more than `varies`, compiled for supersteps up to `rounds`.

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
    grid, compiled, needed = _fit_width(calls, state, shapes, mesh, rows, layout, free)
    why += f" on {mesh.size} device{'s' * (mesh.size > 1)}, {grid.width} vmapped at once on each; {needed / 1e9:.2g} GB"
    return Trials(
        start=_start(calls, compiled, grid),
        look=functools.partial(_look, calls, compiled, grid, last=False),
        step=functools.partial(_step, calls, compiled, grid),
        keep=_keep(calls, grid),
        change=functools.partial(_change, calls, grid),
        slots=fitting,
        scalars=tuple(calls.seen.scalars),
        why=why,
    )


def _calls(pure: Pure, rounds: int, shapes: Inputs, varies: Inputs) -> tuple[_Calls, PyTree]:
    """The calls to lift, and the shapes of the states of all trials."""

    def superstep(count, state, federation, hparams):
        return pure.run(state, federation, hparams, rounds, count)

    def begin(seed, federation, hparams):
        state = pure.init(seed, federation)
        return (state, ()) if pure.setup is None else pure.setup(state, federation, hparams)

    start, readable = tuple(shapes[:3]), tuple(varies[:3])
    alone = jax.tree.map(lambda x, v: jax.ShapeDtypeStruct(x.shape[1:] if v else x.shape, x.dtype), start, readable)
    (slots,) = {x.shape[0] for x, v in zip(*map(jax.tree.leaves, (shapes, varies)), strict=True) if v}

    def stacked(x, v):
        return jax.ShapeDtypeStruct((slots, *x.shape), x.dtype) if v else x

    first, _ = jax.eval_shape(begin, *alone)
    state_varies, setup_varies = lift_trials.what_varies(begin, start, readable)
    while True:  # what differs after a superstep differs before the next one
        state = jax.tree.map(stacked, first, state_varies)
        after, report_varies = lift_trials.what_varies(
            functools.partial(superstep, 1), (state, *shapes[1:3]), (state_varies, *varies[1:3])
        )
        before, state_varies = state_varies, jax.tree.map(lambda a, b: a or b, state_varies, after)
        if state_varies == before:
            break
    if pure.setup is not None:  # which is given states as they differ later, where no more than rounds may differ yet
        given = (state, *shapes[1:3]), (state_varies, *varies[1:3])
        _, setup_varies = lift_trials.what_varies(pure.setup, *given)
    tests_vary = lift_trials.what_varies(pure.evaluate, (state, *shapes[1:]), (state_varies, *varies[1:]))
    seen = Seen(report_varies, *tests_vary)
    calls = _Calls(pure.init, pure.setup, superstep, pure.evaluate, varies, setup_varies, state_varies, seen)
    return calls, state


def _fitting(slots: int, shapes: PyTree, varies: PyTree, mesh: Mesh, free: int | None) -> tuple[int, str]:
    """How many trials' arrays take a third of what is free at most, and the number of trials in words."""
    differing = jax.tree.map(lambda x, v: x if v else None, shapes, varies)
    trial = traffic.size(differing) // slots
    room = slots if free is None else max(1, free // 3 // max(trial, 1)) * mesh.size
    if room >= slots:
        return slots, f"{slots} trials"
    return room, f"{slots} trials in batches of {room}, for a trial takes {trial / 1e6:.3g} MB"


def _fit_width(
    calls: _Calls, state: PyTree, shapes: Inputs, mesh: Mesh, rows: int, layout: Layout, free: int | None
) -> tuple[_Grid, _Compiled, int]:
    """The grid whose chunks fit in memory, the calls lifted on it and compiled, and what they need."""
    compiled: dict[int, _Compiled] = {}

    def needed_by(width: int) -> int:
        compiled[width] = _compile(calls, state, shapes, _Grid(mesh, rows, width))
        return max(plan.needed_bytes(call) for call in (compiled[width].superstep, compiled[width].evaluate))

    share_work = not all(jax.tree.leaves(calls.state.clients))
    widest = _width(layout, rows, share_work)
    width, needed = plan.fit_chunk(widest, free or 1 << 62, needed_by, may_change=True)
    return _Grid(mesh, rows, width), compiled[width], needed


def _compile(calls: _Calls, state: PyTree, shapes: Inputs, grid: _Grid) -> _Compiled:
    """All calls lifted on a grid, lowered one after another and compiled side by side."""
    rows = grid.rows * grid.mesh.size

    def lowered(name, function, inputs, out, **options):  # inputs: (shapes, which of them differ) of each argument
        def placed(x, v):
            return jax.ShapeDtypeStruct((rows, *x.shape[1:]) if v else x.shape, x.dtype, sharding=grid.sharding(v))

        arguments, varies = zip(*inputs, strict=True)
        turns = jax.ShapeDtypeStruct((grid.mesh.size,), np.int32, sharding=grid.sharding(True))
        lifted = lift_trials.over_trials(function, varies, out, grid.mesh, grid.width)
        lifted.__name__ = name  # which reports of what is compiled say
        return jax.jit(lifted, **options).lower(turns, *jax.tree.map(placed, arguments, varies))

    seed, federation, hparams, examples = zip(shapes, calls.inputs, strict=True)
    count, now = (jax.ShapeDtypeStruct((), np.int32), False), (state, calls.state)
    number = (jax.ShapeDtypeStruct((rows,), np.int32), True)

    def init(number, seed, federation):  # trials that differ in hparams alone begin alike, and are as many
        return calls.init(seed, federation)

    in_round, quick, seen = (now, federation, hparams), compiling.quick(grid.mesh), calls.seen
    wanted = {
        "init": lowered("init", init, (number, seed, federation), calls.state, compiler_options=quick),
        "superstep": lowered(
            "superstep", calls.superstep, (count, *in_round), (calls.state, seen.report), donate_argnums=2
        ),
        "evaluate": lowered("evaluate", calls.evaluate, (*in_round, examples), (seen.scalars, seen.clients)),
    }
    if calls.setup is not None:
        out = calls.state, calls.setup_report
        wanted["setup"] = lowered("setup", calls.setup, in_round, out, donate_argnums=1)
    return _Compiled(**{"setup": None, **dict(zip(wanted, compiling.together([*wanted.values()]), strict=True))})


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


def _start(
    calls: _Calls, compiled: _Compiled, grid: _Grid
) -> Callable[[Sequence[Inputs]], tuple[Running, Mapping[int, PyTree]]]:
    def start(trials: Sequence[Inputs]) -> tuple[Running, Mapping[int, PyTree]]:
        places = grid.deal(range(len(trials)))
        rows = [trials[max(number, 0)] for number in places]  # an empty row has the inputs of the first trial

        def put(v, *leaves):
            value = np.stack([np.asarray(x) for x in leaves]) if v else np.asarray(leaves[0])
            return jax.device_put(value, grid.sharding(v))

        inputs, turns = jax.tree.map(put, calls.inputs, *rows), grid.turns(places)
        state, report = compiled.init(turns, np.asarray(places, np.int32), inputs.seed, inputs.federation), ()
        if compiled.setup is not None:
            state, report = compiled.setup(turns, state, inputs.federation, inputs.hparams)
        running = Running(places, turns, (state, *inputs[1:]))
        return running, _by_trial(places, report, calls.setup_report)

    return start


def _look(calls: _Calls, compiled: _Compiled, grid: _Grid, running: Running, *, last: bool) -> Mapping[int, Seen]:
    state, federation, hparams, examples = running.arrays
    if last:  # every one of them, whatever was enough before
        size = len(federation.test.y) if not calls.inputs.federation.test.y else federation.test.y.shape[1]
        examples = jax.tree.map(
            lambda x, v: jax.device_put(np.full(x.shape, size, x.dtype), grid.sharding(v)),
            examples, calls.inputs.examples,
        )  # fmt: skip
    scalars, clients = compiled.evaluate(running.turns, state, federation, hparams, examples)
    return _by_trial(running.places, Seen((), scalars, clients), calls.seen._replace(report=()))


def _step(
    calls: _Calls, compiled: _Compiled, grid: _Grid, running: Running, rounds: int, last: bool = True
) -> tuple[Running, Mapping[int, Seen]]:
    count = jax.device_put(np.int32(rounds), grid.sharding(False))
    state, report = compiled.superstep(running.turns, count, *running.arrays[:3])
    running = running._replace(arrays=(state, *running.arrays[1:]))
    tests = _look(calls, compiled, grid, running, last=last)
    reports = _by_trial(running.places, report, calls.seen.report)
    return running, {n: seen._replace(report=first_rounds(reports[n], rounds)) for n, seen in tests.items()}


def _change(calls: _Calls, grid: _Grid, running: Running, hparams: Mapping[int, HParams]) -> Running:
    def put(v, old, *leaves):
        return jax.device_put(np.stack([np.asarray(x) for x in leaves]), grid.sharding(v)) if v else old

    anyone = running.numbers[0]
    state, federation, before, examples = running.arrays
    rows = [dict(hparams[number if number in hparams else anyone]) for number in running.places]
    now = jax.tree.map(put, dict(calls.inputs.hparams), dict(before), *rows)
    return running._replace(arrays=(state, federation, now, examples))


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
