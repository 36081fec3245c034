"""FedProx: the question of `fedprox_learning_rate_mu`, asked at random points."""

from optuna.distributions import FloatDistribution

from sweeps.fedprox_learning_rate_mu import STUDY as GRID

STUDY = GRID._replace(
    name="fedprox_random",
    runtime="48 trials: 45 seconds on two cores",
    search="random",
    trials=48,
    space={
        "learning_rate": FloatDistribution(1e-3, 1e-1, log=True), "mu": FloatDistribution(1e-4, 10.0, log=True),
    },
    smoke={"fixed": GRID.smoke["fixed"], "trials": 6},
)  # fmt: skip
