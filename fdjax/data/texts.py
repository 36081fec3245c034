"""Texts as sequences of tokens, of which the label is the next one: `from_texts`, and files of texts."""

import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fdjax.data.options import at_least
from fdjax.errors import DataWarning, InputError, a_kind, unknown
from fdjax.types import Source

UNITS = {"character": "every character", "word": "every word and every punctuation mark, as they are written"}
UNKNOWN, PADDING = "<unknown>", "<padding>"
_WORD = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]")
_MOST = 2**31 - 1  # bytes of the windows, more than which is an oversight

Texts = Mapping[str, Sequence[str]] | Sequence[str]


class Windows(NamedTuple):
    """Sequences of tokens, what follows each, and whose they are."""

    x: np.ndarray  # [N, L] int32
    y: np.ndarray  # [N] int32
    owner: np.ndarray  # [N] int32
    unknown: int = 0  # how many more an unknown token follows, which are left out


def from_texts(
    texts: Texts,
    *,
    unit: str = "character",
    length: int = 80,
    stride: int = 1,
    test_texts: Texts | None = None,
    test_fraction: float | None = None,
    vocabulary: int | Sequence[str] | None = None,
    name: str = "texts",
) -> Source:
    """Sequences of `length` tokens and the token that follows each, as LEAF has Shakespeare (Caldas et al. 2018).

    The texts of an owner are joined by line breaks and read as one. Its last `test_fraction` of tokens is its test:
    sequences of training end before it and those of the test begin in it, so they share no token. A part of no more
    than `length` tokens is one sequence, with padding in front of it.

    Tokens 0 to K - 1 are known, the most frequent first, and are the labels; then come the unknown one and padding. A
    sequence that an unknown token follows is left out, because there is nothing to predict.

    Args:
      texts: {owner: [text, ...]} in order of time, whose owners become natural clients, or a list or Series.
      unit: what a token is, one of `UNITS`.
      length: L, tokens of a sequence.
      stride: tokens from the beginning of a sequence to that of the next.
      test_texts: what is tested on, in the same form, in place of the last part of each text.
      test_fraction: in [0, 1), of each owner's tokens, by default 0.2; owners too short for both parts have training
        alone. 0 for proxy data: the test part is the training part.
      vocabulary: None: all tokens of the training text; a number: the most frequent of them; or the tokens themselves.
      name: how tables call the source.

    Returns:
      A `Source` of inputs int32 `[N, L]` with its `vocabulary`. Owners without a sequence to train on are no clients;
      their test is in the test set.

    Raises:
      InputError: what are no texts, options out of range, and texts of which no sequence is left for either part.

    Warns:
      DataWarning: owners without a sequence to train on, sequences that an unknown token follows.
    """
    if unit not in UNITS:
        raise unknown("unit of texts", str(unit), UNITS)
    length, stride = at_least("length", length, 1), at_least("stride", stride, 1)
    fraction = fraction_of(test_fraction, test_texts is not None)
    streams = {owner: _tokens(unit, its) for owner, its in _by_owner(name, texts).items()}
    ends = {owner: len(stream) - round(fraction * len(stream)) for owner, stream in streams.items()}
    training = {owner: stream[: ends[owner]] for owner, stream in streams.items()}
    known = _known(name, vocabulary, [*training.values()])
    tested = {owner: stream[ends[owner] :] for owner, stream in streams.items()} if fraction else training
    if test_texts is not None:
        tested = {owner: _tokens(unit, its) for owner, its in _by_owner(f"{name}, to test on", test_texts).items()}
    number = {owner: i for i, owner in enumerate({**training, **tested})}

    def windows(part: Mapping[Any, Sequence[str]]) -> Windows:
        return _windows({number[owner]: stream for owner, stream in part.items()}, known, length, stride)

    train = windows(training)
    test = train if tested is training else windows(tested)
    return source_of(name, train, test, known, tuple(map(str, number)) if isinstance(texts, Mapping) else ())


def source_of(name: str, train: Windows, test: Windows, known: list[str], owners: tuple[str, ...]) -> Source:
    """The source of windows, whose owners, if any, are numbered anew: those that train, then those of the test alone.

    Raises InputError if a part is empty; warns of owners that do not train and of sequences that are left out.
    """
    for part, windows in (("train", train), ("test", test)):
        if not len(windows.y):
            raise InputError(f"{name}: no sequence is left to {part} on; give longer texts or a shorter length")
    training = np.unique(train.owner).tolist()
    kept = training + np.setdiff1d(test.owner, training).tolist()
    number = np.zeros(max(kept) + 1, np.int32)
    number[kept] = np.arange(len(kept))
    if owners:
        _tell_owners(name, owners, training, kept)
    for part, windows in [("train", train)] if test is train else [("train", train), ("test", test)]:
        if windows.unknown:
            text = (
                f"{name}: an unknown token follows {windows.unknown:,} of {windows.unknown + len(windows.y):,} "
                f"sequences to {part} on, which are left out, because there is nothing to predict"
            )
            warnings.warn(DataWarning(text), stacklevel=3)
    return Source(
        name,
        train.x,
        train.y,
        test.x,
        test.y,
        len(known),
        train_owner=number[train.owner] if owners else None,
        test_owner=number[test.owner] if owners else None,
        classes=tuple(known),
        owners=tuple(owners[i] for i in kept) if owners else (),
        labels=f"tokens {hashlib.sha256(repr(known).encode()).hexdigest()[:12]}",
        vocabulary=(*known, UNKNOWN, PADDING),
    )


