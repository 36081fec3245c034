"""Matching of hidden units against float64 NumPy and SciPy, written from the equations, and what it has to find."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matching_cases import expected

from fdjax.exchange import matching
from fdjax.exchange.matching import Prior

WEIGHTS = 6
PLAIN = Prior()


def drawn(seed, nets, places, width, noise=0.3):
    """Noisy copies of some common units: nets [S, U, D], whose units beyond `width` are rubbish."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(2 * width, WEIGHTS)) * 1.5
    own = [common[rng.permutation(2 * width)[:width]] + noise * rng.normal(size=(width, WEIGHTS)) for _ in range(nets)]
    rubbish = rng.normal(size=(nets, places - width, WEIGHTS))
    return np.concatenate([own, rubbish], 1)


@functools.cache
def compiled():
    return jax.jit(matching.match)


def match(units, present, width, prior=PLAIN, sweeps=3, seed=0):
    given = jnp.asarray(units, jnp.float32), jnp.asarray(present), jnp.int32(width), jax.random.key(seed)
    return jax.device_get(compiled()(*given, Prior(*map(jnp.float32, prior)), jnp.int32(sweeps)))


def groups_of(places, width, present):
    """The sets of (net, unit) that are matched."""
    found = {}
    for net in np.flatnonzero(present):
        for unit in range(width):
            found.setdefault(int(places[net][unit]), set()).add((int(net), unit))
    return {frozenset(group) for group in found.values()}


CASES = {
    "plain": (4, 12, 5, Prior(), ()),
    "absent": (5, 12, 5, Prior(), (1, 3)),
    "the first is absent": (3, 9, 4, Prior(0.5, 2.0, 3.0), (0,)),
    "no room to grow": (4, 5, 5, Prior(1.0, 1.0, 50.0), ()),
    "little room": (4, 6, 5, Prior(0.2, 4.0, 50.0), ()),
    "many": (13, 20, 4, Prior(0.3, 3.0, 1.0), (2,)),
}


@pytest.mark.parametrize("sweeps", [0, 3])
@pytest.mark.parametrize("case", CASES)
def test_matches_as_the_equations_say(case, sweeps):
    nets, places, width, prior, absent = CASES[case]
    units, present = drawn(1, nets, places, width), ~np.isin(np.arange(nets), absent)
    units[~present] = 0
    found = match(units, present, width, prior, sweeps)
    key = jax.random.key(0)
    orders = [np.arange(nets)] + [
        np.asarray(jax.random.permutation(jax.random.fold_in(key, sweep), nets)) for sweep in range(1, sweeps + 1)
    ]
    those = [[int(j) for j in order if present[j]] for order in orders]
    theirs = expected({int(j): units[j, :width] for j in np.flatnonzero(present)}, places, those, *prior)
    assert groups_of(found.place, width, present) == theirs
    assert sorted(found.count[found.count > 0]) == sorted(map(len, theirs))
    for place in found.place:
        assert sorted(place) == list(range(places))

    args = jnp.float32(units), jax.tree.map(jnp.asarray, found), width
    mean, posterior = (np.asarray(matching.common_units(*args, given)) for given in (None, prior))
    for group in theirs:
        (net, unit), *_ = group
        at = found.place[net][unit]
        total = np.sum([units[member] for member in group], 0)
        np.testing.assert_allclose(mean[at], total / len(group), rtol=1e-5, atol=1e-6)
        known = total / prior.variance / (1 / prior.prior_variance + len(group) / prior.variance)
        np.testing.assert_allclose(posterior[at], known, rtol=1e-5, atol=1e-6)
    assert not mean[found.count == 0].any()


def test_permuted_copies_are_found():
    rng, places, width = np.random.default_rng(0), 24, 16
    units = np.zeros((5, places, WEIGHTS))
    order = [rng.permutation(width) for _ in range(5)]
    net = rng.normal(size=(width, WEIGHTS))
    for each, permutation in zip(units, order, strict=True):
        each[:width] = net[permutation]
    found = match(units, np.ones(5, bool), width, Prior(gamma=1.0))  # at 7 small ones are worth a place of their own
    assert (found.count > 0).sum() == width
    assert {*found.count} == {0.0, 5.0}
    common = np.asarray(matching.common_units(jnp.float32(units), jax.tree.map(jnp.asarray, found), width))
    np.testing.assert_allclose(common[:width], net[order[0]], rtol=1e-5, atol=1e-6)


def test_one_net_gives_itself():
    units, present = drawn(0, 3, 8, 5), np.array([False, True, False])
    found = match(units * present[:, None, None], present, 5)
    np.testing.assert_array_equal(found.place[1], np.arange(8))
    common = matching.common_units(jnp.float32(units * present[:, None, None]), jax.tree.map(jnp.asarray, found), 5)
    np.testing.assert_array_equal(common, np.where(np.arange(8)[:, None] < 5, np.float32(units[1]), 0))


def test_nobody_gives_nothing():
    found = match(np.zeros((3, 8, WEIGHTS)), np.zeros(3, bool), 5)
    assert not found.count.any()


def test_a_larger_mass_gives_more_units():
    units, masses = drawn(3, 6, 40, 6, noise=1.0), (0.01, 7.0, 1e4)
    sizes = [int((match(units, np.ones(6, bool), 6, Prior(gamma=gamma)).count > 0).sum()) for gamma in masses]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_new_values_and_widths_compile_nothing():
    units = drawn(0, 3, 8, 5)
    match(units, np.ones(3, bool), 5)
    before = compiled()._cache_size()
    match(units, np.array([True, False, True]), 4, Prior(2.0, 0.5, 3.0), sweeps=1, seed=1)
    assert compiled()._cache_size() == before


def test_clients_who_were_not_there_have_the_most_common_places():
    found = matching.Matching(jnp.int32([[0, 1, 2], [2, 0, 1]]), jnp.float32([1, 0, 2]))
    places = matching.places_of_all(found, jnp.int32([3, 1]), jnp.array([True, False]), 5)
    np.testing.assert_array_equal(places, [[2, 0, 1], [2, 0, 1], [2, 0, 1], [0, 1, 2], [2, 0, 1]])
