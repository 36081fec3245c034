"""Data folders of PFLlib and HtFLlib (Zhang et al. 2025): an npz for each client under train/ and under test/.

Each npz has one entry, `data`, a pickled dict of x [n, C, H, W] (or [n, F]) and y [n]; config.json tells the numbers of
clients and classes, and what each client holds. Pickles can carry programs: ours are read by an unpickler that makes
NumPy arrays and nothing else.
"""

import io
import json
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fdjax.data.checked import checked
from fdjax.data.options import at_least
from fdjax.errors import DataWarning, InputError
from fdjax.types import Holdings, Source

_PARTS = ("train", "test")
_FORM = "a folder of train/0.npz, test/0.npz, ..., as PFLlib's generate_*.py write it"
_NUMBERS = ("num_clients", "num_classes", "vocabulary")  # of config.json; the last one is ours
# What pickled arrays are made of; NumPy 2 calls the module numpy._core.
_ALLOWED = {
    ("numpy", "ndarray"), ("numpy", "dtype"), ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"), ("numpy._core.numeric", "_frombuffer"), ("_codecs", "encode"),
}  # fmt: skip


class Part(NamedTuple):
    """One client's examples of one part, as a file has them."""

    x: np.ndarray
    y: np.ndarray


class _Unpickler(pickle.Unpickler):
    """Makes arrays, numbers, texts, lists and dicts."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it would make {module}.{name}")
        return super().find_class(module, name)


def is_folder(path: Path) -> bool:
    """Whether a folder has a first client's file of each part."""
    return all((path / part / "0.npz").is_file() for part in _PARTS)


def read_folder(path: Path, name: str, *, vocabulary: int | None = None) -> Source:
    """The source of a data folder of PFLlib: every client an owner, tested on its own test file.

    Inputs reach the net as they are, which their generators have normalised, images as [N, H, W, C]. Whole numbers
    [n, L] are sequences of tokens where `vocabulary`, or that of config.json, says how many tokens there are (PFLlib's
    vocab_size), and numbers elsewhere, since a table may have such columns.

    Raises InputError for a folder that is incomplete, files of another form, and other inputs than these tokens.
    Warns of whole numbers [n, L] that are read as numbers.
    """
    config = _config(path)
    tokens = config.get("vocabulary", 0) if vocabulary is None else at_least("vocabulary", vocabulary, 2)
    clients = int(config.get("num_clients", _clients(path)))
    parts = [[_read(path / part / f"{k}.npz") for k in range(clients)] for part in _PARTS]
    shapes = {each.x.shape[1:] for part in parts for each in part if len(each.y)}
    if len(shapes) != 1:
        raise InputError(f"{name}: clients' inputs have shapes {sorted(shapes)}; expected one shape of all")
    arrays: list[np.ndarray] = []
    for part in parts:
        held = [each for each in part if len(each.y)] or [Part(np.zeros((0, *shapes.pop())), np.zeros(0, int))]
        owner = np.repeat(np.arange(clients), [len(each.y) for each in part])
        arrays += [np.concatenate([e.x for e in held]), np.concatenate([e.y for e in held]), owner.astype(np.int32)]
    train_x, train_y, train_owner, test_x, test_y, test_owner = arrays
    highest = max(int(train_y.max(initial=0)), int(test_y.max(initial=0)))
    classes = int(config.get("num_classes", highest + 1))
    train_x, test_x = (_of_tokens if tokens else _of_numbers)(name, train_x, test_x)
    return checked(
        Source(
            name, train_x, train_y.astype(np.int32), test_x, test_y.astype(np.int32), classes,
            train_owner=train_owner, test_owner=test_owner, vocabulary=tuple(map(str, range(tokens))),
        )
    )  # fmt: skip


def write_folder(folder: Path, source: Source, train: Holdings, test: Holdings, **config: Any) -> None:
    """A partition as PFLlib and HtFLlib read it: `dataset/<name>/` of their checkout is the folder.

    Inputs are written as our nets see them, standardised, images as [n, C, H, W] float32, tokens int64.

    Args:
      folder: is made when all of it is written; an empty one may be there.
      source: a data set.
      train, test: who holds what of its training and test examples.
      **config: entries of config.json beside the usual ones, such as alpha and partition; `non_iid` is True, `balance`
        False, batch_size 10 and `alpha` 0 unless they are given. Their generators keep a folder whose entries are what
        they were asked for, and would write over another.

    Raises InputError for a folder that holds something or cannot be written, and a client without a test example, with
    which their evaluation fails.
    """
    empty = np.flatnonzero(np.asarray(test.count) == 0)
    if len(empty):
        raise InputError(
            f"client {empty[0]} has no test example, and PFLlib's evaluation needs one of each; give fewer clients, a "
            "--min_size, or --split_by_client=0.75"
        )
    folder = folder.resolve()
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{str(folder)!r} is not empty; give a new folder")
        beside.mkdir(parents=True)
        _write(beside, source, {"train": train, "test": test}, config)
        beside.replace(folder)
    except OSError as error:
        raise InputError(f"{str(folder)!r} cannot be written ({error.strerror}); give another folder") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write(folder: Path, source: Source, held: dict[str, Holdings], config: dict[str, Any]) -> None:
    statistic = []
    for part, x, y in (("train", source.train_x, source.train_y), ("test", source.test_x, source.test_y)):
        (folder / part).mkdir()
        for k, rows in enumerate(_rows_of(held[part])):
            data = {"x": _outward(x[rows], source), "y": y[rows].astype(np.int64)}
            np.savez_compressed(folder / part / f"{k}.npz", data=np.array(data, dtype=object))
            if part == "train":
                labels, counts = np.unique(y[rows], return_counts=True)
                statistic.append(list(zip(labels.tolist(), counts.tolist(), strict=True)))
    entries = {
        "num_clients": len(statistic), "num_classes": source.num_classes, "non_iid": True, "balance": False,
        "partition": None, "Size of samples for labels in clients": statistic, "alpha": 0, "batch_size": 10,
    }  # fmt: skip
    if source.vocabulary:
        entries["vocabulary"] = len(source.vocabulary)
    (folder / "config.json").write_text(json.dumps(entries | config))


