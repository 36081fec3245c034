"""FD, FedMD, Cronus and DS-FL against NumPy in float64, on logistic regression; written from the papers' equations."""

import chex
import engine_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from choices import some

from fdjax import keys
from fdjax.algorithms import fd
from fdjax.contract import Context, Stack
from fdjax.exchange import traffic as counting
from fdjax.run import experiment, settings

ROUNDS, EPOCHS, RATE, BATCH = 3, 2, 0.3, 4  # three, so that a subset is drawn by a server that drew one before
K, M, N = cases.CLASSES, cases.PROXIES, cases.PER_ROUND


def simulate_rounds(name, options=None, federation=None, **hparams):
    """(state after setup, state, metrics, state before setup) on the host; the bytes are checked on the way."""
    _, simulation = cases.simulation(name, options=options)
    federation = federation or cases.federation()
    given = cases.hparams_of(name, learning_rate=RATE, local_epochs=EPOCHS, **hparams)
    fresh = jax.device_get(simulation.init(0, federation))
    start = cases.begin(simulation, federation, given)
    kept = jax.device_get(start)
    state, report = jax.device_get(simulation.run(start, federation, given, ROUNDS))
    assert_bytes(simulation.traffic(federation, given), report, ids=name != "fd")
    return kept, state, report.metrics, fresh


def assert_bytes(traffic, report, ids):
    """n predictions up, as many targets down and once a round the ids of the subset (of FD a table each way)."""
    floats = N * K if ids else K * K
    up, down = 4 * floats, 4 * floats + (4 * N if ids else 0)
    assert (traffic.per_participant("up"), traffic.per_participant("down")) == ((up,), (down,))
    sent = counting.count_bytes(traffic.round, report.sent)
    present = [len(list(turns(cases.federation(), r))) for r in range(ROUNDS)]
    assert min(present) < cases.PARTICIPANTS  # who holds nothing neither receives nor sends
    np.testing.assert_array_equal(sent["up"], up * np.array(present))
    np.testing.assert_array_equal(sent["down"], down * np.array(present))
    assert all((sizes.up, sizes.down) == (0, 0) for exchange in traffic.setup for sizes in exchange)


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


def exchange_key(r, number):
    """The key of an exchange of round r, of which the first has the round's own."""
    key = cases.round_key(0, r)
    return keys.stream(key, "exchange", number) if number else key


def turns(federation, r, exchange=0):
    """(row, x, y, key) of who takes part in round r and holds anything: others do and say nothing."""
    clients = cases.clients_of(federation)
    for row in cases.participants_of(cases.round_key(0, r), len(clients), cases.PARTICIPANTS):
        i, x, y = clients[row]
        if len(y):
            yield row, x, y, keys.stream(exchange_key(r, exchange), "client", i)


def first_phase(federation):
    """The same of the set-up, in which every client takes part."""
    for row, (i, x, y) in enumerate(cases.clients_of(federation)):
        if len(y):
            yield row, x, y, keys.stream(keys.stream(jax.random.key(0), "setup"), "client", i)


def subset(key):
    return np.asarray(jax.random.choice(key, M, (N,), replace=False))


def first_subset():
    return subset(keys.stream(jax.random.key(0), "server state"))


def server_key(r, exchange):
    return keys.stream(exchange_key(r, exchange), "server")


def assert_another_subset(ids, next_ids):
    assert len({*ids.tolist()}) == N
    assert {*ids.tolist()} != {*next_ids.tolist()}


def context(key, **hparams):
    """What the server's functions read."""
    return Context(cases.model(), 0, np.int32(-1), hparams, np.int32(0), key, cases.federation().proxy)


def assert_same_models(state, models):
    for actual, expected in zip(models_of(state), models, strict=True):
        chex.assert_trees_all_close(actual.params(), expected.params(), rtol=1e-4, atol=1e-5)


# FD.


