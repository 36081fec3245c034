"""`from_arrays`: a user's own arrays as a checked data set, and the same from an npz file."""

import os
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fdjax.data.cache import DAMAGED
from fdjax.data.checked import checked
from fdjax.data.coding import Coded, code_labels, code_owners, values_of
from fdjax.data.npz import arrays_of
from fdjax.data.splitting import none_held_out, split_rows, tell_duplicates, tell_repeated
from fdjax.data.statistics import standard
from fdjax.errors import DataWarning, InputError, unknown
from fdjax.types import Source

_NPZ = ("x", "y", "x_test", "y_test", "owner", "owner_test", "ids", "ids_test", "labels")
_LEAST_DIGITS = 1e4  # of a feature's mean over its std: beyond it float32 keeps less than three digits of a difference


def from_arrays(
    x: Any,
    y: Any,
    x_test: Any = None,
    y_test: Any = None,
    owner: Any = None,
    owner_test: Any = None,
    *,
    ids: Any = None,
    ids_test: Any = None,
    name: str = "arrays",
    labels: str = "",
    test_fraction: float | None = None,
    test_by: str = "label",
    seed: int = 0,
) -> Source:
    """A data set of your own, to give as `dataset` or `proxy`: `fdjax.run(dataset=fdjax.from_arrays(x, y), ...)`.

    Inputs are standardised on the training data alone, per channel or last axis, when a model sees them, unless
    `standardize=False` is among the settings.

    Args:
      x: [N, ...] numbers, anything array-like. Images are uint8 (or whole numbers 0 to 255) [N, height, width] or
        [N, height, width, channels]; all else becomes float32.
      y: [N] labels: whole numbers, texts or bools, which become 0 to K - 1 in sorted order, with their names
        in `Source.classes`.
      x_test, y_test: the same of M test examples. Without them, `test_fraction` (0.2) of the examples is held out.
      owner, owner_test: [N] and [M] who holds each example, numbers or texts; with it the partition is `natural`.
      ids, ids_test: [N] and [M] what each example is called, to find those that are there twice.
      name: what tables call it.
      labels: what the labels name; proxy data of the same are labelled. By default texts name themselves.
      test_fraction: of all examples, drawn by `seed`. 0 for proxy data: none is held out, and the test part is the
        training part.
      test_by: "label": the same share of every label; "owner": of every owner's examples.

    Raises:
      InputError: for anything that clients cannot learn from, in one line.

    Warns:
      DataWarning: examples that are in both parts, ids that are there twice, labels and owners of the test part alone.
    """
    _check_texts(name, labels)
    own_test = _parts_given(name, x_test, y_test, owner, owner_test, ids, ids_test, test_fraction)
    x, y, owner, ids = _part(name, "", x, y, owner, ids)
    if own_test:
        x_test, y_test, owner_test, ids_test = _part(name, "_test", x_test, y_test, owner_test, ids_test)
        x, x_test = _inputs(name, x, x_test)
    else:
        (x,) = _inputs(name, x)
    coded, owners = code_labels(name, y, y_test), code_owners(name, owner, owner_test)
    if not own_test and none_held_out(name, test_fraction):
        return make_source(name, x, x, coded._replace(test=coded.train), owners, labels)
    rows = None
    if not own_test:
        rows, test = _rows(name, coded, owners, test_fraction, test_by, seed)
        x, x_test, ids, ids_test = x[rows], x[test], *((None, None) if ids is None else (ids[rows], ids[test]))
        coded, owners = coded.split(test), None if owners is None else owners.split(test)
    tell_repeated(name, ids, ids_test)
    tell_duplicates(name, x, x_test)
    return make_source(name, x, x_test, coded, owners, labels, rows)


