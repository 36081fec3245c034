"""FedProx: learning rate and mu on synthetic(1, 1).

Li et al. (2020) tune mu over 0.001, 0.01, 0.1 and 1 at a learning rate of 0.01, and find 1 best on synthetic data:
30 devices of which 10 take part, B = 10, E = 20, 200 rounds (here 100). mu = 0 is FedAvg.
"""

from sweeps.study import Study

STUDY = Study(
    name="fedprox_learning_rate_mu",
    paper="Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, FedProx (2020), section 5",
    question="Is a proximal term worth more than another learning rate?",
    runtime="45 trials: 72 seconds on two cores",
    fixed={
        "algorithm": "fedprox", "dataset": "synthetic", "alpha": 1.0, "beta": 1.0, "num_clients": 30, "model": "mclr",
        "participation": 1 / 3, "batch_size": 10, "local_epochs": 20, "rounds": 100, "eval_every": 10,
        "partition_seed": 0,
    },
    space={
        "learning_rate": (0.003, 0.01, 0.03), "mu": (0.0, 0.001, 0.01, 0.1, 1.0), "seed": (0, 1, 2),
    },
    smoke={
        "fixed": {"rounds": 2, "eval_every": 1, "local_epochs": 1},
        "space": {"learning_rate": (0.01, 0.03), "mu": (0.0, 1.0), "seed": (0,)},
    },
)  # fmt: skip
