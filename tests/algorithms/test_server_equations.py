"""FedDF, CFD, FedGKT and FedGEMS against NumPy in float64, written from the papers."""

import math

import chex
import engine_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from coding_cases import coded, nearest

from fdjax import keys

ROUNDS, EPOCHS, RATE, BATCH = 2, 2, 0.3, 4


def simulate_rounds(name, rounds=ROUNDS, options=None, begin=lambda server: server, **hparams):
    """(initial state, states and metrics after each round, traffic) on the host; `begin` changes the first server."""
    algorithm, simulation = cases.simulation(name, batch_size=BATCH, options=options)
    federation, given = cases.federation(), cases.hparams_of(algorithm, learning_rate=RATE, **hparams)
    state = simulation.init(0, federation)
    state = state._replace(server=cases.replicated(begin(state.server), federation))
    start, history = jax.device_get(state), []
    for _ in range(rounds):
        state, metrics = simulation.run(state, federation, given, 1)
        history.append(jax.device_get((state, jax.tree.map(lambda x: x[0], metrics))))
    return start, history, simulation.traffic(federation)


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


# FedDF.


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_feddf(weighting):
    """Adam with a cosine and a clipped gradient, the best student by the KL on the held tenth."""
    steps, rate, options = 20, 0.05, {"weighting": weighting}
    start, history, traffic = simulate_rounds("feddf", server_steps=steps, server_learning_rate=rate, options=options)
    P = cases.FEATURES * cases.CLASSES + cases.CLASSES
    assert (traffic.up, traffic.down) == ((4 * P,), (4 * P,))
    (px, _), mean = proxies(), start.server[0]
    for number, (state, metrics) in enumerate(history):
        uploads, weights = [], []
        for _, key, x, y in participants(number):
            mine = cases.Logistic(mean)
            descend(mine, x, hard(y), orders(key, EPOCHS, len(y)), RATE)
            uploads.append(mine)
            weights.append(len(y) if weighting == "examples" else 1)
        teacher = np.mean([mine(px) for mine in uploads], axis=0)
        student = cases.Logistic(cases.weighted_average([mine.params() for mine in uploads], weights))
        ids = subset(server_key(number))
        held, train = ids[:1], ids[1:]

        def kl(model, teacher=teacher, held=held):
            return cases.kl_divergence(teacher[held], model(px[held])).mean()

        best, best_kl = student.params(), kl(student)
        m, v = [0.0, 0.0], [0.0, 0.0]
        for i in range(steps):
            key = keys.stream(keys.stream(server_key(number), "prototype", 0), "batch", i)
            batch = train[np.asarray(jax.random.randint(key, (BATCH,), 0, len(train)))]
            back = (cases.softmax(student(px[batch])) - cases.softmax(teacher[batch])) / len(batch)
            gradient = [px[batch].T @ back, back.sum(0)]
            norm = np.sqrt(sum((g**2).sum() for g in gradient))
            gradient = [g * min(1, 5 / norm) for g in gradient]
            m = [0.9 * a + 0.1 * g for a, g in zip(m, gradient, strict=True)]
            v = [0.999 * a + 0.001 * g**2 for a, g in zip(v, gradient, strict=True)]
            eta = rate * (1 + math.cos(math.pi * i / steps)) / 2
            move = [
                eta * (a / (1 - 0.9 ** (i + 1))) / (np.sqrt(b / (1 - 0.999 ** (i + 1))) + 1e-8)
                for a, b in zip(m, v, strict=True)
            ]
            student.W, student.b = student.W - move[0], student.b - move[1]
            if kl(student) < best_kl:
                best, best_kl = student.params(), kl(student)
        mean = best
        chex.assert_trees_all_close(state.server[0], mean, rtol=2e-3, atol=2e-4)
        np.testing.assert_allclose(metrics["distill_loss"], best_kl, rtol=1e-2, atol=1e-4)


