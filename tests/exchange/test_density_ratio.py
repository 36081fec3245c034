"""Kernel density ratios against NumPy in float64, written from Kanamori, Suzuki, Sugiyama (2012)."""

import jax
import numpy as np
import pytest

from fdjax.exchange import density_ratio


def kernel(a, b, width):
    return np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * width**2))


def kulsif(known, auxiliary, points, width, penalty):
    a, m = len(auxiliary), len(known)
    system = kernel(auxiliary, auxiliary, width) / a + penalty * np.eye(a)
    alpha = np.linalg.solve(system, -kernel(auxiliary, known, width).sum(1) / (a * m * penalty))
    return kernel(points, auxiliary, width) @ alpha + kernel(points, known, width).sum(1) / (m * penalty)


@pytest.mark.parametrize("width", [0.3, 1.5, 8.0])
@pytest.mark.parametrize("count", [1, 9])
def test_ratios(rng, width, count):
    known, auxiliary, points = (rng.normal(size=(n, 3)) for n in (9, 40, 15))
    penalty = 40**-0.5
    found = jax.jit(density_ratio.ratios, static_argnums=5)(
        np.float32(known), count, np.float32(auxiliary), np.float32(points), np.float32(width), penalty
    )
    np.testing.assert_allclose(found, kulsif(known[:count], auxiliary, points, width, penalty), rtol=2e-4, atol=2e-4)


def test_far_from_the_auxiliary_examples_it_is_a_kernel_density(rng):
    known, points = (rng.normal(size=(n, 3)).astype(np.float32) for n in (9, 15))
    found = density_ratio.ratios(known, 9, np.full((5, 3), 1e3, np.float32), points, 1.0, 0.5)
    np.testing.assert_allclose(found, kernel(points, known, 1.0).mean(1) / 0.5, rtol=1e-4)


def test_where_known_and_auxiliary_are_alike_it_is_about_one(rng):
    known, auxiliary = (rng.normal(size=(400, 1)).astype(np.float32) for _ in range(2))
    points = np.linspace(-1, 1, 9, dtype=np.float32)[:, None]
    found = density_ratio.ratios(known, 400, auxiliary, points, 0.5, 0.02)
    np.testing.assert_allclose(found, 1, atol=0.25)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.9, 1.0])
def test_quantile(rng, count, share):
    values = rng.normal(size=7).astype(np.float32)
    expected = np.quantile(values[:count], share) if count else np.inf
    np.testing.assert_allclose(density_ratio.quantile(values, np.int32(count), np.float32(share)), expected, rtol=1e-5)


def test_spread(rng):
    x = rng.normal(size=(9, 4)).astype(np.float32)
    mine = x[:5].astype(float)
    expected = np.sqrt(((mine[:, None] - mine[None]) ** 2).sum(-1).mean())
    np.testing.assert_allclose(density_ratio.spread(x, 5), expected, rtol=1e-5)
    assert density_ratio.spread(x, 1) == 0
