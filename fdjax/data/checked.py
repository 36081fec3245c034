"""Whether a data set is one that clients can learn from."""

from collections.abc import Iterator

import numpy as np

from fdjax.errors import InputError
from fdjax.types import Source


def checked(source: Source) -> Source:
    """The same source.

    Raises InputError unless it has training and test examples of one shape, uint8, finite floats or tokens of its
    vocabulary, as many labels as examples, all of them whole numbers from 0 to num_classes - 1 of two or more, and an
    owner for each if for any.
    """
    name = source.name
    if source.num_classes < 2:
        raise InputError(f"{name} has num_classes={source.num_classes}; expected 2 or more")
    for part, x, y, owner in _parts(source):
        if not len(x):
            raise InputError(f"{name} has no {part} examples; give at least one")
        if x.shape[1:] != source.train_x.shape[1:] or x.ndim < 2:
            raise InputError(
                f"{name}: {part} inputs have shape {x.shape}, expected [N, ...] as the train inputs' "
                f"{source.train_x.shape}"
            )
        _check_labels(f"{name}: {part}", x, y, source.num_classes)
        _check_inputs(f"{name}: {part}", x, len(source.vocabulary))
        if owner is not None and np.shape(owner) != np.shape(y):
            raise InputError(f"{name}: {part} owners have shape {np.shape(owner)}, expected {np.shape(y)}, one a label")
    return source


def _parts(source: Source) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray | None]]:
    yield "train", source.train_x, source.train_y, source.train_owner
    yield "test", source.test_x, source.test_y, source.test_owner
    if source.validation is not None:
        yield "validation", *source.validation, None


def _check_labels(what: str, x: np.ndarray, y: np.ndarray, num_classes: int) -> None:
    if np.ndim(y) != 1 or not np.issubdtype(np.asarray(y).dtype, np.integer):
        raise InputError(
            f"{what} labels have shape {np.shape(y)} and dtype {np.asarray(y).dtype}; expected [N] integers"
        )
    if len(x) != len(y):
        raise InputError(f"{what} inputs are {len(x)}, but labels {len(y)}; give a label for each")
    if y.min() < 0 or y.max() >= num_classes:
        raise InputError(
            f"{what} labels reach from {y.min()} to {y.max()}, expected 0 to num_classes - 1 = {num_classes - 1}"
        )


def _check_inputs(what: str, x: np.ndarray, tokens: int) -> None:
    if tokens or x.dtype == np.int32:
        _check_tokens(what, x, tokens)
        return
    if x.dtype == np.uint8:
        return
    if x.dtype != np.float32:
        raise InputError(f"{what} inputs are {x.dtype}; expected uint8 for images in 0 to 255, else float32")
    if np.isfinite(x.min(initial=0)) and np.isfinite(x.max(initial=0)):  # no array of the size of x is made
        return
    bad = np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(axis=1))
    raise InputError(
        f"{what} inputs are not finite in {len(bad)} of {len(x)} examples, the first at {bad[0]}; mend or remove them"
    )


def _check_tokens(what: str, x: np.ndarray, tokens: int) -> None:
    if not tokens:
        raise InputError(
            f"{what} inputs are int32, as sequences of tokens are, but the source has no vocabulary; name the tokens, "
            "or give uint8 for images, else float32"
        )
    if x.dtype != np.int32 or x.ndim != 2:
        raise InputError(
            f"{what} inputs are {x.dtype} {x.shape}, but the source has a vocabulary of {tokens}; expected int32 "
            "sequences [N, L] of tokens"
        )
    if x.min() < 0 or x.max() >= tokens:
        bad = np.flatnonzero((x < 0).any(1) | (x >= tokens).any(1))
        raise InputError(
            f"{what} tokens reach from {x.min()} to {x.max()}, first in example {bad[0]}; expected 0 to {tokens - 1}, "
            f"the places of the vocabulary of {tokens}"
        )
