"""The Dirichlet partitions against slow versions written from their definitions, and in their limits."""

import re

import numpy as np
import pytest

from fdjax.data import count_labels, dirichlet, partition
from fdjax.errors import InputError

SIZES = np.array([310, 220, 400, 0, 170])
VARIANTS = "abcdefg"


def reference_per_class(rng, sizes, num_clients, alpha):
    """One attempt of variant A as FedMA and NIID-Bench describe it, with lists of examples."""
    total = sum(sizes)
    clients = [[] for _ in range(num_clients)]
    for c, n in enumerate(sizes):
        p = rng.dirichlet([alpha] * num_clients)
        p = [share if len(held) < total / num_clients else 0.0 for share, held in zip(p, clients, strict=True)]
        ends, so_far = [], 0.0
        for share in p:
            so_far += share / sum(p)
            ends.append(int(so_far * n))
        ends[-1] = n
        for k, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            clients[k] += [c] * (end - begin)
    return np.array([[held.count(c) for c in range(len(sizes))] for held in clients])


@pytest.mark.parametrize("alpha", [0.1, 1.0, 50.0])
@pytest.mark.parametrize("seed", range(5))
def test_variant_a_cuts_as_its_definition(alpha, seed):
    table = dirichlet.per_class(np.random.default_rng(seed), SIZES, 6, alpha=alpha, min_size=0)
    np.testing.assert_array_equal(table, reference_per_class(np.random.default_rng(seed), SIZES, 6, alpha))


def test_variant_a_repeats_until_every_client_has_its_minimum():
    attempts = []
    for seed in range(10):
        rng, failed = np.random.default_rng(seed), 0
        while (expected := reference_per_class(rng, [200, 200], 6, 0.2)).sum(axis=1).min() < 10:
            failed += 1
        attempts.append(failed)
        table = dirichlet.per_class(np.random.default_rng(seed), np.array([200, 200]), 6, alpha=0.2)
        np.testing.assert_array_equal(table, expected)
    assert max(attempts) > 0


def test_variant_a_closes_a_full_client():
    sizes = np.full(20, 100)
    for seed in range(20):
        table = dirichlet.per_class(np.random.default_rng(seed), sizes, 4, alpha=0.05, min_size=0)
        before = np.cumsum(table, axis=1) - table
        assert (table[before >= sizes.sum() / 4] == 0).all()


AUTHORS = [
    "a_fedma",
    "a_niid_bench",
    "a_moon",
    "b_feddf",
    "c_fedaux",
    "d_feddyn",
    "d_fedftg",
    "e_fedgen",
    "f_fedntd",
    "g_hsu",
]


@pytest.mark.parametrize("pair", AUTHORS)
def test_authors_of_a_variant_share_it(pair):
    labels = np.arange(1000) % 10
    first, second = (partition(f"dirichlet_{name}", labels, 7, 0, num_classes=10) for name in pair.split("_", 1))
    np.testing.assert_array_equal(first.order, second.order)


def test_variant_b_keeps_groups_apart_and_above_half_their_average():
    sizes = np.full(10, 300)
    table = dirichlet.per_group(np.random.default_rng(0), sizes, 25, alpha=0.5)
    assert table.shape == (25, 10)
    np.testing.assert_array_equal(table.sum(axis=0), sizes)
    for first, last in ((0, 10), (10, 20), (20, 25)):
        group = table[first:last].sum(axis=1)
        assert group.sum() == 3000 * (last - first) // 25
        assert group.min() >= int(0.5 * group.mean())


def test_variant_b_recut_is_equal_parts_of_the_concatenated_lists():
    sizes = np.full(10, 300)
    plain = dirichlet.per_group(np.random.default_rng(0), sizes, 25, alpha=0.5)
    recut = dirichlet.per_group(np.random.default_rng(0), sizes, 25, alpha=0.5, recut=True)
    line = [c for row in plain for c, n in enumerate(row) for _ in range(n)]
    expected = [np.bincount(part, minlength=10) for part in np.split(np.array(line), 25)]
    np.testing.assert_array_equal(recut, expected)


@pytest.mark.parametrize("alpha", [0.05, 1.0])
def test_variant_c_is_doubly_stochastic_up_to_rounding(alpha):
    table = dirichlet.sinkhorn(np.random.default_rng(0), np.full(10, 1000), 20, alpha=alpha)
    np.testing.assert_array_equal(table.sum(axis=0), 1000)
    assert np.abs(table.sum(axis=1) - 500).max() <= 10


def test_variant_c_survives_an_alpha_that_underflows():
    table = dirichlet.sinkhorn(np.random.default_rng(0), np.full(3, 50), 30, alpha=1e-4)
    np.testing.assert_array_equal(table.sum(axis=0), 50)


def reference_draws(rng, sizes, prior, turns):
    """Variants D and G sample by sample: draw a label again until it names a class that has examples left."""
    table, left = np.zeros(prior.shape, int), list(sizes)
    for k in turns:
        while True:
            label = int(np.argmax(rng.uniform() <= np.cumsum(prior[k])))
            if left[label] > 0:
                break
        left[label] -= 1
        table[k, label] += 1
    return table


