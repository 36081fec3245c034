"""A user's own partition: the indices that each client holds, as a value or in an npz."""

import os
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fdjax import digest, own
from fdjax.data.coding import listed
from fdjax.data.holdings import from_counts
from fdjax.data.npz import arrays_of
from fdjax.errors import DataWarning, InputError, a_kind, unknown
from fdjax.types import Holdings

_OWN = own.Registry("partition")
_OF_TRAINING = (
    "of your own data source.train_index says which rows these are; give the test rows by --test_data so that all rows "
    "are, or who holds each row by --owner"
)
_CLIENT = "client"  # the array of an npz that has each example's client


class Given(NamedTuple):
    """A partition as it was given: indices into the training examples as they are loaded."""

    clients: tuple[np.ndarray, ...]  # [C] arrays of int64
    size: int | None  # N, where each of the N examples was given its client


def resolve(given: Any, known: Collection[str] = ()) -> str:
    """The name by which settings hold a partition.

    Args:
      given: a name in `known`; a list of C index arrays; an array [N] of each example's client, -1 for nobody; the path
        of an npz with that array as `client`, or with an array for each client whose names end in 0, 1, ..., C - 1 (as
        np.savez(path, *arrays) calls them); or what this function returned.
      known: names that are taken as they are.

    Raises:
      InputError: a name that nothing has, a file or value that is no partition.
    """
    if isinstance(given, os.PathLike):
        given = os.fspath(given)
    if not isinstance(given, str):
        return _add("partition", _of_value(given), "")
    if given in known or given in _OWN:
        return given
    path = Path(given).expanduser()
    if path.exists() or given.endswith(".npz") or ("/" in given and not own.is_own(given)):
        return _add(path.name.removesuffix(".npz"), _of_file(given, path), given)
    if own.is_own(given):
        raise InputError(f"--partition={given} was a value, or a file that is not there now; give it again")
    raise unknown("partition", given, known)


def is_known(name: Any) -> bool:
    """Whether a partition of a user's own has this name in this process."""
    return name in _OWN


def title(name: str) -> str:
    """How tables call a partition: by its own name, and the file it is from."""
    return _OWN[name].titled(name) if name in _OWN else name


def file_of(name: str | None) -> str:
    """The file that a partition is from, as it was given; empty for ours and for values."""
    return _OWN[name].file if name is not None and name in _OWN else ""


def holdings(name: str, index: np.ndarray, total: int, *, once: bool = False) -> Holdings:
    """Who holds which of the N training examples that are left.

    Args:
      name: of a partition, from `resolve`.
      index: [N] the place of each of them among the `total` that were loaded; what is not left is held by nobody.
      once: whether no example may be held twice, as privacy of examples needs.

    Raises:
      InputError: an index beyond the examples, as many clients as not examples, or examples held twice.

    Warns:
      DataWarning: examples that are held more than once.
    """
    given: Given = _OWN[name].value
    what = f"--partition={title(name)}"
    if given.size is not None and given.size != total:
        raise InputError(
            f"{what} has the client of {given.size:,} examples, but {total:,} are loaded for training; {_OF_TRAINING}"
        )
    highest = max((int(part.max(initial=-1)) for part in given.clients), default=-1)
    if highest >= total:
        client = next(k for k, part in enumerate(given.clients) if part.max(initial=-1) >= total)
        raise InputError(
            f"{what}: client {client} holds the index {highest:,}, but {total:,} examples are loaded for training; "
            f"expected 0 to {total - 1:,}; {_OF_TRAINING}"
        )
    _tell_twice(what, given.clients, once=once)
    place = np.full(total, -1)
    place[index] = np.arange(len(index))
    kept = [found[found >= 0] for found in (place[part] for part in given.clients)]
    return from_counts(np.concatenate(kept), np.array([len(part) for part in kept]))


def _tell_twice(what: str, clients: Sequence[np.ndarray], *, once: bool) -> None:
    within = sum(len(part) - len(np.unique(part)) for part in clients)
    every = np.concatenate([np.unique(part) for part in clients])
    between = len(every) - len(np.unique(every))
    if not (within or between):
        return
    text = f"{what}: {within:,} examples are held again by the same client, {between:,} again by another one"
    if once:
        raise InputError(f"{text}; privacy of examples needs each to be held once")
    warnings.warn(text, DataWarning, stacklevel=4)


