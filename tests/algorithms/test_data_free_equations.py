"""FedFTG and FedZKT against NumPy in float64: generator and student, step by step."""

import engine_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from choices import some
from server_cases import EPOCHS, RATE, descend, hard, orders, participants, server_key, simulate_rounds

from fdjax import keys

K, F, B, STEPS, STUDENT_STEPS, G_RATE, S_RATE, HARD, APART = (
    cases.CLASSES,
    cases.FEATURES,
    50,
    2,
    3,
    0.01,
    0.3,
    0.7,
    0.9,
)


class Generator:
    """Dense, BatchNorm, LeakyReLU twice; dense, tanh, BatchNorm without parameters. Trained by Adam."""

    def __init__(self, layers):
        names = [("kernel", "scale", "shift")] * (len(layers) - 1) + [("kernel", "bias")]
        self.p = [[np.float64(layer[n]) for n in of] for layer, of in zip(layers, names, strict=True)]
        self.restart()

    def restart(self):
        self.m, self.v, self.t = [[0.0] * len(layer) for layer in self.p], [[0.0] * len(layer) for layer in self.p], 0

    def __call__(self, noise, y=None):
        h = noise if y is None else np.concatenate([noise, np.eye(K)[y]], 1)
        self.seen = []
        for kernel, scale, shift in self.p[:-1]:
            normal, deviation = standardised(h @ kernel)
            a = normal * scale + shift
            self.seen.append((h, normal, deviation, a))
            h = np.where(a > 0, a, 0.2 * a)
        kernel, bias = self.p[-1]
        t = np.tanh(h @ kernel + bias)
        out, deviation = standardised(t)
        self.seen.append((h, out, deviation, t))
        return out

    def step(self, slope):
        """One step of Adam down dL/dx of what was generated last."""
        h, out, deviation, t = self.seen[-1]
        da = back(slope, out, deviation) * (1 - t**2)
        gradients = [[h.T @ da, da.sum(0, keepdims=True)]]
        dh = da @ self.p[-1][0].T
        for (kernel, scale, _), (h, normal, deviation, a) in zip(self.p[-2::-1], self.seen[-2::-1], strict=True):
            da = dh * np.where(a > 0, 1, 0.2)
            dz = back(da * scale, normal, deviation)
            gradients.insert(0, [h.T @ dz, (da * normal).sum(0, keepdims=True), da.sum(0, keepdims=True)])
            dh = dz @ kernel.T
        self.t += 1
        for i, layer in enumerate(gradients):
            for j, g in enumerate(layer):
                self.m[i][j] = 0.9 * self.m[i][j] + 0.1 * g
                self.v[i][j] = 0.999 * self.v[i][j] + 0.001 * g**2
                m, v = self.m[i][j] / (1 - 0.9**self.t), self.v[i][j] / (1 - 0.999**self.t)
                self.p[i][j] = self.p[i][j] - G_RATE * m / (np.sqrt(v) + 1e-8)


def standardised(h):
    deviation = np.sqrt(h.var(0, keepdims=True) + 1e-5)
    return (h - h.mean(0, keepdims=True)) / deviation, deviation


def back(slope, normal, deviation):
    return (slope - slope.mean(0) - normal * (slope * normal).mean(0)) / deviation


def likeness(x, noise):
    """exp(-mean_ij mean|x_i - x_j| mean (z_i - z_j)^2), and its slope at x."""
    apart, far = x[:, None] - x[None], ((noise[:, None] - noise[None]) ** 2).mean(-1)
    value = np.exp(-(np.abs(apart).mean(-1) * far).mean())
    return value, -value * 2 * (far[..., None] * np.sign(apart)).sum(1) / (x.size * len(x))


def drawn(key, odds):
    y = np.asarray(jax.random.categorical(keys.stream(key, "labels"), odds, shape=(B,)))
    return np.float64(jax.random.normal(keys.stream(key, "noise"), (B, 100))), y


def clients_of_round(server, number):
    """Each participant's model, labels counted, and place among them."""
    clients = cases.clients_of(cases.federation())
    taking = cases.participants_of(cases.round_key(0, number), len(clients), cases.PARTICIPANTS).tolist()
    found = []
    for at, key, x, y in participants(number):
        mine = cases.Logistic(server)
        descend(mine, x, hard(y), orders(key, EPOCHS, len(y)), RATE)
        found.append((taking.index(at), mine, np.bincount(y, minlength=K)))
    return sorted(found, key=lambda each: each[0])


