"""Runs a simulation superstep by superstep: evaluates, records, draws progress, keeps checkpoints, can be stopped."""

import contextlib
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from fdjax.engine import compiling, hosts, plan
from fdjax.engine.layout import Report, State, first_rounds
from fdjax.errors import InputError
from fdjax.exchange.traffic import Traffic
from fdjax.run.checkpoint import check_resumable
from fdjax.run.experiment import Experiment, build, put_hparams, traffic_of, with_plan
from fdjax.run.lock import locked
from fdjax.run.loggers import Progress
from fdjax.run.logs import Logs, Told, check_told
from fdjax.run.profiling import Profiler, check_profile
from fdjax.run.record import Record, Recording, Result, clock, kind_of
from fdjax.run.saves import Saves
from fdjax.run.settings import FOLDERS, Settings, make
from fdjax.run.stopping import check_watched
from fdjax.run.trained_model import Trained, leave_devices
from fdjax.run.training import hparams_now

__all__ = ["InterruptedRun", "Result", "run", "start"]


_NOBODY = Told()


class InterruptedRun(Exception):  # noqa: N818
    """A run was asked to stop and did, after `round` rounds, with a checkpoint in `out` (None: nothing was kept).

    `results` are what there is by then, as runs of so many rounds would give it: of one run, or of each seed so far.
    """

    def __init__(self, round: int, out: Path | None, *results: Result):
        super().__init__(round, out, *results)
        self.round, self.out, self.results = round, out, results

    @property
    def result(self) -> Result | None:
        """That of one run."""
        return self.results[0] if self.results else None


def start(
    settings: Settings | None = None,
    out: str | os.PathLike | None = None,
    *,
    resume: bool = False,
    checkpoint_every: int = 0,
    progress: bool = True,
    tensorboard: bool = False,
    wandb: bool = False,
    profile: bool = False,
    callback: Callable[[Progress], Any] | None = None,
    **named: Any,
) -> Result:
    """`run` as users call it, by the name `fdjax.run`: with `Settings`, or with the names of what is to be set.

    These are names of settings, and of hyperparameters and options of the method. With `tensorboard` and `wandb` the
    folder `out` gets event files and an offline run, with `profile` a trace of one superstep. `callback` is called with
    a `fdjax.Progress` at every evaluation; if it raises something, the run ends by a `fdjax.CallbackError`. All else is
    as in `run`.
    """
    checked = chosen("run", settings, named)
    if out is not None and not isinstance(out, str | os.PathLike):
        raise InputError(f"out={out!r}: expected the path of a folder, or None to keep nothing")
    if not isinstance(resume, bool):
        raise InputError(f"resume={resume!r}: expected True or False")
    if isinstance(checkpoint_every, bool) or not isinstance(checkpoint_every, int) or checkpoint_every < 0:
        raise InputError(f"checkpoint_every={checkpoint_every!r}: expected rounds, a whole number of at least 0")
    if checkpoint_every and out is None:
        raise InputError(f"checkpoint_every={checkpoint_every} needs a folder for the checkpoints; give out as well")
    folder = None if out is None else Path(out).expanduser()
    told = Told(tensorboard, wandb, callback)
    how = {"resume": resume, "checkpoint_every": checkpoint_every, "progress": progress}
    return run(checked, folder, **how, told=told, profile=profile)


def chosen(function: str, settings: Any, named: dict[str, Any]) -> Settings:
    """Checked settings, as they are or by their names. Raises InputError for both, and for what are none."""
    if settings is not None and named:
        raise InputError(f"{function} takes Settings or names of settings, but got both; leave out {', '.join(named)}")
    if settings is not None and not isinstance(settings, Settings):
        raise InputError(f"{function} takes Settings, not {settings!r}; give settings by name, e.g. rounds=3")
    return make(**named) if settings is None else settings.check()


def run(
    settings: Settings,
    out: Path | None = None,
    *,
    resume: bool = False,
    checkpoint_every: int = 0,
    progress: bool = True,
    told: Told = _NOBODY,
    profile: bool = False,
) -> Result:
    """Simulate the rounds of checked settings, fewer if their rules of stopping say so.

    With `out`, checkpoints are kept in that folder, which is this run's alone meanwhile; with `resume`, the run goes
    on from the latest of them that is whole. `checkpoint_every` is in rounds; 0 saves about every 30 seconds. The last
    round is always saved. A save that fails is told, and costs nothing but itself. `told` gets every evaluation.
    With `profile`, a superstep is traced into the folder `profile` in `out`.

    Raises InputError for settings that cannot work or that differ from the checkpoint's, before anything compiles;
    InterruptedRun, which has the result so far, after the first SIGINT or SIGTERM; CallbackError, which has it too.
    """
    check_told(told, out)
    check_profile(profile, out, settings.lifting)
    public = settings.public()
    with contextlib.ExitStack() as stack:
        time_spent = stack.enter_context(clock())
        hosts.check_agreement(public | {"resume": resume, "out": str(out)}, FOLDERS)
        _take(stack, out, resume)
        saves = stack.enter_context(contextlib.closing(Saves(out, checkpoint_every, settings, time_spent)))
        saves.check(resume)
        leave_devices()
        built = build(settings)
        check_watched(built)
        profiler = stack.enter_context(contextlib.closing(Profiler(out / "profile" if profile and out else None)))
        with profiler.compiling():
            experiment, traffic, needed = _compile(built, profiler)
        progress = progress and hosts.is_first()
        if progress:
            tests = f"; {experiment.tests.why}" if experiment.tests.why else ""
            tqdm.write(f"lifting: {experiment.plan.why}{needed}{tests}", file=sys.stderr)
        recording = Recording(experiment, traffic, saves.record)
        saves.storages = experiment.layout.storages
        state = saves.restore(experiment.simulation.shapes(experiment.federation)) if saves.round else None
        logs = stack.enter_context(contextlib.closing(Logs(told, out, [settings])))
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

        def result(experiment: Experiment, state: State) -> Result:
            folder = out if saves.round == int(state.round) else None
            return recording.result(time_spent.stamp(recording.record), Trained(experiment, state, folder=folder))

        return _run_rounds(experiment, state, recording, saves, logs, profiler, bar, result)


