"""FedAvg that exchanges a part of the params, against NumPy in float64, and what is counted of it."""

import chex
import engine_cases as cases
import jax
import numpy as np
import pytest

from fdjax.algorithms import ALGORITHMS
from fdjax.client.trained import paths
from fdjax.exchange.parts import exchanging

RATE = 0.3


def run(exchanged, trained=None, rounds=2):
    """The states after each round, and what is sent."""
    task = cases.task(batch_size=100)
    task = task._replace(training=task.training._replace(trained=paths(trained) if trained else None))
    method = ALGORITHMS["fedavg"]
    algorithm = exchanging(method.algorithm(task), task.model, paths(exchanged), task.training.trained)
    simulation = cases.bind(algorithm, task, (7,))
    federation = cases.federation()
    hparams = cases.replicated(method.resolve({"learning_rate": RATE}), federation)
    state = simulation.init(0, federation)
    first = jax.device_get(state)
    for _ in range(rounds):
        state, _ = simulation.run(state, federation, hparams, 1)
    return first, jax.device_get(state), simulation, federation, hparams


def reference(start, held, own, frozen=(), rounds=2):
    """One full-batch step a round of every client; {name: [C, ...]} of `own`, the others averaged or left alone."""
    counts = np.array([len(y) for _, y in held])
    params = {name: np.array([np.array(start[name], np.float64)] * len(held)) for name in start}
    for _ in range(rounds):
        for k, (x, y) in enumerate(held):
            if not len(y):
                continue
            slope = (cases.softmax(x @ params["kernel"][k] + params["bias"][k]) - np.eye(cases.CLASSES)[y]) / len(y)
            for name, g in (("kernel", x.T @ slope), ("bias", slope.sum(0))):
                params[name][k] -= RATE * g * (name not in frozen)
        for name in params:
            if name not in own:
                params[name][:] = np.tensordot(counts / counts.sum(), params[name], 1)
    return params


def held_by(federation):
    """x and y of every client, in order of rows."""
    f = jax.device_get(federation)
    rows = zip(f.train_holdings.start, f.train_holdings.count, strict=True)
    index = [f.train_holdings.order[start : start + count] for start, count in rows]
    return [(f.train.x[i].astype(float) * f.train.scale + f.train.shift, f.train.y[i]) for i in index]


def test_a_personal_layer():
    """The bias stays with its client (FedPer); the kernel alone is sent."""
    first, after, simulation, federation, hparams = run("*kernel")
    start = {"kernel": first.server.state["Dense_0/kernel"], "bias": first.clients[0].own["Dense_0/bias"][0]}
    np.testing.assert_array_equal(first.clients[0].own["Dense_0/bias"], np.tile(start["bias"], (7, 1)))
    expected = reference(start, held_by(federation), own={"bias"})
    np.testing.assert_allclose(after.server.state["Dense_0/kernel"], expected["kernel"][0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after.clients[0].own["Dense_0/bias"][:7], expected["bias"], rtol=1e-4, atol=1e-5)
    sent = simulation.traffic(federation, hparams).round[0][0]
    assert (sent.up, sent.down) == (4 * start["kernel"].size,) * 2
    scalars, _ = simulation.evaluate(simulation.init(0, federation), federation, hparams)
    assert "central_accuracy" not in scalars
    assert "local_accuracy" in scalars


def test_what_is_frozen_and_kept_is_known_and_nobodys_own():
    """As of adapters on a frozen net: clients keep nothing, and the central model is whole."""
    first, after, simulation, federation, hparams = run("*bias", trained="*bias")
    assert not jax.tree.leaves(after.clients)
    chex.assert_trees_all_equal(after.server.frozen, first.server.frozen)
    start = {"kernel": first.server.frozen["Dense_0/kernel"], "bias": first.server.state["Dense_0/bias"]}
    expected = reference(start, held_by(federation), own=(), frozen={"kernel"})
    np.testing.assert_allclose(after.server.state["Dense_0/bias"], expected["bias"][0], rtol=1e-4, atol=1e-5)
    sent = simulation.traffic(federation, hparams).round[0][0]
    assert (sent.up, sent.down) == (4 * start["bias"].size,) * 2
    scalars, _ = simulation.evaluate(simulation.init(0, federation), federation, hparams)
    assert "central_accuracy" in scalars


@pytest.mark.parametrize("exchanged", ["*", "Dense_0/*"])
def test_everything_exchanged_is_fedavg(exchanged):
    _, after, *_ = run(exchanged)
    federation = cases.federation()
    _, plain = cases.simulation("fedavg", batch_size=100, participants=(7,))
    hparams = cases.replicated(ALGORITHMS["fedavg"].resolve({"learning_rate": RATE}), federation)
    state, _ = plain.run(plain.init(0, federation), federation, hparams, 2)
    chex.assert_trees_all_close(
        after.server.state, {f"Dense_0/{n}": v for n, v in state.server["Dense_0"].items()}, rtol=1e-6
    )
