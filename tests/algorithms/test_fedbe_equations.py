"""FedBE against NumPy in float64, written from the paper's posteriors and its code's stochastic weight averaging."""

import engine_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from choices import some
from server_cases import BATCH, EPOCHS, RATE, descend, hard, orders, participants, proxies, server_key, simulate_rounds

from fdjax import keys
from fdjax.contract import Stack
from fdjax.exchange import posterior

DRAWS, SERVER_EPOCHS, SERVER_RATE, SHARPENING, CONCENTRATION = 3, 4, 0.5, 0.4, 0.7
BEGINS, EVERY = 0.3, 2
H = {
    "posterior_samples": DRAWS, "server_epochs": SERVER_EPOCHS, "server_learning_rate": SERVER_RATE,
    "sharpening": SHARPENING, "concentration": CONCENTRATION, "swa_begins": BEGINS, "swa_every": EVERY,
}  # fmt: skip


def trained(server, number):
    """The participants' models [W and b] and their numbers of examples, in the order of clients' ids."""
    found = []
    for at, key, x, y in participants(number):
        mine = cases.Logistic(server)
        descend(mine, x, hard(y), orders(key, EPOCHS, len(y)), RATE)
        found.append((at, [mine.b, mine.W], len(y)))
    return [model for _, model, _ in found], np.array([n for *_, n in found], float), [at for at, *_ in found]


def drawn(kind, models, sizes, places, key):
    """w^(m), [b, W] as the leaves are ordered."""
    share = sizes / sizes.sum()
    if kind == "dirichlet":
        gammas = np.float64(jax.random.gamma(key, CONCENTRATION, (cases.PARTICIPANTS,)))[places]
        weights = gammas * sizes / (gammas * sizes).sum()
        return [np.tensordot(weights, np.array(w), 1) for w in zip(*models, strict=True)]
    out = []
    for i, w in enumerate(map(np.array, zip(*models, strict=True))):
        mean = np.tensordot(share, w, 1)
        noise = np.float64(jax.random.normal(keys.stream(key, "tensor", i), mean.shape))
        if kind == "gaussian":
            out.append(mean + np.sqrt(np.tensordot(share, (w - mean) ** 2, 1)) * noise)
        else:
            lengths = np.array([np.linalg.norm(each - mean) for each in w])
            unit = np.array([(each - mean) / length for each, length in zip(w, lengths, strict=True)])
            out.append(mean + lengths.mean() * (unit.mean(0) + 0.1 * unit.std(0) * noise))
    return out


def outputs(model, x):
    b, W = model
    return cases.softmax(x @ W + b)


def server_round(kind, server, number):
    models, sizes, rows = trained(server, number)
    clients = cases.clients_of(cases.federation())
    taking = cases.participants_of(cases.round_key(0, number), len(clients), cases.PARTICIPANTS).tolist()
    places = [taking.index(row) for row in rows]
    mean = [np.average(w, axis=0, weights=sizes) for w in zip(*models, strict=True)]
    key, (x, _) = server_key(number), proxies()
    samples = [drawn(kind, models, sizes, places, keys.stream(key, "draw", m)) for m in range(DRAWS)]
    p = np.mean([outputs(model, x) for model in [mean, *models, *samples]], axis=0)
    target = p ** (1 / SHARPENING) / (p ** (1 / SHARPENING)).sum(1, keepdims=True)
    ids = np.asarray(jax.random.permutation(keys.stream(key, "subset"), cases.PROXIES))[: cases.PER_ROUND]
    return student(mean, x[ids], target[ids], key)


def student(start, x, target, key):
    """SGD with momentum and weight decay, and the mean of some of its iterates."""
    b, W = (v.copy() for v in start)
    velocity, n, steps, iterates = [0.0, 0.0], len(x), 0, []
    total = SERVER_EPOCHS * -(-n // BATCH)
    for epoch in range(SERVER_EPOCHS):
        order = np.asarray(keys.shuffle(keys.stream(key, "shuffle", epoch), n)(np.arange(n, dtype=np.int32)))
        for first in range(0, n, BATCH):
            i = order[(first + np.arange(BATCH)) % n]
            slope = (outputs((b, W), x[i]) - target[i]) / (BATCH * cases.CLASSES)
            gradients = slope.sum(0) + 1e-5 * b, x[i].T @ slope + 1e-5 * W
            velocity = [0.9 * v + g for v, g in zip(velocity, gradients, strict=True)]
            b, W = b - SERVER_RATE * velocity[0], W - SERVER_RATE * velocity[1]
            if steps >= round(BEGINS * total) and (steps - round(BEGINS * total)) % EVERY == 0:
                iterates.append((b, W))
            steps += 1
    return [np.mean(v, axis=0) for v in zip(*iterates, strict=True)], len(iterates)


@pytest.mark.parametrize("kind", some(["gaussian", "directions", "dirichlet"], "dirichlet"))
def test_rounds(kind):
    start, history = simulate_rounds("fedbe", options={"posterior": kind}, **H)
    server = start.server
    for number, (state, metrics, _) in enumerate(history):
        (b, W), averaged = server_round(kind, server, number)
        assert metrics["averaged"] == averaged
        np.testing.assert_allclose(state.server["Dense_0"]["bias"], b, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(state.server["Dense_0"]["kernel"], W, rtol=1e-3, atol=1e-5)
        server = state.server


def test_without_an_iterate_to_average_the_last_one_is_sent():
    (_, ((state, metrics, _),)) = simulate_rounds("fedbe", 1, **H | {"swa_begins": 1.0})
    assert metrics["averaged"] == 0
    (_, ((other, _, _),)) = simulate_rounds("fedbe", 1, **H | {"swa_begins": 0.0, "swa_every": 1})
    assert not np.allclose(state.server["Dense_0"]["kernel"], other.server["Dense_0"]["kernel"], atol=1e-4)
    (_, ((same, *_),)) = simulate_rounds("fedavg", 1)
    (_, ((fixed, *_),)) = simulate_rounds("fedbe", 1, **H | {"server_learning_rate": 0.0})
    np.testing.assert_allclose(fixed.server["Dense_0"]["kernel"], same.server["Dense_0"]["kernel"], rtol=1e-5)


@pytest.mark.parametrize("kind", posterior.KINDS)
def test_statistics_stay_positive_and_small_concentrations_finite(kind):
    """Variances of BatchNorm are not drawn, and draws of a Gamma distribution that underflow are not divided by."""
    models = {"kernel": jnp.ones((3, 4)) * jnp.arange(3.0)[:, None], "batch_stats": {"var": jnp.full((3, 4), 1e-6)}}
    mean = jax.tree.map(lambda w: w.mean(0), models)
    for seed in range(20):
        stack = Stack(models, jnp.arange(3), jnp.array([1.0, 2.0, 0.0]))
        drawn = posterior.sample(kind, mean, stack, jnp.float32(1e-4), jax.random.key(seed))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(drawn))
        assert (np.asarray(drawn["batch_stats"]["var"]) > 0).all()
