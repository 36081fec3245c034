"""FedDF against NumPy in float64, written from the paper."""

import math

import chex
import engine_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from server_cases import (
    BATCH,
    EPOCHS,
    RATE,
    descend,
    hard,
    orders,
    participants,
    proxies,
    server_key,
    simulate_rounds,
    subset,
)

from fdjax import keys
from fdjax.contract import Context


@pytest.mark.parametrize(
    ("weighting", "selection"),
    [
        ("examples", "kl"),
        pytest.param("uniform", "auto", marks=pytest.mark.exhaustive),
        pytest.param("uniform", "accuracy", marks=pytest.mark.exhaustive),
    ],
)
def test_feddf(weighting, selection):
    """Adam with a cosine and a clipped gradient, the best student by its accuracy or its KL on the held tenth."""
    steps, rate, options = 20, 0.05, {"weighting": weighting, "model_selection": selection}
    start, history = simulate_rounds("feddf", server_steps=steps, server_learning_rate=rate, options=options)
    P = cases.FEATURES * cases.CLASSES + cases.CLASSES
    (px, py), mean = proxies(), start.server[0]
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

        def score(model, held=held):
            return -kl(model) if selection == "kl" else (model(px[held]).argmax(1) == py[held]).mean()

        best, best_score, best_kl, at = student.params(), score(student), kl(student), 0
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
            if score(student) > best_score:
                best, best_score, best_kl, at = student.params(), score(student), kl(student), i + 1
        mean = best
        assert (metrics["best_step"], metrics["server_steps"]) == (at, steps)
        chex.assert_trees_all_close(state.server[0], mean, rtol=2e-3, atol=2e-4)
        np.testing.assert_allclose(metrics["distill_loss"], best_kl, rtol=1e-2, atol=1e-4)


@pytest.mark.exhaustive
def test_feddf_of_two_prototypes_stops_early_and_reverts_to_the_average():
    """Each starts from its own clients' average and has the clients of both for teachers; eta = 0 finds nothing new."""
    _, simulation = cases.simulation("feddf", cohorts=(("mclr", 3), ("mclr", 4)), participants=(2, 3))
    federation = cases.federation(cohort_sizes=(3, 4))
    hparams = cases.hparams_of(
        "feddf", learning_rate=RATE, local_epochs=EPOCHS, server_steps=200, server_learning_rate=0.0, server_patience=19
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
    assert report.metrics["server_steps"] == 20  # the first validation, every 2 steps, that is 19 after the start
    assert report.metrics["best_step"] == 0


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


@pytest.mark.exhaustive
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
