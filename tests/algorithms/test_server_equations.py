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
from fdjax.contract import Context
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


# FedDF.


@pytest.mark.parametrize("weighting", ["examples", pytest.param("uniform", marks=pytest.mark.exhaustive)])
def test_feddf(weighting):
    """Adam with a cosine and a clipped gradient, the best student by the KL on the held tenth."""
    steps, rate, options = 20, 0.05, {"weighting": weighting}
    start, history = simulate_rounds("feddf", server_steps=steps, server_learning_rate=rate, options=options)
    P = cases.FEATURES * cases.CLASSES + cases.CLASSES
    (px, _), mean = proxies(), start.server[0]
    for number, (state, metrics, sent) in enumerate(history):
        uploads, weights = [], []
        for _, key, x, y in participants(number):
            mine = cases.Logistic(mean)
            descend(mine, x, hard(y), orders(key, EPOCHS, len(y)), RATE)
            uploads.append(mine)
            weights.append(len(y) if weighting == "examples" else 1)
        assert sent == {"up": 4 * P * len(uploads), "down": 4 * P * len(uploads)}
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
    _, simulation = cases.simulation("feddf", cohorts=(("mclr", 3), ("mclr", 4)), participants=(2, 3))
    federation = cases.federation(cohort_sizes=(3, 4))
    hparams = cases.hparams_of(
        "feddf", learning_rate=RATE, local_epochs=EPOCHS, server_steps=200, server_learning_rate=0.0
    )
    state = simulation.init(0, federation)
    before = jax.device_get(state.server)
    after, report = jax.device_get(simulation.run(state, federation, hparams, 1))
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
    np.testing.assert_allclose(report.metrics["distill_loss"], np.mean(kls), rtol=1e-3)
    assert report.metrics["server_steps"] == 20  # a tenth of N


def fused(options, *uploads):
    """Params of a server that reverts to the average of uploads of 1, 2, ... examples, and their KL to the teacher."""
    algorithm, _ = cases.simulation("feddf", options=options)
    (exchange,) = algorithm.round
    hparams = cases.hparams_of("feddf", server_steps=20, server_learning_rate=0.0)

    @jax.jit
    def reduce_and_serve(uploads):
        proxy = cases.federation().proxy
        ctx = Context(cases.model(), 0, np.int32(-1), hparams, np.int32(0), jax.random.key(3), proxy)
        partials = [exchange.reduce.partial(ctx, x, jnp.float32(n + 1)) for n, x in enumerate(uploads)]
        total = exchange.reduce.finish(ctx, jax.tree.map(lambda *x: sum(x), *partials))
        before = jax.tree.map(jnp.zeros_like, uploads[0])
        (params,), metrics = exchange.server(ctx, (before,), (total,))
        return params, metrics["distill_loss"]

    return reduce_and_serve(uploads)


def test_feddf_weighs_its_average():
    uploads = [cases.model().init(jax.random.key(seed)) for seed in (0, 1)]
    for weighting, weights in (("examples", (1, 2)), ("uniform", (1, 1))):
        params, _ = fused({"weighting": weighting}, *uploads)
        chex.assert_trees_all_close(params, cases.weighted_average(uploads, weights), rtol=1e-5, atol=1e-6)


