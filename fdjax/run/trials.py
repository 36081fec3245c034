"""Many trials of one simulation as one compiled call: hparams, seeds and partitions are rows of arrays [T, ...].

Trials are shared out over devices, and on each run in chunks of `width` that are vmapped together. What does not differ
between trials is held once, and computed once for a chunk. A trial gives the numbers that it gives alone, to the
rounding of a sum's order.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from fdjax.engine import lift, plan, simulate
from fdjax.errors import InputError
from fdjax.exchange import communication
from fdjax.run import experiment, runner
from fdjax.run.experiment import Experiment
from fdjax.run.settings import Settings
from fdjax.types import PyTree

Watch = Callable[[int, dict[int, dict[str, Any]]], Collection[int]]
# (rounds done, records by number of the trials that still run) -> numbers of those that are to stop


class Batch(NamedTuple):
    """A compiled batch of up to `slots` trials."""

    run: Callable[[Sequence[Experiment], Watch], list[runner.Result]]
    fits: Callable[[Sequence[Experiment]], bool]  # whether these trials differ in no more than it was made for
    slots: int
    scalars: tuple[str, ...]  # what an evaluation gives
    why: str  # how trials are laid out, in words


def experiments(settings: Sequence[Settings]) -> list[Experiment]:
    """One for each trial, on one device, for the others run other trials; those of the same data share them.

    Raises InputError for settings that cannot work.
    """
    built: dict[Settings, Experiment] = {}
    trials = []
    for each in settings:
        data = dataclasses.replace(each, devices=1, lifting="auto", hparams=(), seed=0, partition_seed=each.data_seed)
        if data not in built:
            built[data] = _sharing(experiment.build(data), next(iter(built.values()), None))
        hparams = simulate.resolve_hparams(built[data].algorithm, dict(each.hparams))
        trials.append(built[data]._replace(settings=each, hparams=hparams))
    return trials


def _sharing(one: Experiment, other: Experiment | None) -> Experiment:
    """`one` with the arrays of `other` that are equal to its own, so that they are in memory once."""
    if other is None or jax.tree.structure(one.federation) != jax.tree.structure(other.federation):
        return one
    return one._replace(
        federation=jax.tree.map(lambda a, b: b if np.array_equal(a, b) else a, one.federation, other.federation)
    )


def batch(like: Sequence[Experiment], slots: int, space: Collection[str] = (), devices: int = 0) -> Batch:
    """Up to `slots` trials of the kind of `like`, which share one `signature`, compiled at the first run.

    What differs in `like` may differ between trials, and whatever `space` names (hparams, seed, partition_seed ...).
    Fewer trials run at once where `slots` of them do not fit in memory.

    Raises InputError where not a single trial fits.
    """
    first = experiment.common(like)
    settings, length = first.settings, min(first.settings.eval_every, first.settings.rounds)
    mesh = lift.make_trial_mesh(jax.local_devices()[: min(slots, devices or len(jax.local_devices()))])
    init, run, evaluate = map(_pure, (first.simulation.init, first.simulation.run, first.simulation.evaluate))
    setup = first.simulation.setup and _pure(first.simulation.setup)

    def begin(seed, federation, hparams):
        state = init(seed, federation)
        return setup(state, federation, hparams) if setup else state

    def superstep(rounds, state, federation, hparams):
        state, metrics = run(state, federation, hparams, rounds)
        return state, metrics, *evaluate(state, federation)

    varies = _varies(like, space)
    _, *rest = varies
    shapes = jax.tree.map(lambda x, v: jax.ShapeDtypeStruct((slots,) * v + x.shape, x.dtype), _inputs(first), varies)
    state, state_varies, out_varies = _states(begin, functools.partial(superstep, length), shapes, varies)

    free = math.ceil(settings.memory_limit * 1e9) or plan.free_bytes(mesh)
    stacked = jax.tree.map(lambda x, v: x if v else None, (state, *shapes), (state_varies, *varies))
    each = communication.size(stacked) // slots
    room = slots if free is None else max(1, free // 3 // max(each, 1)) * mesh.size
    why = f"{slots} trials"
    if room < slots:
        slots, why = room, f"{slots} trials in batches of {room}, for a trial takes {each / 1e6:.3g} MB"
    rows = -(-slots // mesh.size)

    def supersteps(width):
        @functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
        def lifted(rounds, turns, *args):
            one = functools.partial(superstep, rounds)
            return lift.over_trials(one, (state_varies, *rest), out_varies, mesh, width)(turns, *args)

        return lifted

    shares = not all(jax.tree.leaves(state_varies.clients))
    specs, made = lift.trial_specs((state_varies, *rest)), {}

    def needed_by(width):
        def place(x, v, spec):
            shape = (rows * mesh.size, *x.shape[1:]) if v else x.shape
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=NamedSharding(mesh, spec))

        placed = jax.tree.map(place, (state, *shapes[1:]), (state_varies, *rest), specs)
        lifted = supersteps(width)
        turns = jax.ShapeDtypeStruct((mesh.size,), np.int32, sharding=NamedSharding(mesh, lift.trial_specs(True)))
        compiled = lifted.lower(length, turns, *placed).compile()
        made[width] = lifted, compiled
        return plan.needed_bytes(compiled)

    width, needed = plan.fit_chunk(_width(first, rows, shares), free or 1 << 62, needed_by, may_change=True)
    others, superstep_of_length = made[width]
    lifted_begin = jax.jit(lift.over_trials(begin, varies, state_varies, mesh, width))
    why += f" on {mesh.size} device{'s' * (mesh.size > 1)}, {width} vmapped at once on each; {needed / 1e9:.2g} GB"

    traffic = first.simulation.traffic(first.federation)
    permute = jax.jit(
        lambda args, index: jax.tree.map(lambda x, v: x[index] if v else x, args, (state_varies, *rest)),
        donate_argnums=0,
        out_shardings=jax.tree.map(lambda s: NamedSharding(mesh, s), specs),
    )

    def run_batch(trials: Sequence[Experiment], watch: Watch) -> list[runner.Result]:
        parts = []
        for begun in range(0, len(trials), slots):

            def watch_part(done, records, begun=begun):
                return [n - begun for n in watch(done, {n + begun: record for n, record in records.items()})]

            parts += run_part(trials[begun : begun + slots], watch_part)
        return parts

    def run_part(trials: Sequence[Experiment], watch: Watch) -> list[runner.Result]:
        if not fits(trials):
            raise InputError(
                "these trials differ in more than the batch was made for; make another with them in `like`"
            )
        with runner.clock() as time_spent:
            return _run(trials, watch, time_spent)

    def _run(trials, watch, time_spent):
        records = [runner.empty_record() for _ in trials]
        time_spent.start(records[0])
        places = _places(list(range(len(trials))), mesh.size, rows)
        inputs = _placed(trials, places, varies, mesh)
        turns = _turns(places, mesh.size, width)
        args = lifted_begin(turns, *inputs), *inputs[1:]
        done, active = 0, set(range(len(trials)))
        while done < settings.rounds and active:
            step = min(length, settings.rounds - done)
            call = superstep_of_length if step == length else functools.partial(others, step)
            state, *seen = call(turns, *args)
            args, done = (state, *args[1:]), done + step
            seen = jax.device_get(seen)
            for place, number in enumerate(places):
                if number in active:
                    mine = jax.tree.map(lambda x, v, i=place: x[i] if v else x, tuple(seen), out_varies[1:])
                    runner.extend(records[number], done, trials[number], *mine, who=f"trial {number}: ")
            stopped = {*watch(done, {n: records[n] for n in sorted(active)})} if done < settings.rounds else ()
            active -= {*stopped}
            following = _places(sorted(active), mesh.size, rows)
            if stopped and not np.array_equal(_turns(following, mesh.size, width), turns):
                args = permute(args, np.asarray([places.index(n) if n >= 0 else 0 for n in following]))
                places, turns = following, _turns(following, mesh.size, width)
        stamp = time_spent.stamp(records[0])
        times = {name: stamp[name] for name in ("seconds", "compile_seconds")}
        return [runner.result(t.settings, r | times, traffic) for t, r in zip(trials, records, strict=True)]

    def fits(trials: Sequence[Experiment]) -> bool:
        largest = all(mine <= most for one in trials for mine, most in zip(_padded(one), _padded(first), strict=True))
        return largest and all(
            v or not d for v, d in zip(*map(jax.tree.leaves, (varies, _differ(trials))), strict=True)
        )

    return Batch(run_batch, fits, slots, tuple(out_varies[2]), why)


def _inputs(one: Experiment) -> tuple[np.ndarray, PyTree, PyTree]:
    """What a trial starts from."""
    return np.asarray(one.settings.seed, np.int32), one.federation, one.hparams


def _padded(one: Experiment) -> tuple[int, int]:
    """What a simulation has room for."""
    return one.shapes.largest, one.shapes.own_batch


def _differ(trials: Sequence[Experiment]) -> tuple[PyTree, PyTree, PyTree]:
    """Which leaves of `_inputs` differ between these trials."""
    return jax.tree.map(lambda *x: any(y is not x[0] and not np.array_equal(y, x[0]) for y in x), *map(_inputs, trials))


def _varies(like: Sequence[Experiment], space: Collection[str]) -> tuple[PyTree, PyTree, PyTree]:
    """Which leaves of `_inputs` may differ between trials."""
    first = like[0]
    seed, federation, hparams = _differ(like)
    defaults = first.algorithm.hparams
    hparams = {name: v or name in space or defaults[name] in space for name, v in hparams.items()}
    fixed = {"seed"} if first.settings.partition_seed is not None else set()
    if {*space} & experiment.DATA - fixed:
        rows = jax.tree.map(lambda _: True, (federation.client, federation.train_holdings, federation.test_holdings))
        federation = federation._replace(client=rows[0], train_holdings=rows[1], test_holdings=rows[2])
    varies = seed or "seed" in space, federation, hparams
    if not any(jax.tree.leaves(varies)):  # trials that are all the same
        varies = True, federation, hparams
    return varies


def _pure(compiled: Any) -> Any:
    """The function under jax.jit: a batch compiles it lifted over trials, on devices of its own."""
    return inspect.unwrap(compiled)


def _states(begin: Callable[..., PyTree], superstep: Callable[..., PyTree], shapes: tuple, varies: tuple):
    """Shapes of the trials' states, which leaves of them differ, and which of what a superstep returns."""
    alone = jax.tree.map(lambda x, v: jax.ShapeDtypeStruct(x.shape[1:] if v else x.shape, x.dtype), shapes, varies)
    (slots,) = {x.shape[0] for x, v in zip(*map(jax.tree.leaves, (shapes, varies)), strict=True) if v}

    def rows(x, v):
        return jax.ShapeDtypeStruct((slots, *x.shape), x.dtype) if v else x

    one, differ = jax.eval_shape(begin, *alone), lift.what_varies(begin, shapes, varies)
    while True:  # what differs after a superstep differs before the next one
        state = jax.tree.map(rows, one, differ)
        after, *seen = lift.what_varies(superstep, (state, *shapes[1:]), (differ, *varies[1:]))
        before, differ = differ, jax.tree.map(lambda a, b: a or b, differ, after)
        if differ == before:
            return state, differ, (differ, *seen)


