"""Robust reductions against their equations in NumPy, float64, client by client."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fdjax.contract import Stack
from fdjax.errors import InputError
from fdjax.exchange import robust


def numpy_median(x):
    return np.median(x, axis=0)


def numpy_trimmed_mean(x, fraction):
    b = math.floor(fraction * len(x) + 1e-9)
    ordered = np.sort(x, axis=0)
    return ordered[b : len(x) - b].mean(0)


def numpy_geometric_median(x, iterations=20_000):
    """Subgradient-free: Weiszfeld with distances bounded from below, from the mean, until it stands still."""
    y = x.mean(0)
    for _ in range(iterations):
        d = np.maximum(np.sqrt(((x - y) ** 2).sum(1)), 1e-9)
        y = (x / d[:, None]).sum(0) / (1 / d).sum()
    return y


def numpy_filtered_mean(x, fraction, threshold):
    """With the D x D covariance and its eigenvector, as the paper has it."""
    allowed = math.floor(fraction * len(x) + 1e-9)
    for _ in range(allowed):
        around = x - x.mean(0)
        values, vectors = np.linalg.eigh(around.T @ around / len(x))
        if values[-1] <= threshold:
            break
        x = np.delete(x, np.argmax((around @ vectors[:, -1]) ** 2), axis=0)
    return x.mean(0)


REDUCTIONS = {
    "median": (robust.coordinate_median(), numpy_median),
    "trimmed": (robust.trimmed_mean(0.3), functools.partial(numpy_trimmed_mean, fraction=0.3)),
    "geometric": (robust.geometric_median(200), numpy_geometric_median),
    "filter": (robust.filtered_mean(0.3), functools.partial(numpy_filtered_mean, fraction=0.3, threshold=0)),
    "filter_to_threshold": (
        robust.filtered_mean(0.45, threshold=1.5),
        functools.partial(numpy_filtered_mean, fraction=0.45, threshold=1.5),
    ),
}
ALL = pytest.mark.parametrize("name", REDUCTIONS)
BY_ROW = {
    "geometric": (robust.geometric_median(200, rows=True), numpy_geometric_median),
    "filter": (robust.filtered_mean(0.3, rows=True), REDUCTIONS["filter"][1]),
}


@functools.cache
def compiled(reduction):
    def run(uploads, weights):
        rows = [jax.tree.map(lambda x, i=i: x[i], uploads) for i in range(len(weights))]
        partials = [reduction.partial(None, row, weight) for row, weight in zip(rows, weights, strict=True)]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *partials)
        return reduction.finish(None, Stack(stacked, jnp.arange(len(weights)), weights))

    return jax.jit(run)


def reduce(reduction, uploads, weights=None):
    assert reduction.combine == "stack"
    size = len(jax.tree.leaves(uploads)[0])
    weights = np.ones(size) if weights is None else weights
    return jax.device_get(compiled(reduction)(uploads, np.asarray(weights, np.float32)))


def draw(size=10, rows=3, columns=4, seed=0, offset=0.0):
    return (np.random.default_rng(seed).normal(size=(size, rows, columns)) + offset).astype(np.float32)


def flat(x):
    return x.reshape(len(x), -1).astype(np.float64)


def close(actual, expected, **more):
    np.testing.assert_allclose(actual, expected, **({"rtol": 1e-4, "atol": 1e-4} | more))


@ALL
@pytest.mark.parametrize("size", [1, 2, 3, 6, 10])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_reduction_is_its_equation(name, size, offset):
    reduction, equation = REDUCTIONS[name]
    x = draw(size, seed=size, offset=offset)
    if size == 10:
        x[[2, 7]] += np.float32(8)  # outliers
    close(flat(reduce(reduction, x)[None])[0], equation(flat(x)), atol=1e-4 * max(offset, 1))


@pytest.mark.parametrize("name", BY_ROW)
def test_rows_by_themselves(name):
    reduction, equation = BY_ROW[name]
    x = draw()
    x[3, 0] += 20  # an outlier in one row only
    x[6, 1] -= 20
    expected = [equation(x[:, m].astype(np.float64)) for m in range(x.shape[1])]
    close(reduce(reduction, x), expected)
    tree = reduce(reduction, {"a": x, "b": x[:, 0]})
    close(tree["a"], expected)
    close(tree["b"], expected[0])


@ALL
def test_a_tree_is_one_vector(name):
    reduction, equation = REDUCTIONS[name]
    x = draw()
    x[4] += 3
    tree = {"kernel": x[:, :2], "bias": [x[:, 2, :3], x[:, 2, 3]]}
    summary = reduce(reduction, tree)
    assert summary["bias"][1].shape == ()
    joined = np.concatenate([np.ravel(summary["kernel"]), summary["bias"][0], summary["bias"][1][None]])
    close(joined, equation(flat(x)))


@ALL
@pytest.mark.parametrize("bad", [5.0, 1e30, np.nan, np.inf, -np.inf])
def test_the_absent_leave_no_trace(name, bad):
    reduction, equation = REDUCTIONS[name]
    x = draw()
    x[5] += 6
    weights = np.array([1, 0, 2, 9, 1, 4, 1, 0, 1, 3])
    poisoned = np.where((weights == 0)[:, None, None], np.float32(bad), x)
    close(flat(reduce(reduction, poisoned, weights)[None])[0], equation(flat(x[weights > 0])))


@ALL
@pytest.mark.parametrize("bad", [1.0, np.nan])
def test_without_any_client_the_summary_is_zero(name, bad):
    np.testing.assert_array_equal(reduce(REDUCTIONS[name][0], np.full((4, 3, 2), bad, np.float32), np.zeros(4)), 0)


@ALL
@pytest.mark.parametrize("bad", [30.0, -1e4, 1e15, 1e19, 1e25, 1e38, np.inf, np.nan])
@pytest.mark.parametrize("corrupt", [1, 3])
def test_few_wrong_uploads_cannot_carry_it_away(name, bad, corrupt):
    reduction, _ = REDUCTIONS[name]
    x = draw()
    right = x[corrupt:].mean(0)
    x[:corrupt] = np.float32(bad)
    assert np.abs(reduce(reduction, x) - right).max() < 1.5
    if bad == 1e15:
        assert np.abs(x.mean(0)).max() > 1e13  # as it does the mean


@ALL
@given(order=st.permutations(range(10)))
def test_the_order_of_clients_does_not_matter(name, order):
    x, weights = draw(), np.array([1, 0, 2, 9, 1, 4, 1, 0, 1, 3])
    x[9] += 7
    reduction, _ = REDUCTIONS[name]
    close(reduce(reduction, x[order], weights[order]), reduce(reduction, x, weights), rtol=1e-3)


@ALL
@pytest.mark.parametrize("value", [0.0, 3.0, 1e-30])
def test_equal_uploads_are_their_own_summary(name, value):
    x = np.full((6, 2, 3), value, np.float32)
    np.testing.assert_allclose(reduce(REDUCTIONS[name][0], x), x[0], rtol=1e-6)


values = hnp.arrays(np.float32, (7, 1, 2), elements=st.floats(-100, 100, width=32))


@given(x=values)
def test_median_and_trimmed_mean_stay_within_the_data(x):
    for name in ("median", "trimmed"):
        reduction, equation = REDUCTIONS[name]
        y = reduce(reduction, x)
        assert (y <= x.max(0) + 1e-4).all()
        assert (y >= x.min(0) - 1e-4).all()
        close(y[0], equation(flat(x)), atol=1e-3)


@given(x=values)
def test_geometric_median_minimises_the_sum_of_distances(x):
    def cost(y):
        return np.sqrt(((flat(x) - y) ** 2).sum(1)).sum()

    ours = cost(reduce(REDUCTIONS["geometric"][0], x).ravel().astype(np.float64))
    best = min(cost(numpy_geometric_median(flat(x), 2000)), *(cost(upload) for upload in flat(x)))
    assert ours <= best * 1.001 + 1e-3


def test_geometric_median_leaves_an_upload_that_is_no_median():
    # The coordinate median of this triangle is its corner at 0, where plain Weiszfeld would stay.
    x = np.array([[[0, 0]], [[1, 0]], [[0, 1]]], np.float32)
    close(reduce(REDUCTIONS["geometric"][0], x)[0], np.full(2, (3 - np.sqrt(3)) / 6))  # the Fermat point
    # An angle of 120 degrees or more is the median itself.
    x = np.array([[[0, 0]], [[1, 0]], [[-1, 0.1]]], np.float32)
    close(reduce(REDUCTIONS["geometric"][0], x)[0], [0, 0], atol=2e-3)


def test_filter_by_hand():
    # Means 0.25 of (0, 0, 0, 0, 1.5, 0), variance 5 * 0.25^2 + 1.25^2 over 6 = 0.3125; without the fifth, 0.
    x = np.zeros((6, 1, 1), np.float32)
    x[4] = 1.5
    assert reduce(robust.filtered_mean(0.2, threshold=0.31), x) == 0
    assert reduce(robust.filtered_mean(0.2, threshold=0.32), x) == 0.25
    assert reduce(robust.filtered_mean(0.1), x) == 0.25  # floor(0.6) may be dropped


def test_trimming_counts_those_that_are_there():
    # 3 of 10 at 0.3, although 0.3 * 10 < 3 in some roundings; of the six present only 1.
    x = np.arange(10, dtype=np.float32)[:, None] ** 2
    assert reduce(robust.trimmed_mean(0.3), x) == np.mean([9, 16, 25, 36])
    assert reduce(robust.trimmed_mean(0.3), x, [1] * 6 + [0] * 4) == np.mean([1, 4, 9, 16])


@pytest.mark.parametrize("make", [robust.trimmed_mean, robust.filtered_mean])
@pytest.mark.parametrize("fraction", [-0.1, 0.5, 1.0, float("nan")])
def test_fractions_below_half(make, fraction):
    with pytest.raises(InputError, match=r"in \[0, 0\.5\)"):
        make(fraction)
