"""Certainties: the optimum, its sensitivity and the noise, against NumPy, SciPy and dp-accounting."""

import dp_accounting as dp
import jax
import numpy as np
import pytest
from scipy import optimize

from fdjax.exchange import certainty

ROOM = 12  # rows of a client's own, of which some are there
FIT = {name: jax.jit(calibration.fit) for name, calibration in certainty.CALIBRATIONS.items()}


def objective(w, x, t, a, mean=True):
    """J of rows x [n, F] with labels t in {1, -1}, and its gradient; with `mean` False the losses are added up."""
    margin, share = t * (x @ w), 1 / len(x) if mean else 1.0
    value = share * np.logaddexp(0, -margin).sum() + a / 2 * w @ w
    return value, share * (-t / (1 + np.exp(margin))) @ x + a * w


def optimum(x, t, a, mean=True):
    found = optimize.minimize(
        objective, np.zeros(x.shape[1]), (x, t, a, mean), "BFGS", jac=True, options={"gtol": 1e-9}
    )
    return found.x


def drawn(seed, own=7, public=5, features=4, apart=1.0):
    """Features of a client and public ones."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(own, features)) + apart, rng.normal(size=(public, features))


def rows(h):
    """(h / |h|, 1) / sqrt(2)."""
    return np.concatenate([h / np.linalg.norm(h, axis=1, keepdims=True), np.ones((len(h), 1))], 1) / np.sqrt(2)


def both(own, public):
    return np.concatenate([rows(own), rows(public)]), np.concatenate([np.ones(len(own)), -np.ones(len(public))])


def fitted(own, public, a, calibration="derived", room=ROOM):
    """w* of the code under test, given room for more rows than there are, in which anything may stand."""
    padded = np.concatenate([rows(own), np.full((room - len(own), own.shape[1] + 1), 7.0)]).astype(np.float32)
    return np.float64(FIT[calibration](padded, np.int32(len(own)), np.float32(rows(public)), np.float32(a)))


def test_rows_have_a_norm_of_one_and_none_decides_anothers():
    h = np.float32(drawn(0)[0])
    found = np.asarray(certainty.rows(h))
    np.testing.assert_allclose(found, rows(np.float64(h)), rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(found[:2], certainty.rows(h[:2]))
    np.testing.assert_allclose(certainty.rows(np.zeros((1, 4), np.float32)), [[0, 0, 0, 0, 2**-0.5]], rtol=1e-6)


@pytest.mark.parametrize("a", [1e-4, 0.01, 1.0, 100.0])
def test_the_fit_is_the_optimum(a):
    own, public = drawn(1)
    w = fitted(own, public, a)
    x, t = both(own, public)
    np.testing.assert_allclose(objective(w, x, t, a)[1], 0, atol=5e-7)
    np.testing.assert_allclose(w, optimum(x, t, a), atol=5e-7 / a + 1e-6)


def test_the_released_fit_is_the_optimum_of_a_sum():
    own, public = drawn(2)
    x, t = both(own, public)
    np.testing.assert_allclose(fitted(own, public, 0.05, "released"), optimum(x, t, 0.05, mean=False), rtol=1e-3)


def test_without_examples_of_its_own_a_client_is_sure_of_nothing():
    own, public = drawn(3)
    w = fitted(own[:0], public, 0.01)
    assert np.asarray(certainty.scores(np.float32(w), np.float32(rows(own)))).max() < 0.5


def test_one_example_moves_the_fit_by_no_more_than_its_sensitivity():
    """Whatever the examples and their replacement, 2 / (n a); and some come to a third of it."""
    shares = []
    for seed in range(30):
        own, public = drawn(seed, own=1 + seed % 7, public=4, apart=3.0 * (seed % 3))
        a, other = [0.003, 0.03, 0.3, 3.0][seed % 4], own.copy()
        other[0] = -10 * own.mean(0) + np.random.default_rng(seed).normal(size=4)
        moved = np.linalg.norm(fitted(own, public, a) - fitted(other, public, a))
        shares.append(moved / (2 / ((len(own) + len(public)) * a)))
    assert max(shares) <= 1
    assert max(shares) > 0.3


def test_the_released_noise_is_for_another_sensitivity():
    """Of a sum of losses one example moves the optimum by more than 2 / (n a), and by less than 2 / a."""
    own, public = drawn(4, own=300, public=200, apart=0.5)
    other = own.copy()
    other[0] = -10 * own.mean(0)
    moved = np.linalg.norm(fitted(own, public, 0.1, "released", 300) - fitted(other, public, 0.1, "released", 300))
    assert 2 / (500 * 0.1) < moved < 2 / 0.1
    assert np.linalg.norm(fitted(own, public, 0.1, room=300) - fitted(other, public, 0.1, room=300)) < 2 / (500 * 0.1)


def test_scores():
    w, x = np.array([2.0, -1.0, 0.5]), np.array([[1.0, 2.0, 3.0], [-40.0, 0.0, 0.0]])
    expected = 1 / (1 + np.exp(-x @ w)) + 1e-8
    np.testing.assert_allclose(certainty.scores(np.float32(w), np.float32(x)), expected, rtol=1e-6)


@pytest.mark.parametrize("delta", [1e-10, 1e-5, 0.1])
def test_multipliers(delta):
    """The least one is that of dp-accounting, rounded up; at an epsilon below 1 the classic one is larger."""
    least = jax.jit(certainty.least_multiplier)
    for epsilon in (0.001, 0.1, 0.9, 10.0, 100.0):
        exact = dp.get_sigma_gaussian(epsilon, delta)
        assert exact < float(least(epsilon, delta)) < 1.003 * exact
        assert dp.get_epsilon_gaussian(float(least(epsilon, delta)), delta) < epsilon
        classic = np.sqrt(2 * np.log(1.25 / delta)) / epsilon
        np.testing.assert_allclose(certainty.classic_multiplier(epsilon, delta), classic, rtol=1e-6)
        assert classic > exact or epsilon > 1
    assert float(certainty.classic_multiplier(0.1, 1e-5)) == pytest.approx(48.448, abs=1e-3)  # the paper's budget


def test_noise():
    derived, released = (certainty.CALIBRATIONS[name] for name in ("derived", "released"))
    n, a, budget = np.float32(40), np.float32(0.02), (0.5, 1e-5)
    z = dp.get_sigma_gaussian(*budget)
    np.testing.assert_allclose(derived.deviation(n, a, *budget), z * 2 / (40 * 0.02), rtol=3e-3)
    assert derived.hides(40, *budget) == pytest.approx(z, rel=3e-3)
    classic = np.sqrt(2 * np.log(1.25 / 1e-5)) / 0.5
    np.testing.assert_allclose(released.deviation(n, a, *budget), classic * 2 / (40 * 0.02), rtol=1e-5)
    # That deviation over the sensitivity of a sum, 2 / a.
    assert released.hides(40, *budget) == pytest.approx(classic * 2 / (40 * 0.02) / (2 / 0.02), rel=1e-5)
