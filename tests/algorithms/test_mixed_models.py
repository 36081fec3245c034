"""Clients of different architectures: FedDistill's teachers and FedDF's prototypes."""

import chex
import jax
import numpy as np
import pytest

from fdjax.run import experiment, settings

MIXED = {
    "dataset": "synthetic", "num_clients": 5, "model": "mclr", "models": "mclr:2,2nn:3", "samples_per_client": 30,
    "batch_size": 10, "rounds": 2, "participation": 0.7, "devices": 1, "chunk": 1,
}  # fmt: skip
FEDDISTILL = MIXED | {"algorithm": "feddistill", "local_eval": "own"}
FEDDF = MIXED | {
    "algorithm": "feddf", "proxy": "noise", "proxy_size": 40,
    # Adam makes a whole step of a gradient of rounding errors, so that steps must be small for numbers to be equal.
    "hparams": {"server_steps": 20, "server_learning_rate": 1e-4},
}  # fmt: skip


def run(built, start=None):
    """(first state, state, report, evaluation) on the host; `start` is another first state."""
    simulation, federation, hparams = built.simulation, built.federation, built.hparams
    if start is None:
        start = simulation.fetch(simulation.init(0, federation))
    state, report = simulation.run(simulation.place(start), federation, hparams, built.settings.rounds)
    evaluation = simulation.evaluate(state, federation, hparams)
    return start, simulation.fetch(state), *jax.device_get((report, evaluation))


def bytes_of(built):
    traffic = experiment.traffic_of(built)
    return traffic.per_participant("up"), traffic.per_participant("down")


def size(params):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def all_finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


@pytest.mark.exhaustive
def test_teachers_of_different_architectures():
    built = experiment.build(settings.make(**FEDDISTILL))
    assert [cohort.model.name for cohort in built.layout.cohorts] == ["mclr", "2nn"]
    assert built.layout.participants == (1, 2)
    _, state, report, (scalars, clients) = run(built)
    student, teachers = state.server, state.clients
    chex.assert_trees_all_equal_structs(student, teachers[0])
    assert [jax.tree.leaves(t)[0].shape[0] for t in teachers] == [2, 3]
    assert len(jax.tree.leaves(teachers[1])) == 6
    # The student's bytes, whatever the teacher.
    assert bytes_of(built) == ((size(student),) * 2, (size(student),) * 2)
    assert {len(values) for values in clients.values()} == {5}
    assert all_finite((state, report.metrics, scalars))


def test_prototypes_of_different_architectures():
    built = experiment.build(settings.make(**FEDDF))
    start, state, report, (scalars, clients) = run(built)
    assert len(state.server) == 2
    sizes = tuple(size(prototype) for prototype in start.server)
    assert bytes_of(built) == (sizes, sizes)
    assert all_finite((state, report.metrics, scalars))
    assert clients["local_accuracy"][0] == clients["local_accuracy"][1] == scalars["central_accuracy"]
    assert len({*clients["local_accuracy"][2:].tolist()}) == 1  # the second prototype's
    assert np.abs(jax.tree.leaves(state.server[1])[0] - jax.tree.leaves(start.server[1])[0]).max() > 1e-3


@pytest.mark.exhaustive
@pytest.mark.parametrize("fields", [FEDDISTILL, FEDDF], ids=["feddistill", "feddf"])
def test_the_same_under_another_lifting(fields):
    start, state, report, _ = run(experiment.build(settings.make(**fields)))
    _, *other = run(experiment.build(settings.make(**fields | {"chunk": 2, "devices": 2})), start)
    chex.assert_trees_all_close(other[0], state, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(other[1].metrics, report.metrics, rtol=1e-5, atol=1e-5)