def test_feddf_of_two_prototypes_stops_early_and_reverts_to_the_average():
    """Each starts from its own clients' average and has the clients of both for teachers; eta = 0 finds nothing new."""
    algorithm, simulation = cases.simulation("feddf", cohorts=(("mclr", 3), ("mclr", 4)), participants=(2, 3))
    federation = cases.federation(cohort_sizes=(3, 4))
    hparams = cases.hparams_of(
        algorithm, learning_rate=RATE, local_epochs=EPOCHS, server_steps=200, server_learning_rate=0.0
    )
    state = simulation.init(0, federation)
    before = jax.device_get(state.server)
    after, metrics = jax.device_get(simulation.run(state, federation, hparams, 1))
    key, clients, (px, _) = cases.round_key(0, 0), cases.clients_of(federation), proxies()
    uploads, weights = ([], []), ([], [])
    for j, (first, size, drawn) in enumerate([(0, 3, 2), (3, 4, 3)]):
        for at in cases.participants_of(key, size, drawn, cohort=j):
            i, x, y = clients[first + at]
            if len(y):
                mine = cases.Logistic(before[j])
                descend(mine, x, hard(y), orders(keys.stream(key, "client", i), EPOCHS, len(y)), RATE)
                uploads[j].append(mine)
                weights[j].append(len(y))
    teacher = np.mean([mine(px) for mine in uploads[0] + uploads[1]], axis=0)
    held, kls = subset(server_key(0))[:1], []
    for j in range(2):
        average = cases.weighted_average([mine.params() for mine in uploads[j]], weights[j])
        chex.assert_trees_all_close(after.server[j], average, rtol=1e-4, atol=1e-5)
        kls.append(cases.kl_divergence(teacher[held], cases.Logistic(average)(px[held])).mean())
    assert len(uploads[0]) != len(uploads[1])
    np.testing.assert_allclose(metrics["distill_loss"], np.mean(kls), rtol=1e-3)
    assert metrics["server_steps"] == 20  # a tenth of N


def test_feddf_drops_clients_that_guess():
    """One whose accuracy on the proxy data is no better than chance counts in no mean; if all are so, all count."""
    algorithm, _ = cases.simulation("feddf", options={"drop_worst": "on"})
    model, proxy = cases.model(), cases.federation().proxy
    good = cases.Logistic(model.init(jax.random.key(0)))
    px, py = proxies()
    descend(good, px, hard(py), [np.arange(len(py))] * 200, 0.1)
    good = jax.tree.map(jnp.float32, good.params())
    guess = jax.tree.map(jnp.zeros_like, good)
    guess["Dense_0"]["bias"] = jnp.asarray([0.0, 0.0, 0.0, 9.0])  # a class of 2 in 11

    def summary(*uploads):
        seen = [algorithm.examine(model, upload, proxy, {}) for upload in uploads]
        return [
            r.finish(
                jax.tree.map(lambda *x: sum(x), *(r.partial(one, jnp.float32(n + 1)) for n, one in enumerate(seen)))
            )
            for r in (algorithm.reduction, algorithm.within)
        ]

    chex.assert_trees_all_close(summary(good, guess), [(s[0], s[1]) for s in summary(good)])
    (logits, _), (params, weight) = summary(guess, guess)
    chex.assert_trees_all_close(params, guess)
    np.testing.assert_allclose(logits[:, 3], 9.0)
    assert weight == 3


# CFD.


@pytest.mark.parametrize(("bits_up", "bits_down"), [(1, 1), (1, 2), (2, 1)])
def test_cfd(bits_up, bits_down):
    """Labels of few bits, and the bytes of each round."""
    options = {"bits_up": str(bits_up), "bits_down": str(bits_down)}
    start, history, _ = simulate_rounds("cfd", rounds=3, distill_epochs=3, options=options)
    px, _ = proxies()
    most_up, most_down = 2**bits_up - 1, 2**bits_down - 1
    central, ids, labels = cases.Logistic(start.server["params"]), start.server["ids"], None
    had, gave = {}, {}  # what each client last received and sent, of every proxy example
    for number, (state, metrics) in enumerate(history):
        uploads, up, down = [], 0, 0
        for at, key, x, y in participants(number):
            mine = cases.Logistic(row(start.clients[0]["start"], at))
            nothing = np.zeros((cases.PROXIES, cases.CLASSES), int)
            received, sent = had.setdefault(at, nothing.copy()), gave.setdefault(at, nothing.copy())
            down += 4 * len(ids)  # in the first round too, or nobody knew what to label
            if labels is not None:
                epochs, target = orders(keys.stream(key, "distill"), 3, len(ids)), labels / most_down
                descend(mine, px[ids], lambda z, b, target=target: cases.softmax(z) - target[b], epochs, RATE)
                down += coded(labels, received[ids], most_down)
                received[ids] = labels
            descend(mine, x, hard(y), orders(keys.stream(key, "train"), EPOCHS, len(y)), RATE)
            uploads.append(nearest(cases.softmax(mine(px[ids])), most_up))
            up += coded(uploads[-1], sent[ids], most_up)
            sent[ids] = uploads[-1]
            chex.assert_trees_all_close(row(state.clients[0]["params"], at), mine.params(), rtol=1e-4, atol=1e-5)
        assert (metrics["bytes_up"], metrics["bytes_down"]) == (up, down)
        target, key = np.mean(uploads, axis=0) / most_up, server_key(number)
        epochs = orders(keys.stream(key, "distill"), 3, len(ids))
        descend(central, px[ids], lambda z, b, target=target: cases.softmax(z) - target[b], epochs, RATE)
        chex.assert_trees_all_close(state.server["params"], central.params(), rtol=1e-4, atol=1e-5)
        ids = subset(key)
        labels = nearest(cases.softmax(central(px[ids])), most_down)
        np.testing.assert_array_equal(state.server["ids"], ids)
        np.testing.assert_array_equal(state.server["symbols"], labels)


