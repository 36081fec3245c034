"""The metrics by name against their definitions in float64, and what they are where a definition has nothing to say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from fdjax.client import metrics, testing
from fdjax.client.data import whole
from fdjax.client.metric import Metric, flattened
from fdjax.client.metrics import METRICS
from fdjax.types import Examples

M, K = 230, 5


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def draw(rng, size=M, classes=K, scale=2.0, sharp=1.0):
    """Labels of unlike frequency, and logits that know something of them."""
    y = rng.choice(classes, size, p=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum())
    return sharp * (scale * rng.normal(size=(size, classes)) + 2 * np.eye(classes)[y]), y


@functools.cache
def compiled(measures, batch):
    """As an evaluation has it: over batches, the last of which is filled up."""

    @jax.jit
    def of(z, y, held):
        examples = Examples(z, y, jnp.ones(1), jnp.zeros(1))
        return testing.test(lambda x: x, whole(examples), batch, measures).finished(measures, held).metrics

    return of


ALL = tuple(metric for metric in METRICS.values() if metric.sums is not None)
AREA = (METRICS["roc_auc"],)  # which compiles faster where the others are not looked at


def values(z, y, batch=37, held=None, measures=ALL):
    held = jnp.ones(z.shape[-1]) if held is None else held
    found = compiled(measures, batch)(jnp.asarray(z, jnp.float32), jnp.asarray(y, jnp.int32), held)
    return {name: np.asarray(value, float) for name, value in found.items()}


def class_accuracy(z, y):
    hit = z.argmax(-1) == y
    return np.array([hit[y == c].mean() if (y == c).any() else np.nan for c in range(z.shape[-1])])


def macro_f1(z, y):
    """By precision and recall, over labels that occur in either."""
    p, found = z.argmax(-1), []
    for c in sorted({*y.tolist(), *p.tolist()}):
        tp = sum((p == c) & (y == c))
        precision, recall = tp / max(sum(p == c), 1), tp / max(sum(y == c), 1)
        found.append(2 * precision * recall / (precision + recall) if tp else 0.0)
    return np.mean(found)


def roc_auc(z, y):
    """By all pairs, and half the share of pairs in one bin."""
    found, slack = [], []
    odds = np.stack([z[:, c] - logsumexp(np.delete(z, c, 1), 1) for c in range(z.shape[-1])], 1)  # p itself rounds to 1
    places = np.asarray(metrics.score_bin(jnp.asarray(z, jnp.float32)))
    for c in range(z.shape[-1]):
        own, others = y == c, y != c
        if own.any() and others.any():
            a, b = odds[own, c][:, None], odds[others, c][None]
            found.append(np.mean((a > b) + 0.5 * (a == b)))
            slack.append(np.mean(places[own, c][:, None] == places[others, c][None]) / 2)
    return np.mean(found), np.mean(slack)


def calibration_error(z, y, bins=15):
    p, total = softmax(z), 0.0
    confidence, hit = p.max(-1), p.argmax(-1) == y
    for b in range(bins):
        there = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if there.any():
            total += there.mean() * abs(hit[there].mean() - confidence[there].mean())
    return total


@pytest.mark.parametrize("classes", [2, K, 12])
@pytest.mark.parametrize("sharp", [0.3, 1.0, 20.0])
def test_definitions(rng, classes, sharp):
    z, y = draw(rng, classes=classes, sharp=sharp)
    by_class, found = class_accuracy(z, y), values(z, y)
    np.testing.assert_allclose(found["class_accuracy"], by_class, rtol=1e-6)
    np.testing.assert_allclose(found["balanced_accuracy"], np.nanmean(by_class), rtol=1e-6)
    np.testing.assert_allclose(found["macro_f1"], macro_f1(z, y), rtol=1e-6)
    np.testing.assert_allclose(found["calibration_error"], calibration_error(z, y), atol=2e-6)
    exact, slack = roc_auc(z, y)
    assert abs(found["roc_auc"] - exact) <= slack + 1e-6
    assert slack < 0.01
    assert abs(found["roc_auc"] - exact) < 2e-3


def test_area_of_confident_models(rng):
    """Where probabilities are 0 and 1 in float32, log-odds are still told apart."""
    z, y = draw(rng, 2000, 3, sharp=15.0)
    assert np.mean(softmax(z).astype(np.float32).max(-1) == 1) > 0.5
    assert abs(values(z, y, 500, measures=AREA)["roc_auc"] - roc_auc(z, y)[0]) < 2e-4


def test_area_of_what_is_known():
    y = np.array([0, 0, 1, 1])
    assert values(np.array([[3, 0], [2, 0], [0, 2], [0, 3.0]]), y, measures=AREA)["roc_auc"] == 1
    assert values(np.array([[0, 3], [0, 2], [2, 0], [3, 0.0]]), y, measures=AREA)["roc_auc"] == 0
    assert values(np.zeros((4, 2)), y, measures=AREA)["roc_auc"] == 0.5
    assert values(np.array([[0, 0], [0, 2], [0, 1], [0, 3.0]]), y, measures=AREA)["roc_auc"] == 0.75


def test_a_part_of_one_class():
    z, y = np.array([[2, 0, 0], [0, 1, 0], [3, 0, 0.0]]), np.zeros(3, int)
    assert np.isnan(values(z, y)["roc_auc"])
    np.testing.assert_allclose(values(z, y)["class_accuracy"], [2 / 3, np.nan, np.nan], rtol=1e-6)
    np.testing.assert_allclose(values(z, y)["balanced_accuracy"], 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(values(z, y)["macro_f1"], 0.8 / 2, rtol=1e-6)  # F1 of class 0 is 0.8, of class 1 it is 0


def test_classes_without_both_are_left_out_of_the_area(rng):
    z, y = draw(rng)
    y[y == 1] = 2
    exact, slack = roc_auc(z, y)
    assert abs(values(z, y)["roc_auc"] - exact) <= slack + 1e-6


def test_nothing_to_test():
    @jax.jit
    def scored():
        score = testing.score(jnp.zeros((4, 3)), jnp.zeros(4, jnp.int32), jnp.zeros(4), ALL)
        return score.finished(ALL, jnp.ones(3)).metrics

    for name, value in scored().items():
        assert np.isnan(value).all(), name


def test_logits_that_are_not_finite(rng):
    z, y = draw(rng, 40)
    z[::2] = np.nan
    z[1, 0] = np.inf
    good = np.isfinite(z).all(-1)
    hit = good & (z.argmax(-1) == y)
    by_class = [hit[y == c].mean() for c in range(K)]
    np.testing.assert_allclose(values(z, y)["class_accuracy"], by_class, rtol=1e-6)
    predicted = [(good & (z.argmax(-1) == c)).sum() for c in range(K)]
    each = [2 * hit[y == c].sum() / ((y == c).sum() + predicted[c]) for c in range(K)]
    np.testing.assert_allclose(values(z, y)["macro_f1"], np.mean(each), rtol=1e-6)
    assert np.isnan(values(z, y)["calibration_error"])
    assert 0 <= values(z, y)["roc_auc"] <= 1
    assert values(np.full((4, 2), np.nan), np.array([0, 1, 0, 1]), measures=AREA)["roc_auc"] == 0.5


def test_inside_and_outside(rng):
    z, y = draw(rng)
    held = jnp.asarray([0, 3, 0, 1, 0.0])
    inside = np.isin(y, [1, 3])
    hit = z.argmax(-1) == y
    found = values(z, y, held=held)
    np.testing.assert_allclose(found["inside_accuracy"], hit[inside].mean(), rtol=1e-6)
    np.testing.assert_allclose(found["outside_accuracy"], hit[~inside].mean(), rtol=1e-6)
    assert np.isnan(values(z, y, held=jnp.ones(K))["outside_accuracy"])
    assert np.isnan(values(z, y, held=jnp.zeros(K))["inside_accuracy"])


def test_jain_index():
    a, tested = jnp.asarray([0.5, 0.25, 0.9, 1.0]), jnp.asarray([True, True, False, True])
    known = np.array([0.5, 0.25, 1.0])
    np.testing.assert_allclose(metrics.jain_index(a, tested), known.sum() ** 2 / (3 * (known**2).sum()), rtol=1e-6)
    np.testing.assert_allclose(metrics.jain_index(jnp.full(7, 0.3), jnp.ones(7, bool)), 1, rtol=1e-6)
    np.testing.assert_allclose(metrics.jain_index(jnp.eye(8)[2], jnp.ones(8, bool)), 1 / 8, rtol=1e-6)
    assert np.isnan(metrics.jain_index(jnp.zeros(3), jnp.ones(3, bool)))


def test_batches_of_any_size_give_the_same(rng):
    z, y = draw(rng)
    whole, single = values(z, y, M), values(z, y, 1)
    for name, value in values(z, y).items():
        np.testing.assert_allclose(value, whole[name], rtol=1e-5)
        np.testing.assert_allclose(value, single[name], rtol=1e-5)


def test_a_mean_over_examples(rng):
    z, y = draw(rng)
    metric = (Metric("margin", per_example=lambda z, y: jnp.sort(z)[:, -1] - jnp.sort(z)[:, -2]),)
    ordered = np.sort(z, -1)
    margin = (ordered[:, -1] - ordered[:, -2]).mean()
    np.testing.assert_allclose(values(z, y, measures=metric)["margin"], margin, rtol=1e-5)


def test_values_by_class_have_names_of_their_own():
    flat = flattened({"a": np.float32(1), "b": np.array([2.0, 3.0])}, 0)
    assert flat == {"a": 1, "b_0": 2, "b_1": 3}
    flat = flattened({"a": np.zeros(4), "b": np.arange(8.0).reshape(4, 2)}, 1)
    assert {name: v.shape for name, v in flat.items()} == {"a": (4,), "b_0": (4,), "b_1": (4,)}
    assert flat["b_1"].tolist() == [1, 3, 5, 7]
