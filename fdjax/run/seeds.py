"""One setting with several seeds: runs as trials of one compiled batch, and their results side by side."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from fdjax.errors import InputError
from fdjax.run import batch
from fdjax.run.experiment import Experiment
from fdjax.run.loggers import Progress
from fdjax.run.logs import Logs, Told, check_told
from fdjax.run.record import Result, clock
from fdjax.run.runner import InterruptedRun, chosen, stop_signals
from fdjax.run.settings import Settings
from fdjax.run.trained_model import leave_devices

_NOBODY = Told()


def start(
    seeds: Sequence[int],
    settings: Settings | None = None,
    *,
    progress: bool = True,
    callback: Callable[[Progress], Any] | None = None,
    **named: Any,
) -> list[Result]:
    """`run_seeds` as users call it: with `Settings`, or with the names of what is to be set, as `fdjax.run` is.

    `callback` is called with every evaluation of every seed, whose number is in the settings of its `fdjax.Progress`.
    """
    if "seed" in named:
        raise InputError(f"run_seeds: seed={named['seed']!r} beside seeds={seeds!r}; give the seeds alone")
    told = Told(callback=callback)
    return run_seeds(chosen("run_seeds", settings, named), seeds, progress=progress, told=told)


def run_seeds(
    settings: Settings,
    seeds: Sequence[int],
    *,
    progress: bool = True,
    told: Told = _NOBODY,
    out: Path | None = None,
) -> list[Result]:
    """The results of checked settings with each of the seeds, in their order.

    A seed draws the first weights, participants and shuffles, and the partition too unless `partition_seed` is set.
    Runs whose data have the same sizes are one batch; others are compiled apart. No checkpoints are kept. Seconds are
    those of all seeds together. With `out`, that folder gets metrics.csv, and what else is `told`.

    Raises InputError for seeds that are none or not different and for settings that no batch can have,
    InterruptedRun, with the results so far, after the first SIGINT or SIGTERM, and CallbackError, with them too.
    """
    check_told(told, out)
    seeds = _checked(seeds)
    if settings.lifting != "auto":
        raise InputError(f"--lifting={settings.lifting}: of several seeds, each device runs some; leave it out")
    if settings.new_clients and settings.fine_tune_epochs:
        raise InputError(
            "several seeds are a batch, which tests new clients as they are; give --fine_tune_epochs=0 too"
        )
    if jax.process_count() > 1:
        raise InputError("several seeds are a batch on one host's devices; give them to one host, or one seed to all")
    leave_devices()
    with clock() as time_spent:
        trials = batch.experiments([dataclasses.replace(settings, seed=seed).check() for seed in seeds])
        with contextlib.closing(Logs(told, out, [trial.settings for trial in trials])) as logs:
            results = _run(settings, trials, progress, logs)
        times = time_spent.stamp({})
    by_seed = {r.settings.seed: r._replace(**times) for r in results}
    if logs.failed():
        raise logs.error(None, *by_seed.values())
    if sum(r.ended for r in results) < len(seeds):
        raise InterruptedRun(min((r.round for r in results), default=0), None, *by_seed.values())
    return [by_seed[seed] for seed in seeds]


def _checked(given: Any) -> list[Any]:
    """Seeds as a list. Raises InputError for what are none, or not different."""
    try:
        seeds = [] if isinstance(given, str) else list(given)
        different = len({*seeds}) == len(seeds) > 0
    except TypeError:
        different, seeds = False, []
    if not different:
        raise InputError(f"seeds={given!r}: expected whole numbers, each another one, e.g. 0,1,2")
    return seeds


def _run(settings: Settings, trials: Sequence[Experiment], progress: bool, logs: Logs) -> list[Result]:
    """The results of those that began before a signal to stop, group by group of one signature."""
    groups: dict[Any, list[Experiment]] = {}
    for trial in trials:
        groups.setdefault(trial.signature, []).append(trial)
    results: list[Result] = []
    with (
        stop_signals() as signals,
        tqdm(total=settings.rounds * len(trials), desc=settings.method.name, unit="round", disable=not progress) as bar,
    ):
        for group in groups.values():
            compiled = batch.batch(group, len(group), devices=settings.devices)
            if progress:
                tqdm.write(compiled.why, file=sys.stderr)
            for begin in range(0, len(group), compiled.slots):
                if signals or logs.failed():
                    return results
                ended = len(results) * settings.rounds

                def watch(done, records, ended=ended):
                    bar.update(ended + done * len(records) - bar.n)
                    return [*records] if signals else []

                results += compiled.run(group[begin : begin + compiled.slots], watch, logs)
                bar.update(len(results) * settings.rounds - bar.n)
    return results
