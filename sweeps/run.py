"""Run a study: its trials as compiled batches, its params and results in Optuna's storage.

    python -m sweeps.run --study=sweeps/temperature_alpha.py --smoke
    python -m sweeps.run --study=sweeps/temperature_alpha.py --workers=2

Running it again goes on: finished trials stay, those of a worker that was stopped or killed are run again. Any number
of these commands, on any machines that reach the storage, share a study.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optuna
from absl import flags
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from fdjax.errors import InputError, unknown
from fdjax.run import program, report, trials
from fdjax.run.experiment import Experiment
from fdjax.run.runner import Result
from sweeps.storage import Worker, open_storage, patiently
from sweeps.study import Study, fingerprint_of_code, load

_TPE_BATCH = 8
_STOPPED = "stopped: finished trials stay, the others are free; the same command goes on"
_POLL = 1.0  # seconds between looks at what others do


class Planned(optuna.samplers.BaseSampler):
    """Params that follow from a trial's number, whichever worker asks."""

    def __init__(self, study: Study):
        self._study = study

    def infer_relative_search_space(self, study, trial):
        return {}

    def sample_relative(self, study, trial, search_space):
        return {}

    def sample_independent(self, study, trial, param_name, param_distribution):
        return self._study.point(trial.number)[param_name]


def open_study(study: Study, url: str) -> optuna.Study:
    """The study in the storage, made if need be. Raises InputError if one of that name is of other settings or code."""
    seed = int.from_bytes(os.urandom(4))  # another one for each worker; the plan of a grid needs none
    sampler = (
        optuna.samplers.TPESampler(seed=seed, constant_liar=True, multivariate=True)
        if study.search == "tpe"
        else Planned(study)
    )
    storage = open_storage(url)
    made = optuna.create_study(
        study_name=study.name, storage=storage, sampler=sampler, direction=study.direction, load_if_exists=True,
        pruner=study.pruner or optuna.pruners.NopPruner(),
    )  # fmt: skip
    then, now = made.user_attrs, {"description": study.description(), "code": fingerprint_of_code()}
    if "description" in then:
        for name, what in (("description", "settings"), ("code", "code")):
            if then.get(name, now[name]) != now[name]:
                raise InputError(
                    f"study {study.name} in {url} was begun with other {what}{_difference(then[name], now[name])}; "
                    "give the new one another --name"
                )
    more: dict[str, Any] = {name: getattr(study, name) for name in ("paper", "question", "runtime")}
    more["command"] = " ".join(["python -m sweeps.run", *(a for a in sys.argv[1:] if not a.startswith("--storage"))])
    for name, value in (now | more | {"environment": report.environment()}).items():
        if name not in then:
            patiently(lambda name=name, value=value: made.set_user_attr(name, value))
    return made


def _difference(then: Any, now: Any, name: str = "") -> str:
    if isinstance(then, dict) and isinstance(now, dict):
        other = next(key for key in {**then, **now} if then.get(key) != now.get(key))
        return _difference(then.get(other), now.get(other), f"{name}.{other}" if name else other)
    return f": {name + '=' if name else ''}{then}, now {now}"


def work(study: Study, shared: optuna.Study, size: int) -> None:
    """Ask for trials, `size` at once, run them and tell, until the study is whole."""
    batches: dict[Any, tuple[trials.Batch, list[Experiment]]] = {}

    def look():
        everything = shared.get_trials(deepcopy=False)
        return everything, _ask(study, worker, everything, size)

    with Worker(shared) as worker, tqdm(total=study.total, desc=study.name, unit="trial") as bar:
        while True:
            everything, mine = patiently(look)
            bar.update(sum(t.state.is_finished() for t in everything[: study.total]) - bar.n)
            if mine:
                try:
                    _run(study, mine, size, batches, bar)
                except BaseException:
                    for trial in _unfinished(mine):
                        worker.release(trial)
                    raise
            elif all(t.state.is_finished() for t in everything) and len(everything) >= study.total:
                return
            else:
                bar.set_postfix_str("waiting: other workers hold all that is left")
                time.sleep(_POLL)


