"""Where clients hold few labels: a quarter of the embedded MNIST sample among ten clients by Dirichlet(0.1)."""

import functools

import engine_cases as cases
import jax

from fdjax.algorithms import ALGORITHMS
from fdjax.run import experiment, settings

SEEDS = (0, 1, 2)
# One client at a time, which compiles once for all seeds; the chunks of choice follow a partition's sizes.
FEW_LABELS = {
    "dataset": "mnist_sample", "train_fraction": 0.25, "partition": "dirichlet_a", "alpha": 0.1, "num_clients": 10,
    "model": "2nn", "rounds": 10, "eval_every": 10, "devices": 2, "chunk": 1,
}  # fmt: skip
HELD_OUT = {"proxy": "held_out", "proxy_size": 500}  # of the 1,500 images, so that 1,000 are left to the clients


def run(algorithm, seed, hparams=None, options=None, **fields):
    """(scalars, history, traffic) after ten rounds of a learning rate of 0.1."""
    made = FEW_LABELS | (HELD_OUT if ALGORITHMS[algorithm].proxy else {}) | fields
    chosen = {"learning_rate": 0.1} | (hparams or {})
    return _run(algorithm, seed, *(tuple(sorted(given.items())) for given in (chosen, options or {}, made)))


@functools.cache
def _run(algorithm, seed, hparams, options, fields):
    built = experiment.build(
        settings.make(dict(hparams), dict(options), algorithm=algorithm, seed=seed, **dict(fields))
    )
    state = cases.begin(built.simulation, built.federation, built.hparams, seed)
    state, metrics = built.simulation.run(state, built.federation, built.hparams, built.settings.rounds)
    scalars, _ = built.simulation.evaluate(state, built.federation)
    return *jax.device_get((scalars, metrics)), built.simulation.traffic(built.federation)


def alone(seed):
    """Mean accuracy of the clients' models on the test set without exchange, on all 1,500 images: 0.245 to 0.256."""
    return run("local", seed)[0]["local_accuracy"]
