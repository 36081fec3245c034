"""How much of a result is the draw of the partition? FedAvg and FedDistill over partitions, and over everything else.

`seed` is that of initialisation, sampling and shuffling, `partition_seed` that of who holds what. Trials of the two
methods are of different programs, so they run as two batches, one after another.
"""

from sweeps.study import Study

STUDY = Study(
    name="partition_seeds",
    paper="none: every table of one partition",
    question="Does the partition's seed move the result more than that of training?",
    runtime="50 trials: 50 seconds on two cores",
    fixed={
        "dataset": "mnist_sample", "partition": "dirichlet_a", "alpha": 0.1, "num_clients": 10, "model": "2nn",
        "batch_size": 32, "learning_rate": 0.05, "rounds": 10, "eval_every": 2,
    },
    space={
        "algorithm": ("fedavg", "feddistill"), "partition_seed": (0, 1, 2, 3, 4), "seed": (0, 1, 2, 3, 4),
    },
    seeds=("seed",),
    smoke={
        "fixed": {"train_fraction": 0.1, "rounds": 2, "eval_every": 1, "model": "mclr"},
        "space": {"algorithm": ("fedavg", "feddistill"), "partition_seed": (0, 1), "seed": (0, 1)},
    },
)  # fmt: skip
