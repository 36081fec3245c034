"""A sweep as one batch, against 24 runs of the program and against 24 warm runs in one process.

    python -m benchmarks.sweep_speed

24 trials: six temperatures by four weights of FedDistill on the embedded MNIST sample; six temperatures of ERA by four
learning rates of DS-FL on synthetic(1, 1). Whole commands are timed once each: `sweeps.run`, and `python -m fdjax` 24
times, either with a folder for compiled code that is empty at first. Warm runs are timed `--repeats` times in turns, of
which the median ratio counts. This file is the study file too.
"""

import collections
import os
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import optuna
from absl import flags

from fdjax.errors import InputError, unknown
from fdjax.run import batch, program, report, runner
from fdjax.run.settings import Settings
from sweeps.study import Study

TEMPERATURES = (1.0, 2.0, 3.0, 5.0, 10.0, 20.0)
SUITES = {
    "feddistill": Study(
        name="feddistill", paper="", question="how long 24 trials take", runtime="",
        fixed={"algorithm": "feddistill", "dataset": "mnist_sample", "partition": "jiang", "num_clients": 5,
               "model": "2nn", "batch_size": 32, "learning_rate": 0.05, "rounds": 10, "eval_every": 2,
               "partition_seed": 0},
        space={"temperature": TEMPERATURES, "weight": (0.1, 0.3, 0.5, 0.9)},
    ),
    "dsfl": Study(
        name="dsfl", paper="", question="how long 24 trials take", runtime="",
        fixed={"algorithm": "dsfl", "dataset": "synthetic", "alpha": 1.0, "beta": 1.0, "num_clients": 30,
               "model": "mclr", "batch_size": 10, "rounds": 50, "eval_every": 10, "partition_seed": 0,
               "proxy": "held_out", "proxy_size": 500},
        space={"era_temperature": (0.03, 0.05, 0.1, 0.2, 0.5, 1.0), "learning_rate": (0.01, 0.03, 0.1, 0.3)},
    ),
}  # fmt: skip
STUDY = SUITES[os.environ.get("FDJAX_SUITE", "feddistill")]


def _timed(command: list[str], suite: str) -> float:
    begun = time.perf_counter()
    done = subprocess.run(command, env=os.environ | {"FDJAX_SUITE": suite}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{' '.join(command)} ended with code {done.returncode}: {done.stderr[-300:]}")
    return time.perf_counter() - begun


def of_commands(suite: str, folder: str) -> dict[str, float]:
    """Wall seconds of the sweep, twice (the second finds its code compiled), and of 24 runs of the program."""
    sweep = [sys.executable, "-m", "sweeps.run", f"--study={__file__}", f"--compile_cache={folder}/{suite}"]
    url = f"sqlite:///{folder}/{suite}"
    found = {"sweep": _timed([*sweep, f"--storage={url}.db"], suite)}
    first = optuna.load_study(study_name=suite, storage=f"{url}.db").trials[0].user_attrs
    found |= {"compile": first["compile_seconds"], "run": first["seconds"] - first["compile_seconds"]}
    found["again"] = _timed([*sweep, f"--storage={url}2.db"], suite)
    study, found["programs"] = SUITES[suite], 0.0
    for number in range(study.total):
        given = {**study.fixed, **study.point(number)}
        command = [sys.executable, "-m", "fdjax", *(f"--{name}={value}" for name, value in given.items())]
        command += [f"--out={folder}/{suite}{number}", f"--compile_cache={folder}/{suite}_programs"]
        found["programs"] += _timed(command, suite)
    return found


def in_process(suite: str, repeats: int) -> tuple[list[float], list[float], int, float]:
    """Warm seconds of the batch and of 24 runs, compilations of the batch's supersteps, largest difference."""
    study = SUITES[suite]
    settings: list[Settings] = [study.settings(study.point(number)) for number in range(study.total)]
    compiled: collections.Counter[str] = collections.Counter()

    def listen(event, seconds, **kwargs):
        if event.endswith("backend_compile_duration"):
            compiled[str(kwargs.get("fun_name"))] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    ready = batch.experiments(settings)
    together_at_once = batch.batch(ready, len(ready), [*study.space])
    results = together_at_once.run(ready, lambda done, records: ())
    supersteps = compiled["jit(superstep)"]
    alone = [runner.run(each, progress=False) for each in settings[:1]]  # compiles a superstep of its own
    warm = compiled["jit(superstep)"]
    together, apart = [], []
    for _ in range(repeats):
        begun = time.perf_counter()
        together_at_once.run(ready, lambda done, records: ())
        together.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        alone = [runner.run(each, progress=False) for each in settings]
        apart.append(time.perf_counter() - begun)
    differences = [
        np.abs(np.subtract(a.evaluations[name], b.evaluations[name])).max()
        for a, b in zip(results, alone, strict=True)
        for name in a.evaluations
        if name.endswith("loss")
    ]
    if compiled["jit(superstep)"] != warm:
        raise InputError("a warm batch or run compiled again; the timing is of no use")
    return together, apart, supersteps, max(differences)


def main() -> None:
    given = flags.FLAGS
    for suite in given.suites:
        if suite not in SUITES:
            raise unknown("suite", suite, SUITES)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    out = report.prepare(given.out)
    rows, raw = [], {}
    for suite in given.suites:
        with tempfile.TemporaryDirectory() as folder:
            commands = of_commands(suite, folder)
        together, apart, compilations, difference = in_process(suite, given.repeats)
        warm = np.divide(apart, together)
        start = commands["sweep"] - commands["compile"] - commands["run"]
        rows += [
            (suite, "one sweep: start, compilation, run", f"{commands['sweep']:.1f} s: {start:.1f}, "
             f"{commands['compile']:.1f}, {commands['run']:.1f}"),
            (suite, "the same, compiled code found in the cache", f"{commands['again']:.1f} s"),
            (suite, "24 runs of the program", f"{commands['programs']:.1f} s"),
            (suite, "**ratio, of whole commands** (target 8)", f"{commands['programs'] / commands['sweep']:.1f}"),
            (suite, "a warm batch; 24 warm runs in one process",
             f"{np.median(together):.2f} s; {np.median(apart):.2f} s"),
            (suite, "**ratio, warm** (target 1.5), median of "
             f"{given.repeats} ({warm.min():.2f} to {warm.max():.2f})", f"{np.median(warm):.2f}"),
            (suite, "compilations of the superstep", compilations),
            (suite, "largest difference of a loss, batch against alone", f"{difference:.1e}"),
        ]  # fmt: skip
        raw[suite] = {"commands": commands, "batch": together, "alone": apart}
    environment = report.environment()
    text = report.table(rows, ("suite", "24 trials", ""))
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    foot = f"{environment['device']}; {environment['machine']}; {versions}; revision {environment['revision']}"
    print(text)
    command = "python -m benchmarks.sweep_speed " + " ".join(a for a in sys.argv[1:] if not a.startswith("--out"))
    report.write_text(out / "table.md", f"# benchmarks.sweep_speed\n\n{text}\n\n`{command.strip()}`\n\n{foot}.\n")
    report.write_json(out / "results.json", environment | {"command": command, "suites": raw})
    print(f"written: {out}/table.md, results.json")


if __name__ == "__main__":
    flags.DEFINE_list("suites", [*SUITES], f"of {', '.join(SUITES)}")
    flags.DEFINE_integer("repeats", 5, "of the warm runs", lower_bound=1)
    flags.DEFINE_string("out", "runs/sweep_speed", "folder for the table")
    program.start(main)
