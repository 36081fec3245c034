"""DS-FL: does the best temperature of ERA depend on how unlike the clients' labels are?

Itahara et al. (2021) use T = 0.1 throughout; a higher temperature sharpens less. The concentration of the Dirichlet
partition says how unlike clients are: 0.1 leaves most of them two or three labels, 10 nearly all.
"""

from sweeps.study import Study

STUDY = Study(
    name="dsfl_temperature_alpha",
    paper="Itahara, Nishio, Koda, Morikura, Yamamoto, DS-FL (2021)",
    question="Which temperature of ERA makes the best central model, from very unlike clients to like ones?",
    runtime="36 trials: two minutes on two cores",
    fixed={
        "algorithm": "dsfl", "dataset": "mnist_sample", "partition": "dirichlet_a", "num_clients": 10, "model": "2nn",
        "batch_size": 32, "learning_rate": 0.1, "rounds": 20, "eval_every": 2, "proxy": "held_out", "proxy_size": 1000,
        "proxy_per_round": 500,
    },
    space={
        "alpha": (0.1, 0.5, 10.0), "era_temperature": (0.03, 0.1, 0.3, 1.0), "seed": (0, 1, 2),
    },
    smoke={
        "fixed": {"train_fraction": 0.2, "rounds": 2, "eval_every": 1, "model": "mclr", "proxy_size": 100,
                  "proxy_per_round": 50},
        "space": {"alpha": (0.1, 10.0), "era_temperature": (0.1, 1.0), "seed": (0,)},
    },
)  # fmt: skip