@pytest.mark.parametrize("gamma", [0.7, 0.0])
def test_fd(gamma):
    federation = cases.federation()
    start, state, metrics, _ = simulate_rounds("fd", gamma=gamma)
    models, means, held = models_of(start), np.zeros((7, K, K)), np.zeros((7, K), bool)  # these by client id
    ids = [i for i, *_ in cases.clients_of(federation)]
    assert ids != sorted(ids)
    for r in range(ROUNDS):
        seen, seen_held, losses, weights = np.zeros((7, K, K)), np.zeros((7, K), bool), [], []
        for row, x, y, key in turns(federation, r):
            table = np.zeros((K, K))
            for label in range(K):
                others = [j for j in range(7) if j != ids[row] and held[j, label]]
                if others:
                    table[label] = sum(means[j, label] for j in others) / len(others)
            said = {label: [] for label in range(K)}

            def loss_and_slope(z, batch, y=y, table=table, said=said):
                for output, label in zip(cases.softmax(z), y[batch], strict=True):
                    said[int(label)].append(output)
                (a, slope), (b, more) = hard(y)(z, batch), soft(table[y])(z, batch)
                return a + gamma * b, slope + gamma * more

            losses.append(descend(models[row], x, loss_and_slope, orders(key, len(y), EPOCHS)))
            weights.append(len(y))
            for label, outputs in said.items():
                if outputs:
                    seen[ids[row], label], seen_held[ids[row], label] = np.mean(outputs, axis=0), True
                    assert len(outputs) == EPOCHS * (y == label).sum()
        means, held = seen, seen_held
        np.testing.assert_allclose(metrics["train_loss"][r], np.average(losses, weights=weights), rtol=1e-4)
    assert_same_models(state, models)
    np.testing.assert_allclose(state.server, means, rtol=1e-4, atol=1e-6)


