"""Entropy reduction aggregation and its variants, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fdjax.exchange import reductions

probabilities = hnp.arrays(np.float64, (3, 6), elements=st.floats(0.01, 1)).map(lambda p: p / p.sum(-1, keepdims=True))


def entropy(p):
    return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)


@pytest.mark.parametrize(
    ("mean", "expected", "before", "after"),
    [
        ([0.3, 0.2, *[0.0625] * 8], [0.4735, 0.1742, *[0.0440] * 8], 2.069, 1.759),
        ([0.5, 0.5, *[0.0] * 8], [0.4869, 0.4869, *[0.0033] * 8], 0.693, 0.851),  # the entropy rises
        ([1.0, *[0.0] * 9], [0.99959, *[4.54e-5] * 9], 0.0, 0.0045),
    ],
)
def test_era_golden_values(mean, expected, before, after):
    sharp = np.asarray(reductions.era(np.float32(mean), 0.1), np.float64)
    np.testing.assert_allclose(sharp, expected, atol=5.1e-5)
    np.testing.assert_allclose((entropy(np.array(mean)), entropy(sharp)), (before, after), atol=6e-4)


@given(p=probabilities, temperature=st.floats(0.02, 10))
def test_era(p, temperature):
    sharp = np.asarray(reductions.era(p.astype(np.float32), np.float32(temperature)), np.float64)
    weights = np.exp(p / temperature)
    np.testing.assert_allclose(sharp, weights / weights.sum(-1, keepdims=True), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(sharp.sum(-1), 1, rtol=1e-5)
    assert (sharp.max(-1) <= sharp.min(-1) * np.exp(1 / temperature) * 1.0001).all()  # the largest ratio


@given(p=probabilities, beta=st.floats(0, 30))
def test_enhanced_era(p, beta):
    power = p**beta
    expected = power / power.sum(-1, keepdims=True)
    actual = reductions.enhanced_era(p.astype(np.float32), np.float32(beta))
    np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=1e-7)
    if beta >= 1:
        assert (entropy(np.asarray(actual, np.float64)) <= entropy(p) + 1e-5).all()


def test_enhanced_era_at_its_ends():
    p = jnp.array([0.6, 0.4, 0.0])
    np.testing.assert_allclose(reductions.enhanced_era(p, 1.0), p, rtol=1e-6)
    np.testing.assert_allclose(reductions.enhanced_era(p, 2.0), jnp.array([9, 4, 0]) / 13, rtol=1e-6)
    np.testing.assert_allclose(reductions.enhanced_era(p, 0.0), jnp.full(3, 1 / 3), rtol=1e-6)
    np.testing.assert_allclose(reductions.enhanced_era(p, 1e4), jnp.array([1.0, 0, 0]))  # 0.6^1e4 underflows
    np.testing.assert_array_equal(reductions.enhanced_era(jnp.zeros(3), 2.0), np.zeros(3))


def test_temperatures_are_an_axis():
    p = jnp.array([0.7, 0.2, 0.1])
    temperatures = jnp.array([0.1, 0.5, 2.0])
    many = jax.jit(jax.vmap(reductions.era, (None, 0)))(p, temperatures)
    np.testing.assert_allclose(many, [reductions.era(p, t) for t in temperatures], rtol=1e-6)
