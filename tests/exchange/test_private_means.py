"""FD's means by label, private given the models, against NumPy in float64."""

import functools

import engine_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdjax import keys
from fdjax.algorithms import ALGORITHMS
from fdjax.contract import Context
from fdjax.exchange import private_means
from fdjax.exchange.reductions import ByLabel

K, RATE, EPOCHS = cases.CLASSES, 0.3, 2


def context(key=0, **hparams):
    h = {name: jnp.float32(value) for name, value in hparams.items()} | {"local_epochs": jnp.int32(EPOCHS)}
    return Context(None, 0, jnp.int32(3), h, jnp.int32(0), jax.random.key(key), None)


@functools.cache
def simulation_of_fd(private):
    task = cases.task()._replace(private_means=private)
    return cases.bind(ALGORITHMS["fd"].algorithm(task), task, (7,))


def rounds_of_fd(private, rounds=1, **privacy):
    federation, simulation = cases.federation(), simulation_of_fd(private)
    hparams = cases.hparams_of("fd", learning_rate=RATE, local_epochs=EPOCHS) | {
        name: np.float32(value) for name, value in privacy.items()
    }
    start = simulation.init(0, federation)
    first, state = jax.device_get(start.clients), start
    for _ in range(rounds):  # supersteps of one round, which are compiled once for all tests
        state, _ = simulation.run(state, federation, cases.replicated(hparams, federation), 1)
    return federation, first, jax.device_get(state)


def outputs_while_training(model, x, y, key):
    """p of every example in every epoch, as predicted before the step that it is in; trains the model."""
    for e in range(EPOCHS):
        order = cases.epoch_order(key, e, len(y))
        for first in range(0, len(y), 4):
            batch = order[first : first + 4]
            yield y[batch], cases.softmax(model(x[batch]))
            model.fit(x, y, [batch], 4, RATE)


@pytest.mark.parametrize("clip", [0.55, 0.7])
def test_a_round_of_fd_with_clipped_outputs(clip):
    federation, first, state = rounds_of_fd(True, clip=clip, noise_multiplier=0, count_noise_multiplier=0)
    expected, was_clipped = np.zeros((7, K, K)), 0
    for row, (i, x, y) in enumerate(cases.clients_of(federation)):
        model = cases.Logistic(jax.tree.map(lambda leaf, row=row: leaf[row], first[0]))
        total, count = np.zeros((K, K)), np.zeros(K)
        key = keys.stream(cases.round_key(0, 0), "client", i)
        for labels, outputs in outputs_while_training(model, x, y, key):
            for label, p in zip(labels, outputs, strict=True):
                norm = np.sqrt((p**2).sum())
                total[label] += p * min(1, clip / norm)
                count[label] += 1
                was_clipped += norm > clip
        expected[i] = total / np.maximum(count, 1)[:, None]
    assert was_clipped
    np.testing.assert_allclose(state.server, expected, rtol=1e-4, atol=1e-6)


def test_without_noise_and_clip_it_is_fd():
    """To the rounding of sums, which XLA adds up in one order or another."""
    plain = rounds_of_fd(False, rounds=3)[2]
    same = rounds_of_fd(True, rounds=3, clip=np.inf, noise_multiplier=0, count_noise_multiplier=0)[2]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), plain, same)
    noisy = rounds_of_fd(True, rounds=3, clip=1, noise_multiplier=0.5, count_noise_multiplier=0.1)[2]
    assert np.abs(noisy.server - plain.server).max() > 0.01


def test_sums_and_counts_are_noised_by_what_an_example_adds_in_all_epochs():
    """2,000 rows: deviations of S and N are E z_s c and E z_n, seen where the counts are large, or the sums 0."""
    c, z_s, z_n, rows = 0.5, 3.0, 4.0, 2000
    total = ByLabel(jnp.full((rows, 3), 0.5e6), jnp.full(rows, 1e6))
    found = np.asarray(
        private_means.noised_means(context(clip=c, noise_multiplier=z_s, count_noise_multiplier=0), total)
    )
    assert abs((found * 1e6).std() / (EPOCHS * z_s * c) - 1) < 0.04
    found = np.asarray(
        private_means.noised_means(context(clip=c, noise_multiplier=0, count_noise_multiplier=z_n), total)
    )
    counts = 0.5e6 / found.astype(np.float64)
    assert abs(counts.std() / (EPOCHS * z_n) - 1) < 0.06
    np.testing.assert_array_equal(found[:, 0], found[:, 1])  # of one label there is one count


def test_a_noised_mean_by_numpy():
    rng, ctx = np.random.default_rng(0), context(5, clip=0.8, noise_multiplier=0.7, count_noise_multiplier=0.4)
    value, count = rng.uniform(0, 20, (K, K)).astype(np.float32), np.float32([40, 25, 1, 0])

    def draws(purpose, shape):
        key = keys.stream(keys.stream(ctx.key, purpose), "noise", 0)
        return np.asarray(jax.random.normal(key, shape), np.float64)

    S = value + EPOCHS * 0.7 * 0.8 * draws("sums", (K, K))
    N = count + EPOCHS * 0.4 * draws("counts", (K,))
    held = N > 2 * EPOCHS * 0.4
    expected = np.where(held[:, None], S / np.maximum(N, 1)[:, None], 0)
    found = private_means.noised_means(ctx, ByLabel(jnp.asarray(value), jnp.asarray(count)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert held[:2].all()
    assert not held[3]


def test_the_server_makes_probabilities_of_noised_means():
    rows = np.float32([[0.2, 0.8, 0.0], [1.5, 0.5, -0.4], [-1, 0.3, 0.2], [0, 0, 0]])
    found = np.asarray(private_means.as_probabilities(jnp.asarray(rows)))
    np.testing.assert_allclose(found, [[0.2, 0.8, 0], [2 / 3, 1 / 3, 0], [0, 0.3, 0.2], [0, 0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(found[0], rows[0])


@pytest.mark.parametrize("clip", [0.3, 1.0, np.inf])
def test_no_example_adds_more_than_the_clip(clip):
    p = np.array(jax.nn.softmax(4 * jax.random.normal(jax.random.key(0), (50, K))))
    p[7] = np.nan
    found = np.asarray(private_means.clipped_outputs(context(clip=clip), jnp.asarray(p)))
    assert (np.linalg.norm(found, axis=1) <= clip * (1 + 1e-6)).all()
    within = np.linalg.norm(p, axis=1) <= clip
    np.testing.assert_array_equal(found[within], p[within])
    assert (found[7] == 0).all()
