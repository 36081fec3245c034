"""What exchange is worth where clients hold few labels, measured against the same training without it."""

import functools
import itertools

import chex
import engine_cases as cases
import jax
import numpy as np
import pytest

from fdjax import experiment, settings
from fdjax.algorithms import ALGORITHMS
from fdjax.errors import InputError

SEEDS = (0, 1, 2)
FEW_LABELS = {
    "dataset": "mnist_sample", "train_fraction": 0.25, "partition": "dirichlet_a", "alpha": 0.1, "num_clients": 10,
    "model": "2nn", "rounds": 10, "eval_every": 10, "devices": 2,
}  # fmt: skip
HELD_OUT = {"proxy": "held_out", "proxy_size": 500}  # of the 1,500 images, so that 1,000 are left to the clients
FLOATS = {"dataset": "synthetic", "num_clients": 4, "samples_per_client": 20, "model": "mclr"}


def scores(algorithm, seed, hparams=None, **fields):
    """Mean accuracy of the clients' models on the whole test set, and what else is measured."""
    made = FEW_LABELS | (HELD_OUT if ALGORITHMS[algorithm].proxy else {}) | fields
    made = settings.make({"learning_rate": 0.1} | (hparams or {}), algorithm=algorithm, seed=seed, **made)
    built = experiment.build(made)
    state = cases.begin(built.simulation, built.federation, built.hparams, seed)
    state, _ = built.simulation.run(state, built.federation, built.hparams, made.rounds)
    scalars, _ = jax.device_get(built.simulation.evaluate(state, built.federation))
    return scalars["local_accuracy"], scalars


@pytest.fixture(scope="module")
def alone():
    """Accuracy by seed without exchange: 0.25 with few labels. It trains on all 1,500 images, the others on 1,000."""
    return {seed: scores("local", seed)[0] for seed in SEEDS}


# Margins hold for each of the seeds; measured: fedmd 0.57, dsfl 0.35, cronus 0.05 at the least.
@pytest.mark.parametrize(("algorithm", "margin"), [("fedmd", 0.4), ("dsfl", 0.25), ("cronus", 0.03)])
def test_exchange_beats_training_alone(algorithm, margin, alone):
    for seed in SEEDS:
        accuracy, _ = scores(algorithm, seed)
        assert accuracy > alone[seed] + margin, (seed, accuracy, alone[seed])


def test_fedmd_owes_its_lead_to_the_consensus_too():
    """Most of what FedMD has before `local` are the labels of the public data; a digest of nothing loses the rest."""
    for seed in SEEDS:
        accuracy, _ = scores("fedmd", seed)
        without, _ = scores("fedmd", seed, {"digest_learning_rate": 0.0})
        assert accuracy > without + 0.15


def test_dsfl_central_model_beats_every_model_alone(alone):
    for seed in SEEDS:
        _, scalars = scores("dsfl", seed)
        assert scalars["central_accuracy"] > alone[seed] + 0.25


def test_fd_neither_helps_nor_harms_where_clients_hold_few_labels(alone):
    """FD tells a client about the labels that it holds, never about others, so no client learns one that it lacks."""
    for seed in SEEDS:
        accuracy, _ = scores("fd", seed)
        assert abs(accuracy - alone[seed]) < 0.08


def test_baselines_are_in_order():
    together = scores("ensemble", 0)[1]
    pooled = scores("centralized", 0)[1]
    assert together["local_accuracy"] == scores("local", 0)[0]  # the same clients
    assert together["central_accuracy"] > together["local_accuracy"] + 0.1
    assert pooled["central_accuracy"] > max(0.85, together["central_accuracy"])
    np.testing.assert_allclose(pooled["central_accuracy"], pooled["local_accuracy"], atol=1e-6)


def test_centralized_is_one_client_that_holds_everything():
    built = experiment.build(settings.make(algorithm="centralized", **FLOATS, participation=0.1))
    apart = experiment.build(settings.make(algorithm="local", **FLOATS))
    everything = sum(np.asarray(apart.federation.train_holdings.count).tolist())
    assert np.asarray(built.federation.train_holdings.count).tolist() == [everything]
    assert len(apart.holdings.order) == everything > 60
    assert sorted(built.holdings.order.tolist()) == sorted(apart.holdings.order.tolist())
    assert built.simulation.traffic(built.federation).round_up == 0


