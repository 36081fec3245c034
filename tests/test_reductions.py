"""Reductions against NumPy in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdjax import reductions


def uploads(size, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"kernel": rng.normal(size=(3, 2)).astype(np.float32), "bias": [np.float32(rng.normal(scale=1e3))]}
        for _ in range(size)
    ]


def reduce(trees, weights, groups=None):
    """finish(sum of partials), the partials added group by group, as chunks and devices do."""
    reduction = reductions.weighted_mean()
    partials = [reduction.partial(x, jnp.float32(w)) for x, w in zip(trees, weights, strict=True)]
    add = lambda parts: jax.tree.map(lambda *x: sum(x), *parts)  # noqa: E731
    cuts = [0, *(groups or []), len(partials)]
    return reduction.finish(add([add(partials[i:j]) for i, j in itertools.pairwise(cuts) if i < j]))


def expected(trees, weights):
    total = sum(map(float, weights))
    return jax.tree.map(
        lambda *x: sum(float(w) * np.asarray(v, np.float64) for w, v in zip(weights, x, strict=True)) / total, *trees
    )


def assert_close(actual, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, wanted)


@given(
    weights=st.lists(st.floats(0, 1e5, width=32), min_size=1, max_size=6).filter(lambda w: sum(w) > 1e-3),
    cut=st.integers(0, 6),
)
def test_weighted_mean_however_partials_are_grouped(weights, cut):
    trees = uploads(len(weights))
    assert_close(reduce(trees, weights, [min(cut, len(weights))]), expected(trees, weights))


def test_counts_weigh_not_clients():
    # Two clients of 1 and 3 examples: (1 * 8 + 3 * 4) / 4 = 5, not 6.
    assert reduce([jnp.float32(8), jnp.float32(4)], [1, 3]) == 5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_upload_of_no_weight_leaves_no_trace(bad):
    trees, weights = uploads(3), [2, 0, 5]
    trees[1] = jax.tree.map(lambda x: np.full_like(x, bad), trees[1])
    assert_close(reduce(trees, weights), expected([trees[0], trees[2]], [2, 5]))


def test_an_upload_with_weight_is_not_hidden():
    trees = uploads(2)
    trees[1]["kernel"][0, 0] = np.nan
    assert np.isnan(reduce(trees, [1, 1])["kernel"][0, 0])


@pytest.mark.parametrize("value", [1.0, np.nan])
def test_without_any_weight_the_summary_is_zero(value):
    trees = jax.tree.map(lambda x: np.full_like(x, value), uploads(2))
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, np.zeros_like(x)), reduce(trees, [0, 0]))


def test_the_summary_has_the_shape_and_dtype_of_an_upload():
    tree = uploads(1)[0]
    summary = reduce([tree], [3])
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), summary, tree)
