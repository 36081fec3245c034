"""100,000 clients on a laptop's memory: a round's temporary memory follows the chunk and not the number of clients."""

import jax
import numpy as np
import optax
import pytest

from fdjax import models
from fdjax.algorithms import ALGORITHMS
from fdjax.data.federation import federate
from fdjax.engine import lift
from fdjax.engine.layout import Layout
from fdjax.engine.simulation import simulation
from fdjax.method import Task, Training
from fdjax.types import Cohort, Holdings, Source

FEATURES, CLASSES, CHUNK, EACH = 8, 10, 250, 2
UPLOAD = 4 * (FEATURES * CLASSES + CLASSES)  # bytes of one client's parameters
# Rows of a client's id, start and count, dealt to chunks and back, and what it returns: its weight, its loss, and which
# of its numbers is not finite.
INDICES = 7 * 4


def build(clients):
    """FedAvg over `clients` clients of two examples each: (simulation, federation, hparams)."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(FEATURES, CLASSES))

    def draw(size):
        x = rng.normal(size=(size, FEATURES)).astype(np.float32)
        return x, np.argmax(x @ truth, axis=1).astype(np.int32)

    source = Source("many", *draw(EACH * clients), *draw(500), CLASSES)
    ids = np.arange(clients, dtype=np.int32)
    train = Holdings(np.arange(EACH * clients, dtype=np.int32), EACH * ids, np.full(clients, EACH, np.int32))
    test = Holdings(np.zeros(1, np.int32), 0 * ids, 0 * ids)
    mesh = lift.make_mesh(jax.devices()[:1])
    model = models.build("mclr", (FEATURES,), CLASSES)
    training = Training(EACH, lambda learning_rate, round: optax.sgd(learning_rate))
    fedavg = ALGORITHMS["fedavg"]
    algorithm = fedavg.algorithm(Task(model, (model,), (clients,), training, training, training, CLASSES))
    layout = Layout(model, (Cohort(model, clients),), (clients,), lift.Lifting("shard_map", mesh, CHUNK))
    federation = federate(source, train, test, (clients,), mesh)
    return simulation(algorithm, layout), federation, fedavg.resolve({"learning_rate": 1.0})


def compile_round(simulation, federation, hparams):
    return simulation.run.lower(simulation.init(0, federation), federation, hparams, 1).compile()


@pytest.fixture(scope="module")
def hundred_thousand():
    built = build(100_000)
    return *built, compile_round(*built)


@pytest.mark.exhaustive
def test_a_round_of_100_000_clients(hundred_thousand):
    simulation, federation, hparams, run = hundred_thousand
    state, report = run(simulation.init(0, federation), federation, hparams)
    before = simulation.init(0, federation)
    loss = {
        when: float(simulation.evaluate(s, federation, hparams)[0]["central_loss"])
        for when, s in (("before", before), ("after", state))
    }
    assert np.isfinite(report.metrics["train_loss"]).all()
    assert loss["after"] < 0.9 * loss["before"]

    # One step on both of a client's examples, averaged over clients of equal size, is one step on all of them.
    W, b = (np.array(before.server["Dense_0"][name], np.float64) for name in ("kernel", "bias"))
    x, y = (np.asarray(leaf) for leaf in (federation.train.x, federation.train.y))
    z = x.astype(float) @ W + b
    p = np.exp(z - z.max(1, keepdims=True))
    slope = p / p.sum(1, keepdims=True) - np.eye(CLASSES)[y]
    np.testing.assert_allclose(state.server["Dense_0"]["kernel"], W - x.T @ slope / len(y), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(state.server["Dense_0"]["bias"], b - slope.mean(0), rtol=1e-3, atol=1e-4)


def test_memory_follows_the_chunk(hundred_thousand):
    """Five times the clients may cost 28 bytes more for each, their share of index arrays: not 360, an upload each."""
    *_, run = hundred_thousand
    small, large = (compiled.memory_analysis().temp_size_in_bytes for compiled in (compile_round(*build(20_000)), run))
    print(
        f"temporary memory of 20,000 clients {small:,} bytes, of 100,000 {large:,}; uploads of all {100_000 * UPLOAD:,}"
    )
    assert large - small <= 80_000 * INDICES
    assert large < 100_000 * INDICES + 8 * CHUNK * UPLOAD
    assert large < 0.2 * 100_000 * UPLOAD
