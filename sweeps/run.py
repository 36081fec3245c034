"""Run a study: its trials as compiled batches, its params and results in Optuna's storage.

    fdjax-sweep --study=temperature_alpha --smoke
    fdjax-sweep --study=my_study.py --workers=2

Running it again goes on: finished trials stay, those of a worker that was stopped or killed are run again. Any number
of these commands, on any machines that reach the storage, share a study.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from absl import flags
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from tqdm import tqdm

from fdjax.errors import InputError, unknown
from fdjax.run import batch, program, report
from fdjax.run.experiment import Experiment
from fdjax.run.record import Result
from sweeps.storage import Worker, given_up, open_storage, patiently, position
from sweeps.study import Study, fingerprint_of_code, load, shipped

_TPE_BATCH = 8
_STOPPED = "stopped: finished trials stay, the others are free; the same command goes on"
_FOLDERS = ("--storage", "--compile_cache")  # flags that mean nothing on another machine
_POLL = 1.0  # seconds between looks at what other workers do


class Planned(optuna.samplers.BaseSampler):
    """Params that follow from a trial's place in the study's plan, whichever worker asks."""

    def __init__(self, plan: Study):
        self._plan = plan
        self.shared: optuna.Study | None = None  # not what `sample_relative` gets: a pruner may hide trials from it

    def infer_relative_search_space(self, study, trial):
        return self._plan.distributions

    def sample_relative(self, study, trial, search_space):
        assert self.shared is not None
        place = position(self.shared.get_trials(deepcopy=False), trial.number)
        return self._plan.point(place % self._plan.total)  # a trial too many gets params too, and is not run

    def sample_independent(self, study, trial, param_name, param_distribution):
        raise NotImplementedError("all params are sampled together")


def open_study(plan: Study, url: str) -> optuna.Study:
    """The study in the storage, which is created if need be.

    Raises InputError if the storage has a study of that name with other settings or of other code.
    """
    seed = int.from_bytes(os.urandom(4))  # another one for each worker; a plan needs none
    planned = Planned(plan)
    tpe = plan.search == "tpe"
    sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True, multivariate=True) if tpe else planned
    shared = planned.shared = optuna.create_study(
        study_name=plan.name, storage=open_storage(url), sampler=sampler, direction=plan.direction,
        pruner=plan.pruner or optuna.pruners.NopPruner(), load_if_exists=True,
    )  # fmt: skip
    now = {"description": plan.description(), "code": fingerprint_of_code(), "files": plan.files()}
    then = shared.user_attrs
    if "description" in then:
        for name, what in (("description", "settings"), ("code", "code"), ("files", "files")):
            if then.get(name, now[name]) != now[name]:
                raise InputError(
                    f"study {plan.name} in {url} was begun with other {what}{_difference(then[name], now[name])}; "
                    "give the new one another --name"
                )
    more: dict[str, Any] = {name: getattr(plan, name) for name in ("paper", "question", "runtime")}
    more["command"] = shlex.join(
        ["python", "-m", "sweeps.run", *(a for a in sys.argv[1:] if not a.startswith(_FOLDERS))]
    )
    for name, value in (now | more | {"environment": report.environment()}).items():
        if name not in then:
            patiently(shared.set_user_attr, name, value)
    return shared


def _difference(then: Any, now: Any, name: str = "") -> str:
    if isinstance(then, dict) and isinstance(now, dict):
        other = next(key for key in {**then, **now} if then.get(key) != now.get(key))
        return _difference(then.get(other), now.get(other), f"{name}.{other}" if name else other)
    return f": {name + '=' if name else ''}{then}, now {now}"


def work(plan: Study, shared: optuna.Study, size: int) -> None:
    """Ask for trials, at most `size` at once, run them and tell their results, until the study is complete."""
    with Worker(plan, shared) as worker, tqdm(total=plan.total, desc=plan.name, unit="trial") as bar:
        runner = Runner(worker, size, bar)
        while True:
            known = patiently(shared.get_trials, deepcopy=False)
            if patiently(worker.recover, known):
                continue
            bar.update(sum(t.state.is_finished() and not given_up(t) for t in known) - bar.n)
            new = max(plan.total - position(known, len(known)), 0)
            if left := new + sum(t.state == TrialState.WAITING for t in known):
                runner.run(worker.ask(min(size, left)))
            elif all(t.state.is_finished() for t in known):
                return
            else:
                bar.set_postfix_str("waiting: other workers have all trials that are left")
                time.sleep(_POLL)


class Runner:
    """Runs trials, those of one signature as one batch, whose compiled code is kept for the next ones."""

    def __init__(self, worker: Worker, size: int, bar: tqdm):
        self.worker, self.plan, self.size, self.bar = worker, worker.plan, size, bar
        self._files = worker.plan.files()  # and what they say
        self._batches: dict[Any, tuple[batch.Batch, list[Experiment]]] = {}

    def run(self, asked: Sequence[optuna.Trial]) -> None:
        """Run the trials and tell their results. Raises what a batch raises; its trials get one more try.

        Raises InputError if a user's file was changed since the worker began: trials of one study are of one code.
        """
        for given, held in self.plan.files().items():
            if held != self._files[given]:
                raise InputError(
                    f"{given} was changed while the study ran ({self._files[given]}, now {held}); change it back and "
                    "run the same command, or give the new one another --name"
                )
        groups: dict[Any, list[tuple[optuna.Trial, Experiment]]] = {}
        for trial, experiment in zip(asked, self._experiments(asked), strict=True):
            if experiment is not None:
                groups.setdefault(experiment.signature, []).append((trial, experiment))
        for signature, group in groups.items():
            try:
                compiled = self._batch(signature, [e for _, e in group], self.size if len(groups) == 1 else 0)
            except InputError as error:
                for trial, _ in group:
                    self._fail(trial, str(error))
                continue
            if self.plan.objective not in compiled.scalars:
                raise unknown("objective", self.plan.objective, compiled.scalars)
            try:
                for start in range(0, len(group), compiled.slots):
                    self._run_batch(compiled, group[start : start + compiled.slots])
            except Exception as error:
                for trial, _ in group:
                    self._count_error(trial, error)
                raise

    def _experiments(self, asked: Sequence[optuna.Trial]) -> list[Experiment | None]:
        """An experiment for each trial, or None for a trial whose settings cannot work, which has failed then."""
        try:
            return list(batch.experiments([self.plan.settings(trial.params) for trial in asked]))
        except InputError as error:
            if len(asked) > 1:
                return [experiment for trial in asked for experiment in self._experiments([trial])]
            self._fail(asked[0], str(error))
            return [None]

    def _batch(self, signature: Any, like: list[Experiment], size: int) -> batch.Batch:
        """The batch for trials of a signature: the last one if they fit in, else one for all such trials so far."""
        known = self._batches.get(signature)
        if known is None or not known[0].fits(like):
            like = [*like, *(known[1] if known else [])]
            known = self._batches[signature] = batch.batch(like, max(len(like), size), [*self.plan.space]), like
            tqdm.write(known[0].why, file=sys.stderr)
        return known[0]

    def _run_batch(self, compiled: batch.Batch, group: Sequence[tuple[optuna.Trial, Experiment]]) -> None:
        asked, experiments = zip(*group, strict=True)

        def watch(done, records):
            self.bar.set_postfix_str(f"{len(records)} trials at round {done}")
            return [n for n, record in records.items() if self._report(asked[n], record["evaluations"])]

        for trial, result in zip(asked, compiled.run(experiments, watch), strict=True):
            self._tell(trial, result)

    def _report(self, trial: optuna.Trial, evaluations: dict[str, list[float]]) -> bool:
        """Report the last value of the objective; returns whether the trial is to stop here."""
        try:
            patiently(trial.report, evaluations[self.plan.objective][-1], int(evaluations["round"][-1]))
            return bool(self._divergence(evaluations)) or patiently(trial.should_prune)
        except UpdateFinishedTrialError:  # another worker took this one for dead
            return True

    def _divergence(self, evaluations: dict[str, list[float]]) -> str:
        """In words, the objective or loss that is not finite at the last evaluation; empty if all are finite."""
        for name in (self.plan.objective, *(name for name in evaluations if name.endswith("_loss"))):
            accuracy = evaluations.get(name.replace("_loss", "_accuracy"), [0.0])[-1]  # NaN: there was nothing to test
            if not np.isfinite(evaluations[name][-1]) and (name == self.plan.objective or np.isfinite(accuracy)):
                return f"{name} is {evaluations[name][-1]} after round {evaluations['round'][-1]:.0f}"
        return ""

    def _tell(self, trial: optuna.Trial, result: Result) -> None:
        """Write everything that the report needs, and then the value: a trial that is finished is complete."""
        evaluations = result.evaluations
        attributes = {
            "settings": result.settings.public(),
            "evaluations": evaluations,
            "bytes": [report.bytes_until(result, int(r)) for r in evaluations["round"]],
            "seconds": result.seconds,
            "compile_seconds": result.compile_seconds,
        }
        if reason := self._divergence(evaluations):
            self._fail(trial, reason, **attributes)
        elif not result.ended:
            self.worker.finish(trial, TrialState.PRUNED, **attributes)
        else:
            value = evaluations[self.plan.objective][-1]
            with contextlib.suppress(UpdateFinishedTrialError):
                patiently(trial.report, value, result.settings.rounds)
            self.worker.finish(trial, TrialState.COMPLETE, value, **attributes)

    def _fail(self, trial: optuna.Trial, reason: str, **attributes: Any) -> None:
        tqdm.write(f"trial {trial.number} failed: {reason}", file=sys.stderr)
        self.worker.finish(trial, TrialState.FAIL, reason=reason, **attributes)

    def _count_error(self, trial: optuna.Trial, error: Exception) -> None:
        """Say in the storage that a trial, unless it is finished, ended in an exception; the second one is the last."""
        errors = trial.user_attrs.get("errors", 0) + 1
        with contextlib.suppress(UpdateFinishedTrialError):
            patiently(trial.set_user_attr, "errors", errors)
            if errors > 1:
                self._fail(trial, f"{type(error).__name__}: {error}".splitlines()[0])


def main() -> None:
    given = flags.FLAGS
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    plan = load(given.study)
    plan = (plan.smaller() if given.smoke else plan)._replace(**({"name": given.name} if given.name else {})).check()
    url = given.storage or f"sqlite:///runs/sweeps/{plan.name}.db"
    size = given.batch or plan.batch or (_TPE_BATCH if plan.search == "tpe" else -(-plan.total // given.workers))
    shared = open_study(plan, url)
    failed = []
    if given.workers > 1:
        try:
            failed = _spawn(given.workers, size)
        except KeyboardInterrupt:
            sys.exit(130)  # the workers say it
    else:
        try:
            work(plan, shared, size)
        except KeyboardInterrupt:
            sys.exit(_STOPPED)
    _tell_states(plan, shared, url, failed)
    more = ["--smoke"] * given.smoke + [f"--name={given.name}"] * bool(given.name)
    print(
        "tables and pictures:",
        shlex.join(["python", "-m", "sweeps.report", f"--study={given.study}", *more, f"--storage={url}"]),
    )


def _tell_states(plan: Study, shared: optuna.Study, url: str, failed: Sequence[int] = ()) -> None:
    """Print how many trials ended how. Raises InputError if workers failed, by these codes, and trials are left."""
    states = [t.state.name.lower() for t in shared.get_trials(deepcopy=False) if not given_up(t)]
    counts = ", ".join(f"{states.count(state)} {state}" for state in sorted({*states})) or "no trial"
    print(f"{plan.name}: {counts}, in {url}")
    if failed:
        text = f"workers ended early, with exit codes {', '.join(map(str, failed))}"
        if sum(states.count(state) for state in ("complete", "pruned", "fail")) < plan.total:
            raise InputError(f"{text}, and trials are left; run the same command again to go on")
        tqdm.write(f"warning: {text}; the others ran all trials", file=sys.stderr)


def _spawn(count: int, size: int) -> list[int]:
    """Run workers on this machine, each with its share of the cores; returns the exit codes of those that failed."""
    cores = sorted(os.sched_getaffinity(0))
    command = [sys.executable, "-m", "sweeps.run", *sys.argv[1:], "--workers=1", f"--batch={size}"]
    processes = []
    for i in range(count):
        share = {*cores[i::count]} or {cores[i % len(cores)]}
        os.sched_setaffinity(0, share)
        processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
    os.sched_setaffinity(0, {*cores})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        while any(process.poll() is None for process in processes):
            time.sleep(_POLL)
    finally:
        for process in processes:
            process.terminate()
    return [process.returncode for process in processes if process.returncode]


def command() -> None:
    """`fdjax-sweep`, or `python -m sweeps.run`."""
    ours = ", ".join(shipped())
    flags.DEFINE_string("study", None, f"file that defines STUDY, or one of ours: {ours}", required=True)
    flags.DEFINE_boolean("smoke", False, "the small variant, of seconds")
    flags.DEFINE_string("name", None, "the study's name in the storage; default: the file's")
    flags.DEFINE_string("storage", None, "sqlite:///x.db, journal:x.log or a database; default: under runs/sweeps")
    flags.DEFINE_integer("workers", 1, "processes that share the study on this machine", lower_bound=1)
    flags.DEFINE_integer("batch", 0, "trials asked for at once; 0: the study's choice", lower_bound=0)
    program.start(main)


if __name__ == "__main__":
    command()
