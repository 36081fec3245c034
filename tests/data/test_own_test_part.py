"""Each client's own test part."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdjax.data import count_labels, load, own_test_part, partition
from fdjax.data.own_test import largest_remainder
from fdjax.types import Holdings


def parts(holdings):
    return [holdings.order[s : s + n] for s, n in zip(holdings.start, holdings.count, strict=True)]


@given(st.lists(st.lists(st.integers(0, 50), min_size=4, max_size=4), min_size=1, max_size=6), st.integers(1, 30))
def test_largest_remainder_is_the_textbook_method(held, size):
    held = np.array(held) + np.array([1, 0, 0, 0])
    quota = largest_remainder(held * (size / held.sum(axis=1))[:, None])
    for row, q in zip(held.tolist(), quota.tolist(), strict=True):
        exact = [Fraction(n * size, sum(row)) for n in row]
        rest = size - sum(int(e) for e in exact)
        fractions = sorted((e - int(e) for e in exact), reverse=True)
        assert sum(q) == size
        for e, n in zip(exact, q, strict=True):
            assert n in (int(e), int(e) + 1)
            if n > int(e):
                assert float(e - int(e)) >= float(fractions[rest - 1]) - 1e-9


@given(st.integers(1, 40), st.integers(0, 100), st.sampled_from(["iid", "labels", "shards", "dirichlet_d"]))
def test_parts_have_the_clients_labels_and_repeat_nothing(num_clients, seed, name):
    rng = np.random.default_rng(seed)
    train, test = rng.integers(0, 6, 400), rng.integers(0, 6, 150)
    holdings = partition(name, train, num_clients, seed, num_classes=6)
    own = own_test_part(train, holdings, test, 6, seed)
    assert all(array.dtype == np.int32 for array in own)
    table, own_table = count_labels(holdings, train, 6), count_labels(own, test, 6)
    assert (own_table[table == 0] == 0).all(), "a label that the client does not hold"
    for k, part in enumerate(parts(own)):
        assert len(np.unique(part)) == len(part)
        assert len(part) >= min(1, table[k].sum())
        share = table[k] / max(table[k].sum(), 1) * round(table[k].sum() * 150 / table.sum())
        open_classes = own_table[k] < np.bincount(test, minlength=6)
        assert (np.abs(own_table[k] - share)[open_classes] <= 1.01).all()
    for first, second in zip(own, own_test_part(train, holdings, test, 6, seed), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("num_clients", [5, 100, 500])
def test_all_parts_together_cost_about_one_pass(num_clients):
    source = load("mnist_sample")
    holdings = partition("dirichlet_d", source.train_y, num_clients, 0, num_classes=10)
    own = own_test_part(source.train_y, holdings, source.test_y, 10, 0)
    assert own.count.sum() == pytest.approx(1000, rel=0.05)
    uses = np.bincount(own.order, minlength=1000)
    for c in range(10):
        assert np.ptp(uses[source.test_y == c]) <= 1, "examples of a class serve unequally often"


def test_one_client_is_tested_on_everything():
    source = load("mnist_sample")
    holdings = partition("iid", source.train_y, 1, 0, num_classes=10)
    own = own_test_part(source.train_y, holdings, source.test_y, 10, 0)
    assert own.count[0] >= 990


def test_an_empty_client_and_an_untestable_label():
    train, test = np.array([0, 0, 1, 2]), np.array([0, 1, 1])
    holdings = Holdings(
        np.arange(4, dtype=np.int32), np.array([0, 2, 2, 3], np.int32), np.array([2, 0, 1, 1], np.int32)
    )
    own = own_test_part(train, holdings, test, 3, 0)
    assert own.count.tolist() == [1, 0, 1, 0]  # client 1 holds nothing, client 3 a label that the test set lacks


def test_natural_clients_are_tested_on_their_own_data():
    source = load("synthetic", num_clients=9)
    holdings = partition("natural", source.train_y, None, 0, owner=source.train_owner, num_classes=10)
    owners = {"train_owner": source.train_owner, "test_owner": source.test_owner}
    own = own_test_part(source.train_y, holdings, source.test_y, 10, 0, **owners)
    np.testing.assert_array_equal(source.test_owner[own.order], np.repeat(np.arange(9), own.count))
    assert own.count.sum() == len(source.test_y)


def test_owners_without_test_examples_fall_back_to_their_labels():
    train, train_owner = np.array([0, 0, 1, 1]), np.array([4, 4, 9, 9])
    test, test_owner = np.array([0, 1, 1, 1]), np.array([4, 4, 7, 7])
    holdings = partition("writer", train, None, 0, owner=train_owner, num_classes=2)
    own = parts(own_test_part(train, holdings, test, 2, 0, train_owner=train_owner, test_owner=test_owner))
    assert own[0].tolist() == [0, 1]
    assert len(own[1]) == 2
    assert (test[own[1]] == 1).all()


def test_owners_spread_over_clients_do_not_count():
    source = load("synthetic", num_clients=9)
    holdings = partition("iid", source.train_y, 9, 0, num_classes=10)
    with_owners = own_test_part(
        source.train_y, holdings, source.test_y, 10, 0, train_owner=source.train_owner, test_owner=source.test_owner
    )
    np.testing.assert_array_equal(
        with_owners.order, own_test_part(source.train_y, holdings, source.test_y, 10, 0).order
    )
