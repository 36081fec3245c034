"""Tests and predictions in batches against NumPy in float64."""

import functools

import engine_cases as cases
import jax
import numpy as np
import pytest
from client_cases import MODEL, N, data_of

from fdjax.client import testing


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(1))


@functools.cache
def scorer(batch_size):
    return jax.jit(lambda p, d: testing.test(functools.partial(MODEL.apply, p), d, batch_size))


@pytest.mark.parametrize("count", [0, 1, 7, 8, 23, 40])
def test_all_examples_count_once(params, count):
    data, x, y = data_of(count)
    score = scorer(8)(params, data)
    z = cases.Logistic(params)(x)
    assert score.count == count
    assert score.correct == (z.argmax(1) == y).sum()
    np.testing.assert_allclose(score.loss, cases.cross_entropy(z, y).sum(), rtol=1e-5)
    accuracy, mean_loss = score.mean()
    expected = [(z.argmax(1) == y).sum() / count, cases.cross_entropy(z, y).sum() / count] if count else [np.nan] * 2
    np.testing.assert_allclose([accuracy, mean_loss], expected, rtol=1e-5)  # of nothing there is no mean


def test_the_score_is_the_same_for_any_batch(params):
    data, _, _ = data_of(23)
    scores = [scorer(size)(params, data) for size in (1, 8, 23, 100)]
    for score in scores[1:]:
        assert (score.correct, score.count) == (scores[0].correct, scores[0].count)
        np.testing.assert_allclose(score.loss, scores[0].loss, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, N, 100])
def test_predictions_are_in_the_order_of_the_examples(params, batch_size):
    examples = data_of(0)[0].examples
    logits = testing.predict(functools.partial(MODEL.apply, params), examples, batch_size)
    expected = cases.Logistic(params)(np.asarray(examples.x, np.float64))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
