"""Arrays of a user's own: what becomes of inputs, labels and owners, how test rows are drawn, and what is told."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

import fdjax
from fdjax import data
from fdjax.data.splitting import split_rows
from fdjax.data.statistics import feature_statistics
from fdjax.errors import DataWarning

N, M = 40, 12


def arrays(rng, y=None, y_test=None, **more):
    x, x_test = rng.normal(size=(N, 3)), rng.normal(size=(M, 3))
    y = np.arange(N) % 3 if y is None else y
    y_test = np.arange(M) % 3 if y_test is None else y_test
    return fdjax.from_arrays(x, y, x_test, y_test, **more)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([0, 1, 2], ()),
        ([1, 2, 3], ("1", "2", "3")),
        ([-1, 5, 9], ("-1", "5", "9")),
        (["b", "a", "c"], ("a", "b", "c")),
        ([b"b", b"a", b"c"], ("a", "b", "c")),
        (np.array(["b", "a", "c"], object), ("a", "b", "c")),
        ([True, False, True], ("False", "True")),
        ([0.0, 2.0, 1.0], ()),
        (np.array([3, 1, 2], np.uint8), ("1", "2", "3")),
    ],
)
def test_labels_become_0_to_k_in_sorted_order(rng, labels, classes):
    labels = np.asarray(labels)
    found = arrays(rng, labels[np.arange(N) % 3], labels[np.arange(M) % 3])
    values = np.unique(labels.astype("U") if labels.dtype.kind in "SO" else labels)
    assert (found.num_classes, found.classes) == (len(values), classes)
    expected = np.searchsorted(values, labels.astype(values.dtype))[np.arange(N) % 3]
    np.testing.assert_array_equal(found.train_y, expected)
    assert found.train_y.dtype == found.test_y.dtype == np.int32


def test_texts_name_their_label_space_and_numbers_do_not(rng):
    texts = np.array(["a", "b", "c"])
    assert arrays(rng, texts[np.arange(N) % 3], texts[np.arange(M) % 3]).label_space == "a, b, c"
    assert arrays(rng).labels == ""
    assert arrays(rng, labels="digits").label_space == "digits"


@pytest.mark.parametrize(
    ("x", "shape", "dtype"),
    [
        (np.zeros((4, 5, 6), np.uint8), (5, 6, 1), np.uint8),
        (np.zeros((4, 5, 6, 3), np.uint8), (5, 6, 3), np.uint8),
        (np.full((4, 5, 6, 3), 255, np.int64), (5, 6, 3), np.uint8),
        (np.full((4, 5, 6), 255, np.int64), (5, 6, 1), np.uint8),
        (np.full((4, 5, 6), 256, np.int64), (5, 6), np.float32),
        (np.ones((4, 5, 6), np.int64), (5, 6), np.float32),
        (np.ones((4, 5, 6), np.float64), (5, 6), np.float32),
        (np.ones((4, 5), np.uint8), (5,), np.float32),
        (np.ones((4, 5), bool), (5,), np.float32),
        (np.ones((4, 5), np.float16), (5,), np.float32),
        ([[1, 2], [3, 4], [5, 6], [7, 8]], (2,), np.float32),
        (jnp.ones((4, 2)), (2,), np.float32),
    ],
)
def test_inputs(x, shape, dtype):
    found = fdjax.from_arrays(x, [0, 1, 0, 1], test_fraction=0)
    assert (found.train_x.shape[1:], found.train_x.dtype) == (shape, dtype)
    np.testing.assert_array_equal(found.train_x.reshape(4, -1), np.asarray(x, float).reshape(4, -1))


def test_inputs_are_standardised_by_training_rows_alone(rng):
    x = rng.normal([1.0, -20.0], [2.0, 0.1], size=(N, 2))
    found = fdjax.from_arrays(x, np.arange(N) % 2, 100 + x[:5], np.arange(5) % 2)
    x = x.astype(np.float32).astype(float)
    np.testing.assert_allclose(found.mean, x.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.std, x.std(axis=0), rtol=1e-5)


def test_statistics_of_constant_and_of_far_features(rng):
    x = np.stack([np.full(9, 5.0), 1e6 + np.arange(9)], axis=1).astype(np.float32)
    found = feature_statistics(x)
    np.testing.assert_allclose(found["mean"], [5, 1e6 + 4], rtol=1e-12)
    np.testing.assert_allclose(found["std"], [1, np.arange(9).std()], rtol=1e-12)
    with pytest.warns(DataWarning, match=r"feature 1 is 1e\+06 ± 2.6, of which float32 keeps few digits"):
        fdjax.from_arrays(x, np.arange(9) % 2, test_fraction=0)


def test_images_of_one_colour_stay_finite():
    found = fdjax.from_arrays(np.full((8, 4, 4), 7, np.uint8), np.arange(8) % 2, test_fraction=0)
    assert found.std == (1.0,)


def test_owners_are_numbered_those_of_the_test_part_alone_last(rng):
    owner = np.array(["zoe", "bob"])[np.arange(N) % 2]
    with pytest.warns(DataWarning, match="2 test examples have a owner that no training example has .amy"):
        found = arrays(rng, owner=owner, owner_test=["amy"] * 2 + ["bob"] * (M - 2))
    assert found.owners == ("bob", "zoe", "amy")
    np.testing.assert_array_equal(found.train_owner, 1 - np.arange(N) % 2)
    np.testing.assert_array_equal(found.test_owner, [2, 2] + [0] * (M - 2))


def test_numbers_of_owners_without_gaps_are_their_own_names(rng):
    assert arrays(rng, owner=np.arange(N) % 4).owners == ()
    assert arrays(rng, owner=1000 + np.arange(N) % 2).owners == ("1000", "1001")


# Test rows.


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("by", ["label", "owner"])
def test_every_group_gives_its_share(rng, fraction, by):
    """Sizes differ from the share by less than one, add up, and each group keeps an example."""
    y, owner = rng.choice(4, 300, p=[0.5, 0.3, 0.15, 0.05]), rng.integers(0, 7, 300)
    test = split_rows("x", y, owner, fraction, by, 3)
    group = owner if by == "owner" else y
    sizes, taken = np.bincount(group), np.bincount(group[test], minlength=group.max() + 1)
    assert np.all(np.abs(taken - fraction * sizes) < 1)
    assert test.sum() == round(fraction * 300)
    assert np.all(sizes > taken)


def test_test_rows_are_random_and_of_the_seed(rng):
    y = np.arange(200) % 2
    first, again, other = (split_rows("x", y, None, 0.3, "label", seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert 20 < (first & other).sum() < 40 or not np.array_equal(first, other)
    assert 20 < first[:100].sum() < 40  # and not the first ones of a label


def test_a_label_with_one_example_stays_in_training():
    y = np.array([0] * 10 + [1])
    assert not split_rows("x", y, None, 0.5, "label", 0)[10]


def test_held_out_parts_are_the_whole(rng):
    x, owner = rng.normal(size=(N, 2)), np.arange(N) % 4
    found = fdjax.from_arrays(x, np.arange(N) % 2, owner=owner, test_fraction=0.25, test_by="owner", seed=1)
    assert (len(found.train_x), len(found.test_x)) == (30, 10)
    both = np.concatenate([found.train_x, found.test_x])
    order = [np.flatnonzero((x.astype(np.float32) == row).all(axis=1))[0] for row in both]
    assert sorted(order) == list(range(N))
    np.testing.assert_array_equal(np.concatenate([found.train_owner, found.test_owner]), owner[order])
    np.testing.assert_array_equal(np.concatenate([found.train_y, found.test_y]), (np.arange(N) % 2)[order])
    np.testing.assert_array_equal(found.train_index, order[:30])


# What is told.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_test": "x"}, "12 of 12 test examples have the inputs of a training example"),
        (
            {"y_test": "new"},
            r"4 test examples have a label that no training example has \(2\): no model can learn them",
        ),
        ({"ids": "twice"}, "1 examples have the id of another one in their part, 0 test examples that of a training"),
        ({"ids": "both"}, "0 examples have the id of another one in their part, 12 test examples that of a training"),
    ],
)
def test_what_is_odd_is_told(rng, change, message):
    x, y = rng.normal(size=(N, 3)), np.arange(N) % 2
    given = {"x_test": rng.normal(size=(M, 3)), "y_test": np.arange(M) % 2}
    if "x_test" in change:
        given["x_test"] = x[:M]
    if "y_test" in change:
        given["y_test"] = np.arange(M) % 3
    if change.get("ids") == "twice":
        given |= {"ids": [*range(N - 1), 0], "ids_test": np.arange(100, 100 + M)}
    if change.get("ids") == "both":
        given |= {"ids": np.arange(N), "ids_test": np.arange(M)}
    with pytest.warns(DataWarning, match=message):
        fdjax.from_arrays(x, y, **given)


def test_nothing_is_told_of_good_data(rng):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arrays(rng, ids=np.arange(N), ids_test=np.arange(N, N + M), owner=np.arange(N) % 4, owner_test=np.arange(M) % 4)


# From an npz.


def test_an_npz_is_the_same(rng, tmp_path):
    given = {"x": rng.normal(size=(N, 2)), "y": np.arange(N) % 2, "owner": np.arange(N) % 4}
    tests = {"x_test": rng.normal(size=(M, 2)), "y_test": np.arange(M) % 2, "owner_test": np.arange(M) % 4}
    np.savez(tmp_path / "one.npz", **given, **tests, labels="digits")
    np.savez(tmp_path / "train.npz", **given)
    np.savez(tmp_path / "test.npz", **{name.removesuffix("_test"): value for name, value in tests.items()})
    expected = fdjax.from_arrays(**given, **tests, name="one", labels="digits")
    one = data.load(tmp_path / "one.npz")
    two = data.load(tmp_path / "train.npz", test_data=tmp_path / "test.npz")
    for name, value in expected._asdict().items():
        np.testing.assert_array_equal(getattr(one, name), value)
        if name not in ("name", "labels"):
            np.testing.assert_array_equal(getattr(two, name), value)
    assert two.label_space.startswith("train@")  # numbers, which may mean anything


def test_what_is_loaded_cannot_be_changed(rng, tmp_path):
    np.savez(tmp_path / "a.npz", x=rng.normal(size=(N, 2)), y=np.arange(N) % 2)
    loaded = data.load(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="read-only"):
        loaded.train_x[0] = 0


def test_labels_of_two_widths_of_whole_numbers(rng):
    """Of uint64 and int64 NumPy makes float64, in which large numbers are alike."""
    train, test = np.uint64([0, 1, 2])[np.arange(N) % 3], np.arange(M) % 3
    found = arrays(rng, train, test)
    assert (found.classes, found.test_y.tolist()) == ((), test.tolist())
    large = 2**60 + np.arange(3)
    found = arrays(rng, large.astype(np.uint64)[np.arange(N) % 3], large[np.arange(M) % 3])
    assert found.classes == tuple(map(str, large))
    np.testing.assert_array_equal(found.test_y, np.arange(M) % 3)
    with pytest.warns(DataWarning, match="6 test examples have a label that no training example has .-1"):
        found = arrays(rng, np.uint64([2**63, 1])[np.arange(N) % 2], np.array([-1, 1])[np.arange(M) % 2])
    assert found.classes == ("-1", "1", str(2**63))
    np.testing.assert_array_equal(found.test_y, np.arange(M) % 2)
