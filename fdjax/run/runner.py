"""Runs a simulation superstep by superstep: evaluates, records, draws progress, keeps checkpoints, can be stopped."""

import contextlib
import math
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from fdjax.engine import hosts, plan
from fdjax.engine.simulate import BAD_CLIENT, BAD_CLIENTS, BAD_LEAF, State
from fdjax.errors import InputError
from fdjax.exchange.communication import Traffic
from fdjax.run.checkpoint import Checkpoints
from fdjax.run.experiment import Experiment, build
from fdjax.run.settings import Settings

_SAVE_SECONDS = 30
_FREE_TO_CHANGE = ("rounds", "data_dir", "cache_dir", "devices", "lifting", "memory_limit")  # before a resumption
_FOLDERS = ("data_dir", "cache_dir", "writers")  # which may differ between hosts


class Result(NamedTuple):
    """What a run gives: histories by name, the last value of every client, bytes and seconds."""

    settings: Settings
    rounds: dict[str, list[float]]  # of every round: metrics of training, cumulative bytes_up and bytes_down
    evaluations: dict[str, list[float]]  # of every evaluation; "round" says after how many rounds
    clients: dict[str, list[float]]  # of every client in order of ids, at the last evaluation
    traffic: Traffic
    seconds: float  # wall, all parts of a resumed run together
    compile_seconds: float  # of which compilation

    @property
    def final(self) -> dict[str, float]:
        """The last evaluation (not the best one)."""
        return {name: values[-1] for name, values in self.evaluations.items()}


class InterruptedRun(Exception):  # noqa: N818
    """A run was asked to stop and did, after `round` rounds, with a checkpoint in `out` (None: nothing was kept)."""

    def __init__(self, round: int, out: Path | None):
        super().__init__(round, out)
        self.round, self.out = round, out


def run(
    settings: Settings,
    out: Path | None = None,
    *,
    resume: bool = False,
    checkpoint_every: int = 0,
    progress: bool = True,
) -> Result:
    """Simulate `settings.rounds` rounds; with `out`, keep checkpoints there; with `resume`, go on from the latest.

    `checkpoint_every` is in rounds; 0 saves about every 30 seconds. The last round is always saved.

    Raises InputError for settings that cannot work or that differ from the checkpoint's, before anything compiles, and
    InterruptedRun after the first SIGINT or SIGTERM.
    """
    with contextlib.ExitStack() as stack:
        time_spent = stack.enter_context(clock())
        hosts.check_agreement(settings.public() | {"resume": resume, "out": str(out)}, _FOLDERS)
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(out / "checkpoints"))) if out else None
        done = _rounds_done(checkpoints, settings, resume) if checkpoints else 0
        experiment = build(settings)
        federation = experiment.federation
        traffic = experiment.simulation.traffic(federation)
        state = experiment.simulation.init(settings.seed, federation)
        length = min(settings.eval_every, settings.rounds)
        experiment, needed = _fitted(experiment, state, length)
        simulation = experiment.simulation
        progress = progress and hosts.is_first()
        if progress:
            tqdm.write(f"lifting: {experiment.plan.why}{needed}", file=sys.stderr)
        record = empty_record()
        if checkpoints and done:
            state, record = checkpoints.restore(state), checkpoints.record()
        elif simulation.setup is not None:
            state = simulation.setup(state, federation, experiment.hparams)
        time_spent.start(record)
        saved_at, saved_round = time.perf_counter(), done
        bar = stack.enter_context(
            tqdm(total=settings.rounds, initial=done, desc=settings.algorithm, unit="round", disable=not progress)
        )
        stop = stack.enter_context(_stop_signals())
        while done < settings.rounds:
            length = min(settings.eval_every, settings.rounds - done)
            state, metrics = simulation.run(state, federation, experiment.hparams, length)
            done += length
            extend(record, done, experiment, metrics, *simulation.evaluate(state, federation))
            kind = "central" if "central_accuracy" in record["evaluations"] else "local"
            bar.set_postfix_str(f"{kind} {100 * record['evaluations'][f'{kind}_accuracy'][-1]:.2f} %")
            bar.update(length)
            due = (
                done - saved_round >= checkpoint_every
                if checkpoint_every
                else time.perf_counter() - saved_at > _SAVE_SECONDS
            )
            stopping = hosts.any_of(bool(stop))
            if checkpoints and (hosts.any_of(due) or stopping or done == settings.rounds):
                checkpoints.save(state, time_spent.stamp(record) | {"settings": settings.public()})
                saved_at, saved_round = time.perf_counter(), done
            if stopping and done < settings.rounds:
                raise InterruptedRun(done, out)
        record = time_spent.stamp(record)
    return result(settings, record, traffic)


