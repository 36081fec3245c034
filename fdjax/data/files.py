"""Image sets as their authors published them: IDX files and CIFAR's binary files."""

import gzip
import zlib
from pathlib import Path

import numpy as np

from fdjax.errors import InputError

Arrays = dict[str, np.ndarray]


def read_idx(folder: Path) -> Arrays:
    """MNIST-like sets: {train,t10k}-{images,labels}, then `-idx3-ubyte` or `.idx3-ubyte`, then `.gz` or nothing.

    Raises InputError for a file that is missing, truncated or of another format, and for as many images as not labels.
    """
    arrays = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        x = _idx(_find(folder, f"{stem}-images", 3), 3)
        y = _idx(_find(folder, f"{stem}-labels", 1), 1)
        if len(x) != len(y):
            raise InputError(
                f"{str(folder)!r}: {len(x)} images but {len(y)} labels of {stem}; expected as many, take both files "
                "from one download"
            )
        arrays |= {f"{split}_x": x[..., None], f"{split}_y": y.astype(np.int32)}
    classes = 1 + max(int(arrays["train_y"].max(initial=0)), int(arrays["test_y"].max(initial=0)))
    return arrays | {"num_classes": np.asarray(classes)}


def read_cifar10(folder: Path) -> Arrays:
    """CIFAR-10 binary version: data_batch_{1..5}.bin and test_batch.bin; raises InputError for a damaged file."""
    train = [f"data_batch_{i}.bin" for i in range(1, 6)]
    return _cifar(folder, "cifar-10-batches-bin", train, ["test_batch.bin"], 1, 10)


def read_cifar100(folder: Path) -> Arrays:
    """CIFAR-100 binary version: train.bin and test.bin, fine labels; raises InputError for a damaged file."""
    return _cifar(folder, "cifar-100-binary", ["train.bin"], ["test.bin"], 2, 100)


def _find(folder: Path, stem: str, dims: int) -> Path:
    names = [f"{stem}{mark}idx{dims}-ubyte{end}" for end in ("", ".gz") for mark in ("-", ".")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"no {names[0]}[.gz] in {str(folder)!r}; give as data_dir the folder that holds the IDX files")


def _bytes(path: Path) -> bytes:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{str(path)!r} cannot be read ({error}); fetch the file again") from None


def _idx(path: Path, dims: int) -> np.ndarray:
    data = _bytes(path)
    magic = bytes((0, 0, 8, dims))
    if data[:4] != magic:
        raise InputError(f"{str(path)!r} starts with {data[:4].hex()}, expected {magic.hex()}; it is no such IDX file")
    shape = tuple(np.frombuffer(data[4 : 4 + 4 * dims].ljust(4 * dims, b"\0"), ">u4").tolist())
    expected = 4 + 4 * dims + int(np.prod(shape))
    if len(data) != expected or min(shape) == 0:
        raise InputError(f"{str(path)!r} has {len(data)} bytes, expected {expected} for {shape}; fetch the file again")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _cifar(folder: Path, inner: str, train: list[str], test: list[str], labels: int, num_classes: int) -> Arrays:
    if (folder / inner).is_dir():
        folder = folder / inner
    arrays = {"num_classes": np.asarray(num_classes)}
    for split, names in (("train", train), ("test", test)):
        parts = [_records(folder / name, labels, num_classes) for name in names]
        records = np.concatenate(parts)
        pixels = records[:, labels:].reshape(-1, 3, 32, 32)
        arrays[f"{split}_x"] = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
        arrays[f"{split}_y"] = records[:, labels - 1].astype(np.int32)
    return arrays


def _records(path: Path, labels: int, num_classes: int) -> np.ndarray:
    if not path.is_file():
        raise InputError(f"no {path.name} in {str(path.parent)!r}; give as data_dir the folder of the binary version")
    data = np.frombuffer(_bytes(path), np.uint8)
    width = labels + 3072
    if data.size == 0 or data.size % width:
        raise InputError(f"{str(path)!r} has {data.size} bytes, expected a multiple of {width}; fetch the file again")
    records = data.reshape(-1, width)
    highest = records[:, labels - 1].max()
    if highest >= num_classes:
        raise InputError(
            f"{str(path)!r} has the label {highest}, expected at most {num_classes - 1}; is it another set?"
        )
    return records
