"""FD, FedMD, Cronus and DS-FL against NumPy in float64, on logistic regression; written from the papers' equations."""

import chex
import engine_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdjax import keys
from fdjax.algorithms import fd
from fdjax.run import experiment, settings

ROUNDS, EPOCHS, RATE, BATCH = 3, 2, 0.3, 4  # three, so that targets of one subset meet the wish for another
K, M, N = cases.CLASSES, cases.PROXIES, cases.PER_ROUND


def simulate_rounds(name, options=None, federation=None, **hparams):
    """(state after setup, state, metrics, traffic, state before setup) on the host."""
    algorithm, simulation = cases.simulation(name, options=options)
    federation = federation or cases.federation()
    given = cases.hparams_of(algorithm, learning_rate=RATE, local_epochs=EPOCHS, **hparams)
    fresh = jax.device_get(simulation.init(0, federation))
    start = cases.begin(simulation, federation, given)
    kept = jax.device_get(start)
    state, metrics = jax.device_get(simulation.run(start, federation, given, ROUNDS))
    return kept, state, metrics, simulation.traffic(federation), fresh


def models_of(state):
    return [cases.Logistic(jax.tree.map(lambda x, i=i: x[i], state.clients[0])) for i in range(len(cases.COUNTS))]


def proxy_of(federation):
    """x as a model sees it, and y."""
    proxy = jax.device_get(federation.proxy)
    return (proxy.x.astype(np.float64) - 0.25) / 1.5, proxy.y


def orders(key, count, epochs):
    return [cases.epoch_order(key, e, count) for e in range(epochs)]


def descend(model, x, loss_and_slope, orders, rate=RATE):
    """SGD; `loss_and_slope(z, batch)` gives the losses and dl/dz of each example. The mean loss of the last epoch."""
    means = [0.0]
    for order in orders:
        means = []
        for first in range(0, len(order), BATCH):
            batch = order[first : first + BATCH]
            loss, slope = loss_and_slope(model(x[batch]), batch)
            model.W, model.b = model.W - rate * x[batch].T @ slope / len(batch), model.b - rate * slope.mean(0)
            means.append(loss.mean())
    return np.mean(means)


def soft(targets):
    """Cross-entropy to the probabilities `targets` [n, K], of any sum."""

    def loss_and_slope(z, batch):
        t = targets[batch]
        return -(t * cases.log_softmax(z)).sum(-1), t.sum(-1, keepdims=True) * cases.softmax(z) - t

    return loss_and_slope


def hard(y):
    return soft(np.eye(K)[y])


def turns(federation, r):
    """(row, x, y, key) of who takes part in round r and holds anything: others do and say nothing."""
    clients = cases.clients_of(federation)
    for row in cases.participants_of(cases.round_key(0, r), len(clients), cases.PARTICIPANTS):
        i, x, y = clients[row]
        if len(y):
            yield row, x, y, keys.stream(cases.round_key(0, r), "client", i)


def subset(key):
    return np.asarray(jax.random.choice(key, M, (N,), replace=False))


def server_key(r):
    return keys.stream(cases.round_key(0, r), "server")


def assert_same_models(state, models):
    for actual, expected in zip(models_of(state), models, strict=True):
        chex.assert_trees_all_close(actual.params(), expected.params(), rtol=1e-4, atol=1e-5)


# FD.