def _tell_owners(name: str, owners: tuple[str, ...], training: Sequence[int], kept: Sequence[int]) -> None:
    """Warn of owners that are in the test set alone, and of those that are nowhere."""
    in_test, nowhere = [*kept][len(training) :], sorted({*range(len(owners))} - {*kept})
    for which, fate in (
        (in_test, "no sequence to train on; they are in the test set, and in no client's own part"),
        (nowhere, "no sequence to train or test on and are left out"),
    ):
        if which:
            text = f"{name}: {len(which)} of {len(owners)} owners, such as {owners[which[0]]!r}, have {fate}"
            warnings.warn(DataWarning(text), stacklevel=4)


def fraction_of(fraction: Any, other_test: bool) -> float:
    """The share that is tested on. Raises InputError unless it is a number from 0 to below 1, and the only test."""
    if other_test and fraction is not None:
        raise InputError(f"test_fraction={fraction!r} beside a test part; give one of them")
    if fraction is None:
        return 0.0 if other_test else 0.2
    is_number = isinstance(fraction, int | float | np.number) and not isinstance(fraction, bool)
    if not is_number or not 0 <= fraction < 1:
        raise InputError(f"test_fraction={fraction!r}: expected a number from 0 to below 1")
    return float(fraction)


def _by_owner(name: str, texts: Any) -> dict[Any, list[str]]:
    """The texts of each owner. Raises InputError for what is neither of the two forms; arrays and Series are lists."""
    expected = "expected {owner: [text, ...]} or [text, ...]"
    if isinstance(texts, Mapping):
        owned = {owner: [its] if isinstance(its, str) else its for owner, its in texts.items()}
    else:
        owned = {"texts": texts}
    if not owned:
        raise InputError(f"{name}: there are no texts; {expected}")
    for owner, its in owned.items():
        whose = repr(owner) if isinstance(texts, Mapping) else "the list"
        if isinstance(its, str | bytes) or not (isinstance(its, Sequence) or getattr(its, "ndim", 0) == 1):
            what = f"{whose} has" if isinstance(texts, Mapping) else "this is"
            raise InputError(f"{name}: {what} {a_kind(its)}; {expected}")
        wrong = [i for i, text in enumerate(its) if not isinstance(text, str)]
        if wrong:
            raise InputError(f"{name}: {whose} has {a_kind([*its][wrong[0]])} at {wrong[0]}; {expected}")
    return {owner: list(its) for owner, its in owned.items()}


def _tokens(unit: str, texts: Sequence[str]) -> list[str]:
    text = "\n".join(texts)
    return list(text) if unit == "character" else _WORD.findall(text)


def _known(name: str, vocabulary: Any, training: Sequence[Sequence[str]]) -> list[str]:
    """The tokens that are labels. Raises InputError unless there are two or more, no name being one of ours."""
    if vocabulary is None or isinstance(vocabulary, int | np.integer):
        if vocabulary is not None:
            at_least("vocabulary", vocabulary, 2)
        counted = Counter(token for stream in training for token in stream)
        known = [token for token, _ in sorted(counted.items(), key=lambda item: (-item[1], item[0]))[:vocabulary]]
        if len(known) < 2:
            have = f"{known[0]!r} alone" if known else "no token"
            raise InputError(f"{name}: the training texts have {have}; expected two or more different tokens")
        return known
    given = list(vocabulary) if isinstance(vocabulary, Sequence) else []
    if len(given) < 2 or not all(isinstance(token, str) and token for token in given):
        raise InputError(f"vocabulary={vocabulary!r}: expected a number, or a list of two or more tokens")
    twice = next((token for token, number in Counter([*given, UNKNOWN, PADDING]).items() if number > 1), None)
    if twice is not None:
        raise InputError(f"vocabulary: {twice!r} is there twice, counting {UNKNOWN} and {PADDING}, which we add")
    return given


def _windows(streams: Mapping[int, Sequence[str]], known: Sequence[str], length: int, stride: int) -> Windows:
    """The windows of each owner's stream, without those that an unknown token follows."""
    number, unseen = {token: i for i, token in enumerate(known)}, len(known)
    size = sum(len(stream) for stream in streams.values()) // stride * length * 4
    if size > _MOST:
        raise InputError(
            f"sequences of {length} tokens every {stride} of these texts need {size / 1e9:.1f} GB; give a larger stride"
        )
    found, unknown_next = [], 0
    for owner, stream in streams.items():
        tokens = np.asarray([number.get(token, unseen) for token in stream], np.int32)
        if len(tokens) < 2:
            continue
        if len(tokens) <= length:
            padding = np.full(length + 1 - len(tokens), unseen + 1, np.int32)
            tokens = np.concatenate([padding, tokens])
        rows = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::stride]
        unknown_next += int(np.sum(rows[:, -1] >= unseen))
        rows = rows[rows[:, -1] < unseen]
        found.append((rows[:, :-1], rows[:, -1], np.full(len(rows), owner, np.int32)))
    if not found:
        return Windows(np.zeros((0, length), np.int32), np.zeros(0, np.int32), np.zeros(0, np.int32))
    x, y, owner = (np.ascontiguousarray(np.concatenate(each)) for each in zip(*found, strict=True))
    return Windows(x, y, owner, unknown_next)