def test_fd_sends_what_the_paper_says():
    """Table 1: 102,400 bits in 16 rounds for 10 labels, up and down together."""
    task = cases.task()._replace(classes=10)
    algorithm = fd.fd(task)
    ctx = context(jax.random.key(0))
    sent = jax.eval_shape(lambda: algorithm.round[0].broadcast(ctx, algorithm.init_server(ctx, ())))
    assert sent.own.shape == (7, 10, 10)
    assert (sent.shared, sent.known) == ((), ())
    assert 16 * 2 * sent.own.dtype.itemsize * 8 * (sent.own.size // 7) == 102_400
    made = settings.make(algorithm="fd", dataset="synthetic", num_clients=2, samples_per_client=10, model="mclr")
    built = experiment.build(made)
    traffic = built.simulation.traffic(built.federation, built.hparams)
    assert built.source.num_classes == 10
    assert 16 * 8 * (traffic.per_participant("up")[0] + traffic.per_participant("down")[0]) == 102_400


def test_fd_leaves_a_clients_own_means_out():
    rows = np.zeros((4, 3, 3), np.float32)
    rows[0, 0], rows[1, 0], rows[2, 1] = (0.5, 0.25, 0.25), (0.1, 0.2, 0.7), (0, 1, 0)
    others = np.asarray(fd.means_of_others(jnp.asarray(rows)))
    np.testing.assert_allclose(others[0, 0], rows[1, 0], atol=1e-7)  # of two holders, the other
    np.testing.assert_allclose(others[1, 0], rows[0, 0], atol=1e-7)
    np.testing.assert_allclose(others[3, 0], (rows[0, 0] + rows[1, 0]) / 2, atol=1e-7)  # who took no part leaves none
    assert (others[2, 1] == 0).all()  # the only holder of label 1: nobody else
    np.testing.assert_allclose(others[0, 1], rows[2, 1], atol=1e-7)
    assert (others[:, 2] == 0).all()  # nobody holds label 2


def test_fd_of_one_participant_has_no_regulariser():
    _, simulation = cases.simulation("fd", participants=(1,))
    federation = cases.federation((0, 0, 12, 0, 0, 0, 0))
    ends = []
    for gamma in (0.0, 5.0):
        hparams = cases.hparams_of("fd", gamma=gamma)
        ends.append(jax.device_get(simulation.run(simulation.init(0, federation), federation, hparams, 8)))
    chex.assert_trees_all_equal(*ends)
    assert (ends[0][1].metrics["train_loss"] > 0).any()  # the one who holds something was drawn
    assert cases.all_finite([state for state, _ in ends])


# FedMD.


def test_fedmd():
    federation, pretrain, private, digests, digest_rate = cases.federation(), 3, 2, 2, 0.4
    start, state, metrics, fresh = simulate_rounds(
        "fedmd", pretrain_epochs=pretrain, private_epochs=private, digest_epochs=digests,
        digest_learning_rate=digest_rate,
    )  # fmt: skip
    x_public, y_public = proxy_of(federation)
    models, ids = models_of(fresh), first_subset()
    for row, x, y, key in first_phase(federation):
        descend(models[row], x_public, hard(y_public), orders(keys.stream(key, "public"), M, pretrain))
        descend(models[row], x, hard(y), orders(keys.stream(key, "private"), len(y), private))
    assert_same_models(start, models)

    for r in range(ROUNDS):
        uploads = [models[row](x_public[ids]) for row, *_ in turns(federation, r)]
        consensus, losses, weights = np.mean(uploads, axis=0), [], []

        def mean_absolute_error(z, batch, consensus=consensus):
            return np.abs(z - consensus[batch]).mean(-1), np.sign(z - consensus[batch]) / K

        for row, x, y, key in turns(federation, r, exchange=1):
            shuffled = orders(keys.stream(key, "digest"), N, digests)
            digest_loss = descend(models[row], x_public[ids], mean_absolute_error, shuffled, digest_rate)
            train_loss = descend(models[row], x, hard(y), orders(keys.stream(key, "revisit"), len(y), EPOCHS))
            losses.append((train_loss, digest_loss))
            weights.append(len(y))
        last, ids = ids, subset(server_key(r, exchange=1))
        assert_another_subset(last, ids)
        expected = np.average(losses, axis=0, weights=weights)
        actual = np.stack([metrics["train_loss"], metrics["digest_loss"]], -1)[r]
        np.testing.assert_allclose(actual, expected, rtol=1e-4)
    assert_same_models(state, models)
    np.testing.assert_allclose(state.server.consensus, consensus, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(state.server.ids, ids)


@pytest.mark.parametrize("name", ["fedmd", "cronus", "dsfl", "mhat"])
def test_without_subsets_no_ids_are_sent(name):
    _, simulation = cases.simulation(name, per_round=M)
    traffic = simulation.traffic(cases.federation(), cases.hparams_of(name))
    assert (traffic.per_participant("up"), traffic.per_participant("down")) == ((4 * M * K,), (4 * M * K,))


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
def test_cronus_reduces_each_example_by_itself(aggregation, rng):
    algorithm, _ = cases.simulation("cronus", options={"aggregation": aggregation, "faulty": "0.4"})
    uploads = rng.dirichlet(np.full(K, 0.5), (5, N)).astype(np.float32)
    weight = np.array([3, 1, 7, 2, 2], np.float32)
    stack = Stack(uploads, np.arange(5, dtype=np.int32), weight)
    robust = ROBUST[aggregation]
    expected = np.stack([robust(example) for example in np.stack(uploads, axis=1)])
    actual = jax.jit(lambda stack: algorithm.round[0].reduce.finish(None, stack))(stack)
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("aggregation", some(ROBUST, "filter"))
def test_cronus(aggregation):
    federation, first = cases.federation(), 3
    options = {"aggregation": aggregation, "faulty": "0.4"}
    start, state, metrics, fresh = simulate_rounds("cronus", options, first_epochs=first)
    x_public, _ = proxy_of(federation)
    models, ids, robust = models_of(fresh), first_subset(), ROBUST[aggregation]
    for row, x, y, key in first_phase(federation):
        descend(models[row], x, hard(y), orders(key, len(y), first))
    assert_same_models(start, models)

    loose = 1e-3 if aggregation == "geometric_median" else 1e-4  # 256 steps of Weiszfeld's, not 5,000
    for r in range(ROUNDS):
        uploads = [cases.softmax(models[row](x_public[ids])) for row, *_ in turns(federation, r)]
        consensus = np.stack([robust(example) for example in np.stack(uploads, axis=1)])
        losses, weights = [], []
        for row, x, y, key in turns(federation, r, exchange=1):
            inputs, targets = np.concatenate([x, x_public[ids]]), np.concatenate([np.eye(K)[y], consensus])
            losses.append(descend(models[row], inputs, soft(targets), orders(key, len(inputs), EPOCHS)))
            weights.append(len(y))
        last, ids = ids, subset(server_key(r, exchange=1))
        assert_another_subset(last, ids)
        np.testing.assert_allclose(metrics["train_loss"][r], np.average(losses, weights=weights), rtol=2 * loose)
    np.testing.assert_allclose(state.server.consensus, consensus, rtol=loose, atol=loose)
    np.testing.assert_array_equal(state.server.ids, ids)
    for actual, expected in zip(models_of(state), models, strict=True):
        chex.assert_trees_all_close(actual.params(), expected.params(), rtol=loose, atol=loose)


# DS-FL.

SHARPEN = {
    "era": lambda p: cases.softmax(p / 0.2),
    "sa": lambda p: p,
    "enhanced_era": lambda p: p**1.5 / (p**1.5).sum(-1, keepdims=True),
    "era_logits": lambda z: cases.softmax(z / 0.2),
}


@pytest.mark.parametrize("aggregation", ["sa", "enhanced_era"])
def test_dsfl_sharpens_the_mean(aggregation, rng):
    algorithm, _ = cases.simulation("dsfl", options={"aggregation": aggregation})
    params, mean = cases.model().init(jax.random.key(1)), rng.dirichlet(np.ones(K), N).astype(np.float32)

    @jax.jit
    def targets(key, hparams, mean):
        ctx = context(key, **hparams)
        return algorithm.round[0].server(ctx, algorithm.init_server(ctx, params), mean)[0].targets

    hparams = cases.hparams_of("dsfl", era_temperature=0.2, era_beta=1.5)
    np.testing.assert_allclose(targets(jax.random.key(0), hparams, mean), SHARPEN[aggregation](mean), rtol=1e-5)


@pytest.mark.parametrize("aggregation", [*some(SHARPEN, "era"), "mhat"])
def test_dsfl_and_mhat(aggregation):
    federation, distils, rate = cases.federation(), 3, 0.2
    named = {"aggregation": aggregation}, {"era_temperature": 0.2, "era_beta": 1.5}
    name, (options, more) = ("mhat", ({}, {})) if aggregation == "mhat" else ("dsfl", named)
    more |= {"distill_epochs": distils, "distill_learning_rate": rate}
    start, state, metrics, _ = simulate_rounds(name, options, **more)
    x_public, _ = proxy_of(federation)
    models, central, ids = models_of(start), cases.Logistic(start.server.params), first_subset()
    for r in range(ROUNDS):
        uploads, losses, distil_losses, weights = [], [], [], []
        for row, x, y, key in turns(federation, r):
            losses.append(descend(models[row], x, hard(y), orders(keys.stream(key, "update"), len(y), EPOCHS)))
            weights.append(len(y))
            logits = models[row](x_public[ids])
            uploads.append(logits if aggregation == "era_logits" else cases.softmax(logits))
        targets = SHARPEN["sa" if name == "mhat" else aggregation](np.mean(uploads, axis=0))
        entropy = -(targets * np.log(targets)).sum(-1).mean()
        shuffled = orders(keys.stream(server_key(r, exchange=0), "distil"), N, distils)
        server_loss = descend(central, x_public[ids], soft(targets), shuffled, rate)
        targets = cases.softmax(central(x_public[ids])) if name == "mhat" else targets
        for row, _, _, key in turns(federation, r, exchange=1):
            shuffled = orders(keys.stream(key, "distil"), N, distils)
            distil_losses.append(descend(models[row], x_public[ids], soft(targets), shuffled, rate))
        last, ids = ids, subset(server_key(r, exchange=1))
        assert_another_subset(last, ids)
        expected = [*np.average([losses, distil_losses], axis=1, weights=weights), server_loss, entropy]
        actual = [metrics[name][r] for name in ("train_loss", "distill_loss", "server_loss", "target_entropy")]
        np.testing.assert_allclose(actual, expected, rtol=2e-4)
    assert_same_models(state, models)
    chex.assert_trees_all_close(state.server.params, central.params(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.server.targets, targets, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(targets.sum(-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(state.server.ids, ids)