@pytest.mark.parametrize("gamma", [0.7, 0.0])
def test_fd(gamma):
    federation = cases.federation()
    start, state, metrics, traffic, _ = simulate_rounds("fd", gamma=gamma)
    models, means, held = models_of(start), np.zeros((7, K, K)), np.zeros((7, K), bool)
    for r in range(ROUNDS):
        seen, seen_held, losses, weights = np.zeros((7, K, K)), np.zeros((7, K), bool), [], []
        for row, x, y, key in turns(federation, r):
            table = np.zeros((K, K))
            for label in range(K):
                others = [j for j in range(7) if j != row and held[j, label]]
                if others:
                    table[label] = sum(means[j, label] for j in others) / len(others)
            said = {label: [] for label in range(K)}

            def loss_and_slope(z, batch, y=y, table=table, said=said):
                for one, label in zip(cases.softmax(z), y[batch], strict=True):
                    said[int(label)].append(one)
                (a, slope), (b, more) = hard(y)(z, batch), soft(table[y])(z, batch)
                return a + gamma * b, slope + gamma * more

            losses.append(descend(models[row], x, loss_and_slope, orders(key, len(y), EPOCHS)))
            weights.append(len(y))
            for label, outputs in said.items():
                if outputs:
                    seen[row, label], seen_held[row, label] = np.mean(outputs, axis=0), True
                    assert len(outputs) == EPOCHS * (y == label).sum()
        means, held = seen, seen_held
        np.testing.assert_allclose(metrics["train_loss"][r], np.average(losses, weights=weights), rtol=1e-4)
    assert_same_models(state, models)
    np.testing.assert_allclose(state.server, means, rtol=1e-4, atol=1e-6)
    assert (traffic.up, traffic.down) == ((4 * K * K,), (4 * K * K,))


