"""Clients of three architectures, the same on one device and on several."""

import functools
import itertools

import chex
import engine_cases as cases
import jax
import numpy as np
import pytest

# Three architectures: one of images for the method that compiles fastest, which gathers and addresses.
FLAT = (cases.FEATURES,), (("mclr", 3), ("2nn", 2), ("wide", 2))
MIXED = {"fd": ((8, 8, 1), (("cnn", 3), ("2nn", 2), ("wide", 2))), "fedmd": FLAT, "cronus": FLAT, "dsfl": FLAT}
LIFTINGS = [
    ("shard_map", 1, 2),
    ("chunk", 2, 1),
    ("shard_map", 2, 1),
    ("shard_map", 1, 4),
    ("pmap", 1, 2),
    ("loop", 1, 1),
]


@functools.cache
def mixed(name):
    """Start and (end, metrics, evaluation), on the host, of three architectures under vmap."""
    _, simulation, federation, hparams = mixed_start(name, "vmap", 1, 1)
    begun = cases.begin(simulation, federation, hparams)
    start = simulation.fetch(begun)
    state, report = simulation.run(begun, federation, hparams, 2)
    return start, (
        simulation.fetch(state),
        *jax.device_get((report, simulation.evaluate(state, federation, hparams))),
    )


def mixed_start(name, kind, chunk, devices):
    layout = {"participants": (2, 2, 1), "devices": devices, "chunk": chunk, "kind": kind}
    shape, cohorts = MIXED[name]
    _, simulation = cases.simulation(name, cohorts=cohorts, shape=shape, **layout)
    federation = cases.federation(devices=devices, cohort_sizes=(3, 2, 2), shape=shape)
    start = simulation.place(mixed(name)[0]) if kind != "vmap" else None
    return start, simulation, federation, cases.hparams_of(name, learning_rate=0.05)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("kind", "chunk", "devices"), LIFTINGS)
@pytest.mark.parametrize("name", MIXED)
def test_three_architectures_are_the_same_under_every_lifting(name, kind, chunk, devices):
    before, (state, report, evaluation) = mixed(name)
    assert cases.all_finite((state, report, evaluation[0]))  # who has no examples is not tested
    shapes = [jax.tree.map(np.shape, cohort) for cohort in state.clients]
    assert not any(a == b for a, b in itertools.combinations(shapes, 2))
    for a, b in zip(before.clients, state.clients, strict=True):  # every architecture learns
        assert max(np.abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)) > 1e-3
    start, simulation, federation, hparams = mixed_start(name, kind, chunk, devices)
    other, other_report = simulation.run(start, federation, hparams, 2)
    if (kind, devices) == ("shard_map", 2):  # elsewhere no need to compile it anew
        chex.assert_trees_all_close(simulation.evaluate(other, federation, hparams), evaluation, rtol=1e-5, atol=1e-5)
    found = simulation.fetch(other), jax.device_get(other_report)
    chex.assert_trees_all_close(found, (state, report), rtol=1e-5, atol=1e-5)