# FedGKT.


class Edge:
    """Features relu(x W0 + b0), head relu(h W1 + b1) W2 + b2."""

    def __init__(self, params):
        self.layers = [
            [np.array(params[f"Dense_{i}"][name], np.float64) for name in ("kernel", "bias")] for i in range(3)
        ]

    def features(self, x):
        return np.maximum(x @ self.layers[0][0] + self.layers[0][1], 0)

    def __call__(self, x):
        hidden = np.maximum(self.features(x) @ self.layers[1][0] + self.layers[1][1], 0)
        return hidden @ self.layers[2][0] + self.layers[2][1]

    def params(self):
        return {f"Dense_{i}": {"kernel": W, "bias": b} for i, (W, b) in enumerate(self.layers)}

    def fit(self, x, slope, epochs, rate):
        for order in epochs:
            for first in range(0, len(order), BATCH):
                batch = order[first : first + BATCH]
                inputs = [x[batch], self.features(x[batch])]
                inputs.append(np.maximum(inputs[1] @ self.layers[1][0] + self.layers[1][1], 0))
                back = slope(self(x[batch]), batch) / len(batch)
                for i in (2, 1, 0):
                    W, b = self.layers[i]
                    gradient = inputs[i].T @ back, back.sum(0)
                    back = (back @ W.T) * (inputs[i] > 0)
                    self.layers[i] = [W - rate * gradient[0], b - rate * gradient[1]]


