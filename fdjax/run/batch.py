"""Many runs as trials of one compiled batch: experiments of settings, their records, and who is to stop early."""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import jax
import numpy as np

from fdjax.engine.new_clients import never_train
from fdjax.engine.trials import Inputs, Running, Trials, compile_trials, differ
from fdjax.errors import InputError
from fdjax.exchange.traffic import Traffic
from fdjax.run.accounting import ledger_of
from fdjax.run.experiment import Experiment, Shapes, build, common, tests_of, traffic_of
from fdjax.run.logs import Logs
from fdjax.run.record import Clock, Record, Recording, Result, clock
from fdjax.run.settings import Settings, of_role
from fdjax.run.stopping import check_watched, values_of
from fdjax.run.training import hparams_now, hparams_of

Watch = Callable[[int, dict[int, Record]], Collection[int]]
# (rounds done, records by number of the trials that still run) -> numbers of those that are to stop


class Batch(NamedTuple):
    """A compiled batch of up to `slots` trials."""

    run: Callable[..., list[Result]]  # (experiments, watch, logs=None): who else is told of every evaluation
    fits: Callable[[Sequence[Experiment]], bool]  # whether these trials differ in no more than it was compiled for
    slots: int
    scalars: tuple[str, ...]  # what an evaluation gives
    why: str  # how trials are laid out, in words