def _width(one: Experiment, rows: int, shares: bool) -> int:
    """Trials to vmap together on a device: on a CPU as many as keep a chunk's parameters in a core's cache.

    Where trials share work, as they do the teachers of FedDistill, it is done once for four of them at least.
    """
    if one.layout.mesh.devices.flat[0].platform != "cpu":
        return rows
    models = [cohort.model for cohort in one.layout.cohorts]
    clients = min(max(one.layout.participants), one.layout.chunk)
    widest = max(4 if shares else 1, plan.CACHE_BYTES // (plan.COPIES * plan.largest(models) * clients))
    return -(-rows // -(-rows // widest))


def _places(numbers: list[int], devices: int, rows: int) -> list[int]:
    """Trial of each row [devices * rows], dealt out evenly, the empty rows (-1) last on each device."""
    dealt = [numbers[device::devices] for device in range(devices)]
    return [number for mine in dealt for number in (*mine, *[-1] * (rows - len(mine)))]


def _turns(places: list[int], devices: int, width: int) -> np.ndarray:
    """[devices]: chunks with a trial in them."""
    held = (np.reshape(places, (devices, -1)) >= 0).sum(1)
    return (-(-held // width)).astype(np.int32)


def _placed(trials: Sequence[Experiment], places: list[int], varies: PyTree, mesh: Mesh) -> tuple:
    """The inputs of all trials in their rows; a row that is empty has those of the first."""
    rows = [_inputs(trials[max(number, 0)]) for number in places]

    def put(v, *leaves):
        value = np.stack([np.asarray(x) for x in leaves]) if v else np.asarray(leaves[0])
        return jax.device_put(value, NamedSharding(mesh, lift.trial_specs(v)))

    return jax.tree.map(put, varies, *rows)
