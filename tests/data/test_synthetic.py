"""synthetic(alpha, beta) against its definition."""

import numpy as np
import pytest

from fdjax.data import load
from fdjax.errors import InputError


def test_it_is_the_generator_of_its_definition():
    source = load("synthetic", alpha=0.5, beta=2.0, num_clients=4, seed=7)
    rng = np.random.default_rng(7)
    n = np.floor(rng.lognormal(4, 2, 4)).astype(int) + 50
    u, B = 0.5 * rng.standard_normal(4), 2.0 * rng.standard_normal(4)
    rng.standard_normal(60 * 10 + 10)  # the W and b of the IID variant
    for k in range(4):
        v = B[k] + rng.standard_normal(60)
        W, b = u[k] + rng.standard_normal((60, 10)), u[k] + rng.standard_normal(10)
        x = np.array([v + rng.standard_normal(60) * np.sqrt([j**-1.2 for j in range(1, 61)]) for _ in range(n[k])])
        y = [int(np.argmax([sum(row * W[:, c]) + b[c] for c in range(10)])) for row in x[:20]]
        mine = np.concatenate([source.train_x[source.train_owner == k], source.test_x[source.test_owner == k]])
        np.testing.assert_allclose(mine, x, rtol=1e-5, atol=1e-5)
        assert source.train_y[source.train_owner == k][:20].tolist() == y
        assert (source.train_owner == k).sum() == int(0.9 * n[k])


def test_shapes_and_name():
    source = load("synthetic", num_clients=5, samples_per_client=20)
    assert source.name == "synthetic(1,1)"
    assert (source.train_x.shape, source.test_x.shape) == ((90, 60), (10, 60))
    assert (source.train_x.dtype, source.train_y.dtype) == (np.float32, np.int32)
    assert source.num_classes == 10
    assert np.bincount(source.train_owner).tolist() == [18] * 5
    assert load("synthetic", alpha=0.5, beta=0, num_clients=2).name == "synthetic(0.5,0)"


def test_variances_fall_as_j_to_the_minus_1_2():
    source = load("synthetic", num_clients=20, samples_per_client=2000)
    x = source.train_x.reshape(20, 1800, 60).astype(np.float64)
    variance = np.mean(x.var(axis=1, ddof=1), axis=0)
    np.testing.assert_allclose(variance, np.arange(1, 61) ** -1.2, rtol=0.05)


def test_beta_is_a_standard_deviation():
    source = load("synthetic", beta=3.0, num_clients=2000, samples_per_client=2)
    centre = source.train_x.mean(axis=1)
    assert centre.std() == pytest.approx(np.sqrt(9 + 1 / 60), rel=0.06)


def test_alpha_moves_all_logits_alike_and_so_changes_nothing():
    one, two = (load("synthetic", alpha=alpha, num_clients=5, seed=3) for alpha in (0.0, 5.0))
    np.testing.assert_array_equal(one.train_x, two.train_x)
    assert (one.train_y == two.train_y).mean() > 0.999


def test_iid_has_one_model_and_no_offset():
    source = load("synthetic", iid=True, num_clients=50, samples_per_client=400, seed=1)
    assert source.name == "synthetic(iid)"
    x, y = source.train_x.astype(np.float64), source.train_y
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=0.04)
    # One linear model labels all devices, so a linear fit to half the devices serves the other half as well as itself.
    first = source.train_owner < 25
    X = np.c_[x, np.ones(len(x))]
    fit = np.linalg.lstsq(X[first], np.eye(10)[y[first]], rcond=None)[0]
    accuracy = [(np.argmax(X[half] @ fit, axis=1) == y[half]).mean() for half in (first, ~first)]
    assert accuracy[1] == pytest.approx(accuracy[0], abs=0.03)
    assert accuracy[1] > 0.6


def test_zero_zero_is_not_iid():
    source = load("synthetic", alpha=0.0, beta=0.0, num_clients=30, samples_per_client=200)
    centre = source.train_x.reshape(30, 180, 60).mean(axis=1)
    assert centre.std() == pytest.approx(1, abs=0.1)


def test_sizes_are_those_of_the_lognormal():
    source = load("synthetic", num_clients=200, seed=2)
    sizes = np.bincount(source.train_owner) + np.bincount(source.test_owner)
    assert sizes.min() >= 50
    assert np.median(sizes - 50) == pytest.approx(np.exp(4), rel=0.4)


def test_seed_decides():
    one, same, other = (load("synthetic", num_clients=3, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.train_x, same.train_x)
    assert one.train_x.shape != other.train_x.shape or (one.train_x != other.train_x).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1}, "alpha=-1: expected a finite number of at least 0"),
        ({"beta": float("inf")}, "beta=inf"),
        ({"num_clients": 0}, "num_clients=0"),
        ({"samples_per_client": 1}, "samples_per_client=1: expected a whole number of at least 2"),
        ({"num_client": 3}, "did you mean 'num_clients'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        load("synthetic", **options)
