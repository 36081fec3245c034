"""FedProx: the space of `fedprox_random`, searched by Optuna's TPE in batches; poor trials are stopped halfway."""

import optuna

from sweeps.fedprox_random import STUDY as RANDOM

STUDY = RANDOM._replace(
    name="fedprox_tpe",
    runtime="48 trials in batches of 8: 52 seconds on two cores",
    search="tpe",
    batch=8,
    pruner=optuna.pruners.MedianPruner(n_startup_trials=8, n_warmup_steps=30),
)
