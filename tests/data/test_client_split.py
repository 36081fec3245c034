"""Parts that are cut within each client, where a random cut would let an example or a token be in both."""

import numpy as np
import pytest

import fdjax
from fdjax.data import own_test_part, partition, split_by_client
from fdjax.data.client_split import merged
from fdjax.data.holdings import from_counts
from fdjax.data.texts import from_texts
from fdjax.errors import DataWarning, InputError
from fdjax.run import experiment
from fdjax.types import Source


def apart(size: int = 30) -> Source:
    """Of which every example is known by its input."""
    x = np.arange(size, dtype=np.float32)[:, None]
    y = np.arange(size, dtype=np.int32) % 3
    cut = size * 4 // 5
    return Source("apart", x[:cut], y[:cut], x[cut:], y[cut:], 3)


def sequences(rng: np.random.Generator, number: int = 50, length: int = 6, tokens: int = 40) -> Source:
    """A text each, of tokens of which some begin or end with padding."""
    x = rng.integers(1, tokens, (number, length)).astype(np.int32)
    x[::3, -3:] = 0
    y = rng.integers(0, 4, number).astype(np.int32)
    return Source("apart", x[5:], y[5:], x[:5], y[:5], 4, vocabulary=tuple(map(str, range(tokens))))


def test_both_parts_are_merged_and_a_copy_is_not():
    source = apart()
    np.testing.assert_array_equal(merged(source).train_x[:, 0], np.arange(30))
    copy = source._replace(test_x=source.train_x.copy(), test_y=source.train_y.copy())
    np.testing.assert_array_equal(merged(copy).train_x, source.train_x)
    other = copy._replace(test_y=(source.train_y + 1) % 3)  # the same inputs of other labels are other examples
    assert len(merged(other).train_y) == 48


def test_data_of_one_part_are_split_without_a_copy():
    x = np.arange(40.0)[:, None]
    given = fdjax.from_arrays(x, np.arange(40) % 2, test_fraction=0)
    built = experiment.build(
        fdjax.settings(dataset=given, model="mclr", split_by_client=0.75, num_clients=4, partition="iid")
    )
    both = np.concatenate([built.source.train_x, built.source.test_x])[:, 0]
    assert (len(built.source.train_y), len(built.source.test_y)) == (28, 12)
    np.testing.assert_array_equal(np.sort(both), np.arange(40))


@pytest.mark.parametrize(("stride", "overlaps"), [(1, True), (4, True), (6, True), (7, False), (9, False)])
def test_sequences_that_overlap_are_not_split_at_random(rng, stride, overlaps):
    text = "".join(chr(0x4E00 + int(i)) for i in rng.integers(0, 30, 700))
    source = from_texts({"a": text[:400], "b": text[400:]}, length=6, stride=stride)
    if overlaps:
        with pytest.raises(InputError, match=f"begins {stride} tokens after.*--stride=7 leaves no") as caught:
            merged(source)
        assert "\n" not in str(caught.value)
    else:
        assert len(merged(source).train_y) == len(source.train_y) + len(source.test_y)


def test_sequences_of_which_many_are_left_out_are_found_too(rng):
    text = "".join("abcdefghij"[i] for i in rng.integers(0, 10, 2000))
    with pytest.warns(DataWarning, match="an unknown token follows"):
        source = from_texts([text], length=6, vocabulary=list("abcdef"))
    with pytest.raises(InputError, match="begins 1 tokens after"):
        merged(source)


def test_sequences_of_texts_each_are_split(rng):
    source = sequences(rng)
    assert len(merged(source).train_y) == 50


def test_examples_held_twice_are_not_split():
    whole = merged(apart())
    with pytest.raises(InputError, match="2 of 6 examples are held twice, and would be in both parts"):
        split_by_client(whole, from_counts(np.array([0, 0, 1, 2, 3, 1]), np.array([4, 2])), 0.5, 0)


def test_own_partitions_are_split_by_client():
    """Its indices are those of both parts, the test part's after the others."""
    given = apart()
    clients = [[0, 1, 2, 29], [25, 26, 27, 28], [5], []]
    built = experiment.build(
        fdjax.settings(dataset=given, model="mclr", partition=clients, split_by_client=0.5, standardize=False)
    )
    source, holdings = built.source, built.holdings
    np.testing.assert_array_equal(holdings.count, [2, 2, 1, 0])
    for k, mine in enumerate(clients):
        train, test = source.train_x[source.train_owner == k], source.test_x[source.test_owner == k]
        assert sorted([*train[:, 0], *test[:, 0]]) == mine
    assert built.tests is not None
    twice = [[0, 1, 2], [2, 3, 4]]
    with pytest.warns(DataWarning, match="1 again by another one"), pytest.raises(InputError, match="held twice"):
        experiment.build(fdjax.settings(dataset=given, model="mclr", partition=twice, split_by_client=0.5))


def test_a_client_without_a_test_of_its_own_is_not_tested_on_others():
    whole = merged(apart())
    split, train = split_by_client(whole, from_counts(np.arange(13), np.array([6, 1, 0, 6])), 0.5, 0)
    owners = {"train_owner": split.train_owner, "test_owner": split.test_owner}
    own = own_test_part(split.train_y, train, split.test_y, 3, 0, **owners, only_own=True)
    np.testing.assert_array_equal(own.count, [3, 0, 0, 3])
    np.testing.assert_array_equal(split.test_owner[own.order], [0, 0, 0, 3, 3, 3])
    pooled = from_counts(train.order, np.array([7]))  # one who has all is tested on all
    assert own_test_part(split.train_y, pooled, split.test_y, 3, 0, **owners, only_own=True).count.tolist() == [6]


def test_a_run_in_which_a_client_has_no_test():
    clients = [[0, 1, 2, 29], [25, 26, 27, 28], [5]]
    result = fdjax.run(dataset=apart(), model="mclr", partition=clients, split_by_client=0.5, rounds=1, batch_size=2)
    assert result.holdings["test_examples"] == [2, 2, 0]
    own = np.array(result.clients["own_accuracy"], float)
    assert np.isfinite(own[:2]).all()
    assert result.final["own_accuracy"] == pytest.approx(own[:2].mean(), abs=1e-6)


def test_others_fall_back_to_their_labels():
    source = apart()
    train = partition("iid", source.train_y, 3, 0, num_classes=3)
    alike = own_test_part(source.train_y, train, source.test_y, 3, 0)
    again = own_test_part(source.train_y, train, source.test_y, 3, 0, only_own=True)
    np.testing.assert_array_equal(alike.order, again.order)