@pytest.mark.parametrize("disagreement", some(["kl", "l1"], "kl"))
def test_fedftg(disagreement):
    given = {
        "server_steps": STEPS, "student_steps": STUDENT_STEPS, "generator_learning_rate": G_RATE,
        "server_learning_rate": S_RATE, "class_weight": HARD, "diversity_weight": APART,
    }  # fmt: skip
    start, history = simulate_rounds("fedftg", 1, {"disagreement": disagreement}, with_counts, **given)
    ((state, metrics, _),) = history
    taught, made, loss = tuned(start.server, clients_of_round(start.server["params"], 0), disagreement)
    np.testing.assert_allclose(metrics["distill_loss"], loss, rtol=1e-3)
    np.testing.assert_allclose(state.server["params"]["Dense_0"]["kernel"], taught.W, rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(state.server["generator"][-1]["kernel"], made.p[-1][0], rtol=2e-2, atol=2e-3)


def with_counts(server):
    """The counts of labels that the set-up leaves."""
    counts = np.zeros((7, K), np.float32)
    for i, _, y in cases.clients_of(cases.federation()):
        counts[i] = np.bincount(y, minlength=K)
    return server | {"counts": jnp.asarray(counts)}


def tuned(server, clients, disagreement):
    student, made, key = cases.Logistic(server["params"]), Generator(server["generator"]), server_key(0)
    sizes, counts = [c.sum() for *_, c in clients], np.array([c for *_, c in clients], float)
    for name in ("W", "b"):
        setattr(student, name, np.average([getattr(m, name) for _, m, _ in clients], axis=0, weights=sizes))
    share, odds = counts / np.maximum(counts.sum(0), 1), jnp.log(jnp.asarray(counts.sum(0), jnp.float32))
    for i in range(STEPS):
        for (place, model, _), of in zip(clients, share, strict=True):
            noise, y = drawn(keys.stream(key, "generator", i, place), odds)
            x = made(noise, y)
            t, z, weight = model(x), student(x), of[y][:, None] / B
            p, q = cases.softmax(t), cases.softmax(z)
            if disagreement == "l1":
                dt, dz = np.sign(t - z) / K, -np.sign(t - z) / K
            else:
                log_ratio = np.log(p) - np.log(q)
                dt, dz = p * (log_ratio - (p * log_ratio).sum(1, keepdims=True)), q - p
            slope = (weight * (HARD * (p - np.eye(K)[y]) - dt)) @ model.W.T - (weight * dz) @ student.W.T
            made.step(slope + APART / len(clients) * likeness(x, noise)[1])
        for j in range(STUDENT_STEPS):
            noise, y = drawn(keys.stream(key, "student", i, j), odds)
            x = made(noise, y)
            target = sum(
                of[y][:, None] * cases.softmax(model(x)) for (_, model, _), of in zip(clients, share, strict=True)
            )
            loss = -(target * np.log(cases.softmax(student(x)))).mean()
            slope = (cases.softmax(student(x)) - target) / (B * K)
            student.W, student.b = student.W - S_RATE * x.T @ slope, student.b - S_RATE * slope.sum(0)
    return student, made, loss


DEVICE_STEPS, DEVICE_RATE, MU = 2, 0.2, 0.4


def sign_of_gap(server, devices, x):
    """mean SL, d SL / dz of the server's logits, and of the mean of the devices' probabilities."""
    p, mean = cases.softmax(server(x)), np.mean([cases.softmax(model(x)) for model in devices], axis=0)
    sign = np.sign(p - mean) / len(x)
    return np.abs(p - mean).sum(1).mean(), through_softmax(p, sign), -sign


def through_softmax(p, slope):
    return p * (slope - (p * slope).sum(1, keepdims=True))


def noise(key, *place):
    return np.float64(jax.random.normal(keys.stream(key, *place), (B, 100)))


def game(server, made, devices, key):
    """The global model after the adversarial steps."""
    loss = 0.0
    for i in range(STEPS):
        x = made(noise(key, "generator", i))
        _, dz, dmean = sign_of_gap(server, devices, x)
        slope = dz @ server.W.T
        for model in devices:
            slope = slope + through_softmax(cases.softmax(model(x)), dmean / len(devices)) @ model.W.T
        made.step(-slope)
        for j in range(STUDENT_STEPS):
            x = made(noise(key, "student", i, j))
            loss, dz, _ = sign_of_gap(server, devices, x)
            server.W, server.b = server.W - S_RATE * x.T @ dz, server.b - S_RATE * dz.sum(0)
    return loss


def test_fedzkt():
    """Two rounds: in a client's first one it has its own model, later the one that it is sent."""
    given = {
        "server_steps": STEPS, "student_steps": STUDENT_STEPS, "device_steps": DEVICE_STEPS, "mu": MU,
        "generator_learning_rate": G_RATE, "server_learning_rate": S_RATE, "device_learning_rate": DEVICE_RATE,
    }  # fmt: skip
    start, history = simulate_rounds("fedzkt", 2, **given)
    ids = np.asarray(cases.federation().client)
    server, made = cases.Logistic(start.server["params"]), Generator(start.server["generator"])
    own = [cases.Logistic(jax.tree.map(lambda leaf, row=row: leaf[row], start.clients[0])) for row in range(7)]
    sent = {}
    for number, (state, metrics, _) in enumerate(history):
        devices = []
        for row, key, x, y in participants(number):
            mine = cases.Logistic(sent.get(row, own[row].params()))
            mine.fit(x, y, orders(key, EPOCHS, len(y)), 4, RATE, mu=MU)
            own[row] = mine
            devices.append((row, cases.Logistic(mine.params())))
        key = server_key(number)
        made.restart()
        loss = game(server, made, [model for _, model in devices], key)
        np.testing.assert_allclose(metrics["distill_loss"], loss, rtol=1e-2)
        np.testing.assert_allclose(state.server["params"]["Dense_0"]["kernel"], server.W, rtol=1e-2, atol=1e-3)
        for i in range(DEVICE_STEPS):
            x = made(noise(key, "device", i))
            for _, model in devices:
                slope = (cases.softmax(model(x)) - cases.softmax(server(x))) / B
                model.W, model.b = model.W - DEVICE_RATE * x.T @ slope, model.b - DEVICE_RATE * slope.sum(0)
        for row, model in devices:
            sent[row] = model.params()
            found = state.server["devices"][0]["Dense_0"]["kernel"][ids[row]]
            np.testing.assert_allclose(found, model.W, rtol=1e-2, atol=1e-3)
            np.testing.assert_allclose(state.clients[0]["Dense_0"]["kernel"][row], own[row].W, rtol=1e-2, atol=1e-3)
        assert sorted(np.flatnonzero(state.server["known"])) == sorted(ids[row] for row in sent)
