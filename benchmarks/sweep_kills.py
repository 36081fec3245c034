"""Workers of a sweep killed at random times: is every trial complete once, with the values of an undisturbed study?

    python -m benchmarks.sweep_kills
    python -m benchmarks.sweep_kills --kills=3 --trials=12

Two workers share a study. One of them, drawn at random, gets SIGKILL after a random time, and another takes its place;
after the last kill they are left alone. This file is the study file too: FedProx on a small synthetic federation, for
so many rounds that a batch takes as long as a worker's start, or few kills would hit a worker that holds trials. A
trial whose worker was killed is given up, and another one with its params runs in its place.
"""

import collections
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import optuna
from absl import flags
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from fdjax.errors import InputError
from fdjax.run import program, report
from sweeps.storage import given_up, open_storage
from sweeps.study import Study

ROUNDS, TRIALS = (
    int(os.environ.get(f"FDJAX_KILLS_{name}", usual)) for name, usual in (("ROUNDS", 80_000), ("TRIALS", 60))
)
STUDY = Study(
    name="kills",
    paper="none: a test of sweeps.run",
    question="Does a study survive its workers?",
    runtime="seven minutes on two cores, with 50 kills",
    fixed={
        "algorithm": "fedprox", "dataset": "synthetic", "num_clients": 5, "samples_per_client": 10, "model": "mclr",
        "rounds": ROUNDS, "eval_every": ROUNDS // 4, "partition_seed": 0,
    },
    space={"learning_rate": FloatDistribution(1e-3, 1e-1, log=True), "mu": FloatDistribution(0.0, 1.0)},
    search="random",
    trials=TRIALS,
)  # fmt: skip


class Worker(NamedTuple):
    """A process of `sweeps.run`, and the file with what it writes to stderr."""

    process: subprocess.Popen
    errors: Path

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.errors.unlink(missing_ok=True)

    def check(self) -> None:
        """Wait for its end. Raises InputError, with the last lines of its stderr, unless it ended well."""
        code, text = self.process.wait(), self.errors.read_text()
        self.errors.unlink()
        if code:
            raise InputError(f"a worker ended with code {code}; its stderr ends with:\n{text[-3000:]}")


def start(url: str, batch: int, trials: int, rounds: int) -> Worker:
    """A worker on the study in the storage `url`."""
    command = [sys.executable, "-m", "sweeps.run", f"--study={__file__}", f"--storage={url}", f"--batch={batch}"]
    command.append(f"--compile_cache={url.removeprefix('sqlite:///')}.compiled")  # a kill may damage what is kept there
    environment = os.environ | {"FDJAX_KILLS_TRIALS": str(trials), "FDJAX_KILLS_ROUNDS": str(rounds)}
    with tempfile.NamedTemporaryFile("w", prefix="fdjax-worker-", suffix=".stderr", delete=False) as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment)
    return Worker(process, Path(errors.name))


def undisturbed(url: str, trials: int, rounds: int = ROUNDS) -> None:
    """The whole study by one worker."""
    start(url, trials, trials, rounds).check()


def stored(url: str) -> list[FrozenTrial]:
    """Every trial in the storage; none as long as it has no study."""
    try:
        return optuna.load_study(study_name=STUDY.name, storage=open_storage(url)).trials
    except KeyError:
        return []


def holds_a_trial(url: str, worker: Worker) -> bool:
    """Whether a trial that runs names this worker."""
    of_worker = f"|{worker.process.pid}|"
    return any(t.state == TrialState.RUNNING and of_worker in t.user_attrs.get("worker", "") for t in stored(url))


def disturbed(
    url: str, kills: int, batch: int, trials: int, seconds: float | None, seed: int = 0, rounds: int = ROUNDS
) -> int:
    """The study by two workers of which one is killed at a time; returns how many kills hit one that held trials.

    `seconds` is the mean time between kills; None: the next worker is killed as soon as it holds a trial.
    """
    chance, hits = random.Random(seed), 0
    workers = [start(url, batch, trials, rounds) for _ in range(2)]
    try:
        for _ in range(kills):
            if seconds is not None:
                time.sleep(chance.uniform(0, 2 * seconds))
            place = chance.randrange(2)
            victim = workers[place]
            while not (hit := holds_a_trial(url, victim)) and seconds is None and victim.process.poll() is None:
                time.sleep(0.1)
            hits += hit and victim.process.poll() is None
            victim.kill()
            workers[place] = start(url, batch, trials, rounds)
        for worker in workers:
            worker.check()
    finally:
        for worker in workers:
            worker.kill()
    return hits


Params = tuple[tuple[str, float], ...]


def values(url: str) -> dict[Params, tuple[dict[int, float], list[float]]]:
    """Intermediate values and central losses of each complete trial. Raises InputError if two have the same params."""
    complete = [t for t in stored(url) if t.state == TrialState.COMPLETE]
    found = {
        tuple(sorted(t.params.items())): (t.intermediate_values, t.user_attrs["evaluations"]["central_loss"])
        for t in complete
    }
    if len(found) < len(complete):
        raise InputError(f"{len(complete)} trials are complete, but only {len(found)} of them have params of their own")
    return found


def states(url: str) -> dict[str, int]:
    """How many trials of the storage are in which state."""
    return collections.Counter("given up" if given_up(t) else t.state.name.lower() for t in stored(url))


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
    hits = disturbed(wild, given.kills, given.batch, given.trials, given.seconds, given.seed)
    expected, found = values(calm), values(wild)
    same = sum(found.get(params) == value for params, value in expected.items())
    near = max(
        (abs(a - b) for p in {*found} & {*expected} for a, b in zip(found[p][1], expected[p][1], strict=True)),
        default=float("nan"),
    )
    rows = [
        ("trials", given.trials),
        ("kills, of which hit a worker that held trials just before", f"{given.kills}, {hits}"),
        ("complete, with the params of the undisturbed study", len({*found} & {*expected})),
        ("in the storage in all", ", ".join(f"{count} {state}" for state, count in sorted(states(wild).items()))),
        ("equal to the undisturbed study in every digit", same),
        ("largest difference of a loss", f"{near:.1e}"),
        ("seconds undisturbed, disturbed", f"{alone:.0f}, {time.perf_counter() - begun - alone:.0f}"),
    ]
    text = report.table(rows, ("two workers under SIGKILL", ""))
    print(text)
    environment = report.environment()
    report.write_text(out / "table.md", f"# benchmarks.sweep_kills\n\n{text}\n\n{environment}\n")
    if found.keys() != expected.keys() or len(found) != given.trials or not near <= 1e-5:
        raise InputError("the disturbed study is not the undisturbed one: see the table")


if __name__ == "__main__":
    flags.DEFINE_integer("kills", 50, "how often a worker is killed", lower_bound=0)
    flags.DEFINE_integer("trials", STUDY.trials, "of the study", lower_bound=1)
    flags.DEFINE_integer("batch", 3, "trials that a worker asks for at once", lower_bound=1)
    flags.DEFINE_float("seconds", 4.0, "between kills, in the mean", lower_bound=0.0)
    flags.DEFINE_integer("seed", 0, "of the times and victims")
    flags.DEFINE_string("out", "runs/sweep_kills", "folder for storages and table")
    program.start(main)
