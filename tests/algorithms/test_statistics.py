"""Rounds of FedAvg with BatchNorm, whose statistics are averaged or stay with the client, and with dropout.

The equations are those of Ioffe and Szegedy (2015), batch normalisation, in NumPy and float64: of a batch z [B, K],

    mean = sum_i z_i / B,  var = sum_i (z_i - mean)^2 / B,  y = scale (z - mean) / sqrt(var + e) + bias
    running <- 0.9 running + 0.1 (mean, var)

where a short batch is filled with the first examples of its epoch, which count in mean and var and not in the loss.
"""

import engine_cases as cases
import flax.linen as nn
import jax
import numpy as np
import pytest

from fdjax import keys, models
from fdjax.algorithms import ALGORITHMS
from fdjax.client.trained import is_statistic
from fdjax.exchange.parts import exchanging

BATCH, EPSILON, ROUNDS, RATE = 4, 1e-5, 2, 0.2
F, K, COUNTS = cases.FEATURES, cases.CLASSES, cases.COUNTS


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=EPSILON)(nn.Dense(K)(x))


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(K)(nn.Dropout(0.5, deterministic=not train)(x))


def model_of(module):
    return models.from_linen(module, (F,))


def simulated(module, statistics="averaged", rounds=ROUNDS):
    """The first state, the last one, the predictions' metrics and the federation."""
    model = model_of(module)
    task = cases.task(BATCH)._replace(model=model, models=(model,))
    method = ALGORITHMS["fedavg"]
    algorithm = method.algorithm(task)
    if statistics == "local":
        algorithm = exchanging(algorithm, model, lambda path: not is_statistic(path))
    simulation, federation = cases.bind(algorithm, task, (len(COUNTS),)), cases.federation()
    hparams = cases.replicated(method.resolve({"learning_rate": RATE}), federation)
    first = simulation.init(0, federation)
    kept = jax.device_get(first)
    last, _ = simulation.run(first, federation, hparams, rounds)
    scalars, _ = simulation.evaluate(last, federation, hparams)
    return kept, jax.device_get(last), jax.device_get(scalars), federation, simulation.traffic(federation, hparams)


class Net:
    """The net of a client in float64."""

    def __init__(self, params, running):
        self.W, self.b, self.scale, self.bias = (np.array(p, np.float64) for p in params)
        self.running = [np.array(r, np.float64) for r in running]

    def step(self, x, y, weight):
        z = x @ self.W + self.b
        mean, var = z.mean(0), z.var(0)
        deviation = np.sqrt(var + EPSILON)
        normal = (z - mean) / deviation
        g = (cases.softmax(normal * self.scale + self.bias) - np.eye(K)[y]) * (weight / weight.sum())[:, None]
        dnormal = g * self.scale
        dz = (dnormal - dnormal.mean(0) - normal * (dnormal * normal).mean(0)) / deviation
        self.scale, self.bias = self.scale - RATE * (g * normal).sum(0), self.bias - RATE * g.sum(0)
        self.W, self.b = self.W - RATE * x.T @ dz, self.b - RATE * dz.sum(0)
        self.running = [0.9 * old + 0.1 * new for old, new in zip(self.running, (mean, var), strict=True)]

    def test(self, x, y):
        z = (x @ self.W + self.b - self.running[0]) / np.sqrt(self.running[1] + EPSILON)
        return cases.cross_entropy(z * self.scale + self.bias, y)

    @property
    def params(self):
        return self.W, self.b, self.scale, self.bias


def reference(params, running, federation, statistics):
    """The server's net after the rounds, and each row's running statistics."""
    f = jax.device_get(federation)
    of_row = [running] * len(COUNTS)
    for number in range(ROUNDS):
        nets = []
        for row, client in enumerate(f.client):
            net = Net(params, of_row[row] if statistics == "local" else running)
            start, count = f.train_holdings.start[row], f.train_holdings.count[row]
            index = f.train_holdings.order[start : start + count]
            x, y = f.train.x[index] * np.float64(f.train.scale) + f.train.shift, f.train.y[index]
            order = cases.epoch_order(keys.stream(cases.round_key(0, number), "client", client), 0, count)
            for begin in range(0, count, BATCH):
                position = begin + np.arange(BATCH)
                at = order[position % count]
                net.step(x[at], y[at], (position < count) * 1.0)
            nets.append((count, net))
        of_row = [net.running if count else old for (count, net), old in zip(nets, of_row, strict=True)]
        share = np.array([count for count, _ in nets]) / sum(COUNTS)
        params = [sum(w * net.params[i] for w, (_, net) in zip(share, nets, strict=True)) for i in range(4)]
        running = [sum(w * net.running[i] for w, (_, net) in zip(share, nets, strict=True)) for i in range(2)]
    return Net(params, running), of_row


