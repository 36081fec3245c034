"""FedDistill: how much do the temperature and the weight of distillation matter?

Jiang, Shan, Zhang (2020) leave both unpublished (our defaults are in `fdjax.algorithms.feddistill`): their weight alpha
is our `weight`. Two labels a client, as the paper states its split, on the embedded MNIST sample.
"""

from sweeps.study import Study

STUDY = Study(
    name="temperature_alpha",
    paper="Jiang, Shan, Zhang, FedDistill (2020)",
    question="Which temperature and weight (the paper's alpha) of distillation make the best central model?",
    runtime="72 trials: under two minutes on two cores",
    fixed={
        "algorithm": "feddistill", "dataset": "mnist_sample", "partition": "jiang", "num_clients": 5, "model": "2nn",
        "batch_size": 32, "learning_rate": 0.05, "rounds": 20, "eval_every": 2, "partition_seed": 0,
    },
    space={
        "temperature": (1.0, 2.0, 3.0, 5.0, 10.0, 20.0), "weight": (0.1, 0.3, 0.5, 0.9), "seed": (0, 1, 2),
    },
    smoke={
        "fixed": {"train_fraction": 0.1, "rounds": 2, "eval_every": 1, "model": "mclr"},
        "space": {"temperature": (1.0, 5.0), "weight": (0.3, 0.9), "seed": (0, 1)},
    },
)  # fmt: skip
