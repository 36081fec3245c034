"""How many clients must there be for FedNTD to pay? FedAvg and FedNTD over clients and their share in a round.

An open issue of the authors' code has FedNTD behind FedAvg with ten clients. What its distillation preserves is what
the received model knows of labels that a client lacks, which matters the more, the less of all data a round sees.
"""

from sweeps.study import Study

STUDY = Study(
    name="fedntd_clients",
    paper="Lee et al. (2022), FedNTD",
    question="Where is FedNTD ahead of FedAvg: with how many clients, of which how many take part?",
    runtime="36 trials: about 8 minutes on two cores",
    fixed={
        "dataset": "mnist_sample", "partition": "shards", "model": "2nn", "batch_size": 50, "learning_rate": 0.01,
        "momentum": 0.9, "local_epochs": 5, "rounds": 30, "eval_every": 3,
    },
    space={
        "algorithm": ("fedavg", "fedntd"), "num_clients": (10, 30, 100), "participation": (0.1, 1.0), "seed": (0, 1, 2),
    },
    seeds=("seed",),
    smoke={
        "fixed": {"train_fraction": 0.1, "rounds": 2, "eval_every": 1, "model": "mclr", "participation": 1.0},
        "space": {"algorithm": ("fedavg", "fedntd"), "num_clients": (5, 10), "seed": (0, 1)},
    },
)  # fmt: skip
