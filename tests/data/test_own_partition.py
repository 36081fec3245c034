"""A partition of a user's own: what each client holds of the examples that are left."""

import numpy as np
import pytest

from fdjax import data
from fdjax.data import own_partition
from fdjax.errors import DataWarning, InputError

CLIENTS = [[0, 1, 2], [], [9, 4], np.array([7], np.uint8)]


def held(name, index=None, total=10, **more):
    found = own_partition.holdings(name, np.arange(total) if index is None else np.asarray(index), total, **more)
    return [found.order[start : start + count].tolist() for start, count in zip(found.start, found.count, strict=True)]


def client_of(clients, total=10):
    client = np.full(total, -1)
    for k, part in enumerate(clients):
        client[np.asarray(part, int)] = k
    return client


def test_all_forms_are_one_partition(tmp_path):
    arrays = [np.asarray(part, int) for part in CLIENTS]
    np.savez(tmp_path / "list.npz", *arrays)
    np.savez(tmp_path / "named.npz", **{f"client_{k}": part for k, part in reversed([*enumerate(arrays)])})
    np.savez(tmp_path / "client.npz", client=client_of(CLIENTS))
    forms = [CLIENTS, dict(enumerate(CLIENTS)), tmp_path / "list.npz", tmp_path / "named.npz"]
    names = [own_partition.resolve(form) for form in forms]
    assert len({name.partition("@")[2] for name in names}) == 1
    assert [held(name) for name in names] == [[[0, 1, 2], [], [9, 4], [7]]] * 4
    for form in (client_of(CLIENTS), client_of(CLIENTS).tolist(), tmp_path / "client.npz"):
        assert held(own_partition.resolve(form)) == [[0, 1, 2], [], [4, 9], [7]]
    assert own_partition.file_of(names[2]) == str(tmp_path / "list.npz")
    assert own_partition.resolve(names[0]) == names[0]
    assert own_partition.resolve([[0, 1]]) != own_partition.resolve([[1, 0]])


def test_more_than_ten_clients_are_in_order_of_their_numbers(tmp_path):
    np.savez(tmp_path / "p.npz", *[np.array([k]) for k in range(12)])
    assert held(own_partition.resolve(tmp_path / "p.npz"), total=12) == [[k] for k in range(12)]


def test_indices_are_those_of_the_examples_as_loaded():
    """Of examples that became proxy or validation data, or were not drawn, nothing is left."""
    index = [9, 2, 0, 7]  # what is left, in another order
    assert held(own_partition.resolve(CLIENTS), index) == [[2, 1], [], [0], [3]]


def test_examples_held_twice_are_told():
    name = own_partition.resolve([[0, 0, 1], [1, 2], [2]])
    with pytest.warns(DataWarning, match="1 examples are held again by the same client, 2 again by another one"):
        assert held(name) == [[0, 0, 1], [1, 2], [2]]
    with pytest.raises(InputError, match="privacy of examples needs each to be held once"):
        held(name, once=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[0, 10]], "client 0 holds the index 10, but 10 examples are loaded for training; expected 0 to 9; of"),
        (
            np.zeros(9, int),
            "the client of 9 examples, but 10 are loaded for training; .* source.train_index says .* by --test_data",
        ),
    ],
)
def test_partitions_that_do_not_fit_the_data(given, message):
    with pytest.raises(InputError, match=message):
        held(own_partition.resolve(given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "an int is no partition; give a name, a list of index arrays"),
        ([], "is an empty list; give the index array of at least one client"),
        ([[0, -1]], "client 0 holds the index -1; expected whole numbers of at least 0"),
        ([[0.5]], "client 0's indices are float64 of shape .1,., expected whole numbers"),
        ([[True, False]], r"expected whole numbers \[n\]; of a mask give np.flatnonzero"),
        ([[[0, 1]]], r"client 0's indices are int64 of shape \(1, 2\)"),
        ([["a"]], "client 0's indices are <U1"),
        (np.array([-2, 0]), "reach from -2 to 0; expected 0 to C - 1, and -1 for nobody's"),
        (np.array([-1, -1]), "reach from -1 to -1; expected 0 to C - 1"),
        (["Bath", "York"], "are texts, such as 'Bath'; expected whole numbers: give them as owners .owner=...., or pd"),
        ({"a": [1]}, "'a' names no client; expected names that end in 0 to C - 1"),
        ({"a0": [1], "a2": [2]}, "arrays of the clients 0, 2; expected one each of 0 to C - 1"),
        ("irid", "unknown partition 'irid' .did you mean 'iid'"),
        ("none.npz", "--partition=none.npz: there is no such file"),
        ("p@0123456789ab", "was a value, or a file that is not there now; give it again"),
    ],
)
def test_what_is_no_partition(given, message):
    with pytest.raises(InputError, match=message) as told:
        own_partition.resolve(given, data.PARTITIONS)
    assert "\n" not in str(told.value)


def test_a_file_that_is_no_npz(tmp_path):
    (tmp_path / "a.npz").write_text("x")
    np.save(tmp_path / "a.npy", np.arange(3))
    for name, reason in (("a.npz", "it is no npz, but another kind of file"), ("a.npy", "it is an npy, of one array")):
        with pytest.raises(
            InputError, match=f"{name} is not an npz of plain arrays: {reason}.*; write it with np.savez"
        ):
            own_partition.resolve(tmp_path / name)


def test_a_series_is_the_client_of_each_example():
    pd = pytest.importorskip("pandas")
    client = client_of(CLIENTS)
    assert own_partition.resolve(pd.Series(client, index=client + 7)) == own_partition.resolve(client)
    with pytest.raises(InputError, match="are texts, such as 'a'; expected whole numbers"):
        own_partition.resolve(pd.Series(["a", "b"]))