IMAGES = (8, 8, 1)
MIXED = (("cnn", 3), ("2nn", 2), ("md", 2))
LIFTINGS = [
    ("chunk", 2, 1),
    ("shard_map", 2, 1),
    ("shard_map", 1, 2),
    ("shard_map", 1, 4),
    ("pmap", 1, 2),
    ("loop", 1, 1),
]


@functools.cache
def mixed(name, kind, chunk=3, devices=1):
    """Start and (end, metrics, evaluation) of three architectures, two of them convolutional."""
    algorithm, simulation = cases.simulation(
        name, cohorts=MIXED, participants=(2, 2, 1), devices=devices, chunk=chunk, kind=kind, shape=IMAGES
    )
    federation = cases.federation(devices=devices, cohort_sizes=(3, 2, 2), shape=IMAGES)
    hparams = cases.hparams_of(algorithm, learning_rate=0.05)
    start = jax.device_get(cases.begin(simulation, federation, hparams)) if kind == "vmap" else mixed(name, "vmap")[0]
    end = simulation.run(cases.replicated(start, federation), federation, hparams, 2)
    return start, jax.device_get((*end, simulation.evaluate(end[0], federation)))


@pytest.mark.parametrize("name", ["fd", "fedmd", "cronus", "dsfl"])
@pytest.mark.parametrize(("kind", "chunk", "devices"), LIFTINGS, ids=str)
def test_three_architectures_under_every_lifting(name, kind, chunk, devices):
    start, first = mixed(name, "vmap")
    assert cases.all_finite(first)
    shapes = [jax.tree.map(np.shape, cohort) for cohort in first[0].clients]
    assert not any(a == b for a, b in itertools.combinations(shapes, 2))
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (start.clients, first[0].clients)), strict=True)]
    assert max(moved) > 1e-3
    chex.assert_trees_all_close(mixed(name, kind, chunk, devices)[1], first, rtol=1e-5, atol=1e-5)


BAD = [
    ({"algorithm": "fedmd"}, {}, "fedmd needs labelled proxy data"),
    ({"algorithm": "cronus"}, {}, "cronus needs unlabelled proxy data"),
    ({"algorithm": "dsfl"}, {}, "dsfl needs unlabelled proxy data"),
    ({"algorithm": "fedmd", "proxy": "noise"}, {}, "fedmd needs labelled proxy data, but --proxy=noise has no labels"),
    ({"algorithm": "dsfl", "proxy": "mnist_sample", "proxy_size": 9}, {}, "--proxy=mnist_sample has inputs (28, 28, "),
    ({"algorithm": "dsfl", "proxy": "noise", "options": {"aggregation": "mean"}}, {}, "unknown aggregation 'mean'"),
    ({"algorithm": "cronus", "proxy": "noise", "options": {"faulty": "0.5"}}, {}, "unknown faulty '0.5'"),
    ({"algorithm": "fd", "options": {"aggregation": "era"}}, {}, "unknown option of fd 'aggregation'"),
    ({"algorithm": "fd"}, {"gamma": -0.1}, "--gamma=-0.1: expected a finite number of at least 0"),
    ({"algorithm": "dsfl", "proxy": "noise"}, {"era_temperature": 0.0}, "--era_temperature=0.0: expected a finite num"),
    ({"algorithm": "dsfl", "proxy": "noise"}, {"era_beta": -1.0}, "--era_beta=-1.0: expected a finite number of at le"),
    ({"algorithm": "dsfl", "proxy": "noise"}, {"distill_epochs": 0}, "--distill_epochs=0: expected a whole number of"),
    ({"algorithm": "ensemble", "local_eval": "own"}, {}, "ensemble tests an ensemble of personal models"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "hparams", "message"), BAD, ids=[message[:40] for *_, message in BAD])
def test_bad_input(fields, hparams, message):
    with pytest.raises(InputError) as error:
        experiment.build(settings.make(hparams, **FLOATS | {"proxy_size": 20} | fields))
    assert str(error.value).startswith(message)
