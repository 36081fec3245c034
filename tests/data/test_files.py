"""IDX and CIFAR binary files, written here byte by byte from their formats."""

import gzip
import struct

import numpy as np
import pytest

from fdjax.data import load
from fdjax.errors import InputError


def idx(array):
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def images(rng):
    return {
        "train-images": rng.integers(0, 256, (12, 5, 4), dtype=np.uint8),
        "train-labels": (np.arange(12) % 6).astype(np.uint8),
        "t10k-images": rng.integers(0, 256, (7, 5, 4), dtype=np.uint8),
        "t10k-labels": (np.arange(7) % 6).astype(np.uint8),
    }


def write_idx(folder, arrays, mark="-", packed=False):
    for name, array in arrays.items():
        path = folder / f"{name}{mark}idx{array.ndim}-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))


@pytest.mark.parametrize("mark", ["-", "."])
@pytest.mark.parametrize("packed", [False, True])
def test_idx_round_trip(tmp_path, images, mark, packed):
    write_idx(tmp_path, images, mark, packed)
    source = load("idx", data_dir=tmp_path)
    assert source.name == f"idx:{tmp_path.name}"
    np.testing.assert_array_equal(source.train_x, images["train-images"][..., None])
    np.testing.assert_array_equal(source.train_y, images["train-labels"])
    np.testing.assert_array_equal(source.test_x[..., 0], images["t10k-images"])
    np.testing.assert_array_equal(source.test_y, images["t10k-labels"])
    assert (source.train_x.dtype, source.train_y.dtype, source.num_classes) == (np.uint8, np.int32, 6)
    assert source.mean[0] == pytest.approx((images["train-images"] / 255).mean())
    assert source.std[0] == pytest.approx((images["train-images"] / 255).std())


def damage(folder, name, change):
    path = next(folder.glob(f"{name}*"))
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train-images", lambda data: data[:-10], "train-images"),
        ("train-images", lambda data: data[:3], "train-images"),
        ("train-images", lambda data: data[:9], "train-images"),
        ("t10k-labels", lambda data: b"", "t10k-labels"),
        ("t10k-labels", lambda data: b"<html>404" + data, "t10k-labels"),
    ],
)
def test_damaged_idx(tmp_path, images, packed, name, change, message):
    write_idx(tmp_path, images, packed=packed)
    damage(tmp_path, name, change)
    with pytest.raises(InputError, match=message) as error:
        load("idx", data_dir=tmp_path)
    assert "\n" not in str(error.value)


def test_idx_files_that_do_not_fit(tmp_path, images):
    write_idx(tmp_path, images | {"train-labels": images["train-labels"][:-1]})
    with pytest.raises(InputError, match="12 images but 11 labels of train"):
        load("idx", data_dir=tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(images["train-images"]))
    with pytest.raises(InputError, match="starts with 00000803, expected 00000801"):
        load("idx", data_dir=tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(InputError, match=r"no train-labels-idx1-ubyte\[\.gz\]"):
        load("idx", data_dir=tmp_path)
    with pytest.raises(InputError, match="idx needs data_dir"):
        load("idx")


def write_cifar(folder, rng, names, labels, classes, count=4):
    records = {name: rng.integers(0, classes, (count, labels + 3072), dtype=np.uint8) for name in names}
    folder.mkdir(exist_ok=True)
    for name, record in records.items():
        (folder / name).write_bytes(record.tobytes())
    return records


TEN = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-bin"])
def test_cifar10(tmp_path, rng, inner):
    records = write_cifar(tmp_path / inner, rng, TEN, 1, 10)
    source = load("cifar10_bin", data_dir=tmp_path)
    assert (source.train_x.shape, source.test_x.shape, source.num_classes) == ((20, 32, 32, 3), (4, 32, 32, 3), 10)
    record = records["data_batch_2.bin"][1]
    assert source.train_y[5] == record[0]
    for channel in range(3):
        for row in (0, 31):
            plane = record[1 + 1024 * channel :][32 * row : 32 * row + 32]
            np.testing.assert_array_equal(source.train_x[5, row, :, channel], plane)
    assert len(source.mean) == len(source.std) == 3


def test_cifar100_has_the_fine_labels(tmp_path, rng):
    records = write_cifar(tmp_path, rng, ["train.bin", "test.bin"], 2, 100)
    source = load("cifar100_bin", data_dir=tmp_path)
    np.testing.assert_array_equal(source.train_y, records["train.bin"][:, 1])
    assert source.num_classes == 100


def test_damaged_cifar(tmp_path, rng):
    write_cifar(tmp_path, rng, TEN, 1, 10)
    whole = (tmp_path / "data_batch_3.bin").read_bytes()
    for data, message in ((whole[:-1], "expected a multiple of 3073"), (b"", "expected a multiple of 3073"),
                          (b"\x0a" + whole[1:], "has the label 10, expected at most 9")):  # fmt: skip
        (tmp_path / "data_batch_3.bin").write_bytes(data)
        with pytest.raises(InputError, match=message):
            load("cifar10_bin", data_dir=tmp_path)
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(InputError, match=r"no data_batch_3\.bin"):
        load("cifar10_bin", data_dir=tmp_path)
