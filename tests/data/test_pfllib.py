"""Data folders of PFLlib and HtFLlib, read and written, and parts that are cut within each client."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

import fdjax
from fdjax.data import own_test_part, partition, split_by_client
from fdjax.data.client_split import merged
from fdjax.data.holdings import from_counts
from fdjax.data.pfllib import is_folder, read_folder, write_folder
from fdjax.errors import DataWarning, InputError
from fdjax.types import Source

SHAPE = (2, 6, 5)  # channels, height, width
SIZES = {"train": (7, 1, 4), "test": (3, 2, 1)}


def theirs(folder, rng, shape=SHAPE, sizes=SIZES, config=True, draw=None):
    """A folder as their generators write it, and what is in it."""
    content = {}
    for part, of_part in sizes.items():
        (folder / part).mkdir(parents=True)
        for k, n in enumerate(of_part):
            x = rng.normal(size=(n, *shape)).astype(np.float32) if draw is None else draw((n, *shape))
            data = {"x": x, "y": rng.integers(0, 4, n)}
            with open(folder / part / f"{k}.npz", "wb") as file:
                np.savez_compressed(file, data=data)  # pyright: ignore[reportArgumentType]
            content[part, k] = data
    if config:
        (folder / "config.json").write_text(json.dumps({"num_clients": len(sizes["train"]), "num_classes": 4}))
    return content


def read_theirs(file):
    """As their clients do."""
    with open(file, "rb") as opened:
        return np.load(opened, allow_pickle=True)["data"].tolist()


def test_a_folder_is_read(tmp_path, rng):
    content = theirs(tmp_path / "mine", rng)
    assert is_folder(tmp_path / "mine")
    source = read_folder(tmp_path / "mine", "mine")
    assert source.num_classes == 4
    for part in SIZES:
        x, y, owner = (getattr(source, f"{part}_{what}") for what in ("x", "y", "owner"))
        assert x.shape[1:] == (6, 5, 2)
        for k in range(3):
            data = content[part, k]
            np.testing.assert_array_equal(np.moveaxis(x[owner == k], -1, 1), data["x"])
            np.testing.assert_array_equal(y[owner == k], data["y"])
    assert (source.mean, source.std) == ((0.0,), (1.0,))  # they are normalised already


def test_an_empty_client_and_a_folder_without_config(tmp_path, rng):
    theirs(tmp_path / "mine", rng, (5,), {"train": (3, 0, 2), "test": (1, 1, 1)}, config=False)
    source = read_folder(tmp_path / "mine", "mine")
    assert source.train_x.shape == (5, 5)
    np.testing.assert_array_equal(source.train_owner, [0, 0, 0, 2, 2])


def test_sequences_of_tokens(tmp_path, rng):
    content = theirs(tmp_path / "mine", rng, (9,), draw=lambda shape: rng.integers(0, 7, shape))
    source = fdjax.data.load(str(tmp_path / "mine"), vocabulary=11)
    assert source.train_x.dtype == np.int32
    assert len(source.vocabulary) == 11
    np.testing.assert_array_equal(source.train_x[:7], content["train", 0]["x"])
    split, held = split_by_client(merged(source), from_counts(np.arange(18), np.array([9, 9])), 0.5, 0)
    write_folder(tmp_path / "new", split, held, from_counts(np.arange(10), np.array([5, 5])))
    again = read_folder(tmp_path / "new", "new")  # config.json says it
    assert len(again.vocabulary) == 11
    np.testing.assert_array_equal(again.train_x, split.train_x)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8])
def test_whole_numbers_are_numbers_unless_they_are_said_to_be_tokens(tmp_path, rng, dtype):
    content = theirs(tmp_path / "mine", rng, (9,), draw=lambda shape: rng.integers(0, 200, shape).astype(dtype))
    with pytest.warns(DataWarning, match=f"whole numbers {np.dtype(dtype)} .* read as numbers; if they are tokens"):
        source = read_folder(tmp_path / "mine", "mine")
    assert (source.train_x.dtype, source.vocabulary) == (np.float32, ())
    np.testing.assert_array_equal(source.train_x[:7], content["train", 0]["x"])


@pytest.mark.parametrize(
    ("draw", "vocabulary", "error"),
    [
        (lambda shape: np.full(shape, 0.5), 11, r"has inputs float64 \(12, 9\), which are no sequences of tokens"),
        (lambda shape: np.full(shape, 11), 11, "tokens reach from 11 to 11, first in example 0; expected 0 to 10"),
        (lambda shape: np.full(shape, -1), 11, "tokens reach from -1 to -1"),
        (lambda shape: np.full(shape, 2**32 + 1), 11, "tokens reach from 2147483647 to"),
        (lambda shape: np.full(shape, 1), 1, "vocabulary=1: expected a whole number of at least 2"),
        (lambda shape: np.full(shape, 1), "many", "vocabulary='many': expected a whole number"),
    ],
)
def test_other_inputs_than_the_tokens_that_were_said(tmp_path, rng, draw, vocabulary, error):
    theirs(tmp_path / "mine", rng, (9,), draw=draw)
    with pytest.raises(InputError, match=error) as caught:
        read_folder(tmp_path / "mine", "mine", vocabulary=vocabulary)
    assert "\n" not in str(caught.value)


def test_files_beyond_those_of_config_are_left(tmp_path, rng):
    theirs(tmp_path / "mine", rng)
    (tmp_path / "mine" / "config.json").write_text('{"num_clients": 2, "num_classes": 9}')
    source = read_folder(tmp_path / "mine", "mine")
    assert (source.train_owner.max(), source.num_classes) == (1, 9)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 256, (60, 4, 3, 2), np.uint8), np.arange(60, dtype=np.int32) % 3
    return Source("images", x[:48], y[:48], x[48:], y[48:], 3, mean=(0.4, 0.5), std=(0.2, 0.25))


def test_there_and_back(tmp_path, images):
    train = partition("iid", images.train_y, 4, 0, num_classes=3)
    test = own_test_part(images.train_y, train, images.test_y, 3, 0)
    write_folder(tmp_path / "new" / "images", images, train, test, alpha=0.1, partition="dir")
    again = fdjax.data.load(str(tmp_path / "new" / "images"))
    for k in range(4):
        for part, holdings, x, y in (
            ("train", train, images.train_x, images.train_y), ("test", test, images.test_x, images.test_y),
        ):  # fmt: skip
            rows = holdings.order[holdings.start[k] :][: holdings.count[k]]
            seen = (x[rows] / 255 - np.array(images.mean)) / np.array(images.std)
            mine = getattr(again, f"{part}_owner") == k
            np.testing.assert_allclose(getattr(again, f"{part}_x")[mine], seen, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(getattr(again, f"{part}_y")[mine], y[rows])
            data = read_theirs(tmp_path / "new" / "images" / part / f"{k}.npz")
            assert (data["x"].dtype, data["y"].dtype) == (np.float32, np.int64)
            np.testing.assert_allclose(data["x"], np.moveaxis(seen, -1, 1), rtol=1e-5, atol=1e-6)
    config = json.loads((tmp_path / "new" / "images" / "config.json").read_text())
    assert (config["num_clients"], config["alpha"], config["partition"], config["batch_size"]) == (4, 0.1, "dir", 10)
    assert [sum(n for _, n in each) for each in config["Size of samples for labels in clients"]] == [12] * 4


def test_own_tests_are_the_clients_files(tmp_path, rng):
    theirs(tmp_path / "mine", rng, (6,))
    result = fdjax.run(dataset=str(tmp_path / "mine"), model="dnn", rounds=1, batch_size=2)
    assert result.settings.partition_name == "natural"
    assert result.holdings["test_examples"] == [3, 2, 1]
    each = np.array(result.clients["own_accuracy"])
    assert result.final["own_accuracy"] == pytest.approx(each.mean(), abs=1e-6)
    assert result.final["own_accuracy_by_test_size"] == pytest.approx(each @ [3, 2, 1] / 6, abs=1e-6)


def test_a_split_by_client(images):
    whole = merged(images)
    assert len(whole.train_y) == 60
    held = from_counts(np.random.default_rng(2).permutation(60)[:43], np.array([20, 1, 0, 22]))
    split, train = split_by_client(whole, held, 0.75, 0)
    np.testing.assert_array_equal(train.count, [15, 1, 0, 16])
    np.testing.assert_array_equal(np.bincount(split.test_owner, minlength=4), [5, 0, 0, 6])
    own = own_test_part(
        split.train_y, train, split.test_y, 3, 0, train_owner=split.train_owner, test_owner=split.test_owner
    )
    for k in (0, 3):
        rows = held.order[held.start[k] :][: held.count[k]]
        parts = split.train_x[split.train_owner == k], split.test_x[own.order[own.start[k] :][: own.count[k]]]
        together = np.sort(np.concatenate(parts).reshape(len(rows), -1), axis=0)
        np.testing.assert_array_equal(together, np.sort(whole.train_x[rows].reshape(len(rows), -1), axis=0))
    other, _ = split_by_client(whole, held, 0.75, 1)
    assert not np.array_equal(other.test_x, split.test_x)


def test_a_run_of_a_split_by_client():
    result = fdjax.run(
        model="mclr", num_clients=7, partition="dirichlet_a", alpha=0.3, split_by_client=0.75, rounds=1,
        train_fraction=0.1,
    )  # fmt: skip
    assert sum(result.holdings["n_k"]) == pytest.approx(0.75 * 700, abs=7)


def test_the_program_writes_a_partition(tmp_path):
    command = [sys.executable, "-m", "fdjax.data", "--partition=dirichlet_a", "--alpha=0.5", "--num_clients=3"]
    done = subprocess.run(
        [*command, "--split_by_client=0.75", f"--write_pfllib={tmp_path / 'mnist'}"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    source = read_folder(tmp_path / "mnist", "mnist")
    assert (len(source.train_y), len(source.test_y)) == pytest.approx((5250, 1750), abs=3)
    assert source.train_x.shape[1:] == (28, 28, 1)


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def save(file, **entries):
    np.savez_compressed(file, **entries)


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda f: (f / "test/1.npz").unlink(), r"test/1.npz is missing"),
        (lambda f: (f / "train/1.npz").write_bytes(b"no zip"), r"train/1.npz cannot be read \(BadZipFile"),
        (lambda f: save(f / "train/1.npz", data=np.array(Evil(), object)), "it would make (posix|nt).system"),
        (lambda f: save(f / "train/1.npz", data=np.array(os.getcwd, object)), "it would make (posix|nt).getcwd"),
        (lambda f: save(f / "train/1.npz", x=np.zeros(3)), r"train/1.npz cannot be read \(KeyError"),
        (lambda f: save(f / "train/1.npz", data=np.zeros((2, 3))), "has an array as its data"),
        (lambda f: save(f / "train/1.npz", data=np.array({"x": 1}, object)), "has no x and y"),
        (lambda f: save(f / "train/1.npz", data=np.array({"x": [[1.0]], "y": [1, 2]}, object)), "a label each"),
        (lambda f: save(f / "train/1.npz", data=np.array({"x": [[1.0]], "y": [1.5]}, object)), "whole numbers"),
        (lambda f: save(f / "train/1.npz", data=np.array({"x": [["a"]], "y": [1]}, object)), "expected numbers"),
        (lambda f: save(f / "train/1.npz", data=np.array({"x": [([1], 1)], "y": [1]}, object)), "different shapes"),
        (lambda f: save(f / "train/1.npz", data=np.array({"x": [[1.0]], "y": [1]}, object)), "one shape of all"),
        (lambda f: save(f / "train/1.npz", data=np.array({"x": np.full((1, *SHAPE), np.nan), "y": [1]}, object)),
         "not finite in 1"),
        (lambda f: (f / "config.json").write_text("{"), "config.json' cannot be read"),
        (lambda f: (f / "config.json").write_text('{"num_clients": "2"}'), "other than numbers as num_clients"),
        (lambda f: (f / "config.json").write_text('{"vocabulary": -1}'), "numbers as num_clients, num_classes, vocab"),
        (lambda f: (f / "config.json").write_text('{"num_clients": 4}'), "train/3.npz is missing"),
        (lambda f: (f / "config.json").write_text('{"num_clients": 3, "num_classes": 2}'), "labels reach from 0 to 3"),
    ],
)  # fmt: skip
def test_bad_folders_are_one_line(tmp_path, rng, spoil, error):
    theirs(tmp_path / "mine", rng)
    spoil(tmp_path / "mine")
    with pytest.raises(InputError, match=error) as caught:
        read_folder(tmp_path / "mine", "mine")
    assert "\n" not in str(caught.value)


def test_a_pickle_that_runs_a_program_does_not(tmp_path, rng):
    theirs(tmp_path / "mine", rng)
    there = tmp_path / "ran"

    class Program:
        def __reduce__(self):
            return open, (str(there), "w")

    assert pickle.dumps(Program())
    save(tmp_path / "mine/test/0.npz", data=np.array({"x": Program(), "y": [1]}, object))
    with pytest.raises(InputError, match=r"it would make (_?io)\.open"):
        read_folder(tmp_path / "mine", "mine")
    assert not there.exists()


def test_a_folder_is_there_when_all_of_it_is_written(tmp_path, images, monkeypatch):
    train = partition("iid", images.train_y, 3, 0, num_classes=3)
    test = own_test_part(images.train_y, train, images.test_y, 3, 0)
    written, save_one = [], np.savez_compressed

    def full(file, **entries):
        assert not (tmp_path / "new").exists()
        written.append(file)
        if len(written) > 4:
            raise OSError(28, "No space left on device")
        save_one(file, **entries)

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(InputError, match="cannot be written"):
        write_folder(tmp_path / "new", images, train, test)
    assert len(written) == 5
    assert not [*tmp_path.iterdir()]
    monkeypatch.undo()
    (tmp_path / "new").mkdir()
    write_folder(tmp_path / "new", images, train, test)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"train", "test", "config.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_what_cannot_be_written(tmp_path, images):
    train, nothing = partition("iid", images.train_y, 2, 0, num_classes=3), from_counts(np.arange(3), np.array([3, 0]))
    test = own_test_part(images.train_y, train, images.test_y, 3, 0)
    with pytest.raises(InputError, match="client 1 has no test example"):
        write_folder(tmp_path / "a", images, train, nothing)
    with pytest.raises(InputError, match="is not empty; give a new folder"):
        write_folder(tmp_path.parent, images, train, test)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_folder(tmp_path / "file" / "below", images, train, test)


@pytest.mark.parametrize("fraction", [0, 1, -0.5, "three quarters"])
def test_bad_fractions(fraction):
    with pytest.raises(InputError, match=r"--split_by_client=.*: expected"):
        fdjax.settings(split_by_client=fraction)


def test_a_split_that_leaves_no_test(images):
    with pytest.raises(InputError, match="clients of 1 examples or fewer have none left to test on"):
        split_by_client(merged(images), from_counts(np.arange(5), np.ones(5, int)), 0.75, 0)