def leaves(tree):
    """Params and running statistics of the module, of a nested dict or of one by paths."""
    flat = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree.leaves_with_path(tree)}
    names = ("Dense_0/kernel", "Dense_0/bias", "BatchNorm_0/scale", "BatchNorm_0/bias")
    running = [flat.get(f"batch_stats/BatchNorm_0/{name}") for name in ("mean", "var")]
    return [flat[name] for name in names], running


@pytest.mark.exhaustive
def test_averaged_statistics():
    first, last, scalars, federation, traffic = simulated(Normalised())
    net, _ = reference(*leaves(first.server), federation, "averaged")
    params, running = leaves(last.server)
    for actual, expected in zip([*params, *running], [*net.params, *net.running], strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-5)
    f = jax.device_get(federation)
    test_x = f.test.x * np.float64(f.test.scale) + f.test.shift
    np.testing.assert_allclose(scalars["central_loss"], net.test(test_x, f.test.y).mean(), rtol=1e-4)
    assert traffic.round[0][0].up == 4 * (F * K + K + 2 * K + 2 * K)


def test_local_statistics():
    """They are not sent, and each client is tested with its own."""
    first, last, scalars, federation, traffic = simulated(Normalised(), "local")
    start = first.server.state | {path: own[0] for path, own in first.clients[0].own.items()}
    net, of_row = reference(*leaves(start), federation, "local")
    params, _ = leaves(last.server.state)
    for actual, expected in zip(params, net.params, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-5)
    own = last.clients[0].own
    for i, name in enumerate(("mean", "var")):
        expected = [running[i] for running in of_row]
        actual = own[f"batch_stats/BatchNorm_0/{name}"][: len(COUNTS)]
        np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-5)
    f = jax.device_get(federation)
    test_x = f.test.x * np.float64(f.test.scale) + f.test.shift
    losses = [
        Net(net.params, running).test(test_x, f.test.y).mean()
        for running, count in zip(of_row, f.train_holdings.count, strict=True)
        if count
    ]
    np.testing.assert_allclose(scalars["local_loss"], np.mean(losses), rtol=1e-4)
    assert "central_loss" not in scalars
    assert traffic.round[0][0].up == 4 * (F * K + K + 2 * K)


def test_dropout_differs_by_client_and_step_and_is_off_in_tests():
    model = model_of(Dropped())
    params = model.init(jax.random.key(0))
    x = np.ones((3, F), np.float32)
    alike = [model.apply(params, x) for _ in range(2)]
    np.testing.assert_array_equal(*alike)
    np.testing.assert_allclose(alike[0], x @ np.asarray(params["Dense_0"]["kernel"]), rtol=1e-5)
    seen = []
    task = cases.task(BATCH)._replace(model=model, models=(model,))
    method = ALGORITHMS["fedavg"]
    watching = model._replace(apply=lambda p, x, key=None: _watched(model, seen, p, x, key))
    task = task._replace(model=watching, models=(watching,))
    algorithm = method.algorithm(task)
    simulation, federation = cases.bind(algorithm, task, (len(COUNTS),), chunk=1, kind="chunk"), cases.federation()
    hparams = cases.replicated(method.resolve({"learning_rate": RATE, "local_epochs": 2}), federation)
    jax.block_until_ready(simulation.run(simulation.init(0, federation), federation, hparams, 2))
    jax.effects_barrier()
    steps = sum(-(-count // BATCH) for count in COUNTS)
    assert len(seen) == len(set(seen)) == 2 * 2 * steps  # one of its own for every client, step, epoch and round
    masked = [model.apply(params, x, jax.random.key(i)) for i in (1, 1, 2)]
    np.testing.assert_array_equal(masked[0], masked[1])
    assert not np.allclose(masked[0], masked[2])


def _watched(model, seen, params, x, key):
    if key is not None:
        jax.debug.callback(lambda data: seen.append(np.asarray(data).tobytes()), jax.random.key_data(key))
    return model.apply(params, x, key)
