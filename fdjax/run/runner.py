"""Runs a simulation superstep by superstep: evaluates, records, draws progress, keeps checkpoints, can be stopped."""

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from fdjax import own
from fdjax.engine import compiling, hosts, plan
from fdjax.engine.layout import State, first_rounds
from fdjax.engine.storage import Storage
from fdjax.errors import InputError
from fdjax.exchange.traffic import Traffic
from fdjax.run.checkpoint import Checkpoints
from fdjax.run.experiment import Experiment, build, put_hparams, traffic_of, with_plan
from fdjax.run.record import Clock, Record, Recording, Result, clock, kind_of
from fdjax.run.settings import FOLDERS, Settings, make
from fdjax.run.training import hparams_now

__all__ = ["InterruptedRun", "Result", "run", "start"]

_SAVE_SECONDS = 30


class InterruptedRun(Exception):  # noqa: N818
    """A run was asked to stop and did, after `round` rounds, with a checkpoint in `out` (None: nothing was kept)."""

    def __init__(self, round: int, out: Path | None):
        super().__init__(round, out)
        self.round, self.out = round, out


def start(
    settings: Settings | None = None,
    out: str | os.PathLike | None = None,
    *,
    resume: bool = False,
    checkpoint_every: int = 0,
    progress: bool = True,
    **named: Any,
) -> Result:
    """`run` as users call it, by the name `fdjax.run`: with `Settings`, or with the names of what is to be set.

    These are names of settings, and of hyperparameters and options of the method. All else is as in `run`.
    """
    if settings is not None and named:
        raise InputError(f"run takes Settings or names of settings, but got both; leave out {', '.join(named)}")
    checked = make(**named) if settings is None else settings.check()
    folder = None if out is None else Path(out).expanduser()
    return run(checked, folder, resume=resume, checkpoint_every=checkpoint_every, progress=progress)


def run(
    settings: Settings,
    out: Path | None = None,
    *,
    resume: bool = False,
    checkpoint_every: int = 0,
    progress: bool = True,
) -> Result:
    """Simulate the rounds of checked settings.

    With `out`, checkpoints are kept in that folder; with `resume`, the run goes on from the latest of them.
    `checkpoint_every` is in rounds; 0 saves about every 30 seconds. The last round is always saved.

    Raises InputError for settings that cannot work or that differ from the checkpoint's, before anything compiles, and
    InterruptedRun after the first SIGINT or SIGTERM.
    """
    public = settings.public()
    with contextlib.ExitStack() as stack:
        time_spent = stack.enter_context(clock())
        hosts.check_agreement(public | {"resume": resume, "out": str(out)}, FOLDERS)
        saves = stack.enter_context(contextlib.closing(_Saves(out, checkpoint_every, public, time_spent)))
        saves.check(settings, resume)
        experiment, traffic, needed = _compile(build(settings))
        progress = progress and hosts.is_first()
        if progress:
            tests = f"; {experiment.tests.why}" if experiment.tests.why else ""
            tqdm.write(f"lifting: {experiment.plan.why}{needed}{tests}", file=sys.stderr)
        recording = Recording(experiment, traffic, saves.record)
        saves.storages = experiment.layout.storages
        state = saves.restore(experiment.simulation.shapes(experiment.federation)) if saves.round else None
        state = _begun(experiment, recording) if state is None else state
        time_spent.start(recording.record)
        bar = stack.enter_context(
            tqdm(
                total=settings.rounds,
                initial=saves.round,
                desc=settings.method.name,
                unit="round",
                disable=not progress,
            )
        )
        _run_rounds(experiment, state, recording, saves, bar)
        return recording.result(time_spent.stamp(recording.record))


def _begun(experiment: Experiment, recording: Recording) -> State:
    """The state before the first round, which is tested too."""
    state = experiment.simulation.init(experiment.settings.seed, experiment.federation)
    if experiment.simulation.setup is not None:
        state, report = experiment.simulation.setup(state, experiment.federation, experiment.hparams)
        recording.add_setup(report)
    recording.add_evaluation(0, *_evaluate(experiment, state, experiment.tests.between))
    return state


def _evaluate(experiment: Experiment, state: State, examples: int) -> tuple[Any, Any]:
    """An evaluation that tests personal models on so many examples."""
    return experiment.simulation.evaluate(state, experiment.federation, experiment.hparams, np.int32(examples))


def _run_rounds(experiment: Experiment, state: State, recording: Recording, saves: "_Saves", bar: tqdm) -> None:
    """Run and record the rounds that are left."""
    rounds, eval_every = experiment.settings.rounds, experiment.settings.eval_every
    simulation, federation, tests = experiment.simulation, experiment.federation, experiment.tests
    most, done = _longest(experiment.settings), saves.round
    _show(bar, recording.record, 0)
    with _stop_signals() as signals:
        while done < rounds:
            length = min(eval_every, rounds - done)
            if experiment.settings.schedule == "plateau":
                now = hparams_now(experiment.settings, recording.record["evaluations"])
                experiment = experiment._replace(hparams=put_hparams(experiment, now))
            state, report = simulation.run(state, federation, experiment.hparams, most, np.int32(length))
            done += length
            evaluation = _evaluate(experiment, state, tests.last if done == rounds else tests.between)
            recording.add_superstep(done, first_rounds(jax.device_get(report), length), *evaluation)
            if done == rounds and simulation.fine_tune is not None:
                recording.add_last(simulation.fine_tune(state, federation, experiment.hparams))
            _show(bar, recording.record, length)
            stopping = hosts.any_of(bool(signals))
            saves.save_if_due(state, recording.record, done, at_once=stopping or done == rounds)
            if stopping and done < rounds:
                raise InterruptedRun(done, saves.folder)