def _take(stack: contextlib.ExitStack, out: Path | None, resume: bool) -> None:
    """Hold the folder while `stack` is open. Raises InputError, on all hosts, if it is in use or nothing resumes."""
    with hosts.all_or_none():
        if resume and out is None:
            raise InputError("resume=True needs the folder of the run that is to go on; give out as well")
        if out is not None and resume:
            check_resumable(out)
        if out is not None and hosts.is_first():
            try:
                out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"cannot write to {out}: {error.strerror}; choose another --out") from None
            stack.enter_context(locked(out))


def _begun(experiment: Experiment, recording: Recording) -> State:
    """The state before the first round, which is tested too."""
    state = experiment.simulation.init(experiment.settings.seed, experiment.federation)
    if experiment.simulation.setup is not None:
        state, report = experiment.simulation.setup(state, experiment.federation, experiment.hparams)
        recording.add_setup(report)
    recording.add_evaluation(0, *_evaluate(experiment, state, experiment.tests.between))
    return state


def _record(experiment: Experiment, state: State, recording: Recording, done: int, report: Report) -> bool:
    """Keep what the rounds of a superstep report, and the evaluation after it; returns whether it was the last one."""
    tests, all_done = experiment.tests, done == experiment.settings.rounds
    recording.add_superstep(done, report, *_evaluate(experiment, state, tests.last if all_done else tests.between))
    ended = all_done or recording.stop_if_due()
    if ended and not all_done and tests.between != tests.last:
        recording.replace_evaluation(done, *_evaluate(experiment, state, tests.last))
    if ended and experiment.simulation.fine_tune is not None:
        recording.add_last(experiment.simulation.fine_tune(state, experiment.federation, experiment.hparams))
    return ended


def _evaluate(experiment: Experiment, state: State, examples: int) -> tuple[Any, Any]:
    """An evaluation that tests personal models on so many examples."""
    with jax.profiler.TraceAnnotation("evaluation"):
        tested = experiment.simulation.evaluate(state, experiment.federation, experiment.hparams, np.int32(examples))
        return jax.device_get(tested)


def _run_rounds(
    experiment: Experiment,
    state: State,
    recording: Recording,
    saves: Saves,
    logs: Logs,
    profiler: Profiler,
    bar: tqdm,
    result: Callable[[Experiment, State], Result],
) -> Result:
    """Run and record the rounds that are left; `result` makes the result of what they end in."""
    rounds, eval_every = experiment.settings.rounds, experiment.settings.eval_every
    simulation, federation = experiment.simulation, experiment.federation
    most, done = _longest(experiment.settings), saves.round
    ended = done > 0 and recording.stop_if_due()
    logs.tell(recording, again=done > 0)
    _show(bar, recording.record, 0)
    if logs.failed():
        raise logs.error(saves.folder if saves.round else None, result(experiment, state))
    with stop_signals() as signals:
        while done < rounds and not ended:
            length = min(eval_every, rounds - done)
            if experiment.settings.schedule == "plateau":
                now = hparams_now(experiment.settings, experiment.ledger, recording.record["evaluations"])
                experiment = experiment._replace(hparams=put_hparams(experiment, now))
            done += length
            with profiler.superstep(last=done == rounds):
                with jax.profiler.TraceAnnotation("superstep"):
                    state, report = simulation.run(state, federation, experiment.hparams, most, np.int32(length))
                    report = first_rounds(jax.device_get(report), length)
                ended = _record(experiment, state, recording, done, report)
            _show(bar, recording.record, length)
            logs.tell(recording)
            stopping, failed = hosts.any_of(bool(signals)), logs.failed()
            saves.save_if_due(state, recording.record, done, at_once=stopping or failed or ended)
            kept = saves.folder if saves.round else None
            if failed:
                raise logs.error(kept, result(experiment, state))
            if stopping and not ended:
                raise InterruptedRun(done, kept, result(experiment, state))
    return result(experiment, state)


def _show(bar: tqdm, record: Record, rounds: int) -> None:
    kind = kind_of(record["evaluations"])
    bar.set_postfix_str(f"{kind} {100 * record['evaluations'][f'{kind}_accuracy'][-1]:.2f} %")
    bar.update(rounds)


def _longest(settings: Settings) -> int:
    """Rounds of the superstep that is compiled, which runs shorter ones too."""
    return min(settings.eval_every, settings.rounds)


def _compile(experiment: Experiment, profiler: Profiler) -> tuple[Experiment, Traffic, str]:
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
        profiler.modules = [call.as_text() for call in compiled[:2]] if profiler.folder else []
        return held + max(plan.needed_bytes(call) for call in compiled[: len(calls)])

    fitting, needed = plan.fit_chunk(chunk, free or 1 << 62, needed_by, may_change=planned.automatic_chunk)
    changed = f"; chunk {fitting}, because {chunk} does not fit" if fitting != chunk else ""
    words = f"; {needed / 1e9:.2g} of {free / 1e9:.3g} GB free" if free is not None else ""
    return tried[fitting], traffic[0], changed + words


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
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
