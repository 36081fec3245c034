"""What the tables share: cases run over seeds, mean and std, the files that they write."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from fdjax.algorithms import ALGORITHMS
from fdjax.errors import InputError
from fdjax.run import methods, report
from fdjax.run.checkpoint import FOLDER, steps
from fdjax.run.runner import InterruptedRun, Result, run
from fdjax.run.settings import FOLDERS, Settings


def run_seeds(cases: dict[str, list[Settings]], out: Path) -> dict[str, list[Result]]:
    """Run every case for each of its settings, one per seed, each with checkpoints under `out`/runs.

    With --resume, finished runs are read back and interrupted ones go on.
    """
    results: dict[str, list[Result]] = {}
    for name, seeds in cases.items():
        for settings in seeds:
            print(f"{name}, seed {settings.seed}: {settings.rounds} rounds", flush=True)
            try:
                folder = run_folder(out, name, settings)
                resume = flags.FLAGS.resume and bool(steps(folder / FOLDER))  # others begin where they were not reached
                result = run(settings, folder, resume=resume, checkpoint_every=flags.FLAGS.checkpoint_every)
            except InterruptedRun as stop:
                raise InterruptedRun(stop.round, out, *stop.results) from None
            results.setdefault(name, []).append(result)
    return results


def run_folder(out: Path, name: str, settings: Settings) -> Path:
    """Where `run_seeds` keeps a run's checkpoints."""
    return out / "runs" / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-seed{settings.seed}"


def without_distillation() -> dict[str, None]:
    """Overrides that leave out, for FedAvg, what only FedDistill understands."""
    understood = ALGORITHMS["fedavg"].hparams
    return {"models": None} | {name: None for name in ALGORITHMS["feddistill"].hparams if name not in understood}


def without_others(algorithm: str) -> dict[str, None]:
    """Overrides that leave out the hparams and options that only other methods understand."""
    own = methods.of(algorithm)
    understood = {*own.hparams, *own.options}
    every = {name for method in methods.known().values() for name in (*method.hparams, *method.options)}
    return dict.fromkeys(every - understood)


def check_rounds(needed: Sequence[int]) -> None:
    """Raises InputError if --eval_every leaves out a round whose accuracy is to be printed."""
    every = flags.FLAGS.eval_every
    for round in needed:
        if round % every and round != needed[-1]:
            raise InputError(f"--eval_every={every} leaves out round {round}, which the table shows; use a divisor")


def at_round(results: Sequence[Result], metric: str, round: int) -> tuple[float, float | None]:
    """Mean and (of two seeds or more) sample std of a metric after `round` rounds."""
    return report.spread([r.evaluations[metric][r.evaluations["round"].index(round)] for r in results])


def bytes_a_round(result: Result) -> float:
    """The same of one round, the mean over all."""
    rounds = len(result.rounds["bytes_up"])
    return (report.bytes_until(result, rounds) - report.bytes_until(result, 0)) / rounds


def cell(results: Sequence[Result], metric: str, round: int) -> str:
    """The same, as a percentage."""
    return report.percent(*at_round(results, metric, round))


def mean_curve(results: Sequence[Result], metric: str) -> tuple[list[float], list[float]]:
    """Rounds, and the mean over seeds of a metric in percent."""
    rounds = results[0].evaluations["round"]
    return rounds, (100 * np.mean([r.evaluations[metric] for r in results], axis=0)).tolist()


def write(
    out: Path, title: str, text: str, results: dict[str, list[Result]], more: dict[str, Any] | None = None
) -> None:
    """Print the text and write table.md and results.json; both say command, versions, device, seeds and time."""
    seconds = sum(r.seconds for runs in results.values() for r in runs)
    compiling = sum(r.compile_seconds for runs in results.values() for r in runs)
    runs = {name: [report.result_dict(r) for r in runs] for name, runs in results.items()}
    write_runs(out, title, text, runs, f"{seconds:.0f} s of runs, {compiling:.0f} s of it compilation", more)


def write_runs(
    out: Path, title: str, text: str, runs: dict[str, list[Any]], time: str, more: dict[str, Any] | None = None
) -> None:
    """The same of runs that are JSON values already, and of what is to be said of their time."""
    environment = report.environment()
    command = shlex.join(["python", "-m", title, *_given_flags()])
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    footer = (
        f"`{command}`\n\n{environment['device']}; {environment['machine']}; {versions}; revision "
        f"{environment['revision']}; {time}."
    )
    print(f"\n{text}\n")
    report.write_text(out / "table.md", f"# {title}\n\n{text}\n\n{footer}\n")
    report.write_json(out / "results.json", environment | {"command": command, "runs": runs} | (more or {}))
    pictures = sorted(path.name for path in out.glob("*.png"))
    print(f"written: {out}/{', '.join(('table.md', 'results.json', *pictures))}")


def _given_flags() -> list[str]:
    """The flags of the command line without folders, which mean nothing elsewhere."""
    ours = flags.FLAGS.get_key_flags_for_module(__import__("sys").argv[0])
    folders = ("out", "fashion_dir", "compile_cache", "resume", "overwrite", *FOLDERS)
    return [f.serialize() for f in ours if f.present and f.name not in folders]