def experiments(settings: Sequence[Settings]) -> list[Experiment]:
    """The experiment of each trial, on one device, as the other devices run other trials; equal data are stored once.

    Raises InputError for settings that cannot work.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(Settings) if f.name in of_role("traced")}
    built: dict[Settings, Experiment] = {}
    trials = []
    for each in settings:
        same_data = dataclasses.replace(
            each, **defaults | {"devices": 1, "lifting": "auto", "partition_seed": each.data_seed}
        )
        if same_data not in built:
            built[same_data] = _sharing_arrays(build(same_data), next(iter(built.values()), None))
        ready = built[same_data]
        held = np.asarray(ready.holdings.count)[~never_train(ready.layout)[np.argsort(ready.federation.client)]]
        ledger = ledger_of(each, ready.algorithm, ready.shapes.participants, ready.shapes.may_train, held)
        mine = ready._replace(settings=each, hparams=hparams_of(each, ledger), ledger=ledger)
        trials.append(mine._replace(tests=tests_of(mine)))
    return trials


def _sharing_arrays(experiment: Experiment, other: Experiment | None) -> Experiment:
    """The experiment with the arrays of the other that are equal to its own, so that they are in memory once."""
    if other is None or jax.tree.structure(experiment.federation) != jax.tree.structure(other.federation):
        return experiment
    shared = jax.tree.map(lambda a, b: b if np.array_equal(a, b) else a, experiment.federation, other.federation)
    return experiment._replace(federation=shared)


def batch(like: Sequence[Experiment], slots: int, space: Collection[str] = (), devices: int = 0) -> Batch:
    """A batch of up to `slots` trials of the kind of `like`, which share one `signature`; supersteps are compiled here.

    What differs in `like` may differ between trials, and whatever `space` names (hparams, seed, partition_seed ...).
    Fewer trials run at once where `slots` of them do not fit in memory.

    Raises InputError where not a single trial fits.
    """
    first, varies = common(like), _varies(like, space)
    settings = first.settings
    for experiment in like:
        check_watched(experiment)
    trials = compile_trials(
        first.simulation.pure,
        first.layout,
        _inputs(first),
        varies,
        rounds=min(settings.eval_every, settings.rounds),
        slots=slots,
        devices=devices,
        memory=math.ceil(settings.memory_limit * 1e9),
    )
    traffic = traffic_of(first)

    def fits(these: Sequence[Experiment]) -> bool:
        return _fits(these, first.shapes, varies)

    def run(these: Sequence[Experiment], watch: Watch, logs: Logs | None = None) -> list[Result]:
        results = []
        for begin in range(0, len(these), trials.slots):
            part = these[begin : begin + trials.slots]
            if not fits(part):
                raise InputError(
                    "these trials differ in more than the batch was compiled for; compile another with them in `like`"
                )
            with clock() as time_spent:
                results += _run(trials, part, traffic, _numbered_from(begin, watch), time_spent, logs)
            if logs is not None and logs.failed():
                break
        return results

    values = trials.scalars if settings.metrics is None else values_of(first)
    return Batch(run, fits, trials.slots, values, trials.why)


def _run(
    trials: Trials, experiments: Sequence[Experiment], traffic: Traffic, watch: Watch, time_spent: Clock,
    logs: Logs | None,
) -> list[Result]:  # fmt: skip
    """Run trials that fit in at once, until they are done, end by their own rules or are told to stop."""
    settings = experiments[0].settings
    beside = len(experiments)
    recordings = [Recording(e, traffic, who=f"trial {n}: ", beside=beside) for n, e in enumerate(experiments)]
    time_spent.start(recordings[0].record)
    running, setups = trials.start([_inputs(experiment) for experiment in experiments])
    if experiments[0].simulation.setup is not None:
        for number, report in setups.items():
            recordings[number].add_setup(report)
    for number, seen in trials.look(running).items():
        recordings[number].add_evaluation(0, seen.scalars, seen.clients)
    _tell(logs, recordings)
    done = 0
    while done < settings.rounds and running.numbers and not (logs and logs.failed()):
        rounds = min(settings.eval_every, settings.rounds - done)
        done += rounds
        if settings.schedule == "plateau":
            evaluations = {number: recordings[number].record["evaluations"] for number in running.numbers}
            now = {
                n: hparams_now(experiments[n].settings, experiments[n].ledger, seen) for n, seen in evaluations.items()
            }
            running = trials.change(running, now)
        running, seen = trials.step(running, rounds, last=done == settings.rounds)
        for number, (report, scalars, clients) in seen.items():
            recordings[number].add_superstep(done, report, scalars, clients)
        if done < settings.rounds:
            stopped = {*_ended(trials, running, recordings, done)}
            stopped |= {*watch(done, {number: recordings[number].record for number in running.numbers})}
            if stopped:
                running = trials.keep(running, [n for n in running.numbers if n not in stopped])
        _tell(logs, recordings)
    times = time_spent.stamp(recordings[0].record)
    return [recording.result(times) for recording in recordings]


def _ended(trials: Trials, running: Running, recordings: Sequence[Recording], done: int) -> list[int]:
    """The trials that end here by their own rules, whose last evaluation is on all examples."""
    ended = [number for number in running.numbers if recordings[number].stop_if_due()]
    in_full = [number for number in ended if recordings[number].tests.between != recordings[number].tests.last]
    seen = trials.look(running, last=True) if in_full else {}
    for number in in_full:
        recordings[number].replace_evaluation(done, seen[number].scalars, seen[number].clients)
    return ended


def _tell(logs: Logs | None, recordings: Sequence[Recording]) -> None:
    if logs is not None:
        for recording in recordings:
            logs.tell(recording)


def _numbered_from(begin: int, watch: Watch) -> Watch:
    """The watch of all trials, for a part of them from the trial `begin` on, whose numbers start at 0."""
    return lambda done, records: [n - begin for n in watch(done, {n + begin: r for n, r in records.items()})]


def _inputs(experiment: Experiment) -> Inputs:
    seed, examples = (np.asarray(x, np.int32) for x in (experiment.settings.seed, experiment.tests.between))
    return Inputs(seed, experiment.federation, experiment.hparams, examples)


def _varies(like: Sequence[Experiment], space: Collection[str]) -> Inputs:
    """Which leaves of the inputs may differ between trials."""
    settings, method = like[0].settings, like[0].settings.method
    varies = differ([_inputs(experiment) for experiment in like])
    lowered = settings.schedule == "plateau"
    of_privacy = {
        "noise_multiplier": {"target_epsilon"},
        "count_noise_multiplier": {"target_epsilon", "noise_multiplier"},
    }
    follows = {name: {record.default} for name, record in method.hparams.items()} | of_privacy
    rates = {name for name, record in method.hparams.items() if record.learning_rate} if lowered else set()
    hparams = {
        name: differs or name in rates or bool(({name} | follows.get(name, set())) & {*space})
        for name, differs in varies.hparams.items()
    }
    federation = varies.federation
    fixed_by_seed = set() if settings.partition_seed is None else {"seed"}
    drawn = bool({*space} & (of_role("data", "partition") | {"seed"}) - fixed_by_seed)
    if drawn:
        rows = (federation.client, federation.train_holdings, federation.test_holdings, federation.cumulative)
        client, train, test, table = jax.tree.map(lambda _: True, rows)
        federation = federation._replace(client=client, train_holdings=train, test_holdings=test, cumulative=table)
    federation = federation._replace(test_order=federation.test_order or drawn)
    subsampled = settings.local_eval == "auto" and like[0].algorithm.personal is not None
    examples = varies.examples or (subsampled and (drawn or bool({"local_epochs", "local_steps"} & {*space})))
    varies = Inputs(varies.seed or "seed" in space, federation, hparams, examples)
    if not any(jax.tree.leaves(varies)):  # trials that are all the same
        return varies._replace(seed=True)
    return varies


def _fits(experiments: Sequence[Experiment], room: Shapes, varies: Inputs) -> bool:
    """Whether the clients of these are no larger than there is room for, and what differs between them may."""
    small = all(e.shapes.largest <= room.largest and e.shapes.own_batch <= room.own_batch for e in experiments)
    differing = differ([_inputs(experiment) for experiment in experiments])
    return small and all(may or not does for may, does in zip(*map(jax.tree.leaves, (varies, differing)), strict=True))
