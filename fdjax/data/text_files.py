"""Files of texts: LEAF's JSON, of speeches or of its own sequences, and plain text."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from fdjax.data.texts import Windows, check_fraction, from_texts, source_of
from fdjax.errors import InputError
from fdjax.types import Source

ENDINGS = (".json", ".json.gz", ".txt", ".txt.gz")
_FORMS = '{"user_data": {user: [text, ...]}}, or {"users": [...], "user_data": {user: {"x": [...], "y": [...]}}}'


def is_text_file(path: Path) -> bool:
    """Whether the name ends as that of a file of texts does."""
    return path.name.lower().endswith(ENDINGS)


def read_texts(path: Path, **options: Any) -> Source:
    """The source of a file.

    `.txt` is one text of nobody, in UTF-8. `.json` has texts by user, `{"user_data": {user: [text, ...]}}`, or LEAF's
    own sequences, `{"users": [...], "user_data": {user: {"x": [...], "y": [...]}}}` of characters; both may be gzipped.
    `options` are those of `from_texts`; of sequences that are cut already only `test_fraction` matters.
    Raises InputError for a file that cannot be read, is damaged or of another form, and for options that mean nothing.
    """
    name, text = path.name, _text(path)
    if path.name.lower().endswith((".txt", ".txt.gz")):
        return from_texts([text], name=name, **options)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{str(path)!r} is no JSON ({error}); expected {_FORMS}") from None
    users = content.get("user_data") if isinstance(content, dict) else None
    if not isinstance(users, dict) or not users:
        raise InputError(f"{str(path)!r} has no users with data; expected {_FORMS}")
    if all(isinstance(each, list) for each in users.values()):
        return from_texts(users, name=name, **options)
    if not all(isinstance(each, dict) and {"x", "y"} <= each.keys() for each in users.values()):
        raise InputError(f"{str(path)!r} has users of another form; expected {_FORMS}")
    extra = sorted(set(options) - {"test_fraction"})
    if extra:
        raise InputError(f"{str(path)!r} has sequences that are cut already, so {extra[0]} means nothing; leave it out")
    return _of_sequences(path, users, **options)


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.name.lower().endswith(".gz") else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{str(path)!r} is not UTF-8 (at byte {error.start}); save it as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{str(path)!r} cannot be read ({error}); give a file of texts") from None


def _of_sequences(path: Path, users: dict[str, Any], test_fraction: float = 0.2) -> Source:
    """LEAF's own: x of L characters and y the next one; between training and test those that overlap are left out."""
    check_fraction(test_fraction)
    lengths = {len(x) for each in users.values() for x in each["x"] if isinstance(x, str)}
    for user, each in users.items():
        x, y = each["x"], each["y"]
        good = isinstance(x, list) and isinstance(y, list) and len(x) == len(y)
        if not good or not all(isinstance(a, str) and isinstance(b, str) and len(b) == 1 for a, b in zip(x, y)):
            raise InputError(
                f"{str(path)!r}: user {user!r} has other than as many texts x as single characters y; expected {_FORMS}"
            )
    if len(lengths) != 1 or not min(lengths):
        raise InputError(f"{str(path)!r}: sequences x have lengths {sorted(lengths)[:5]}; expected one length")
    (length,) = lengths
    parts: list[list[tuple[int, str, str]]] = [[], []]
    for owner, each in enumerate(users.values()):
        rows = [(owner, x, y) for x, y in zip(each["x"], each["y"], strict=True)]
        end = len(rows) - round(test_fraction * len(rows))
        parts[1] += rows[end:]
        parts[0] += rows[: end - _overlap(each["x"], end, length)]
    seen = sorted({letter for _, x, y in parts[0] for letter in x + y})
    number = {letter: i for i, letter in enumerate(seen)}

    def windows(rows: list[tuple[int, str, str]]) -> Windows:
        known = [row for row in rows if row[2] in number]
        x = np.asarray([[number.get(letter, len(seen)) for letter in row[1]] for row in known], np.int32)
        return Windows(
            x.reshape(-1, length),
            np.asarray([number[row[2]] for row in known], np.int32),
            np.asarray([row[0] for row in known], np.int32),
        )

    train = windows(parts[0])
    return source_of(path.name, train, windows(parts[1]) if test_fraction else train, seen, with_owners=True)


def _overlap(x: list[str], end: int, length: int) -> int:
    """How many sequences before `end` share characters with what comes after, if neighbours are shifted by a few."""
    if not 0 < end < len(x):
        return 0
    shift = next((s for s in range(1, length) if x[end - 1][s:] == x[end][:-s]), 0)
    return min(end, -(-(length + 1) // shift) - 1) if shift else 0
