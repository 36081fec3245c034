"""`load`: a data set by name."""

import os
from importlib import resources
from pathlib import Path

import numpy as np

from fdjax.data import files, own, prepared
from fdjax.data.cache import DAMAGED, cached
from fdjax.data.options import call
from fdjax.data.statistics import channel_statistics
from fdjax.data.synthetic import synthetic
from fdjax.errors import InputError
from fdjax.types import Source

SOURCES: dict[str, str] = {
    "mnist_sample": "6,000 + 1,000 MNIST images with their writers, shipped with the package",
    "mnist": "MNIST as tfds prepared it; option writers",
    "fashion_mnist": "Fashion-MNIST as tfds prepared it",
    "cifar10": "CIFAR-10 as tfds prepared it",
    "cifar100": "CIFAR-100, fine labels, as tfds prepared it",
    "emnist/balanced": "EMNIST, 47 classes, as tfds prepared it",
    "emnist/byclass": "EMNIST, 62 classes, as tfds prepared it",
    "emnist/bymerge": "EMNIST, 47 classes, as tfds prepared it",
    "emnist/digits": "EMNIST, 10 digits, as tfds prepared it",
    "emnist/letters": "EMNIST, 26 letters, as tfds prepared it",
    "emnist/mnist": "EMNIST, 10 digits in MNIST's sizes, as tfds prepared it",
    "idx": "a folder of IDX files, gzipped or not, as in Debian's /usr/share/datasets/fashion-mnist",
    "cifar10_bin": "a folder of CIFAR-10's binary files",
    "cifar100_bin": "a folder of CIFAR-100's binary files, fine labels",
    "synthetic": "synthetic(alpha, beta) of Li et al. 2020; alpha, beta, num_clients, iid, samples_per_client, seed",
}

_LABELS = {  # what labels name, where more than one source names it
    **dict.fromkeys(("mnist_sample", "mnist", "emnist/digits", "emnist/mnist"), "digits"),
    **dict.fromkeys(("cifar10", "cifar10_bin"), "cifar10"),
    **dict.fromkeys(("cifar100", "cifar100_bin"), "cifar100"),
    **dict.fromkeys(("emnist/balanced", "emnist/bymerge"), "emnist, merged"),
}
WITHOUT_FILES = ("mnist_sample", "synthetic")
PLAIN_FILES = ("idx", "cifar10_bin", "cifar100_bin")  # those that no other program has to prepare

PathLike = str | os.PathLike


def load(
    name: str | Source, *, data_dir: PathLike | None = None, cache_dir: PathLike | None = None, **options
) -> Source:
    """The data set `name`, one of `SOURCES`, on the host: images uint8 `[N, height, width, channels]`, labels int32.

    Or one's own: the path of a file or folder with the options of its kind (`own.READERS`), or a `Source`, as it is.
    `data_dir` is the folder of the files (for tfds sets by default tfds's own); `cache_dir` keeps decoded tfds sets (by
    default $FDJAX_CACHE, else $XDG_CACHE_HOME/fdjax, else ~/.cache/fdjax). EMNIST's images, which tfds serves
    transposed, come upright, and the labels of emnist/letters from 0.
    Raises InputError for an unknown name or option and for files that are missing or damaged.
    """
    if not isinstance(name, str) or name not in SOURCES:
        return own.load(own.resolve(name, "dataset", SOURCES), **options)
    data_dir = Path(data_dir).expanduser() if data_dir is not None else None
    cache_dir = Path(cache_dir).expanduser() if cache_dir is not None else None
    if name == "mnist_sample":
        return call("data set", name, _mnist_sample, **options)
    if name == "synthetic":
        return call("data set", name, synthetic, **options)
    if name in PLAIN_FILES:
        if data_dir is None:
            raise InputError(f"{name} needs data_dir: give the folder that holds its files")
        reader = {"idx": files.read_idx, "cifar10_bin": files.read_cifar10, "cifar100_bin": files.read_cifar100}[name]
        arrays = call("data set", name, reader, data_dir, **options)
        label = f"idx:{data_dir.resolve().name}" if name == "idx" else name
        source = _source(label, arrays | channel_statistics(arrays["train_x"]))
        return source._replace(labels=f"idx:{data_dir.resolve()}") if name == "idx" else source
    if name == "mnist":
        return call("data set", name, _mnist, data_dir, cache_dir, **options)
    return call("data set", name, lambda: _prepared(name, data_dir, cache_dir), **options)


def _source(name: str, arrays: dict[str, np.ndarray]) -> Source:
    return Source(
        name,
        arrays["train_x"],
        arrays["train_y"].astype(np.int32, copy=False),
        arrays["test_x"],
        arrays["test_y"].astype(np.int32, copy=False),
        int(arrays["num_classes"]),
        tuple(arrays["mean"].tolist()),
        tuple(arrays["std"].tolist()),
        arrays["train_owner"].astype(np.int32) if "train_owner" in arrays else None,
        arrays["test_owner"].astype(np.int32) if "test_owner" in arrays else None,
        labels=_LABELS.get(name, ""),
    )


def _mnist_sample() -> Source:
    with resources.files("fdjax.data").joinpath("mnist_sample.npz").open("rb") as file, np.load(file) as arrays:
        sample = dict(arrays)
    return _source("mnist_sample", sample | {"num_classes": np.asarray(10)} | channel_statistics(sample["train_x"]))


def _prepared(name: str, data_dir: PathLike | None, cache_dir: PathLike | None) -> Source:
    folder = prepared.locate(name, data_dir)

    def build() -> dict[str, np.ndarray]:
        arrays = prepared.read(name, folder)
        if name.startswith("emnist/"):
            for split in ("train", "test"):
                arrays[f"{split}_x"] = np.ascontiguousarray(arrays[f"{split}_x"].swapaxes(1, 2))
        if name == "emnist/letters":  # tfds keeps the labels 1..26 of the original and calls them 37 classes
            arrays |= {"train_y": arrays["train_y"] - 1, "test_y": arrays["test_y"] - 1, "num_classes": np.asarray(26)}
        return arrays | channel_statistics(arrays["train_x"])

    key = f"{name.replace('/', '-')}-{folder.name}-{prepared.identity(folder)}"
    return _source(name, cached(key, build, cache_dir))


def _mnist(data_dir: PathLike | None, cache_dir: PathLike | None, *, writers: PathLike | None = None) -> Source:
    source = _prepared("mnist", data_dir, cache_dir)
    if writers is None:
        return source
    names = ("train_writer", "test_writer")
    advice = f"give an npz with {names[0]} [{len(source.train_y)}] and {names[1]} [{len(source.test_y)}]"
    try:
        with Path(writers).expanduser().open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            train_owner, test_owner = (arrays[name].astype(np.int32) for name in names)
    except (OSError, TypeError, *DAMAGED) as error:
        raise InputError(f"writers {str(writers)!r}: {type(error).__name__}; {advice}") from None
    if train_owner.shape != source.train_y.shape or test_owner.shape != source.test_y.shape:
        raise InputError(f"writers {str(writers)!r}: shapes {train_owner.shape} and {test_owner.shape}; {advice}")
    return source._replace(train_owner=train_owner, test_owner=test_owner)
