"""What distillation from the global model is worth where few clients take part and hold few labels, class by class.

FedNTD's regime in small: the embedded MNIST sample in shards of two labels among 100 clients, of which ten take part.
Of one seed all methods have the same weights at first, the same private data and the same participants.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from learning_cases import SEEDS

from fdjax.data.holdings import from_counts
from fdjax.models import nets
from fdjax.run import derived, experiment, settings

K, EVALUATIONS, EVERY = 10, 10, 2
SHARDS = {
    "dataset": "mnist_sample", "partition": "shards", "num_clients": 100, "participation": 0.1, "batch_size": 50,
    "model": functools.partial(nets.TwoNN, width=64), "momentum": 0.9, "rounds": EVALUATIONS * EVERY,
    "proxy": "held_out", "proxy_size": 500, "devices": 1, "chunk": 1,
}  # fmt: skip
HPARAMS = {"learning_rate": 0.01, "local_epochs": 5}
# hparams; how far above FedAvg's accuracy, and how much less forgotten, seeds 0, 1, 2 were when it was measured, of
# FedAvg's 0.765, 0.764, 0.696 and 0.117, 0.115, 0.177.
WORTH = {
    "fedntd": ({}, (0.011, 0.018, 0.078), (-0.005, 0.017, 0.056)),
    "fedcad": ({}, (0.050, 0.030, 0.122), (0.039, 0.021, 0.112)),
    "fedmlb": ({"hybrid_weight": 0.3, "distill_weight": 3.0}, (0.031, 0.022, 0.068), (0.020, 0.011, 0.071)),
    "fedgkd": ({}, (0.015, 0.015, 0.039), (-0.013, 0.026, 0.038)),
    "fedlsd": ({}, (0.011, 0.010, 0.056), (0.021, 0.030, 0.050)),
    "fedavg_kd": ({}, (0.019, 0.013, 0.068), (0.014, 0.022, 0.059)),
    "fedgkd_vote": ({}, (0.018, 0.020, 0.043), (-0.015, 0.029, 0.045)),
}


@functools.cache
def by_class(name):
    """[S, EVALUATIONS, K]: accuracies of the central model on the test examples of each class, for SEEDS."""
    hparams = HPARAMS | WORTH.get(name, ({},))[0]
    builts = [experiment.build(settings.make(hparams, algorithm=name, seed=seed, **SHARDS)) for seed in SEEDS]
    pure = builts[0].simulation.pure

    def learn(seed, federation, tests, hparams):
        def on(state, _):
            state, _ = pure.run(state, federation, hparams, EVERY)
            return state, pure.evaluate(state, tests, hparams)[1]["own_accuracy"][:K]

        return lax.scan(on, pure.init(seed, federation), None, EVALUATIONS)[1]

    learn = jax.jit(learn, compiler_options={"xla_backend_optimization_level": 1})
    return np.stack([
        learn(seed, built.federation, _tests_of_classes(built.federation), built.hparams)
        for seed, built in zip(SEEDS, builts, strict=True)
    ])  # fmt: skip


def _tests_of_classes(federation):
    """The federation whose first K clients have, as their own test parts, the test examples of one class each."""
    y = np.asarray(federation.test.y)
    counts = np.bincount(y, minlength=len(federation.client))
    parts = from_counts(np.argsort(y, kind="stable"), counts)
    return federation._replace(test_holdings=jax.tree.map(jnp.asarray, parts))


def accuracy(name):
    """Mean over classes and over the last half of the evaluations: [S]."""
    return by_class(name)[:, EVALUATIONS // 2 :].mean((1, 2))


def forgetting(name):
    """mean_c (max_{t < T} A_c^t - A_c^T), the mean over the last half of the evaluations as T: [S]."""
    return np.array([derived.forgetting(A)[EVALUATIONS // 2 :].mean() for A in by_class(name)])


@pytest.mark.parametrize("name", WORTH)
@pytest.mark.exhaustive
def test_is_ahead_of_fedavg_and_forgets_less(name):
    lead, kept = accuracy(name) - accuracy("fedavg"), forgetting("fedavg") - forgetting(name)
    assert lead.min() > 0, lead
    assert lead.mean() > 0.01, lead
    assert kept.mean() > 0.005, kept
