"""Every partition: disjoint, conserving, a function of the seed; then what each one promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdjax.data import PARTITIONS, count_labels, load, partition
from fdjax.errors import InputError

COMPLETE = {
    "iid",
    "shards",
    "shards_fedntd",
    "quantity",
    "natural",
    "dirichlet_a",
    "dirichlet_b",
    "dirichlet_c",
    "dirichlet_f",
}
MINIMUM = {"quantity", "dirichlet_a", "dirichlet_e", "dirichlet_f"}
DISTINCT = [name for name in PARTITIONS if not name.startswith("dirichlet_") or len(name) == len("dirichlet_a")]


@st.composite
def federations(draw):
    """Labels [N], owners [N], number of classes and of clients, seed."""
    num_classes = draw(st.integers(1, 8))
    size = draw(st.integers(1, 300))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    labels = rng.integers(0, num_classes, size).astype(np.int32)
    owner = rng.integers(0, draw(st.integers(1, 20)), size) * 7
    return labels, owner, num_classes, draw(st.integers(1, max(1, size // 2))), draw(st.integers(0, 2**31))


def assert_valid(holdings, size):
    assert all(array.dtype == np.int32 for array in holdings)
    assert (holdings.count >= 0).all()
    np.testing.assert_array_equal(holdings.start, np.cumsum(holdings.count) - holdings.count)
    assert holdings.count.sum() == len(holdings.order)
    assert len(np.unique(holdings.order)) == len(holdings.order), "an example is held twice"
    assert len(holdings.order) == 0 or 0 <= holdings.order.min() <= holdings.order.max() < size


@pytest.mark.parametrize("name", DISTINCT)
@settings(max_examples=25)
@given(federations())
def test_every_partition_is_disjoint_conserving_and_repeatable(name, federation):
    labels, owner, num_classes, num_clients, seed = federation
    options: dict = {"min_size": 0} if name in MINIMUM else {}
    if name in ("labels", "jiang"):
        options = {"labels_per_client": 1}
    if name == "scarce":
        options = {"samples_per_client": len(labels) // num_clients, "scarce_labels": 1, "scarce_size": 1}
    if name in ("writer", "natural"):
        num_clients = None
    if name == "shards" and len(labels) == 1:
        options = {"shards_per_client": 1}
    if name == "shards_fedntd":
        options = {"shards_per_client": num_classes}
        num_clients = int(min(num_clients, max(1, np.bincount(labels, minlength=num_classes).min())))
        if np.bincount(labels, minlength=num_classes).min() == 0:
            return
    given_labels = labels.copy()

    def split():
        return partition(name, labels, num_clients, seed, owner=owner, num_classes=num_classes, **options)

    holdings = split()
    assert_valid(holdings, len(labels))
    assert len(holdings.count) == (num_clients or len(np.unique(owner)))
    if name in COMPLETE:
        assert len(holdings.order) == len(labels)
    for first, second in zip(holdings, split(), strict=True):
        np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(labels, given_labels)


@pytest.mark.parametrize("name", [name for name in DISTINCT if name not in ("natural", "jiang")])
def test_another_seed_gives_another_partition(name):
    labels, owner = np.arange(2000) % 10, np.arange(2000) // 50
    options = {"samples_per_client": 100} if name == "scarce" else {}
    one, two = (partition(name, labels, 10, seed, owner=owner, num_classes=10, **options) for seed in (0, 1))
    assert len(one.order) != len(two.order) or (one.order != two.order).any()


def test_the_global_random_state_is_neither_read_nor_moved(rng):
    labels = rng.integers(0, 10, 500)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    partition("dirichlet_a", labels, 5, 0, num_classes=10)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


@given(federations())
def test_iid_sizes_differ_by_at_most_one(federation):
    labels, _, num_classes, num_clients, seed = federation
    count = partition("iid", labels, num_clients, seed, num_classes=num_classes).count
    assert count.max() - count.min() <= 1


@pytest.mark.parametrize("shards_per_client", [1, 2, 5])
def test_shards_are_runs_of_the_sorted_labels(shards_per_client):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 100))
    holdings = partition("shards", labels, 20, 3, num_classes=10, shards_per_client=shards_per_client)
    assert (holdings.count == 50).all()
    # A shard here is no longer than a class, so it has examples of at most two classes.
    kinds = (count_labels(holdings, labels, 10) > 0).sum(axis=1)
    assert kinds.max() <= 2 * shards_per_client
    pathological = partition("shards", labels, 100, 3, num_classes=10)
    assert (count_labels(pathological, labels, 10) > 0).sum(axis=1).max() <= 2


def test_fedntd_shards_have_one_label_each_and_equal_sizes():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 100))
    holdings = partition("shards_fedntd", labels, 20, 3, num_classes=10, shards_per_client=3 + 2)
    table = count_labels(holdings, labels, 10)
    assert (table.sum(axis=1) == 50).all()
    assert (table % 10 == 0).all()  # 20 clients of 5 shards make 10 shards of each label, of 10 examples
    assert (table > 0).sum(axis=1).max() <= 5


@settings(max_examples=50)
@given(federations(), st.integers(1, 8))
def test_labels_gives_each_client_its_budget_and_splits_each_label_equally(federation, budget):
    labels, _, num_classes, num_clients, seed = federation
    budget = min(budget, num_classes)
    holdings = partition("labels", labels, num_clients, seed, num_classes=num_classes, labels_per_client=budget)
    table = count_labels(holdings, labels, num_classes)
    assert (table > 0).sum(axis=1).max() <= budget
    first = table[np.arange(num_clients), np.arange(num_clients) % num_classes]
    sizes = np.bincount(labels, minlength=num_classes)
    for c in range(num_classes):
        if len(holders := np.flatnonzero(table[:, c])):
            assert np.ptp(table[holders, c]) <= 1
            assert table[:, c].sum() == sizes[c]
    plenty = sizes[np.arange(num_clients) % num_classes] >= num_clients
    assert (first[plenty] > 0).all()


def test_labels_with_all_labels_is_a_stratified_split():
    labels = np.repeat(np.arange(5), 40)
    holdings = partition("labels", labels, 8, 0, num_classes=5, labels_per_client=5)
    np.testing.assert_array_equal(count_labels(holdings, labels, 5), np.full((8, 5), 5))


def test_jiang_shares_out_ten_labels_among_five_clients():
    labels = load("mnist_sample").train_y
    table = count_labels(partition("jiang", labels, 5, 0, num_classes=10), labels, 10)
    expected = np.zeros((5, 10), int)
    sizes = np.bincount(labels)
    for k in range(5):
        expected[k, 2 * k : 2 * k + 2] = sizes[2 * k : 2 * k + 2]
    np.testing.assert_array_equal(table, expected)


def test_scarce_deals_at_random_and_cuts_three_labels_of_each_client():
    labels = np.arange(20_000) % 10
    holdings = partition("scarce", labels, 4, 0, num_classes=10, samples_per_client=2000)
    table = count_labels(holdings, labels, 10)
    assert ((table == 5).sum(axis=1) == 3).all()
    assert (table[table != 5] > 150).all()
    assert len({tuple(np.flatnonzero(row == 5)) for row in table}) > 1, "everybody lacks the same labels"
    np.testing.assert_allclose(holdings.count, 2000 * 7 / 10 + 15, rtol=0.05)
    uncut = partition("scarce", labels, 4, 0, num_classes=10, samples_per_client=2000, scarce_labels=0)
    assert uncut.count.tolist() == [2000] * 4
    none_left = partition("scarce", labels, 4, 0, num_classes=10, samples_per_client=100, scarce_size=0)
    assert ((count_labels(none_left, labels, 10) > 0).sum(axis=1) == 7).all()


def test_quantity_skews_sizes_but_not_labels():
    labels = np.arange(20000) % 10
    holdings = partition("quantity", labels, 5, 0, num_classes=10, beta=0.5)
    assert holdings.count.min() >= 10
    assert holdings.count.max() > 2 * holdings.count.min()
    largest = count_labels(holdings, labels, 10)[holdings.count.argmax()]
    np.testing.assert_allclose(largest / largest.sum(), 0.1, atol=0.02)


def test_writer_gives_each_client_one_writer():
    source = load("mnist_sample")
    whole = partition("writer", source.train_y, None, 0, owner=source.train_owner, num_classes=10)
    assert len(whole.order) == len(source.train_y)
    some = partition("writer", source.train_y, 30, 0, owner=source.train_owner, num_classes=10)
    writers = [
        np.unique(source.train_owner[some.order[s : s + n]]) for s, n in zip(some.start, some.count, strict=True)
    ]
    assert [len(w) for w in writers] == [1] * 30
    assert len(np.unique(np.concatenate(writers))) == 30
    for writer, n in zip(writers, some.count, strict=True):
        assert n == (source.train_owner == writer[0]).sum()


def test_writer_merges_whole_writers_evenly():
    source = load("mnist_sample")
    merged = partition("writer", source.train_y, 30, 0, owner=source.train_owner, num_classes=10, merge=True)
    assert len(merged.order) == len(source.train_y)
    writers = [
        np.unique(source.train_owner[merged.order[s : s + n]]) for s, n in zip(merged.start, merged.count, strict=True)
    ]
    assert len(np.concatenate(writers)) == len(np.unique(source.train_owner)), "a writer is in two clients"
    assert np.ptp([len(w) for w in writers]) <= 1


def test_natural_keeps_the_devices():
    source = load("synthetic", num_clients=12, samples_per_client=20)
    holdings = partition("natural", source.train_y, 12, 0, owner=source.train_owner, num_classes=10)
    np.testing.assert_array_equal(source.train_owner[holdings.order], np.repeat(np.arange(12), 18))


def test_natural_clients_stay_who_they_are_when_one_loses_all_its_examples():
    """The others moved up by one, and there was a client less."""
    owner = np.repeat([0, 2, 3], 5)
    holdings = partition("natural", np.arange(15) % 3, None, 0, owner=owner, owners=5, num_classes=3)
    assert np.asarray(holdings.count).tolist() == [5, 0, 5, 5, 0]
    assert owner[holdings.order].tolist() == owner.tolist()


def test_a_hundred_thousand_clients():
    labels = np.arange(300_000) % 10
    for name in ("iid", "labels", "shards", "dirichlet_c", "dirichlet_d"):
        assert len(partition(name, labels, 100_000, 0, num_classes=10).count) == 100_000


LABELS = np.arange(100) % 5
BAD = [
    ("idd", {}, "did you mean 'iid'"),
    ("iid", {"alpha": 1.0}, "takes no options, but 'alpha'"),
    ("dirichlet_a", {"aplha": 1.0}, "did you mean 'alpha'"),
    ("dirichlet_a", {"alpha": 0.0}, "alpha=0.0: expected a finite number above 0"),
    ("dirichlet_d", {"alpha": float("nan")}, "alpha=nan: expected a finite number above 0"),
    ("dirichlet_hsu", {"alpha": "x"}, "alpha='x': expected a finite number above 0"),
    ("dirichlet_g", {"alpha": 1e308}, "expected a number from 1e-9"),
    ("quantity", {"beta": 1e-300}, "expected a number from 1e-9"),
    ("dirichlet_e", {"sampling_ratio": 1.5}, "expected a number in (0, 1]"),
    ("dirichlet_a", {"min_size": 11}, "give num_clients <= 9 or a smaller min_size"),
    ("labels", {"labels_per_client": 6}, "there are 5 labels"),
    ("jiang", {"labels_per_client": 0}, "labels_per_client=0: expected a whole number of at least 1"),
    ("scarce", {"samples_per_client": 11}, "num_clients * samples_per_client = 110, but there are 100 examples"),
    ("scarce", {"samples_per_client": 10, "scarce_labels": 6}, "there are 5 labels; give at most as many"),
    ("scarce", {"samples_per_client": 10, "scarce_size": -1}, "scarce_size=-1: expected a whole number of at least 0"),
    ("shards", {"shards_per_client": 11}, "110 shards of 100 examples"),
    ("shards_fedntd", {"shards_per_client": 11}, "22 shards of each label, but label 0 has 20 examples"),
    ("shards_fedntd", {"num_clients": 3, "shards_per_client": 1}, "3 shards, expected a multiple of the 5 labels"),
    ("writer", {}, "needs the owner"),
    ("natural", {"owner": np.arange(7)}, "owner has shape (7,), expected (100,)"),
    ("writer", {"owner": np.arange(100) // 20}, "there are 5 writers"),
    ("natural", {"owner": np.arange(100) // 20}, "has 5 clients of its own; give 5 or none"),
    ("iid", {"num_clients": 101}, "num_clients=101 for 100 examples"),
    ("iid", {"num_clients": 0}, "num_clients=0: expected a whole number of at least 1"),
    ("iid", {"num_clients": None}, "'iid' needs num_clients"),
    ("iid", {"seed": -1}, "seed=-1: expected a whole number of at least 0"),
    ("iid", {"num_classes": 4}, "labels reach from 0 to 4, expected 0 to num_classes - 1 = 3"),
    ("iid", {"labels": np.zeros((2, 2), int)}, "labels have shape (2, 2)"),
    ("iid", {"labels": np.zeros(20)}, "dtype float64"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(BAD)])
def test_bad_input_is_one_line_that_says_what_to_do(name, options, message):
    arguments = {"labels": LABELS, "num_clients": 10, "seed": 0, "num_classes": 5} | options
    with pytest.raises(InputError) as error:
        partition(name, **arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