def make_source(
    name: str,
    x: np.ndarray,
    x_test: np.ndarray,
    y: Coded,
    owner: Coded | None,
    labels: str,
    rows: np.ndarray | None = None,
    **more: Any,
) -> Source:
    """A checked source of inputs [N, ...] and [M, ...] and of what is coded; tells what the test part alone has.

    `rows` are the places of the N among what the user gave, by default these in their order.
    """
    assert y.test is not None
    statistics = {} if "mean" in more else {**_statistics(name, x), "fitted": True}
    source = Source(
        name,
        x,
        y.train,
        x_test,
        y.test,
        len(y.names),
        train_owner=None if owner is None else owner.train,
        test_owner=None if owner is None else owner.test,
        labels=labels or (", ".join(y.names) if y.texts else ""),
        classes=() if y.plain else y.names,
        owners=() if owner is None or owner.plain else owner.names,
        train_index=(np.arange(len(x)) if rows is None else rows).astype(np.int32),
        **{**statistics, **more},
    )
    y.tell_unseen(name, "label", "no model can learn them, and they count as errors")
    if owner is not None:
        owner.tell_unseen(name, "owner", "they are in the test set, and in no client's own part")
    return checked(source)


def read_npz(
    path: Path,
    name: str,
    *,
    test_data: Path | None = None,
    test_fraction: float | None = None,
    test_by: str = "label",
    seed: int = 0,
) -> Source:
    """An npz with x and y, and if it likes x_test, y_test, owner, owner_test, ids, ids_test, and a text `labels`.

    `test_data` is another one, whose x, y, owner and ids are those of the test part. As `from_arrays` otherwise.
    """
    given = _load(path)
    if test_data is not None:
        if twice := [key for key in given if key.endswith("_test")]:
            raise InputError(f"{path.name} has {', '.join(twice)} already; leave --test_data out")
        given |= {f"{key}_test": value for key, value in _load(test_data).items() if f"{key}_test" in _NPZ}
    if missing := [key for key in ("x", "y") if key not in given]:
        raise InputError(f"{path.name} has no {' and no '.join(missing)}; it has {', '.join(given) or 'nothing'}")
    labels = str(given.pop("labels", ""))
    return from_arrays(**given, name=name, labels=labels, test_fraction=test_fraction, test_by=test_by, seed=seed)  # pyright: ignore[reportCallIssue]