def _ask(study: Study, worker: Worker, everything: list[FrozenTrial], size: int) -> list[optuna.Trial]:
    """Trials for this worker: those left behind, and new ones as long as there are any."""
    mine = worker.take_over(worker.left_behind(everything)[:size])
    for _ in range(min(size - len(mine), study.total - len(everything))):
        mine.append(worker.take(worker.study.ask()._trial_id))
    wanted = []
    for trial in mine:
        if trial.number < study.total:
            for name, distribution in study.distributions.items():
                trial._suggest(name, distribution)
            wanted.append(optuna.Trial(worker.study, trial._trial_id))  # with the params that the storage has
        else:
            _fail(trial, "one too many: several workers asked for the last one at once")
    return wanted


def _run(study: Study, mine: Sequence[optuna.Trial], size: int, batches: dict[Any, Any], bar: tqdm) -> None:
    """Run trials, those of one signature as one batch, which is kept for the next ones."""
    groups: dict[Any, list[tuple[optuna.Trial, Experiment]]] = {}
    for trial, experiment in zip(mine, _experiments(study, mine), strict=True):
        if experiment is not None:
            groups.setdefault(experiment.signature, []).append((trial, experiment))
    for signature, group in groups.items():
        try:
            batch = _batch(study, signature, [e for _, e in group], size if len(groups) == 1 else 0, batches)
        except InputError as error:
            for trial, _ in group:
                _fail(trial, str(error))
            continue
        if study.objective not in batch.scalars:
            raise unknown("objective", study.objective, batch.scalars)
        try:
            for begun in range(0, len(group), batch.slots):
                _run_together(study, batch, group[begun : begun + batch.slots], bar)
        except Exception as error:  # once more, by whoever takes them, and then no more
            for trial in _unfinished([trial for trial, _ in group]):
                tried = trial.user_attrs.get("tried", 0) + 1
                trial.set_user_attr("tried", tried)
                if tried > 1:
                    _fail(trial, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            raise


def _unfinished(mine: Sequence[optuna.Trial]) -> list[optuna.Trial]:
    return [trial for trial in mine if not trial.storage.get_trial(trial._trial_id).state.is_finished()]


def _batch(study: Study, signature: Any, like: list[Experiment], size: int, batches: dict[Any, Any]) -> trials.Batch:
    """The batch for trials of a signature: the last one if they fit in, else one for all trials so far."""
    if signature not in batches or not batches[signature][0].fits(like):
        like = [*like, *(batches[signature][1] if signature in batches else [])]
        batch = trials.batch(like, max(len(like), size), [*study.space])
        batches[signature] = batch, like
        tqdm.write(batch.why, file=sys.stderr)
    return batches[signature][0]


def _run_together(
    study: Study, batch: trials.Batch, group: Sequence[tuple[optuna.Trial, Experiment]], bar: tqdm
) -> None:
    asked, experiments = zip(*group, strict=True)

    def watch(done, records):
        bar.set_postfix_str(f"{len(records)} trials at round {done}")
        return [n for n, record in records.items() if _prune(study, asked[n], done, record)]

    for trial, result in zip(asked, batch.run(experiments, watch), strict=True):
        _tell(study, trial, result)


def _experiments(study: Study, mine: Sequence[optuna.Trial]) -> list[Experiment | None]:
    """One for each trial; None for those that cannot work, which have failed then."""
    try:
        return list(trials.experiments([study.settings(trial.params) for trial in mine]))
    except InputError:  # of one of them
        made: list[Experiment | None] = []
        for trial in mine:
            try:
                made += trials.experiments([study.settings(trial.params)])
            except InputError as error:
                _fail(trial, str(error))
                made.append(None)
        return made


def _prune(study: Study, trial: optuna.Trial, done: int, record: dict[str, Any]) -> bool:
    """Report an intermediate value; whether to stop here."""
    value = record["evaluations"][study.objective][-1]
    storage, number = trial.storage, trial._trial_id

    def report_and_ask():
        storage.set_trial_intermediate_value(number, done, value)
        seen = storage.get_trial(number)
        seen.intermediate_values = {r: v for r, v in seen.intermediate_values.items() if r <= done}  # of this run
        return bool(_diverged(study, record["evaluations"])) or trial.study.pruner.prune(trial.study, seen)

    try:
        return patiently(report_and_ask)
    except optuna.exceptions.UpdateFinishedTrialError:
        return True


def _diverged(study: Study, evaluations: dict[str, list[float]]) -> str:
    """The objective or the loss that is no number at the last evaluation, in words; empty if all are."""
    for name in (study.objective, *(name for name in evaluations if name.endswith("_loss"))):
        if not np.isfinite(evaluations[name][-1]):
            return f"{name} is {evaluations[name][-1]} after round {evaluations['round'][-1]:.0f}"
    return ""


def _tell(study: Study, trial: optuna.Trial, result: Result) -> None:
    """Everything that the report wants, and then the value: what is finished is whole."""
    evaluations = result.evaluations
    total = np.add(result.rounds["bytes_up"], result.rounds["bytes_down"])
    value = evaluations[study.objective][-1]
    attributes = {
        "settings": result.settings.public(),
        "evaluations": evaluations,
        "bytes": [float(total[int(r) - 1]) for r in evaluations["round"]],
        "seconds": result.seconds,
        "compile_seconds": result.compile_seconds,
    }
    done = int(evaluations["round"][-1])
    if reason := _diverged(study, evaluations):
        _fail(trial, reason, attributes)
    else:
        state = TrialState.PRUNED if done < result.settings.rounds else TrialState.COMPLETE
        _finish(trial, attributes, {done: value}, state, [value])


def _fail(trial: optuna.Trial, reason: str, attributes: dict[str, Any] | None = None) -> None:
    tqdm.write(f"trial {trial.number} failed: {reason}", file=sys.stderr)
    _finish(trial, (attributes or {}) | {"reason": reason}, {}, TrialState.FAIL, None)


def _finish(trial: optuna.Trial, attributes: dict[str, Any], values: dict[int, float], state, value) -> None:
    storage, number = trial.storage, trial._trial_id

    def write():
        for name, content in attributes.items():
            storage.set_trial_user_attr(number, name, content)
        for step, intermediate in values.items():
            storage.set_trial_intermediate_value(number, step, intermediate)
        storage.set_trial_state_values(number, state, value)

    with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):  # another took it over, and was first
        patiently(write)


