"""Workers of a sweep killed at random times: is every trial complete once, with the values of an undisturbed study?

    python -m benchmarks.sweep_kills
    python -m benchmarks.sweep_kills --kills=3 --trials=12

Two workers share a study. One of them, drawn at random, gets SIGKILL after a random time, and another takes its place;
after the last kill they are left alone. This file is the study file too: FedProx on a small synthetic federation, for
so many rounds that a batch takes as long as a worker's start, or few kills would hit a worker that holds trials.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
from absl import flags
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from fdjax.errors import InputError
from fdjax.run import program, report
from sweeps.storage import open_storage
from sweeps.study import Study

STUDY = Study(
    name="kills",
    paper="none: a test of sweeps.run",
    question="Does a study survive its workers?",
    runtime="seven minutes on two cores, with 50 kills",
    fixed={
        "algorithm": "fedprox", "dataset": "synthetic", "num_clients": 5, "samples_per_client": 10, "model": "mclr",
        "rounds": 80_000, "eval_every": 20_000, "partition_seed": 0,
    },
    space={"learning_rate": FloatDistribution(1e-3, 1e-1, log=True), "mu": FloatDistribution(0.0, 1.0)},
    search="random",
    trials=int(os.environ.get("FDJAX_KILLS_TRIALS", "60")),
)  # fmt: skip


def worker(url: str, batch: int, trials: int) -> subprocess.Popen:
    """One process of `sweeps.run`."""
    command = [sys.executable, "-m", "sweeps.run", f"--study={__file__}", f"--storage={url}", f"--batch={batch}"]
    environment = os.environ | {"FDJAX_KILLS_TRIALS": str(trials)}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)


def undisturbed(url: str, trials: int) -> None:
    """The whole study by one worker."""
    if code := worker(url, trials, trials).wait():
        raise InputError(f"the undisturbed study ended with code {code}; run python -m sweeps.run by hand to see why")


def holds_a_trial(url: str, process: subprocess.Popen) -> bool:
    """Whether a trial that runs names this worker."""
    trials = optuna.load_study(study_name=STUDY.name, storage=open_storage(url)).trials
    return any(t.state == TrialState.RUNNING and f"|{process.pid}|" in t.user_attrs.get("worker", "") for t in trials)


def disturbed(url: str, kills: int, batch: int, trials: int, seconds: float, seed: int = 0) -> int:
    """The study by two workers of which one is killed at a time; returns how many kills hit one that held trials."""
    chance, hit = random.Random(seed), 0
    workers = [worker(url, batch, trials) for _ in range(2)]
    try:
        for _ in range(kills):
            time.sleep(chance.uniform(0, 2 * seconds))
            victim = chance.randrange(2)
            hit += workers[victim].poll() is None and holds_a_trial(url, workers[victim])
            workers[victim].send_signal(signal.SIGKILL)
            workers[victim].wait()
            workers[victim] = worker(url, batch, trials)
        if codes := [code for w in workers if (code := w.wait())]:
            raise InputError(f"workers ended with codes {codes}")
    finally:
        for process in workers:
            process.kill()
            process.wait()
    return hit


def values(url: str) -> dict[int, tuple[dict[str, float], dict[int, float], list[float]]]:
    """Params, intermediate values and central losses of each complete trial."""
    trials = optuna.load_study(study_name=STUDY.name, storage=open_storage(url)).trials
    return {
        t.number: (t.params, t.intermediate_values, t.user_attrs["evaluations"]["central_loss"])
        for t in trials
        if t.state == TrialState.COMPLETE
    }


def states(url: str) -> list[str]:
    """Of every trial in the storage."""
    return [t.state.name for t in optuna.load_study(study_name=STUDY.name, storage=open_storage(url)).trials]


def main() -> None:
    given = flags.FLAGS
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    out = report.prepare(given.out)
    calm, wild = (f"sqlite:///{out}/{name}.db" for name in ("calm", "wild"))
    for name in ("calm", "wild"):
        Path(f"{out}/{name}.db").unlink(missing_ok=True)
    begun = time.perf_counter()
    undisturbed(calm, given.trials)
    alone = time.perf_counter() - begun
    hit = disturbed(wild, given.kills, given.batch, given.trials, given.seconds, given.seed)
    expected, found = values(calm), values(wild)
    same = sum(found.get(number) == value for number, value in expected.items())
    near = max(
        (abs(a - b) for n in found for a, b in zip(found[n][2], expected[n][2], strict=True)), default=float("nan")
    )
    counted = states(wild)
    rows = [
        ("trials", given.trials),
        ("kills, of which hit a worker that held trials just before", f"{given.kills}, {hit}"),
        ("complete, of the plan", len(found)),
        ("in the storage in all", ", ".join(f"{counted.count(s)} {s.lower()}" for s in sorted({*counted}))),
        ("equal to the undisturbed study in every digit", same),
        ("largest difference of a loss", f"{near:.1e}"),
        ("seconds undisturbed, disturbed", f"{alone:.0f}, {time.perf_counter() - begun - alone:.0f}"),
    ]
    text = report.table(rows, ("two workers under SIGKILL", ""))
    print(text)
    environment = report.environment()
    report.write_text(out / "table.md", f"# benchmarks.sweep_kills\n\n{text}\n\n{environment}\n")
    params = all(found[number][0] == expected[number][0] for number in found)
    if sorted(found) != list(range(given.trials)) or near > 1e-5 or not params:
        raise InputError("the disturbed study is not the undisturbed one: see the table")


if __name__ == "__main__":
    flags.DEFINE_integer("kills", 50, "how often a worker is killed", lower_bound=0)
    flags.DEFINE_integer("trials", STUDY.trials, "of the study", lower_bound=1)
    flags.DEFINE_integer("batch", 3, "trials that a worker asks for at once", lower_bound=1)
    flags.DEFINE_float("seconds", 4.0, "between kills, in the mean", lower_bound=0.0)
    flags.DEFINE_integer("seed", 0, "of the times and victims")
    flags.DEFINE_string("out", "runs/sweep_kills", "folder for storages and table")
    program.start(main)