def test_drawing_labels_has_the_distribution_of_drawing_again():
    sizes, turns = np.array([2, 3, 4]), np.array([0, 1, 2, 0, 1, 2, 0, 1, 2])
    prior = np.array([[0.7, 0.2, 0.1], [0.2, 0.4, 0.4], [0.5, 0.1, 0.4]])
    rng, repeats = np.random.default_rng(0), 4000
    fast = np.stack([dirichlet._draw_labels(rng, sizes, prior, turns) for _ in range(repeats)])
    slow = np.stack([reference_draws(rng, sizes, prior, turns) for _ in range(repeats)])
    assert (fast.sum(axis=1) == sizes).all()
    error = np.sqrt((fast.var(axis=0) + slow.var(axis=0)) / repeats)
    assert (np.abs(fast.mean(axis=0) - slow.mean(axis=0)) < 5 * error + 1e-9).all()


@pytest.mark.parametrize("draw", [dirichlet.prior_interleaved, dirichlet.prior_sequential])
@pytest.mark.parametrize("alpha", [1e-5, 0.3, 100.0])
def test_variants_d_and_g_are_equal_in_size(draw, alpha):
    table = draw(np.random.default_rng(0), SIZES, 7, alpha=alpha)
    assert (table.sum(axis=1) == SIZES.sum() // 7).all()
    assert (table.sum(axis=0) <= SIZES).all()


def test_random_turns_are_full_and_uniform():
    turns = np.stack([dirichlet._random_turns(np.random.default_rng(s), 5, 8) for s in range(500)])
    assert all((np.bincount(t, minlength=5) == 8).all() for t in turns)
    np.testing.assert_allclose((turns[:, 0][:, None] == np.arange(5)).mean(axis=0), 0.2, atol=0.08)


def test_variant_e_subsamples_and_caps():
    sizes = np.array([600, 500, 100])
    table = dirichlet.subsampled(np.random.default_rng(0), sizes, 4, alpha=1.0, sampling_ratio=0.5)
    np.testing.assert_array_equal(table.sum(axis=0), [150, 150, 50])  # m = 0.5 * 1200 / 4 = 150
    assert table.sum(axis=1).min() >= 10
    everything = dirichlet.subsampled(np.random.default_rng(0), sizes, 4, alpha=1.0, sampling_ratio=1.0)
    np.testing.assert_array_equal(everything.sum(axis=0), sizes)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_large_alpha_tends_to_iid(variant):
    labels = np.arange(20000) % 10
    table = count_labels(partition(f"dirichlet_{variant}", labels, 10, 0, num_classes=10, alpha=1e6), labels, 10)
    if variant in "abef":  # the cap closes clients at the last class, so judge the classes before it
        table = table[:, np.argsort(table.std(axis=0))[:7]]
    np.testing.assert_allclose(table / table.sum(axis=1, keepdims=True), 1 / table.shape[1], atol=0.06)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_small_alpha_concentrates(variant):
    labels = np.arange(20000) % 10

    def concentration(alpha):
        options = {"min_size": 0} if variant in "aef" else {}
        holdings = partition(f"dirichlet_{variant}", labels, 10, 0, num_classes=10, alpha=alpha, **options)
        table = count_labels(holdings, labels, 10)
        return table.max(axis=1).sum() / table.sum()

    small, middle, large = concentration(0.05), concentration(1.0), concentration(100.0)
    assert small > middle > large
    assert small > 0.5


@pytest.mark.parametrize("variant", ["dirichlet_a", "dirichlet_b", "quantity"])
def test_a_hopeless_alpha_ends_in_an_error_that_names_one_that_works(variant, monkeypatch):
    monkeypatch.setattr(dirichlet, "ATTEMPTS", 200)
    labels = np.arange(2000) % 3
    name = "beta" if variant == "quantity" else "alpha"
    with pytest.raises(InputError, match=f"{name}=0.001 with 10 clients: ") as error:
        partition(variant, labels, 10, 0, num_classes=3, **{name: 0.001})
    works = re.search(rf"give {name}=([0-9.]+), which works", str(error.value))
    assert works, error.value
    partition(variant, labels, 10, 1, num_classes=3, **{name: float(works[1])})


def test_the_search_for_a_partition_ends_after_seconds_of_work(monkeypatch):
    """5,000 clients took 31 s to be given up, whatever a draw costs."""
    draws = []
    monkeypatch.setattr(dirichlet, "SECONDS", 0.0)
    monkeypatch.setattr(dirichlet, "capped", lambda *args: draws.append(args) or np.zeros((5000, 3), int))
    with pytest.raises(InputError, match="in 1 draws some client always had fewer than 10 of 60000"):
        partition("dirichlet_a", np.arange(60000) % 3, 5000, 0, num_classes=3, alpha=0.1)
    assert len(draws) == 1


def test_an_empty_class_is_no_obstacle():
    labels = np.arange(1000) % 4
    for variant in VARIANTS:
        table = count_labels(partition(f"dirichlet_{variant}", labels, 5, 0, num_classes=10), labels, 10)
        assert table[:, 4:].sum() == 0