def main() -> None:
    given = flags.FLAGS
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = load(given.study)
    study = (study.smaller() if given.smoke else study)._replace(**({"name": given.name} if given.name else {})).check()
    url = given.storage or f"sqlite:///runs/sweeps/{study.name}.db"
    size = given.batch or study.batch or (_TPE_BATCH if study.search == "tpe" else -(-study.total // given.workers))
    shared = open_study(study, url)
    if given.workers > 1:
        try:
            _spawn(given.workers, size)
        except KeyboardInterrupt:
            sys.exit(130)  # the workers say it
    else:
        folder = Path(given.compile_cache).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        try:
            work(study, shared, size)
        except KeyboardInterrupt:
            sys.exit(_STOPPED)
    states = [t.state.name.lower() for t in shared.get_trials(deepcopy=False)]
    counts = ", ".join(f"{states.count(state)} {state}" for state in sorted({*states}))
    print(f"{study.name}: {counts}, in {url}")
    smoke, name = " --smoke" * given.smoke, f" --name={given.name}" if given.name else ""
    print(f"tables and pictures: python -m sweeps.report --study={given.study}{smoke}{name} --storage={url}")


def _spawn(count: int, size: int) -> None:
    """Workers on this machine, each with its share of the cores."""
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
    if failed := [process.returncode for process in processes if process.returncode]:
        raise InputError(f"{len(failed)} of {count} workers ended with code {failed[0]}; run it again to go on")


if __name__ == "__main__":
    flags.DEFINE_string("study", None, "study file, such as sweeps/temperature_alpha.py", required=True)
    flags.DEFINE_boolean("smoke", False, "the small variant, of seconds")
    flags.DEFINE_string("name", None, "the study's name in the storage; default: the file's")
    flags.DEFINE_string("storage", None, "sqlite:///x.db, journal:x.log or a database; default: under runs/sweeps")
    flags.DEFINE_integer("workers", 1, "processes that share the study on this machine", lower_bound=1)
    flags.DEFINE_integer("batch", 0, "trials asked for at once; 0: the study's choice", lower_bound=0)
    flags.DEFINE_string("compile_cache", "~/.cache/fdjax/compiled", "folder for compiled code")
    program.start(main)