def empty_record() -> dict[str, Any]:
    """What a run keeps on the host, before its first round."""
    return {"rounds": {}, "evaluations": {}, "clients": {}, "seconds": 0.0, "compile_seconds": 0.0}


def result(settings: Settings, record: dict[str, Any], traffic: Traffic) -> Result:
    """A run's record with the bytes of its rounds, as far as it went."""
    done = int(record["evaluations"]["round"][-1])
    rounds = dict(record["rounds"])
    for way, fixed in (("bytes_up", traffic.round_up), ("bytes_down", traffic.round_down)):
        rounds[way] = np.cumsum(rounds.get(way, [fixed] * done)).tolist()  # coded bytes, if the method counts them
    times = {name: record[name] for name in ("seconds", "compile_seconds")}
    return Result(settings, rounds, record["evaluations"], record["clients"], traffic, **times)


def _rounds_done(checkpoints: Checkpoints, settings: Settings, resume: bool) -> int:
    latest, folder = checkpoints.latest(), checkpoints.folder.parent
    if latest is None:
        return 0
    if not resume:
        raise InputError(
            f"{folder} holds {latest} rounds already; use --resume to go on, --overwrite to begin anew or another --out"
        )
    then, now = checkpoints.record()["settings"], settings.public()
    free = set(_FREE_TO_CHANGE) - ({"rounds"} if settings.schedule == "cosine" else set())
    other = sorted(name for name in {*then, *now} - free if then.get(name) != now.get(name))
    if other:
        name, more = other[0], f" ({len(other) - 1} more differ)" if len(other) > 1 else ""
        raise InputError(
            f"{folder} was run with {name}={then.get(name)}, not {now.get(name)}{more}; "
            "use the settings of the run that you resume, or another --out"
        )
    if latest > settings.rounds:
        raise InputError(f"{folder} is at round {latest} already; give --rounds={latest} or more")
    return latest


def extend(record: dict[str, Any], done: int, experiment: Experiment, metrics, scalars, clients, who: str = "") -> None:
    """Append one superstep, fetched from the device, to the record."""
    metrics, scalars, clients = jax.device_get((metrics, scalars, clients))
    metrics = dict(metrics)
    bad, leaf = metrics.pop(BAD_CLIENT), metrics.pop(BAD_LEAF)
    before = sum(record["rounds"].get(BAD_CLIENTS, []))
    if metrics[BAD_CLIENTS].any() and not before:
        _name_the_bad(experiment, done - len(bad), metrics[BAD_CLIENTS], bad, leaf, who)
    for name, values in metrics.items():
        record["rounds"].setdefault(name, []).extend(values.astype(float).tolist())
    evaluations = record["evaluations"]
    evaluations.setdefault("round", []).append(done)
    for name, value in scalars.items():
        evaluations.setdefault(name, []).append(float(value))
    kind = "central" if "central_loss" in evaluations else "local"
    losses = evaluations.get(f"{kind}_loss", [0.0])
    if not np.isfinite(losses[-1]) and (len(losses) == 1 or np.isfinite(losses[-2])):
        text = f"the {kind} loss is {losses[-1]} at round {done}: the run diverged; lower the learning rates"
        tqdm.write(f"warning: {who}{text}", file=sys.stderr)
    in_order_of_ids = np.argsort(np.asarray(experiment.federation.client))
    record["clients"] = {name: values[in_order_of_ids].astype(float).tolist() for name, values in clients.items()}


