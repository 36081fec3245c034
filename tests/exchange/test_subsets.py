"""The proxy examples of a round."""

import engine_cases as cases
import jax
import numpy as np
import pytest

from fdjax.exchange import proxy


def drawn(labels, n, draws=400):
    """Ids [draws, n]."""
    task = cases.task()._replace(proxy_size=len(labels), proxy_per_round=n)
    keys = jax.random.split(jax.random.key(1), draws)
    return np.asarray(jax.jit(jax.vmap(lambda key: proxy.draw_ids(task, key, labels)))(keys))


@pytest.mark.parametrize(("counts", "n"), [((10, 25, 3, 1), 13), ((7, 7, 7), 4), ((1, 99), 10), ((40, 0, 2), 41)])
def test_stratified_subsets(counts, n, rng):
    """Of each label floor or ceil of its share, nothing twice, and every example as often as any other."""
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts)).astype(np.int32)
    found, draws = drawn(labels, n), 400
    size = len(labels)
    assert all(len({*ids.tolist()}) == n for ids in found)
    share = n * np.array(counts) / size
    of_label = np.array([np.bincount(labels[ids], minlength=len(counts)) for ids in found])
    assert ((np.floor(share) <= of_label) & (of_label <= np.ceil(share))).all()
    np.testing.assert_allclose(of_label.mean(0), share, atol=4 * 0.5 / np.sqrt(draws))
    often = np.bincount(found.ravel(), minlength=size) / draws
    np.testing.assert_allclose(often, n / size, atol=5 * 0.5 / np.sqrt(draws))
    assert len({tuple(np.sort(ids)) for ids in found}) > 30


def test_a_large_set_does_not_overflow():
    """n M is above 2^31."""
    size, n = 100_000, 60_000
    labels = np.repeat(np.arange(10, dtype=np.int32), size // 10)
    (ids,) = drawn(labels, n, draws=1)
    assert len(np.unique(ids)) == n
    assert ids.min() >= 0
    assert np.bincount(labels[ids]).tolist() == [n // 10] * 10


def test_all_of_them_need_no_ids():
    task = cases.task(per_round=cases.PROXIES)
    assert proxy.draw_ids(task, jax.random.key(0), np.zeros(cases.PROXIES, np.int32)) == ()
