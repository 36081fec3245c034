"""Rounds from starts that the test draws, with momentum that is kept: FedAvg, FedProx and FedMD against NumPy."""

import chex
import engine_cases as cases
import jax
import numpy as np
import pytest
import start_cases as starts

from fdjax import keys, models
from fdjax.exchange import proxy

ROUNDS, EPOCHS, RATE = 2, 2, 0.05


def participants(number, exchange=0):
    """(row, key, x, y) of those that hold examples."""
    key, clients = cases.round_key(0, number), cases.clients_of(cases.federation())
    of_exchange = keys.stream(key, "exchange", exchange) if exchange else key
    for at in cases.participants_of(key, len(clients), cases.PARTICIPANTS):
        i, x, y = clients[at]
        if len(y):
            yield int(at), keys.stream(of_exchange, "client", i), x, y


def orders(key, epochs, count):
    return [cases.epoch_order(key, e, count) for e in range(epochs)]


def assert_same_clients(state, clients):
    for actual, expected in zip(starts.clients_of(state.clients), clients, strict=True):
        for stage, velocity in expected.velocities.items():
            chex.assert_trees_all_close(actual.velocities[stage].params(), velocity.params(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "mu"), [("fedavg", 0.0), ("fedprox", 0.8)])
def test_average_of_clients_that_keep_their_momentum(name, mu):
    federation = cases.federation()
    simulation = starts.simulation(name)
    state, place = starts.drawn(simulation, federation)
    state = state._replace(server=state.server._replace(state=place(state.server.state)))
    hparams = cases.hparams_of(name, learning_rate=RATE, local_epochs=EPOCHS, **({"mu": mu} if mu else {}))
    server, clients = jax.device_get(state.server.state), starts.clients_of(state.clients)
    after, report = jax.device_get(simulation.run(state, federation, hparams, ROUNDS))
    taken = []
    for r in range(ROUNDS):
        uploads, weights, losses = [], [], []
        for row, key, x, y in participants(starts.FIRST_ROUND + r):
            clients[row].restart(server)
            means = clients[row].descend("client", x, starts.hard(y), orders(key, EPOCHS, len(y)), RATE, mu=mu)
            uploads.append(clients[row].model.params())
            weights.append(len(y))
            losses.append(means[-1])
            taken.append(row)
        server = cases.weighted_average(uploads, weights)
        np.testing.assert_allclose(report.metrics["train_loss"][r], np.average(losses, weights=weights), rtol=1e-4)
    assert max(taken.count(row) for row in taken) == ROUNDS  # whose momentum of one round goes into the next
    assert after.round == starts.FIRST_ROUND + ROUNDS
    chex.assert_trees_all_close(after.server.state, server, rtol=1e-3, atol=1e-4)
    assert_same_clients(after, clients)


@pytest.mark.exhaustive
def test_fedmd_of_two_label_sets_from_set_up_on():
    """Private labels 0 to 3, public ones 4 to 7, one output layer over both; transfer learning stops early."""
    K, M, N = 2 * cases.CLASSES, cases.PROXIES, cases.PER_ROUND
    federation = cases.federation()
    federation = federation._replace(proxy=federation.proxy._replace(y=federation.proxy.y + cases.CLASSES))
    net = models.build("mclr", (cases.FEATURES,), K)
    simulation = starts.simulation("fedmd", {"subset": "stratified"}, model=net, models=(net,), classes=K)
    state, _ = starts.drawn(simulation, federation)
    ids = np.random.default_rng(8).choice(M, N, replace=False).astype(np.int32)
    agreed = proxy.Agreement(ids, np.zeros((N, K), np.float32))
    state = state._replace(server=state.server._replace(state=cases.replicated(agreed, federation)))
    hparams = cases.hparams_of(
        "fedmd", learning_rate=RATE, local_epochs=EPOCHS, pretrain_epochs=30, pretrain_patience=2, private_epochs=25,
        private_patience=1, digest_epochs=2, digest_learning_rate=0.1,
    )  # fmt: skip
    clients = starts.clients_of(state.clients)
    state, _ = simulation.setup(state, federation, hparams)
    set_up = jax.device_get(state)
    public = jax.device_get(federation.proxy)
    px, epochs_of = (public.x.astype(float) - 0.25) / 1.5, []
    for found, mine, (i, x, y) in zip(
        starts.clients_of(set_up.clients), clients, cases.clients_of(federation), strict=True
    ):
        key = keys.stream(keys.stream(jax.random.key(0), "setup"), "client", i)
        if len(y):
            first = keys.stream(key, "public"), 30, 2, RATE
            epochs_of.append(mine.until_flat("distill", px, starts.hard(public.y, K), *first))
            then = keys.stream(key, "private"), 25, 1, RATE
            epochs_of.append(mine.until_flat("client", x, starts.hard(y, K), *then))
        chex.assert_trees_all_close(found.model.params(), mine.model.params(), rtol=1e-3, atol=1e-3)
    assert min(epochs_of) < 25  # some stop early,
    assert len({*epochs_of}) > 3  # and each for itself

    after, report = jax.device_get(simulation.run(state, federation, hparams, 1))
    uploads = [clients[row].model(px[ids]) for row, *_ in participants(starts.FIRST_ROUND)]
    consensus, losses, weights = np.mean(uploads, axis=0), [], []

    def mean_absolute_error(z, batch):
        return np.abs(z - consensus[batch]).mean(-1), np.sign(z - consensus[batch]) / K

    for row, key, x, y in participants(starts.FIRST_ROUND, exchange=1):
        shuffled = orders(keys.stream(key, "digest"), 2, N)
        digest = clients[row].descend("distill", px[ids], mean_absolute_error, shuffled, 0.1)
        revisit = orders(keys.stream(key, "revisit"), EPOCHS, len(y))
        train = clients[row].descend("client", x, starts.hard(y, K), revisit, RATE)
        losses.append((train[-1], digest[-1]))
        weights.append(len(y))
    expected = np.average(losses, axis=0, weights=weights)
    np.testing.assert_allclose([report.metrics[n][0] for n in ("train_loss", "digest_loss")], expected, rtol=1e-3)
    np.testing.assert_allclose(after.server.state.consensus, consensus, rtol=1e-3, atol=1e-3)
    assert_same_clients(after, clients)
    for actual, mine in zip(starts.clients_of(after.clients), clients, strict=True):
        chex.assert_trees_all_close(actual.model.params(), mine.model.params(), rtol=1e-3, atol=1e-3)
    of_label = np.bincount(public.y[after.server.state.ids], minlength=K)
    share = N * np.bincount(public.y, minlength=K) / M
    assert ((np.floor(share) <= of_label) & (of_label <= np.ceil(share))).all()
