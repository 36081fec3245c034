"""Labels and owners as whole numbers from 0, with the names that they had."""

import warnings
from typing import Any, NamedTuple

import numpy as np

from fdjax.errors import DataWarning, InputError

_MOST_NAMED = 5  # names that a message lists
_MANY_LABELS = 100


class Coded(NamedTuple):
    """Values as codes, which are places in `names`."""

    names: tuple[str, ...]
    train: np.ndarray  # [N] int32
    test: np.ndarray | None  # [M] int32
    plain: bool  # whether the values are the codes themselves
    texts: bool  # whether the values are texts, which say what they mean

    def split(self, test: np.ndarray) -> "Coded":
        """The rows `test` [N] bool, of training values, as test values."""
        return self._replace(train=self.train[~test], test=self.train[test])

    def tell_unseen(self, name: str, what: str, meaning: str) -> None:
        """Warn of values of the test part that no training row has."""
        test = np.zeros(0, np.int32) if self.test is None else self.test
        unseen = ~np.isin(test, self.train)
        if unseen.any():
            which = [self.names[code] for code in np.unique(test[unseen])]
            warnings.warn(
                f"{name}: {unseen.sum():,} test examples have a {what} that no training example has ({listed(which)}): "
                f"{meaning}",
                DataWarning,
                stacklevel=5,
            )


def listed(names: Any) -> str:
    """Names in words, the first few of many."""
    names = [str(name) for name in names]
    more = f" and {len(names) - _MOST_NAMED:,} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def values_of(name: str, what: str, given: Any, *, labels: bool = False) -> np.ndarray:
    """One plain value an example, [N]: whole numbers, texts or bools. Raises InputError for anything else.

    `what` they are is how an error calls them; of `labels` it says why they are to be whole.
    """
    try:
        values = np.asarray(given)
    except (ValueError, TypeError) as error:
        raise InputError(f"{name}: {what} is no array ({error}); give one value for each example") from None
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        hot = f"; of one-hot labels give {what}.argmax(axis=1)" if values.ndim == 2 and labels else ""
        raise InputError(f"{name}: {what} has shape {values.shape}, expected [N]{hot}")
    if not len(values):
        raise InputError(f"{name}: {what} is empty; give at least one example")
    if values.dtype.kind == "S":
        return np.char.decode(values, "utf-8", "replace")
    if values.dtype.kind == "O":
        return _plain(name, what, values, labels=labels)
    if values.dtype.kind == "f":
        if bad := int((~np.isfinite(values)).sum()):
            raise InputError(
                f"{name}: {what} is NaN or infinite in {bad:,} of {len(values):,} examples; mend or leave these out"
            )
        if (values != np.round(values)).any():
            part = float(values[values != np.round(values)][0])
            why = " (fdjax classifies)" if labels else ""
            raise InputError(f"{name}: {what} holds {part:g}, expected whole numbers or names{why}")
        return values.astype(np.int64)
    if values.dtype.kind not in "buiU":
        raise InputError(f"{name}: {what} holds {values.dtype}, expected whole numbers, texts or bools")
    return values


def _plain(name: str, what: str, values: np.ndarray, *, labels: bool) -> np.ndarray:
    """An array of objects as one of texts, whole numbers or bools."""
    missing = sum(value is None or value != value for value in values)
    if missing:
        raise InputError(
            f"{name}: {what} is missing in {missing:,} of {len(values):,} examples; mend or leave these out"
        )
    for kinds in (str, bool | np.bool_, int | float | np.number):
        if all(
            isinstance(value, kinds) and (kinds is bool | np.bool_ or not isinstance(value, bool)) for value in values
        ):
            return values_of(name, what, np.array(values.tolist()), labels=labels)
    kinds = listed(sorted({type(value).__name__ for value in values}))
    raise InputError(
        f"{name}: {what} holds values of several kinds or of none that is known ({kinds}); give texts or whole numbers"
    )


def code_labels(name: str, y: np.ndarray, y_test: np.ndarray | None) -> Coded:
    """Labels as 0 to K - 1 in sorted order of all that occur. Raises InputError unless they are two or more classes."""
    coded = _code(name, "y", y, y_test, together=True)
    if len(coded.names) < 2:
        raise InputError(f"{name}: all labels are {listed(coded.names)}; expected two or more classes to tell apart")
    if len(coded.names) > _MANY_LABELS and 2 * len(coded.names) > len(y):
        raise InputError(
            f"{name}: {len(coded.names):,} different labels of {len(y):,} examples; is it a number to predict? "
            "fdjax classifies: give classes"
        )
    return coded


def code_owners(name: str, owner: np.ndarray | None, owner_test: np.ndarray | None) -> Coded | None:
    """Owners as 0 to C - 1 in sorted order, those that are in the test part alone behind them."""
    return None if owner is None else _code(name, "owner", owner, owner_test, together=False)


def _code(name: str, what: str, train: np.ndarray, test: np.ndarray | None, *, together: bool) -> Coded:
    parts = [train] if test is None else [train, test]
    if len({part.dtype.kind if part.dtype.kind != "u" else "i" for part in parts}) > 1:
        raise InputError(
            f"{name}: {what} holds {_kind(train)}, but {what}_test {_kind(parts[1])}; give both in one form"
        )
    if np.result_type(*parts).kind == "f":  # uint64 beside int64, which NumPy would make float64
        parts = [part.astype(np.uint64 if min(p.min() for p in parts) >= 0 else object) for part in parts]
    every = np.unique(np.concatenate(parts))
    if not together:
        first = np.unique(train)
        every = np.concatenate([first, every[~np.isin(every, first)]])
    order = np.argsort(every)
    codes = [order[np.searchsorted(every, part, sorter=order)].astype(np.int32) for part in parts]
    plain = every.dtype.kind in "ui" and np.array_equal(every, np.arange(len(every)))
    names = tuple(str(value) for value in every.tolist())
    return Coded(names, codes[0], codes[1] if test is not None else None, plain, every.dtype.kind == "U")


def _kind(values: np.ndarray) -> str:
    return {"U": "texts", "b": "bools"}.get(values.dtype.kind, "numbers")
