"""Where clients hold few labels: a quarter of the embedded MNIST sample among ten clients by Dirichlet(0.1)."""

import functools
from typing import NamedTuple

import jax
import numpy as np

from fdjax.algorithms import ALGORITHMS
from fdjax.exchange.traffic import count_bytes
from fdjax.run import experiment, settings

SEEDS = (0, 1, 2)
# One client at a time, which compiles once for all seeds; the chunks of choice follow a partition's sizes.
FEW_LABELS = {
    "dataset": "mnist_sample", "train_fraction": 0.25, "partition": "dirichlet_a", "alpha": 0.1, "num_clients": 10,
    "model": "2nn", "rounds": 5, "devices": 1, "chunk": 1,
}  # fmt: skip
HELD_OUT = {"proxy": "held_out", "proxy_size": 500}  # of the 1,500 images, so that 1,000 are left to the clients
BESIDE = {  # measured in test_local_distillation_learning.py
    "fedntd", "fedlsd", "fedavg_kd", "fedmlb", "fedgkd", "fedgkd_vote", "fedcad",
}  # fmt: skip
# What takes long here is training, unlike in other tests: XLA's optimisation pays for itself four times over.
_COMPILED = {"xla_backend_optimization_level": 1}


class Learned(NamedTuple):
    """What one seed learned."""

    scalars: dict[str, float]  # of the evaluation at the end
    clients: dict[str, np.ndarray]  # of the same, [C]
    metrics: dict[str, np.ndarray]  # [rounds]
    sent: dict[str, np.ndarray]  # [rounds] bytes "up" and "down" of all participants


def run(algorithm, hparams=None, options=None, **fields):
    """What each of SEEDS learns in five rounds at a learning rate of 0.1: one compiled call, made for each of them."""
    made = FEW_LABELS | (HELD_OUT if ALGORITHMS[algorithm].proxy else {}) | fields
    chosen = {"learning_rate": 0.1} | (hparams or {})
    return _run(algorithm, *(tuple(sorted(given.items())) for given in (chosen, options or {}, made)))


@functools.cache
def _run(algorithm, hparams, options, fields):
    builts = [
        experiment.build(settings.make(dict(hparams), dict(options), algorithm=algorithm, seed=seed, **dict(fields)))
        for seed in SEEDS
    ]
    learn, traffic = _learning(builts[0].simulation.pure, builts[0].settings.rounds), experiment.traffic_of(builts[0])
    learned = []
    for seed, built in zip(SEEDS, builts, strict=True):
        scalars, clients, report = jax.device_get(learn(seed, built.federation, built.hparams))
        learned.append(Learned(scalars, clients, report.metrics, count_bytes(traffic.round, report.sent)))
    return learned


@functools.cache
def _learning(pure, rounds):
    """From a seed to the last evaluation, compiled as a whole."""

    def learn(seed, federation, hparams):
        state = pure.init(seed, federation)
        if pure.setup is not None:
            state, _ = pure.setup(state, federation, hparams)
        state, report = pure.run(state, federation, hparams, rounds)
        return *pure.evaluate(state, federation, hparams), report

    return jax.jit(learn, compiler_options=_COMPILED)


def final(name, algorithm, *given, **fields):
    """`name` of every seed, as evaluated at the end."""
    return np.array([learned.scalars[name] for learned in run(algorithm, *given, **fields)])


def alone():
    """Mean accuracy of the clients' models on the test set without exchange, on all 1,500 images: 0.230 to 0.249."""
    return final("local_accuracy", "local")
