"""FedAvg and FedDistill learn, and federating is worth more than training alone; clients of different architectures."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fdjax.client.local import Training

from fdjax import keys
from fdjax.client import local, losses
from fdjax.data.federation import replicated
from fdjax.engine import lift
from fdjax.errors import InputError
from fdjax.run import experiment, settings

ROUNDS, RATE, BATCH = 6, 0.1, 32
NON_IID = {
    "dataset": "mnist_sample", "partition": "dirichlet_a", "alpha": 0.5, "num_clients": 10, "model": "2nn",
    "batch_size": BATCH, "rounds": ROUNDS, "eval_every": ROUNDS, "local_eval": "own", "devices": 2, "chunk": 1,
}  # fmt: skip


def run(hparams=None, **made):
    built = experiment.build(settings.make(hparams=hparams, **made))
    start = built.simulation.init(0, built.federation)
    return built, *built.simulation.run(start, built.federation, built.hparams, built.settings.rounds)


@pytest.fixture(scope="module")
def alone():
    """Accuracy on the full test set, [C], of clients that train for as many epochs by themselves."""
    built = experiment.build(settings.make(**NON_IID))
    model, federation = built.layout.cohorts[0].model, built.federation
    training = Training(BATCH, experiment.optimizer_of(built.settings))
    params = model.init(jax.random.key(0))
    hparams = built.hparams | {"learning_rate": np.float32(RATE), "round": np.int32(0)}

    def one(shared, row):
        client, start, count = row
        data = local.ClientData(shared.train, shared.train_holdings.order, start, count)
        trained, _ = local.fit(
            training,
            lambda p, x, y: losses.cross_entropy(model.apply(p, x), y),
            params,
            data,
            hparams,
            keys.stream(jax.random.key(0), "alone", client),
            epochs=ROUNDS,
        )
        size = len(shared.test.y)
        everything = local.ClientData(shared.test, jnp.arange(size), jnp.int32(0), jnp.int32(size))
        return local.test(model.apply, trained, everything, 500).mean()[0], ()

    rows = federation.client, federation.train_holdings.start, federation.train_holdings.count
    lifting = built.layout.lifting._replace(chunk=1)
    run_all = jax.jit(lambda shared, rows: lift.over_clients(one, shared, rows, lifting)[0])
    return np.asarray(run_all(federation, rows))


@pytest.mark.parametrize("algorithm", ["fedavg", "feddistill"])
def test_learns_what_no_client_learns_alone(algorithm, alone):
    built, state, metrics = run({"learning_rate": RATE}, algorithm=algorithm, **NON_IID)
    scalars, _ = built.simulation.evaluate(state, built.federation)
    assert metrics["train_loss"][-1] < 0.5 * metrics["train_loss"][0]
    assert scalars["central_accuracy"] > 0.8
    assert scalars["central_accuracy"] > alone.max() + 0.02
    assert scalars["central_accuracy"] > alone.mean() + 0.15


MIXED = {
    "algorithm": "feddistill", "dataset": "synthetic", "num_clients": 5, "model": "mclr", "models": "mclr:2,2nn:3",
    "samples_per_client": 30, "batch_size": 10, "rounds": 2, "eval_every": 2, "participation": 0.7, "local_eval": "own",
}  # fmt: skip


def test_teachers_of_different_architectures():
    built, state, metrics = run(**MIXED, chunk=1, devices=1)
    assert [cohort.model.name for cohort in built.layout.cohorts] == ["mclr", "2nn"]
    assert built.layout.participants == (1, 2)
    student, teachers = state.server, state.clients
    chex.assert_trees_all_equal_structs(student, teachers[0])
    assert [jax.tree.leaves(t)[0].shape[0] for t in teachers] == [2, 3]
    assert len(jax.tree.leaves(teachers[1])) == 6
    P = sum(leaf.size for leaf in jax.tree.leaves(student))
    traffic = built.simulation.traffic(built.federation)
    assert (traffic.up, traffic.down) == ((4 * P, 4 * P), (4 * P, 4 * P))  # the student's bytes, whatever the teacher
    scalars, clients = built.simulation.evaluate(state, built.federation)
    assert {len(values) for values in clients.values()} == {5}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state, metrics, scalars)))

    other = experiment.build(settings.make(**MIXED, chunk=2, devices=2))
    start = jax.device_put(jax.device_get(built.simulation.init(0, built.federation)), replicated(other.layout.mesh))
    other = other.simulation.run(start, other.federation, other.hparams, other.settings.rounds)
    chex.assert_trees_all_close(jax.device_get(other), jax.device_get((state, metrics)), rtol=1e-5, atol=1e-5)


def test_models_that_an_algorithm_does_not_use_are_refused():
    with pytest.raises(InputError, match="mclr"):
        experiment.build(settings.make(**MIXED | {"algorithm": "fedavg", "model": "2nn", "models": "mclr:5"}))
