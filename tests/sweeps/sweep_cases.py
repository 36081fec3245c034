"""A study of seconds, and what carries it out."""

import optuna

from sweeps import run
from sweeps.study import Study

optuna.logging.set_verbosity(optuna.logging.WARNING)

TINY = Study(
    name="tiny", paper="", question="", runtime="",
    fixed={"algorithm": "fedprox", "dataset": "synthetic", "num_clients": 4, "samples_per_client": 10,
           "model": "mclr", "partition_seed": 0, "rounds": 2, "eval_every": 1},
    space={"learning_rate": (0.01, 0.1), "mu": (0.0, 1.0), "seed": (0, 1)},
)  # fmt: skip


def finish(study, url, size=8):
    shared = run.open_study(study.check(), url)
    run.work(study, shared, size)
    return shared.trials