def test_feddf_drops_clients_that_guess():
    """One whose accuracy on the proxy data is no better than chance counts in no mean; if all are so, all count."""
    drop = {"drop_worst": "on"}
    good = cases.Logistic(cases.model().init(jax.random.key(0)))
    px, py = proxies()
    descend(good, px, hard(py), [np.arange(len(py))] * 200, 0.1)
    good = jax.tree.map(jnp.float32, good.params())
    guess = jax.tree.map(jnp.zeros_like, good)
    guess["Dense_0"]["bias"] = jnp.asarray([0.0, 0.0, 0.0, 9.0])  # a class of 2 in 11
    chex.assert_trees_all_close(fused(drop, good, guess), (good, 0.0), rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_close(fused(drop, guess, guess), (guess, 0.0), rtol=1e-6, atol=1e-6)


# CFD.


@pytest.mark.parametrize(
    ("bits_up", "bits_down"),
    [(1, 2), *(pytest.param(*bits, marks=pytest.mark.exhaustive) for bits in ((1, 1), (2, 1)))],
)
def test_cfd(bits_up, bits_down):
    """Labels of few bits, and the bytes of each round."""
    options = {"bits_up": str(bits_up), "bits_down": str(bits_down)}
    start, history = simulate_rounds("cfd", rounds=3, distill_epochs=3, options=options)
    px, _ = proxies()
    most_up, most_down = 2**bits_up - 1, 2**bits_down - 1
    central, ids, labels = cases.Logistic(start.server["params"]), first_subset(), None
    had, gave = {}, {}  # what each client last received and sent, of every proxy example
    for number, (state, _, sent_bytes) in enumerate(history):
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
            own = row(state.clients[0], at)
            chex.assert_trees_all_close(own["params"], mine.params(), rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(own["received"], received)
            np.testing.assert_array_equal(own["sent"], sent)
        assert sent_bytes == {"up": up, "down": down}
        target, key = np.mean(uploads, axis=0) / most_up, server_key(number)
        epochs = orders(keys.stream(key, "distill"), 3, len(ids))
        descend(central, px[ids], lambda z, b, target=target: cases.softmax(z) - target[b], epochs, RATE)
        chex.assert_trees_all_close(state.server["params"], central.params(), rtol=1e-4, atol=1e-5)
        ids = subset(key)
        probabilities = cases.softmax(central(px[ids]))
        labels = nearest(probabilities, most_down)
        np.testing.assert_array_equal(state.server["labels"].ids, ids)
        np.testing.assert_allclose(state.server["labels"].labels, probabilities, rtol=1e-3, atol=1e-4)


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
    start, history = simulate_rounds("fedgkt", temperature=T, weight=alpha, server_epochs=epochs)
    edges = [Edge(row(start.clients[0], i)) for i in range(7)]
    ids = np.asarray(cases.federation().client)  # by which the server keeps what it says
    net, taught = cases.Logistic(start.server["params"]), {}
    for number, (state, _, sent) in enumerate(history):
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
        assert sent == {"up": up, "down": down}
        sizes = [len(y) for y in labels]
        h, teacher, y = np.concatenate(h), np.concatenate(z), np.concatenate(labels)

        def slope(logits, batch, teacher=teacher, y=y):
            return alpha * hard(y)(logits, batch) + T * (cases.softmax(logits / T) - cases.softmax(teacher[batch] / T))

        descend(net, h, slope, orders(keys.stream(server_key(number), "train"), epochs, len(y)), RATE)
        chex.assert_trees_all_close(state.server["params"], net.params(), rtol=1e-3, atol=1e-4)
        for at, mine in zip(owners, np.split(net(h), np.cumsum(sizes)[:-1]), strict=True):
            taught[at] = mine
            np.testing.assert_allclose(state.server["logits"][ids[at], : len(mine)], mine, rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(np.flatnonzero(state.server["known"]), sorted(ids[at] for at in taught))
        for at, edge in enumerate(edges):
            chex.assert_trees_all_close(row(state.clients[0], at), edge.params(), rtol=1e-3, atol=1e-4)


def test_fedgkt_predicts_with_the_server_on_a_clients_features():
    _, simulation = cases.simulation("fedgkt")
    federation, hparams = cases.federation(), cases.hparams_of("fedgkt")
    state, _ = simulation.run(simulation.init(0, federation), federation, hparams, 1)
    scalars, clients = jax.device_get(simulation.evaluate(state, federation, hparams))
    state, test = jax.device_get((state, federation.test))
    x, net = (test.x.astype(float) - 0.25) / 1.5, cases.Logistic(state.server["params"])
    right = [(net(Edge(row(state.clients[0], i)).features(x)).argmax(1) == test.y).mean() for i in range(7)]
    np.testing.assert_allclose(clients["local_accuracy"], right, rtol=1e-6)
    assert "central_accuracy" not in scalars


def test_fedgems():
    """The server starts from the contrary of what it drew, and once was right about half of what it is wrong about."""
    weight, rounds, kinds, n, K = 0.4, 4, set(), cases.PER_ROUND, cases.CLASSES
    (px, py), memory = proxies(), {}

    def remember(server):
        known, logits = np.zeros(cases.PROXIES, np.float32), np.zeros((cases.PROXIES, K), np.float32)
        contrary = jax.tree.map(jnp.negative, server["params"])
        wrong = np.flatnonzero(cases.Logistic(contrary)(px).argmax(1) != py)
        for example in wrong[::2].tolist():
            memory[example] = np.random.default_rng(example).normal(size=K)
            known[example], logits[example] = 1, memory[example]
        return server | {"params": contrary, "known": known, "memory": logits}

    start, history = simulate_rounds(
        "fedgems", rounds=rounds, weight=weight, distill_epochs=2, server_epochs=3, begin=remember
    )
    central, clients = cases.Logistic(start.server["params"]), [row(start.clients[0], i) for i in range(7)]
    clients = [cases.Logistic(params) for params in clients]
    ids, said_by_server = first_subset(), None

    def mixed(teacher, weights, y):
        def slope(z, batch):
            w = weights[batch][:, None]
            return (1 - w) * hard(y)(z, batch) + w * (cases.softmax(z) - cases.softmax(teacher[batch]))

        return slope

    for number, (state, _, sent) in enumerate(history):
        uploads = []
        for at, key, x, y in participants(number):
            if said_by_server is not None:
                epochs = orders(keys.stream(key, "distill"), 2, n)
                descend(clients[at], px[ids], mixed(said_by_server, np.full(n, weight), py[ids]), epochs, RATE)
            descend(clients[at], x, hard(y), orders(keys.stream(key, "train"), EPOCHS, len(y)), RATE)
            uploads.append(clients[at](px[ids]))
            chex.assert_trees_all_close(row(state.clients[0], at), clients[at].params(), rtol=1e-3, atol=1e-4)
        down = 4 * n + (0 if said_by_server is None else 4 * n * K)
        assert sent == {"up": 4 * n * K * len(uploads), "down": down * len(uploads)}
        teacher, weights = np.zeros((n, K)), np.full(n, weight)
        for i, example in enumerate(ids.tolist()):
            z = central(px[example])
            if z.argmax() == py[example]:
                memory[example], weights[i] = z, 0
                kinds.add("right")
            elif example in memory:
                teacher[i] = memory[example]
                kinds.add("remembered")
            else:
                said = np.array([upload[i] for upload in uploads])
                p = cases.softmax(said)
                score = (said.argmax(1) == py[example]) / np.maximum(-(p * np.log(p)).sum(1), 1 / 16)
                teacher[i] = np.exp(score) / np.exp(score).sum() @ said
                kinds.add("asked")
        epochs = orders(keys.stream(server_key(number), "train"), 3, n)
        descend(central, px[ids], mixed(teacher, weights, py[ids]), epochs, RATE)
        chex.assert_trees_all_close(state.server["params"], central.params(), rtol=1e-3, atol=1e-4)
        ids = subset(server_key(number))
        said_by_server = central(px[ids])
        np.testing.assert_allclose(state.server["logits"], said_by_server, rtol=1e-3, atol=1e-3)
    assert kinds == {"right", "remembered", "asked"}