def _show(bar: tqdm, record: Record, rounds: int) -> None:
    kind = kind_of(record["evaluations"])
    bar.set_postfix_str(f"{kind} {100 * record['evaluations'][f'{kind}_accuracy'][-1]:.2f} %")
    bar.update(rounds)


class _Saves:
    """The saves of a run: whether there is one to go on from, and when to make the next. None without a folder."""

    def __init__(self, folder: Path | None, every: int, public: dict[str, Any], time_spent: Clock):
        self.folder, self.round = folder, 0  # rounds done at the last save
        self.record: Record | None = None  # of the save from which the run goes on, if there is one
        self.storages: tuple[Storage, ...] = ()  # where states of clients lie
        self._stored: list[Storage] | None = None  # where they lay at that save
        self._every, self._public, self._time_spent = every, public, time_spent
        self._checkpoints = None if folder is None else Checkpoints(folder / "checkpoints")
        self._saved_at = time.perf_counter()

    def check(self, settings: Settings, resume: bool) -> None:
        """Find the last save. Raises InputError if the folder holds a run that these settings cannot continue."""
        latest = self._checkpoints.latest() if self._checkpoints else None
        if self._checkpoints is None or latest is None:
            return
        if not resume:
            raise InputError(
                f"{self.folder} holds {latest} rounds already; use --resume to go on, --overwrite to begin anew or "
                "another --out"
            )
        record = self._checkpoints.record()
        then, now = record.pop("settings"), self._public
        stored = record.pop("storages", None)
        self._stored = None if stored is None else [Storage(*each) for each in stored]
        differing = sorted(n for n in {*then, *now} - settings.resumable if then.get(n) != now.get(n))
        if differing:
            name, more = differing[0], f" ({len(differing) - 1} more differ)" if len(differing) > 1 else ""
            changed = own.changed(then.get(name), now.get(name))
            raise InputError(
                f"{self.folder} was run with {name}={then.get(name)}, not {now.get(name)}{changed}{more}; "
                "use the settings of the run that you resume, or another --out"
            )
        if latest > settings.rounds:
            raise InputError(f"{self.folder} is at round {latest} already; give --rounds={latest} or more")
        self.round, self.record = latest, record

    def restore(self, like: State) -> State:
        """The state of the last save, with the shapes and the placement of `like`."""
        assert self._checkpoints is not None
        self._saved_at = time.perf_counter()
        return self._checkpoints.restore(like, self._stored, self.storages)

    def save_if_due(self, state: State, record: Record, done: int, *, at_once: bool) -> None:
        """Save if enough rounds or seconds have passed on any host, or `at_once`."""
        if self._checkpoints is None:
            return
        rounds, seconds = done - self.round, time.perf_counter() - self._saved_at
        due = rounds >= self._every if self._every else seconds > _SAVE_SECONDS
        if hosts.any_of(due) or at_once:
            more = {"settings": self._public, "storages": [list(storage) for storage in self.storages]}
            self._checkpoints.save(state, self._time_spent.stamp(record) | more)
            self._saved_at, self.round = time.perf_counter(), done

    def close(self) -> None:
        """Release what the checkpoints hold."""
        if self._checkpoints is not None:
            self._checkpoints.close()


def _longest(settings: Settings) -> int:
    """Rounds of the superstep that is compiled, which runs shorter ones too."""
    return min(settings.eval_every, settings.rounds)


def _compile(experiment: Experiment) -> tuple[Experiment, Traffic, str]:
    """The experiment in chunks that fit in memory, compiled; its traffic; what it needs of what is free, in words.

    Everything is traced before anything is compiled, and then compiled side by side. The jitted functions keep what is
    compiled here for their first call. The states of the clients, which are not there yet, are counted.
    Raises InputError if they do not fit, if a round does not and --chunk was given, or if nothing fits.
    """
    settings, planned = experiment.settings, experiment.plan
    if planned.lifting.kind == "loop":
        return experiment, traffic_of(experiment), ""
    federation, hparams, chunk = experiment.federation, experiment.hparams, planned.lifting.chunk
    init: Any = experiment.simulation.init
    first = init.lower(settings.seed, federation)
    mesh = planned.lifting.mesh
    free = math.ceil(settings.memory_limit * 1e9) or plan.free_bytes(mesh)
    tried: dict[int, Experiment] = {}
    traffic: list[Traffic] = []

    def needed_by(chunk: int) -> int:
        tried[chunk] = with_plan(experiment, planned.in_chunks_of(chunk))
        now: Any = tried[chunk].simulation
        state = now.shapes(federation)
        held = plan.fit_states(state.clients, mesh, free or 1 << 62)
        calls = [
            now.run.lower(state, federation, hparams, _longest(settings), np.int32(0)),
            now.evaluate.lower(state, federation, hparams, np.int32(0)),
            *([now.setup.lower(state, federation, hparams)] if now.setup else []),
        ]
        once = [] if traffic else [first]
        compiled = compiling.together([*calls, *once], lambda: traffic or traffic.append(traffic_of(experiment)))
        return held + max(plan.needed_bytes(call) for call in compiled[: len(calls)])

    fitting, needed = plan.fit_chunk(chunk, free or 1 << 62, needed_by, may_change=planned.automatic_chunk)
    changed = f"; chunk {fitting}, because {chunk} does not fit" if fitting != chunk else ""
    words = f"; {needed / 1e9:.2g} of {free / 1e9:.3g} GB free" if free is not None else ""
    return tried[fitting], traffic[0], changed + words


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
