"""Clients that never train: drawn, left out of everything that trains and of the usual means, and tested apart."""

import chex
import jax
import numpy as np
import pytest

from fdjax.client import losses
from fdjax.errors import InputError
from fdjax.run import batch, experiment, runner, settings

SMALL = {
    "dataset": "synthetic", "num_clients": 10, "samples_per_client": 20, "model": "mclr", "batch_size": 8, "rounds": 2,
    "new_clients": 0.3, "learning_rate": 0.3, "eval_every": 2, "partition_seed": 0,
}  # fmt: skip


def accuracy_of_own_part(built, row, logits):
    federation = jax.device_get(built.federation)
    start, count = federation.test_holdings.start[row], federation.test_holdings.count[row]
    ids = federation.test_holdings.order[start : start + count]
    x = federation.test.x[ids] * federation.test.scale + federation.test.shift
    return float(np.mean(losses.correct(logits(x), federation.test.y[ids])))


def test_they_take_no_part():
    built = experiment.build(settings.make(**SMALL, algorithm="local", devices=2))
    assert built.layout.new == (3,)
    assert built.layout.may_train == (7,)
    simulation, federation = built.simulation, built.federation
    before = simulation.init(0, federation)
    first = simulation.fetch(before)
    state, report = simulation.run(before, federation, built.hparams, 2)
    after = simulation.fetch(state)
    kernels = [s.clients[0]["Dense_0"]["kernel"] for s in (first, after)]
    changed = (kernels[0] != kernels[1]).any((1, 2))
    assert changed.tolist() == [True] * 7 + [False] * 3
    assert report.sent[0][0].participants.tolist() == [7, 7]

    scalars, clients = jax.device_get(simulation.evaluate(state, federation, built.hparams))
    own = clients["own_accuracy"]
    for row in (0, 8):
        model = {name: x[row] for name, x in after.clients[0]["Dense_0"].items()}
        expected = accuracy_of_own_part(built, row, lambda x, m=model: x @ m["kernel"] + m["bias"])
        assert own[row] == pytest.approx(expected)
    np.testing.assert_allclose(scalars["new_accuracy"], own[7:].mean(), rtol=1e-6)
    np.testing.assert_allclose(scalars["own_accuracy"], own[:7].mean(), rtol=1e-6)
    np.testing.assert_allclose(scalars["local_accuracy"], clients["local_accuracy"][:7].mean(), rtol=1e-6)
    tuned = simulation.fine_tune(state, federation, built.hparams)
    assert tuned["new_accuracy_tuned"] > scalars["new_accuracy"] + 0.1  # it begins as a random net
    chex.assert_trees_all_equal(simulation.fetch(state), after)


def test_a_run_tests_them_again_after_its_last_round():
    result = runner.run(settings.make(**SMALL | {"eval_every": 1, "fine_tune_epochs": 5}), progress=False)
    tuned = result.evaluations["new_accuracy_tuned"]
    assert np.isnan(tuned[:-1]).all()
    assert tuned[-1] > result.final["new_accuracy"]
    assert len(result.evaluations["new_loss"]) == len(tuned) == 3


@pytest.mark.exhaustive
def test_trials_have_them_too():
    """Where a batch draws partitions, each trial has new clients of its own."""
    chosen = [
        settings.make(**SMALL | {"partition_seed": seed}, sampling="poisson", participation=0.5) for seed in (0, 1)
    ]
    built = batch.experiments(chosen)
    results = batch.batch(built, 2).run(built, lambda done, records: ())
    alone = runner.run(chosen[1], progress=False)
    for name in ("new_accuracy", "own_loss"):
        np.testing.assert_allclose(results[1].final[name], alone.final[name], rtol=1e-5)
    assert results[1].rounds["participants"] == alone.rounds["participants"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"new_clients": 0.01}, "--new_clients=0.01 of 10 clients is 0; some must be new"),
        ({"new_clients": 1.0}, "--new_clients=1.0: expected a number of at least 0 and below 1"),
        ({"algorithm": "centralized"}, "centralized has a single client"),
        ({"capacity": 3}, "--capacity=3 is for --sampling=poisson alone"),
        ({"sampling": "poisson", "participation": 0.5, "capacity": 3}, "--capacity=3 is too small: .* give at least 7"),
        ({"sampling": "poison"}, r"unknown sampling 'poison' \(did you mean 'poisson'\?\)"),
        ({"dropped": 1.0}, "--dropped=1.0: expected"),
        ({"stragglers": 1.5}, "--stragglers=1.5: expected a number from 0 to 1"),
        (
            {"sampling": "examples", "partition": "dirichlet_a", "min_size": 0, "dataset": "mnist_sample",
             "alpha": 0.01, "samples_per_client": None, "num_clients": 300},
            "--sampling=examples draws 210 different clients, but only",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_be_is_one_line(given, message):
    with pytest.raises(InputError, match=message) as error:
        experiment.build(settings.make(**{k: v for k, v in (SMALL | given).items() if v is not None}))
    assert "\n" not in str(error.value)
