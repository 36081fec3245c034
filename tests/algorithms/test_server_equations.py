"""CFD, FedGKT, FedDKC and FedGEMS against NumPy in float64, written from the papers."""

import chex
import engine_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from choices import some
from coding_cases import coded, nearest
from scipy import optimize
from server_cases import (
    BATCH,
    EPOCHS,
    RATE,
    descend,
    first_subset,
    hard,
    orders,
    participants,
    proxies,
    row,
    server_key,
    simulate_rounds,
    subset,
)

from fdjax import keys
from fdjax.algorithms import feddkc

# CFD.


@pytest.mark.parametrize(
    ("bits_up", "bits_down"),
    [(1, 2), *(pytest.param(*bits, marks=pytest.mark.exhaustive) for bits in ((1, 1), (1, 32), (2, 1), (32, 32)))],
)
def test_cfd(bits_up, bits_down):
    """Labels of few bits, or of 32, which are floats and sent whole; and the bytes of each round."""
    options = {"bits_up": str(bits_up), "bits_down": str(bits_down)}
    start, history = simulate_rounds("cfd", rounds=3, distill_epochs=3, options=options)
    px, _ = proxies()
    said_up, said_down = (saying(bits) for bits in (bits_up, bits_down))
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
                target, number_of_bytes = said_down(labels, received, ids)
                epochs = orders(keys.stream(key, "distill"), 3, len(ids))
                descend(mine, px[ids], lambda z, b, target=target: cases.softmax(z) - target[b], epochs, RATE)
                down += number_of_bytes
            descend(mine, x, hard(y), orders(keys.stream(key, "train"), EPOCHS, len(y)), RATE)
            upload, number_of_bytes = said_up(cases.softmax(mine(px[ids])), sent, ids)
            uploads.append(upload)
            up += number_of_bytes
            own = row(state.clients[0], at)
            chex.assert_trees_all_close(own["params"], mine.params(), rtol=1e-4, atol=1e-5)
            for name, known, bits in (("received", received, bits_down), ("sent", sent, bits_up)):
                assert (name in own) == (bits < 32)
                np.testing.assert_array_equal(own.get(name, known), known)
        assert sent_bytes == {"up": up, "down": down}
        target, key = np.mean(uploads, axis=0), server_key(number)
        epochs = orders(keys.stream(key, "distill"), 3, len(ids))
        descend(central, px[ids], lambda z, b, target=target: cases.softmax(z) - target[b], epochs, RATE)
        chex.assert_trees_all_close(state.server["params"], central.params(), rtol=1e-4, atol=1e-5)
        ids = subset(key)
        labels = cases.softmax(central(px[ids]))
        np.testing.assert_array_equal(state.server["labels"].ids, ids)
        np.testing.assert_allclose(state.server["labels"].labels, labels, rtol=1e-3, atol=1e-4)


def saying(bits):
    """(probabilities, what the receiver knows, ids) -> (what it gets, bytes); with less than 32 bits it knows more."""

    def say(probabilities, known, ids):
        if bits == 32:
            return probabilities, 4 * probabilities.size
        top = 2**bits - 1
        symbols = nearest(probabilities, top)
        number = coded(symbols, known[ids], top)
        known[ids] = symbols
        return symbols / top, number

    return say


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


PEAK, ENTROPY = 0.6, 0.7


def refined(z, name, option):
    """What FedDKC makes of logits z [n, K]: z / tau of one peak or one entropy, tau by a root finder of SciPy."""
    if name == "fedgkt":
        return z

    def beyond(log_tau, row):
        r = cases.softmax(row / np.exp(log_tau))
        return r.max() - PEAK if option == "kkr" else ENTROPY + (r * np.log(np.maximum(r, 1e-300))).sum()

    taus = [np.exp(optimize.brentq(beyond, np.log(np.ptp(row)) - 5, np.log(np.ptp(row)) + 5, args=(row,))) for row in z]
    return z / np.array(taus)[:, None]


@pytest.mark.parametrize(
    ("name", "option"), some([("fedgkt", ""), ("feddkc", "kkr"), ("feddkc", "skr")], ("fedgkt", ""), ("feddkc", "kkr"))
)
def test_fedgkt_and_feddkc(name, option):
    T, alpha, epochs = 2.0, 0.8, 3
    more = {"fedgkt": {}, "kkr": {"peak": PEAK}, "skr": {"entropy": ENTROPY}}[option or name]
    options = {"refinement": option} if option else None
    start, history = simulate_rounds(name, options=options, temperature=T, weight=alpha, server_epochs=epochs, **more)
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
        h, y = np.concatenate(h), np.concatenate(labels)
        told = cases.softmax(refined(np.concatenate(z), name, option) / (T if name == "fedgkt" else 1))

        def slope(logits, batch, told=told, y=y):
            return alpha * hard(y)(logits, batch) + T * (cases.softmax(logits / T) - told[batch])

        descend(net, h, slope, orders(keys.stream(server_key(number), "train"), epochs, len(y)), RATE)
        chex.assert_trees_all_close(state.server["params"], net.params(), rtol=1e-3, atol=1e-4)
        for at, mine in zip(owners, np.split(net(h), np.cumsum(sizes)[:-1]), strict=True):
            taught[at] = mine
            np.testing.assert_allclose(state.server["logits"][ids[at], : len(mine)], mine, rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(np.flatnonzero(state.server["known"]), sorted(ids[at] for at in taught))
        for at, edge in enumerate(edges):
            chex.assert_trees_all_close(row(state.clients[0], at), edge.params(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("by_entropy", [False, True])
def test_what_cannot_be_refined_stays_finite(by_entropy):
    """Equal logits, peaks below 1 / K and entropies above log K."""
    z = np.float32([[1, 1, 1], [3, 0, 1], [1e4, 0, -1e4]])
    for wanted in (1e-3, 0.2, 5.0):
        found = feddkc.refined(z, np.float32(wanted), by_entropy)
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found[0] - found[0][0], 0)
    r = cases.softmax(feddkc.refined(z, np.float32(0.9), by_entropy)[1:])
    reached = -(r * np.log(r)).sum(1) if by_entropy else r.max(1)
    np.testing.assert_allclose(reached, 0.9, rtol=1e-4)


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
            divergence = (cases.softmax(z) - cases.softmax(teacher[batch])) / K  # averaged over classes too
            return (1 - w) * hard(y)(z, batch) + w * divergence

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
