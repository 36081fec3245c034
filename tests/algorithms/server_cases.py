"""Rounds of methods with a server that trains, and NumPy's side of them: what both of their test files need."""

import engine_cases as cases
import jax
import numpy as np

from fdjax import keys
from fdjax.exchange import traffic as counting

ROUNDS, EPOCHS, RATE, BATCH = 2, 2, 0.3, 4


def simulate_rounds(name, rounds=ROUNDS, options=None, begin=lambda server: server, **hparams):
    """(initial state; state, metrics and bytes sent of each round) on the host; `begin` changes the first server."""
    _, simulation = cases.simulation(name, batch_size=BATCH, options=options)
    federation, given = cases.federation(), cases.hparams_of(name, learning_rate=RATE, **hparams)
    traffic = simulation.traffic(federation, given)
    state = simulation.init(0, federation)
    state = state._replace(server=cases.replicated(begin(state.server), federation))
    start, history = jax.device_get(state), []
    for _ in range(rounds):
        state, report = simulation.run(state, federation, given, 1)
        kept, report = jax.device_get((state, jax.tree.map(lambda x: x[0], report)))
        history.append((kept, report.metrics, counting.count_bytes(traffic.round, report.sent)))
    return start, history


def row(stacked, i):
    return jax.tree.map(lambda x: x[i], stacked)


def proxies():
    proxy = jax.device_get(cases.federation().proxy)
    return (proxy.x.astype(float) - 0.25) / 1.5, proxy.y


def participants(number):
    """(row, key, x, y) of those that hold examples."""
    key, clients = cases.round_key(0, number), cases.clients_of(cases.federation())
    for at in cases.participants_of(key, len(clients), cases.PARTICIPANTS):
        i, x, y = clients[at]
        if len(y):
            yield int(at), keys.stream(key, "client", i), x, y


def first_subset():
    """The proxy examples that a server draws before the first round."""
    key = keys.stream(jax.random.key(0), "server state")
    return np.asarray(jax.random.choice(key, cases.PROXIES, (cases.PER_ROUND,), replace=False))


def orders(key, epochs, count):
    return [cases.epoch_order(key, e, count) for e in range(epochs)]


def descend(model, x, slope, epochs, rate):
    """SGD on x [n, F] with dl/dz = slope(z [B, K], which [B])."""
    for order in epochs:
        for first in range(0, len(order), BATCH):
            batch = order[first : first + BATCH]
            back = slope(model(x[batch]), batch) / len(batch)
            model.W, model.b = model.W - rate * x[batch].T @ back, model.b - rate * back.sum(0)


def hard(y):
    return lambda z, batch: cases.softmax(z) - np.eye(cases.CLASSES)[y[batch]]


def server_key(number):
    return keys.stream(cases.round_key(0, number), "server")


def subset(key, size=cases.PER_ROUND):
    return np.asarray(jax.random.permutation(keys.stream(key, "subset"), cases.PROXIES))[:size]
