"""Test rows of a data set that comes without, and what is in both parts."""

import warnings
from typing import Any

import numpy as np

from fdjax.data.options import at_least
from fdjax.data.own_test import largest_remainder
from fdjax.errors import DataWarning, InputError, unknown


def none_held_out(name: str, fraction: Any) -> bool:
    """Whether a fraction is 0, with which the test part is the training part. Raises InputError for a bool."""
    if isinstance(fraction, bool | np.bool_):
        raise InputError(f"{name}: test_fraction={fraction!r}: expected a number from 0 to below 1")
    return isinstance(fraction, int | float | np.number) and fraction == 0


def split_rows(name: str, y: np.ndarray, owner: np.ndarray | None, fraction: Any, by: str, seed: int) -> np.ndarray:
    """Which of the N examples are test examples, [N] bool: a fraction of each label's or of each owner's.

    They are `fraction` N in all, dealt to the groups by largest remainder, drawn by `seed`; each group keeps one for
    training. Raises InputError if that is none.
    """
    number = isinstance(fraction, int | float | np.number) and not isinstance(fraction, bool)
    if not number or not 0 < fraction < 1:
        raise InputError(f"{name}: test_fraction={fraction!r}: expected a number above 0 and below 1")
    if by not in ("label", "owner"):
        raise unknown("test_by", by, ("label", "owner"))
    if by == "owner" and owner is None:
        raise InputError(f"{name}: test_by=owner needs the owner of each example; give it, or test_by=label")
    group = np.unique(y if owner is None or by == "label" else owner, return_inverse=True)[1]
    size = np.bincount(group)
    total = round(fraction * len(y))
    quota = np.minimum(largest_remainder(size[None] * total / len(y))[0], size - 1)
    if not quota.sum():
        raise InputError(
            f"{name}: test_fraction={fraction:g} of {len(y)} examples leaves none to test; give more of either"
        )
    rng = np.random.default_rng([at_least("seed", seed, 0), 3])
    shuffled = rng.permutation(len(y))
    order = shuffled[np.argsort(group[shuffled], kind="stable")]  # group after group, each at random
    place = np.arange(len(y)) - np.repeat(np.cumsum(size) - size, size)
    test = np.zeros(len(y), bool)
    test[order] = place < np.repeat(quota, size)
    return test


def tell_duplicates(name: str, x: np.ndarray, x_test: np.ndarray) -> None:
    """Warn of test examples whose inputs are, bit by bit, those of a training example."""
    known = {hash(row.tobytes()) for row in x}
    twice = sum(hash(row.tobytes()) in known for row in x_test)
    if twice:
        warnings.warn(
            f"{name}: {twice:,} of {len(x_test):,} test examples have the inputs of a training example; what is tested "
            "on them was seen in training",
            DataWarning,
            stacklevel=4,
        )


def tell_repeated(name: str, ids: np.ndarray | None, ids_test: np.ndarray | None) -> None:
    """Warn of ids that more than one example has."""
    if ids is None:
        return
    within = len(ids) - len(np.unique(ids))
    both = 0 if ids_test is None else int(np.isin(ids_test, ids).sum())
    within += 0 if ids_test is None else len(ids_test) - len(np.unique(ids_test))
    if within or both:
        warnings.warn(
            f"{name}: {within:,} examples have the id of another one in their part, {both:,} test examples that of a "
            "training example",
            DataWarning,
            stacklevel=4,
        )