def test_fedgkt():
    T, alpha, epochs = 2.0, 0.8, 3
    start, history, _ = simulate_rounds("fedgkt", temperature=T, weight=alpha, server_epochs=epochs)
    edges = [Edge(row(start.clients[0], i)) for i in range(7)]
    net, taught = cases.Logistic(start.server["params"]), {}
    for number, (state, metrics) in enumerate(history):
        h, z, labels, owners, up, down = [], [], [], [], 0, 0
        for at, key, x, y in participants(number):
            known = taught.get(at)

            def slope(logits, batch, teacher=known, y=y):
                soft = 0
                if teacher is not None:
                    soft = alpha * T * (cases.softmax(logits / T) - cases.softmax(teacher[batch] / T))
                return hard(y)(logits, batch) + soft

            edges[at].fit(x, slope, orders(key, EPOCHS, len(y)), RATE)
            up += 4 * len(y) * (5 + cases.CLASSES + 1)
            down += 4 * len(y) * cases.CLASSES * (at in taught)
            h.append(edges[at].features(x))
            z.append(edges[at](x))
            labels.append(y)
            owners.append(at)
        assert (metrics["bytes_up"], metrics["bytes_down"]) == (up, down)
        sizes = [len(y) for y in labels]
        h, teacher, y = np.concatenate(h), np.concatenate(z), np.concatenate(labels)

        def slope(logits, batch, teacher=teacher, y=y):
            return alpha * hard(y)(logits, batch) + T * (cases.softmax(logits / T) - cases.softmax(teacher[batch] / T))

        descend(net, h, slope, orders(keys.stream(server_key(number), "train"), epochs, len(y)), RATE)
        chex.assert_trees_all_close(state.server["params"], net.params(), rtol=1e-3, atol=1e-4)
        for at, mine in zip(owners, np.split(net(h), np.cumsum(sizes)[:-1]), strict=True):
            taught[at] = mine
            np.testing.assert_allclose(state.server["logits"][at, : len(mine)], mine, rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(np.flatnonzero(state.server["known"]), sorted(taught))
        for at, edge in enumerate(edges):
            chex.assert_trees_all_close(row(state.clients[0], at), edge.params(), rtol=1e-3, atol=1e-4)


def test_fedgkt_predicts_with_the_server_on_a_clients_features():
    algorithm, simulation = cases.simulation("fedgkt")
    federation = cases.federation()
    state, _ = simulation.run(simulation.init(0, federation), federation, cases.hparams_of(algorithm), 1)
    scalars, clients = jax.device_get(simulation.evaluate(state, federation))
    state, test = jax.device_get((state, federation.test))
    x, net = (test.x.astype(float) - 0.25) / 1.5, cases.Logistic(state.server["params"])
    right = [(net(Edge(row(state.clients[0], i)).features(x)).argmax(1) == test.y).mean() for i in range(7)]
    np.testing.assert_allclose(clients["local_accuracy"], right, rtol=1e-6)
    assert "central_accuracy" not in scalars


# FedGEMS.


def test_fedgems():
    """The server was right about every other example before, so that it remembers some of those it is wrong about."""
    weight, rounds, kinds, n, K = 0.4, 4, set(), cases.PER_ROUND, cases.CLASSES
    memory = {one: np.random.default_rng(one).normal(size=K) for one in range(0, cases.PROXIES, 2)}

    def remember(server):
        known, logits = np.zeros(cases.PROXIES, np.float32), np.zeros((cases.PROXIES, K), np.float32)
        for one, z in memory.items():
            known[one], logits[one] = 1, z
        return server | {"known": known, "memory": logits}

    start, history, traffic = simulate_rounds(
        "fedgems", rounds=rounds, weight=weight, distill_epochs=2, server_epochs=3, begin=remember
    )
    assert traffic.down == (4 * n * K + 4 * n,)
    px, py = proxies()
    central, clients = cases.Logistic(start.server["params"]), [row(start.clients[0], i) for i in range(7)]
    clients = [cases.Logistic(params) for params in clients]
    ids, sent = start.server["ids"], None

    def mixed(teacher, weights, y):
        def slope(z, batch):
            w = weights[batch][:, None]
            return (1 - w) * hard(y)(z, batch) + w * (cases.softmax(z) - cases.softmax(teacher[batch]))

        return slope

    for number, (state, metrics) in enumerate(history):
        uploads = []
        for at, key, x, y in participants(number):
            if sent is not None:
                epochs = orders(keys.stream(key, "distill"), 2, n)
                descend(clients[at], px[ids], mixed(sent, np.full(n, weight), py[ids]), epochs, RATE)
            descend(clients[at], x, hard(y), orders(keys.stream(key, "train"), EPOCHS, len(y)), RATE)
            uploads.append(clients[at](px[ids]))
            chex.assert_trees_all_close(row(state.clients[0], at), clients[at].params(), rtol=1e-3, atol=1e-4)
        assert metrics["bytes_up"] == 4 * n * K * len(uploads)
        teacher, weights = np.zeros((n, K)), np.full(n, weight)
        for i, one in enumerate(ids):
            z = central(px[one])
            if z.argmax() == py[one]:
                memory[one], weights[i] = z, 0
                kinds.add("right")
            elif one in memory:
                teacher[i] = memory[one]
                kinds.add("remembered")
            else:
                said = np.array([upload[i] for upload in uploads])
                p = cases.softmax(said)
                score = (said.argmax(1) == py[one]) / np.maximum(-(p * np.log(p)).sum(1), 1 / 16)
                teacher[i] = np.exp(score) / np.exp(score).sum() @ said
                kinds.add("asked")
        epochs = orders(keys.stream(server_key(number), "train"), 3, n)
        descend(central, px[ids], mixed(teacher, weights, py[ids]), epochs, RATE)
        chex.assert_trees_all_close(state.server["params"], central.params(), rtol=1e-3, atol=1e-4)
        ids = subset(server_key(number))
        sent = central(px[ids])
        np.testing.assert_allclose(state.server["logits"], sent, rtol=1e-3, atol=1e-3)
    assert kinds == {"right", "remembered", "asked"}