def _name_the_bad(experiment: Experiment, before: int, counts, clients, leaves, who: str) -> None:
    """Say whose numbers stopped being finite first, and in what."""
    first = int(np.argmax(counts > 0))
    client = int(clients[first])
    row = int(np.flatnonzero(np.asarray(experiment.federation.client) == client)[0])
    cohort = next(j for j, part in enumerate(experiment.layout.slices) if part.start <= row < part.stop)
    name = experiment.simulation.leaf(experiment.federation, cohort, int(leaves[first]))
    more = f" ({int(counts[first]) - 1} more in that round)" if counts[first] > 1 else ""
    what = (
        "left out of the rounds in which it happens"
        if experiment.settings.drop_nonfinite
        else "nor is what is made of it then; lower the learning rates, or leave such clients out by --drop_nonfinite"
    )
    tqdm.write(
        f"warning: {who}client {client}: {name} is not finite in round {before + first + 1}{more}; {what}",
        file=sys.stderr,
    )


def _fitted(experiment: Experiment, state: State, length: int) -> tuple[Experiment, str]:
    """The experiment in chunks that fit in memory, compiled, and what it needs of what is free, in words.

    Raises InputError if it does not fit and --chunk was given, or if nothing fits.
    """
    settings, chosen = experiment.settings, experiment.plan
    free = math.ceil(settings.memory_limit * 1e9) or plan.free_bytes(chosen.mesh)
    if chosen.kind == "loop" or free is None:
        return experiment, ""
    tried: dict[int, Experiment] = {}

    def needed_by(chunk: int) -> int:
        one = tried[chunk] = experiment if chunk == chosen.chunk else experiment.rechunked(chunk)
        run: Any = one.simulation.run  # both are jitted, and keep what is compiled here for their first call
        evaluate: Any = one.simulation.evaluate
        calls = run.lower(state, one.federation, one.hparams, length), evaluate.lower(state, one.federation)
        return max(plan.needed_bytes(call.compile()) for call in calls)

    chunk, needed = plan.fit_chunk(chosen.chunk, free, needed_by, may_change=chosen.automatic_chunk)
    changed = f"; chunk {chunk}, because {chosen.chunk} does not fit" if chunk != chosen.chunk else ""
    return tried[chunk], f"{changed}; {needed / 1e9:.2g} of {free / 1e9:.3g} GB free"


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that the first SIGINT or SIGTERM fills; the second one ends the process at once."""
    received: list[int] = []

    def stop(number, frame):
        received.append(number)
        tqdm.write("stopping after this superstep; once more stops at once", file=sys.stderr)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    try:
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # signals are the main thread's alone
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Clock:
    """Wall and compilation seconds, added to those of a resumed record."""

    def __init__(self):
        self.began, self.compiling = time.perf_counter(), 0.0
        self.before, self.compiling_before = 0.0, 0.0

    def listen(self, event: str, duration_secs: float, **_: Any) -> None:
        if event in ("/jax/core/compile/backend_compile_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration"):
            self.compiling += duration_secs

    def start(self, record: dict[str, Any]) -> None:
        self.before, self.compiling_before = record["seconds"], record["compile_seconds"]

    def stamp(self, record: dict[str, Any]) -> dict[str, Any]:
        seconds = self.before + time.perf_counter() - self.began
        return record | {"seconds": seconds, "compile_seconds": self.compiling_before + self.compiling}


@contextlib.contextmanager
def clock() -> Iterator[Clock]:
    """Seconds from here on, of them those of compilation: `clock.stamp(record)`."""
    running = Clock()
    jax.monitoring.register_event_duration_secs_listener(running.listen)
    try:
        yield running
    finally:
        jax.monitoring.unregister_event_duration_listener(running.listen)