def _add(called: str, given: Given, file: str) -> str:
    content, _ = digest.of(tuple(given))
    return _OWN.add(called, content, own.Thing(given, file, ""))


def _of_value(given: Any) -> Given:
    """Raises InputError for what is neither a list of index arrays nor an array of clients."""
    if isinstance(given, Mapping):
        return _by_name("--partition", given)
    if not isinstance(given, np.ndarray) and getattr(given, "ndim", 0) == 1 and hasattr(given, "tolist"):
        given = given.tolist()  # a pandas Series, or an array of another library
    if not isinstance(given, np.ndarray | Sequence) or isinstance(given, bytes):
        raise InputError(
            f"--partition: {a_kind(given)} is no partition; give a name, a list of index arrays, one a "
            "client, an array [N] of each example's client, or the path of an npz"
        )
    if not len(given):
        raise InputError("--partition is an empty list; give the index array of at least one client")
    if np.ndim(given[0]) == 0:
        return _of_clients("--partition", given)
    return Given(tuple(_indices(f"--partition: client {k}", part) for k, part in enumerate(given)), None)


def _of_clients(what: str, given: Any) -> Given:
    """From an array [N] of each example's client."""
    if any(isinstance(value, str) for value in given):
        raise InputError(
            f"{what}: the clients of examples are texts, such as {next(v for v in given if isinstance(v, str))!r}; "
            "expected whole numbers: give them as owners (owner=...), or pd.factorize(...)[0]"
        )
    client = _whole(f"{what}: the clients of examples", given)
    if client.min() < -1 or client.max() < 0:
        raise InputError(
            f"{what}: the clients of examples reach from {client.min()} to {client.max()}; expected 0 to C - 1, and -1 "
            "for nobody's"
        )
    order = np.argsort(client, kind="stable")
    ends = np.searchsorted(client[order], np.arange(client.max() + 2))
    return Given(tuple(np.split(order, ends)[1:-1]), len(client))


def _by_name(what: str, arrays: Mapping[Any, Any]) -> Given:
    """From an array of each client, by names that end in the client's number."""
    numbers = {}
    for name in arrays:
        match = re.fullmatch(r"\D*(\d+)", str(name))
        if not match:
            raise InputError(
                f"{what}: {str(name)!r} names no client; expected names that end in 0 to C - 1, or {_CLIENT!r}"
            )
        numbers[int(match[1])] = name
    if sorted(numbers) != list(range(len(arrays))) or not arrays:
        raise InputError(
            f"{what} has arrays of the clients {listed(sorted(numbers)) or 'none'}; expected one each of 0 to C - 1"
        )
    return Given(tuple(_indices(f"{what}: client {k}", arrays[numbers[k]]) for k in range(len(arrays))), None)


def _of_file(given: str, path: Path) -> Given:
    what = f"--partition={given}"
    if not path.is_file():
        raise InputError(f"{what}: there is no such file; paths are relative to the working directory")
    arrays = arrays_of(path, what)
    return _of_clients(what, arrays[_CLIENT]) if [*arrays] == [_CLIENT] else _by_name(what, arrays)


def _indices(what: str, given: Any) -> np.ndarray:
    if not np.size(given):
        return np.zeros(0, np.int64)
    indices = _whole(f"{what}'s indices", given)
    if indices.min() < 0:
        raise InputError(f"{what} holds the index {indices.min()}; expected whole numbers of at least 0")
    return indices


def _whole(what: str, given: Any) -> np.ndarray:
    try:
        values = np.asarray(given)
    except (ValueError, TypeError) as error:
        raise InputError(f"{what} are no array ({error}); give whole numbers") from None
    if values.ndim != 1 or values.dtype.kind not in "ui" or not len(values):
        more = "; of a mask give np.flatnonzero(mask)" if values.dtype.kind == "b" else ""
        raise InputError(f"{what} are {values.dtype} of shape {values.shape}, expected whole numbers [n]{more}")
    return values.astype(np.int64)