def npz_has_owners(path: Path) -> bool:
    """Whether an npz says who holds each example; reads its list of contents alone."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "owner.npy" in archive.namelist()
    except (OSError, *DAMAGED):
        return False  # said when it is read


def _load(path: Path) -> dict[str, np.ndarray]:
    found = arrays_of(path, repr(os.fspath(path)))
    for key in found:
        if key not in _NPZ:
            raise unknown(f"array of {path.name}", key, _NPZ)
    return found


def _check_texts(name: Any, labels: Any) -> None:
    if not isinstance(name, str) or not isinstance(labels, str):
        raise InputError(f"from_arrays: name={name!r}, labels={labels!r}: expected texts")


def _parts_given(
    name: str, x_test: Any, y_test: Any, owner: Any, owner_test: Any, ids: Any, ids_test: Any, fraction: Any
):
    """Whether test data are given. Raises InputError for a part of them, or for a fraction beside them."""
    if (x_test is None) != (y_test is None):
        raise InputError(
            f"{name}: {'y_test' if x_test is None else 'x_test'} alone; give both x_test and y_test, or none"
        )
    given = x_test is not None
    none_held_out(name, fraction)  # raises, if it is a bool
    if given and fraction:
        raise InputError(f"{name}: test_fraction={fraction!r} beside test data; give one of them")
    for what, part, test in (("owner", owner, owner_test), ("ids", ids, ids_test)):
        if test is not None and (part is None or not given):
            raise InputError(f"{name}: {what}_test needs {what} and x_test; give these too, or leave it out")
    return given


def _part(name: str, suffix: str, x: Any, y: Any, owner: Any, ids: Any):
    """Arrays of one part, of equal lengths: x, y, owner, ids."""
    x = _array(name, f"x{suffix}", x)
    if x.ndim < 2:
        more = "; give [N, 1] for one feature" if x.ndim == 1 else ""
        raise InputError(f"{name}: x{suffix} has shape {x.shape}, expected [N, ...]{more}")
    if not x.size:
        raise InputError(f"{name}: x{suffix} has shape {x.shape}, and so no numbers; give at least one example")
    found = [x]
    for what, part in (("y", y), ("owner", owner), ("ids", ids)):
        values = None if part is None and what != "y" else values_of(name, f"{what}{suffix}", part, labels=what == "y")
        if values is not None and len(values) != len(x):
            raise InputError(
                f"{name}: x{suffix} has {len(x)} examples, but {what}{suffix} has {len(values)}; give one each"
            )
        found.append(values)
    return found


def _array(name: str, what: str, given: Any) -> np.ndarray:
    """Numbers as they were given. Raises InputError for what are none."""
    try:
        array = np.asarray(given)
    except (ValueError, TypeError) as error:
        raise InputError(f"{name}: {what} is no array ({error}); give examples of one shape") from None
    if array.dtype.kind in "buif":
        return array
    if hasattr(given, "columns"):
        raise InputError(f"{name}: {what} is a table with columns that are no numbers; give it to fdjax.from_frame")
    if array.dtype.kind == "O" and hasattr(given, "toarray"):
        raise InputError(f"{name}: {what} is a sparse {type(given).__name__}; give {what}.toarray()")
    raise InputError(f"{name}: {what} holds {array.dtype} of shape {array.shape}, expected whole or floating numbers")


def _inputs(name: str, *parts: np.ndarray) -> list[np.ndarray]:
    """Both parts as uint8 images [N, height, width, channels], or as float32."""
    first = parts[0]
    for part in parts[1:]:
        if part.shape[1:] != first.shape[1:]:
            raise InputError(
                f"{name}: x has examples of shape {first.shape[1:]}, x_test {part.shape[1:]}; give one shape"
            )
        kinds = {part.dtype.kind == "f", first.dtype.kind == "f"}
        if len(kinds) > 1 and {part.dtype, first.dtype} & {np.dtype(np.uint8)}:
            raise InputError(f"{name}: x is {first.dtype}, x_test {part.dtype}: images in two forms; give one of them")
    if first.ndim in (3, 4) and _are_bytes(parts):
        return [
            np.ascontiguousarray(part.astype(np.uint8)[..., None] if part.ndim == 3 else part, np.uint8)
            for part in parts
        ]
    return [_as_float(name, what, part) for what, part in zip(("x", "x_test"), parts, strict=False)]


def _are_bytes(parts: Sequence[np.ndarray]) -> bool:
    """Whether they are pixels: uint8, or whole numbers from 0 to 255, and not 0 and 1 alone."""
    if all(part.dtype == np.uint8 for part in parts):
        return True
    whole = all(part.dtype.kind in "ui" for part in parts)
    return whole and min(part.min() for part in parts) >= 0 and 1 < max(part.max() for part in parts) <= 255


def _as_float(name: str, what: str, x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        small = np.ascontiguousarray(x, np.float32)
    if x.dtype.itemsize > 4 and x.dtype.kind == "f" and np.isinf(small).any() and not np.isinf(x).any():
        raise InputError(f"{name}: {what} has numbers beyond float32's 3.4e38; scale them down")
    if not (np.isfinite(small.min()) and np.isfinite(small.max())):  # no array of its size is made
        bad = np.flatnonzero(~np.isfinite(small).reshape(len(small), -1).all(axis=1))
        raise InputError(
            f"{name}: inputs are not finite in {len(bad):,} of {len(small):,} examples, the first of them "
            f"{what}[{bad[0]}]; mend or remove them"
        )
    return small


def _statistics(name: str, x: np.ndarray) -> dict[str, Any]:
    """Mean and std that standardise training inputs."""
    found = standard(x)
    if x.dtype != np.uint8:
        rough = np.flatnonzero(np.abs(found["mean"]) > _LEAST_DIGITS * found["std"])
        if len(rough) and len(x) > 1:
            j = int(rough[0])
            warnings.warn(
                f"{name}: feature {j} is {found['mean'][j]:.6g} ± {found['std'][j]:.2g}, of which float32 keeps few "
                f"digits ({len(rough)} such); subtract its mean in float64 first",
                DataWarning,
                stacklevel=5,
            )
    return {key: tuple(value.tolist()) for key, value in found.items()}


def _rows(name: str, y: Coded, owner: Coded | None, fraction: float | None, by: str, seed: int):
    """Places of the training examples, and which are test examples, [N] bool, where they come without test data."""
    fraction = 0.2 if fraction is None else fraction
    test = split_rows(name, y.train, None if owner is None else owner.train, fraction, by, seed)
    return np.flatnonzero(~test), test