def test_fd_sends_what_the_paper_says():
    """Table 1: 102,400 bits in 16 rounds for 10 labels, up and down together."""
    task = cases.task()._replace(classes=10)
    algorithm = fd.fd(task)
    row = jax.eval_shape(lambda key: algorithm.address(algorithm.init_server(key)), jax.random.key(0))
    assert row.shape == (7, 10, 10)
    assert algorithm.broadcast(None, 0) == ()
    assert 16 * 2 * row.dtype.itemsize * 8 * (row.size // 7) == 102_400
    made = settings.make(algorithm="fd", dataset="synthetic", num_clients=2, samples_per_client=10, model="mclr")
    built = experiment.build(made)
    traffic = built.simulation.traffic(built.federation)
    assert built.source.num_classes == 10
    assert 16 * 8 * (traffic.up[0] + traffic.down[0]) == 102_400


def test_fd_leaves_one_out():
    rows = np.zeros((4, 3, 3), np.float32)
    rows[0, 0], rows[1, 0], rows[2, 1] = (0.5, 0.25, 0.25), (0.1, 0.2, 0.7), (0, 1, 0)
    others = np.asarray(fd.others(jnp.asarray(rows)))
    np.testing.assert_allclose(others[0, 0], rows[1, 0], atol=1e-7)  # of two holders, the other
    np.testing.assert_allclose(others[1, 0], rows[0, 0], atol=1e-7)
    np.testing.assert_allclose(others[3, 0], (rows[0, 0] + rows[1, 0]) / 2, atol=1e-7)  # who took no part leaves none
    assert (others[2, 1] == 0).all()  # the only holder of label 1: nobody else
    np.testing.assert_allclose(others[0, 1], rows[2, 1], atol=1e-7)
    assert (others[:, 2] == 0).all()  # nobody holds label 2


def test_fd_of_one_participant_has_no_regulariser():
    algorithm, simulation = cases.simulation("fd", participants=(1,))
    federation = cases.federation((0, 0, 12, 0, 0, 0, 0))
    ends = []
    for gamma in (0.0, 5.0):
        hparams = cases.hparams_of(algorithm, gamma=gamma)
        ends.append(jax.device_get(simulation.run(simulation.init(0, federation), federation, hparams, 8)))
    chex.assert_trees_all_equal(*ends)
    assert (ends[0][1]["train_loss"] > 0).any()  # the one who holds something was drawn
    assert cases.all_finite(ends)


# FedMD.


def test_fedmd():
    federation, pretrain, private, digests, digest_rate = cases.federation(), 3, 2, 2, 0.4
    start, state, metrics, traffic, fresh = simulate_rounds(
        "fedmd", pretrain_epochs=pretrain, private_epochs=private, digest_epochs=digests,
        digest_learning_rate=digest_rate,
    )  # fmt: skip
    x_public, y_public = proxy_of(federation)
    models = models_of(fresh)
    for row, (i, x, y) in enumerate(cases.clients_of(federation)):
        key = keys.stream(keys.stream(jax.random.key(0), "setup"), "client", i)
        if len(y):
            descend(models[row], x_public, hard(y_public), orders(keys.stream(key, "public"), M, pretrain))
            descend(models[row], x, hard(y), orders(keys.stream(key, "private"), len(y), private))
    assert_same_models(start, models)

    wanted, consensus, ids = start.server.wanted, None, None
    for r in range(ROUNDS):
        uploads, losses, weights = [], [], []
        for row, x, y, key in turns(federation, r):
            digest_loss = 0.0
            if consensus is not None:

                def mean_absolute_error(z, batch, consensus=consensus):
                    return np.abs(z - consensus[batch]).mean(-1), np.sign(z - consensus[batch]) / K

                shuffled = orders(keys.stream(key, "digest"), N, digests)
                digest_loss = descend(models[row], x_public[ids], mean_absolute_error, shuffled, digest_rate)
            revisits = orders(keys.stream(key, "revisit"), len(y), EPOCHS)
            losses.append((descend(models[row], x, hard(y), revisits), digest_loss))
            weights.append(len(y))
            uploads.append(models[row](x_public[wanted]))
        consensus, ids, wanted = np.mean(uploads, axis=0), wanted, subset(server_key(r))
        expected = np.average(losses, axis=0, weights=weights)
        actual = np.stack([metrics["train_loss"], metrics["digest_loss"]], -1)[r]
        np.testing.assert_allclose(actual, expected, rtol=1e-4)
    assert_same_models(state, models)
    np.testing.assert_allclose(state.server.targets, consensus, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(state.server.ids, ids)
    np.testing.assert_array_equal(state.server.wanted, wanted)
    assert len(set(ids.tolist())) == N
    assert set(ids.tolist()) != set(wanted.tolist())
    assert_exchange(traffic)


def assert_exchange(traffic):
    """n predictions up; down as many targets, their ids and the next ones."""
    assert traffic.up == (4 * N * K,)
    assert traffic.down == (4 * N * K + 4 * N + 4 * N,)


@pytest.mark.parametrize("name", ["fedmd", "cronus", "dsfl"])
def test_without_subsets_no_ids_are_sent(name):
    _, simulation = cases.simulation(name, per_round=M)
    traffic = simulation.traffic(cases.federation())
    assert (traffic.up, traffic.down) == ((4 * M * K,), (4 * M * K,))


# Cronus.


def filtered_mean(vectors, fraction):
    """Drops floor(fraction m) of the vectors [m, K], each time the one furthest along the main direction."""
    vectors = np.asarray(vectors, np.float64)
    for _ in range(int(fraction * len(vectors) + 1e-6)):
        centered = vectors - vectors.mean(0)
        values, directions = np.linalg.eigh(centered.T @ centered / len(vectors))
        if values[-1] <= 0:
            break
        vectors = np.delete(vectors, np.argmax((centered @ directions[:, -1]) ** 2), axis=0)
    return vectors.mean(0)


def geometric_median(vectors):
    """Weiszfeld's steps, from a point that is not one of the vectors."""
    y = vectors.mean(0) + 1e-9
    for _ in range(5000):
        pull = 1 / np.maximum(np.linalg.norm(vectors - y, axis=-1), 1e-12)
        y = pull @ vectors / pull.sum()
    return y


def trimmed_mean(vectors, fraction):
    b = int(fraction * len(vectors) + 1e-6)
    return np.sort(vectors, axis=0)[b : len(vectors) - b].mean(0)


ROBUST = {
    "filter": lambda v: filtered_mean(v, 0.4),
    "median": lambda v: np.median(v, axis=0),
    "trimmed_mean": lambda v: trimmed_mean(v, 0.4),
    "geometric_median": geometric_median,
}


@pytest.mark.parametrize("aggregation", ROBUST)
def test_cronus(aggregation):
    federation, first = cases.federation(), 3
    options = {"aggregation": aggregation, "faulty": "0.4"}
    start, state, metrics, traffic, _ = simulate_rounds("cronus", options, first_epochs=first)
    x_public, _ = proxy_of(federation)
    models, wanted, consensus, ids = models_of(start), start.server.wanted, None, None
    for r in range(ROUNDS):
        uploads, losses, weights = [], [], []
        for row, x, y, key in turns(federation, r):
            inputs, targets = x, np.eye(K)[y]
            if consensus is not None:
                inputs, targets = np.concatenate([x, x_public[ids]]), np.concatenate([targets, consensus])
            epochs = orders(key, len(inputs), EPOCHS if r else first)
            losses.append(descend(models[row], inputs, soft(targets), epochs))
            weights.append(len(y))
            uploads.append(cases.softmax(models[row](x_public[wanted])))
        robust = ROBUST[aggregation]
        consensus = np.stack([robust(example) for example in np.stack(uploads, axis=1)])
        ids, wanted = wanted, subset(server_key(r))
        np.testing.assert_allclose(metrics["train_loss"][r], np.average(losses, weights=weights), rtol=2e-4)
    loose = 1e-3 if aggregation == "geometric_median" else 1e-4  # 256 steps of Weiszfeld's, not 5,000
    np.testing.assert_allclose(state.server.targets, consensus, rtol=loose, atol=loose)
    for actual, expected in zip(models_of(state), models, strict=True):
        chex.assert_trees_all_close(actual.params(), expected.params(), rtol=loose, atol=loose)
    assert_exchange(traffic)


# DS-FL.

SHARPEN = {
    "era": lambda p: cases.softmax(p / 0.2),
    "sa": lambda p: p,
    "enhanced_era": lambda p: p**1.5 / (p**1.5).sum(-1, keepdims=True),
    "era_logits": lambda z: cases.softmax(z / 0.2),
}


@pytest.mark.parametrize("aggregation", SHARPEN)
def test_dsfl(aggregation):
    federation, distils, distil_rate = cases.federation(), 3, 0.2
    start, state, metrics, traffic, _ = simulate_rounds(
        "dsfl", {"aggregation": aggregation}, distill_epochs=distils, distill_learning_rate=distil_rate,
        era_temperature=0.2, era_beta=1.5,
    )  # fmt: skip
    x_public, _ = proxy_of(federation)
    models, central = models_of(start), cases.Logistic(start.server.params)
    wanted, targets, ids = start.server.exchange.wanted, None, None
    for r in range(ROUNDS):
        uploads, losses, weights = [], [], []
        for row, x, y, key in turns(federation, r):
            distil_loss = 0.0
            if targets is not None:
                shuffled = orders(keys.stream(key, "distil"), N, distils)
                distil_loss = descend(models[row], x_public[ids], soft(targets), shuffled, distil_rate)
            losses.append(
                (descend(models[row], x, hard(y), orders(keys.stream(key, "update"), len(y), EPOCHS)), distil_loss)
            )
            weights.append(len(y))
            logits = models[row](x_public[wanted])
            uploads.append(logits if aggregation == "era_logits" else cases.softmax(logits))
        targets, ids = SHARPEN[aggregation](np.mean(uploads, axis=0)), wanted
        wanted = subset(keys.stream(server_key(r), "subset"))
        shuffled = orders(keys.stream(server_key(r), "distil"), N, distils)
        server_loss = descend(central, x_public[ids], soft(targets), shuffled, distil_rate)
        expected = [*np.average(losses, axis=0, weights=weights), server_loss]
        actual = [metrics[name][r] for name in ("train_loss", "distill_loss", "server_loss")]
        np.testing.assert_allclose(actual, expected, rtol=2e-4)
    assert_same_models(state, models)
    chex.assert_trees_all_close(state.server.params, central.params(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.server.exchange.targets, targets, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(targets.sum(-1), 1, rtol=1e-6)
    assert_exchange(traffic)


@pytest.mark.parametrize("name", ["fedmd", "cronus", "dsfl"])
def test_a_round_of_nobody_leaves_no_consensus(name):
    """If only clients without examples are drawn first, there is nothing to digest in the second round either."""
    _, simulation = cases.simulation(name, participants=(1,))
    algorithm, _ = cases.simulation(name)
    federation = cases.federation((0, 0, 12, 0, 0, 0, 0))
    hparams = cases.hparams_of(algorithm)
    rows = [int(cases.participants_of(cases.round_key(s, 0), 7, 1)[0]) for s in range(20)]
    seed = next(s for s, row in enumerate(rows) if row != 0)
    state, _ = simulation.run(cases.begin(simulation, federation, hparams, seed), federation, hparams, 1)
    received = jax.device_get(algorithm.broadcast(state.server, 0))
    assert not received.targets.any()
    assert not received.is_on()
