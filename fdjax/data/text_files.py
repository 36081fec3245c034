"""Files of texts: LEAF's JSON, of speeches or of its own sequences, and plain text."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from fdjax.data.texts import Windows, fraction_of, from_texts, source_of
from fdjax.errors import InputError
from fdjax.types import Source

SUFFIXES = (".json", ".json.gz", ".txt", ".txt.gz")
_FORMS = '{"user_data": {user: [text, ...]}}, or {"users": [...], "user_data": {user: {"x": [...], "y": [...]}}}'

Users = dict[str, Any]


def has_users(path: Path) -> bool:
    """Whether a file of texts says who wrote what."""
    return path.name.lower().endswith((".json", ".json.gz"))


def read_texts(
    path: Path,
    name: str,
    *,
    unit: str = "character",
    length: int = 80,
    stride: int = 1,
    vocabulary: int | None = None,
    test_data: Path | None = None,
    test_fraction: float | None = None,
) -> Source:
    """The source of a file, and of another one that is tested on, if it is given.

    `.txt` is one text of nobody, in UTF-8. `.json` has texts by user, `{"user_data": {user: [text, ...]}}`, or LEAF's
    own sequences, `{"users": [...], "user_data": {user: {"x": [...], "y": [...]}}}` of characters; both may be gzipped.
    The options are those of `from_texts`; sequences that are cut already have those of the test part alone.
    Raises InputError for a file that cannot be read, is damaged or of another form, and for options that mean nothing.
    """
    texts, tested = _content(path), None if test_data is None else _content(test_data)
    if tested is not None and _is_cut(texts) != _is_cut(tested):
        raise InputError(f"{path.name} and {_called(test_data)} are not both texts; expected two files of one form")
    if not _is_cut(texts):
        return from_texts(
            texts, unit=unit, length=length, stride=stride, vocabulary=vocabulary, test_texts=tested,
            test_fraction=test_fraction, name=name,
        )  # fmt: skip
    for option, value, usual in (("unit", unit, "character"), ("stride", stride, 1), ("vocabulary", vocabulary, None)):
        if value != usual:
            raise InputError(
                f"{path.name} has sequences that are cut already, so {option}={value} means nothing; leave it out"
            )
    return _of_sequences(name, path, texts, tested, length, fraction_of(test_fraction, tested is not None))


def read_like(path: Path, name: str, like: Source) -> Source:
    """A file of texts as proxy data: sequences of the length and with the vocabulary of `like`, none held out.

    Raises InputError for a source without tokens, and for sequences that are cut already.
    """
    texts = _content(path)
    if not like.vocabulary or _is_cut(texts):
        what = "sequences that are cut already" if _is_cut(texts) else "texts"
        raise InputError(f"--proxy={path.name} has {what}, but --dataset={like.name} has to be read alike; give others")
    known, length = like.vocabulary[:-2], like.train_x.shape[1]
    unit = "word" if any(len(token) > 1 for token in known) else "character"
    return from_texts(texts, unit=unit, length=length, vocabulary=known, test_fraction=0, name=name)


def _called(path: Path | None) -> str:
    return "" if path is None else path.name


def _is_cut(texts: Any) -> bool:
    """Whether they are LEAF's sequences."""
    return isinstance(texts, dict) and isinstance(next(iter(texts.values())), dict)


def _content(path: Path) -> Any:
    """A list of one text, or what there is by user."""
    text = _text(path)
    if not has_users(path):
        return [text]
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path.name} is no JSON ({error}); expected {_FORMS}") from None
    users = content.get("user_data") if isinstance(content, dict) else None
    if not isinstance(users, dict) or not users:
        raise InputError(f"{path.name} has no users with data; expected {_FORMS}")
    texts = all(isinstance(each, list) for each in users.values())
    if not texts and not all(isinstance(each, dict) and {"x", "y"} <= each.keys() for each in users.values()):
        raise InputError(f"{path.name} has users of another form; expected {_FORMS}")
    return users


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.name.lower().endswith(".gz") else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name} is not UTF-8 (at byte {error.start}); save it as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path.name} cannot be read ({error}); give a file of texts") from None


def _of_sequences(name: str, path: Path, users: Users, tested: Users | None, length: int, fraction: float) -> Source:
    """LEAF's own: x of L characters and y the next one; between training and test those that overlap are left out."""
    rows: list[list[tuple[int, str, str]]] = [[], []]
    number = {user: i for i, user in enumerate({**users, **(tested or {})})}
    for part, of_part in enumerate((users, tested or {})):
        for user, each in of_part.items():
            x, y = _pairs(path, user, each, length)
            mine = [(number[user], a, b) for a, b in zip(x, y, strict=True)]
            end = len(mine) - round(fraction * len(mine))
            rows[part] += mine[: end - _overlap(x, end, length)]
            rows[1] += mine[end:]
    known = sorted({letter for _, x, y in rows[0] for letter in x + y})
    token = {letter: i for i, letter in enumerate(known)}

    def windows(rows: list[tuple[int, str, str]]) -> Windows:
        read = [row for row in rows if row[2] in token]
        x = np.asarray([[token.get(letter, len(known)) for letter in row[1]] for row in read], np.int32)
        y, owner = (np.asarray(each, np.int32) for each in ([token[row[2]] for row in read], [row[0] for row in read]))
        return Windows(x.reshape(-1, length), y, owner, len(rows) - len(read))

    train = windows(rows[0])
    test = windows(rows[1]) if tested is not None or fraction else train
    return source_of(name, train, test, known, tuple(map(str, number)))


def _pairs(path: Path, user: str, each: Users, length: int) -> tuple[list[str], list[str]]:
    """x and y of a user. Raises InputError unless they are as many texts of one length and characters."""
    x, y = each["x"], each["y"]
    if not isinstance(x, list) or not isinstance(y, list) or len(x) != len(y):
        raise InputError(f"{path.name}: user {user!r} has not as many x as y, both lists; expected {_FORMS}")
    if not all(isinstance(a, str) and isinstance(b, str) and len(b) == 1 for a, b in zip(x, y, strict=True)):
        raise InputError(f"{path.name}: user {user!r} has other x and y than texts and the one character after each")
    wrong = next((a for a in x if len(a) != length), None)
    if wrong is not None:
        raise InputError(
            f"{path.name}: user {user!r} has an x of {len(wrong)} characters; expected length={length} of all, or give "
            "their length"
        )
    return x, y


def _overlap(x: list[str], end: int, length: int) -> int:
    """How many sequences before `end` share characters with what comes after, if neighbours are shifted by a few."""
    if not 0 < end < len(x):
        return 0
    shift = next((s for s in range(1, length) if x[end - 1][s:] == x[end][:-s]), 0)
    return min(end, length // shift) if shift else 0
