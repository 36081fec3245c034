"""FedSSD against NumPy in float64, written from the equations of our concretisation (`fdjax/algorithms/fedssd.py`)."""

import chex
import engine_cases as cases
import jax
import numpy as np
import pytest

from fdjax import keys
from fdjax.errors import InputError
from fdjax.run import settings

K, BATCH, ROUNDS, EPOCHS, RATE, MOST, FLOOR = cases.CLASSES, 4, 3, 2, 0.1, 1.3, 0.02


def simulated(name="fedssd", federation=None, **hparams):
    """The first server, the last one, metrics, and bytes up and down."""
    _, simulation = cases.simulation(name, per_round=cases.PROXIES)
    federation, given = federation or cases.federation(), cases.hparams_of(name, learning_rate=RATE, **hparams)
    start = jax.device_get(simulation.init(0, federation)).server
    state, report = jax.device_get(simulation.run(simulation.init(0, federation), federation, given, ROUNDS))
    traffic = simulation.traffic(federation, given)
    return start, state.server, report.metrics, [traffic.per_participant(way)[0] for way in ("up", "down")]


def credibility(model, x, y):
    """M[c] = A_cc (1 - max_{j != c} A_cj), class by class; 0 of a class without examples."""
    taken_for, M = model(x).argmax(-1), np.zeros(K)
    for c in range(K):
        if (y == c).any():
            A = [np.mean(taken_for[y == c] == j) for j in range(K)]
            M[c] = A[c] * (1 - max(A[j] for j in range(K) if j != c))
    return M


def train(w, M, x, y, key):
    mine, teacher = cases.Logistic(w), cases.Logistic(w)
    for epoch in range(EPOCHS):
        order = cases.epoch_order(key, epoch, len(y))
        for first in range(0, len(y), BATCH):
            b = order[first : first + BATCH]
            z, z_g = mine(x[b]), teacher(x[b])
            m = 1 - np.sqrt(1 - cases.softmax(z_g)[np.arange(len(b)), y[b]])
            mask = MOST * np.maximum(M * m[:, None] - FLOOR, 0)
            slope = cases.softmax(z) - np.eye(K)[y[b]] + 2 * mask**2 * (z - z_g)
            mine.W, mine.b = mine.W - RATE * x[b].T @ slope / len(b), mine.b - RATE * slope.mean(0)
    return mine.params()


def test_rounds():
    w, last, metrics, sent = simulated(m_max=MOST, floor=FLOOR)
    federation = cases.federation()
    proxy, clients = jax.device_get(federation.proxy), cases.clients_of(federation)
    for r in range(ROUNDS):
        key, uploads, weights = cases.round_key(0, r), [], []
        M = credibility(cases.Logistic(w), (proxy.x.astype(float) - 0.25) / 1.5, proxy.y)
        for row in cases.participants_of(key, len(clients), cases.PARTICIPANTS):
            i, x, y = clients[row]
            if len(y):
                uploads.append(train(w, M, x, y, keys.stream(key, "client", i)))
                weights.append(len(y))
        w = cases.weighted_average(uploads, weights)
        np.testing.assert_allclose(metrics["credibility"][r], M.mean(), rtol=1e-5)
    assert M.max() > 0.3  # or the last round would distil nothing
    chex.assert_trees_all_close(last, w, rtol=1e-4, atol=1e-5)
    P = cases.FEATURES * K + K
    assert sent == [4 * P, 4 * (P + K)]


def test_without_a_mask_it_is_fedavg():
    averaged = simulated("fedavg")[1]
    for nothing in ({"m_max": 0.0}, {"floor": 1.0}):
        chex.assert_trees_all_close(simulated(**nothing)[1], averaged, rtol=1e-6, atol=1e-7)


def test_of_a_class_without_auxiliary_examples_nothing_is_distilled():
    """Auxiliary data of one class, for which the first model takes all or none of it: M is finite, 0 elsewhere."""
    federation = cases.federation()
    y = cases.replicated(np.zeros(cases.PROXIES, np.int32), federation)
    alone = federation._replace(proxy=federation.proxy._replace(y=y))
    _, last, metrics, _ = simulated(federation=alone)
    assert cases.all_finite((last, metrics))
    assert metrics["credibility"].max() <= 1 / K


def test_what_cannot_work():
    with pytest.raises(InputError, match="fedssd needs proxy data, with labels; give --proxy=held_out"):
        settings.make(algorithm="fedssd")
    with pytest.raises(InputError, match=r"--floor=-1\.0: expected a finite number of at least 0"):
        settings.make(algorithm="fedssd", proxy="held_out", floor=-1.0)