def _rows_of(holdings: Holdings) -> Iterator[np.ndarray]:
    order = np.asarray(holdings.order)
    for start, count in zip(np.asarray(holdings.start), np.asarray(holdings.count), strict=True):
        yield order[start : start + count]


def _outward(x: np.ndarray, source: Source) -> np.ndarray:
    """Inputs as a net sees them, in PyTorch's layout."""
    if source.vocabulary:
        return x.astype(np.int64)
    unit = 255 if x.dtype == np.uint8 else 1
    mean, std = np.asarray(source.mean, np.float32), np.asarray(source.std, np.float32)
    seen = (x.astype(np.float32) / unit - mean) / std
    return np.ascontiguousarray(np.moveaxis(seen, -1, 1)) if seen.ndim == 4 else seen


def _of_tokens(name: str, *parts: np.ndarray) -> Iterator[np.ndarray]:
    """Sequences of tokens in our layout. Raises InputError for inputs that are none."""
    for x in parts:
        if x.ndim != 2 or x.dtype.kind not in "iu":
            raise InputError(
                f"{name} has inputs {x.dtype} {x.shape}, which are no sequences of tokens; expected whole numbers "
                "[n, L], or leave out --vocabulary"
            )
        yield x.clip(-1, np.iinfo(np.int32).max).astype(np.int32)


def _of_numbers(name: str, *parts: np.ndarray) -> Iterator[np.ndarray]:
    """Numbers in our layout. Warns of those that may be tokens."""
    if all(x.ndim == 2 and x.dtype.kind in "iu" for x in parts):
        warnings.warn(
            f"{name} has whole numbers {parts[0].dtype} {parts[0].shape} as inputs, which are read as numbers; if they "
            "are tokens, say how many there are: --vocabulary=...",
            DataWarning,
            stacklevel=3,
        )
    for x in parts:
        yield np.ascontiguousarray(np.moveaxis(x, 1, -1) if x.ndim == 4 else x, np.float32)


def _config(path: Path) -> dict[str, Any]:
    """config.json, or nothing where there is none."""
    file = path / "config.json"
    try:
        content = json.loads(file.read_text()) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"{str(file)!r} cannot be read ({error}); mend or remove it") from None
    numbers = {key: content.get(key, 1) for key in _NUMBERS} if isinstance(content, dict) else {}
    if not numbers or not all(isinstance(value, int) and value > 0 for value in numbers.values()):
        raise InputError(f"{str(file)!r} has other than numbers as {', '.join(_NUMBERS)}; mend or remove it")
    return content


def _clients(path: Path) -> int:
    """How many clients' files there are, where config.json does not say."""
    return sum(1 for file in (path / "train").iterdir() if file.stem.isdecimal() and file.suffix == ".npz")


def _read(file: Path) -> Part:
    """One client's part. Raises InputError for a file that is missing, or of another form."""
    called = f"{file.parent.name}/{file.name}"
    if not file.is_file():
        raise InputError(f"{called} is missing in {str(file.parents[1])!r}; expected {_FORM}")
    try:
        with zipfile.ZipFile(file) as archive:
            stream = io.BytesIO(archive.read("data.npy"))
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(stream)
        if not dtype.hasobject or shape != ():
            raise InputError(f"{called} has an array as its data; expected a dict of x and y: {_FORM}")
        data = _Unpickler(stream).load()
        data = data.item() if isinstance(data, np.ndarray) else data
    except InputError:
        raise
    except Exception as error:  # whatever a damaged or foreign pickle raises
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{called} cannot be read ({type(error).__name__}: {reason}); expected {_FORM}") from None
    if not isinstance(data, dict) or not {"x", "y"} <= data.keys():
        raise InputError(f"{called} has no x and y; expected {_FORM}")
    return _part(called, data["x"], data["y"])


def _part(called: str, x: Any, y: Any) -> Part:
    try:
        inputs, labels = np.asarray(x), np.asarray(y)
    except ValueError:  # of different lengths
        raise InputError(f"{called} has x of different shapes, such as texts and lengths; expected one") from None
    if inputs.dtype.kind not in "uif" or inputs.ndim < 2 or labels.ndim != 1 or len(inputs) != len(labels):
        if labels.size == 0 == inputs.size:
            return Part(inputs, labels)
        raise InputError(
            f"{called} has x {inputs.dtype} {inputs.shape} and y {labels.shape}; expected numbers [n, ...] and a label "
            "each"
        )
    if labels.dtype.kind not in "ui" and not np.array_equal(labels, np.rint(labels)):
        raise InputError(f"{called} has labels {labels.dtype}; expected whole numbers")
    return Part(inputs, labels.astype(np.int64))
