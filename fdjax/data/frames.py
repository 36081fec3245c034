"""`from_frame`: a pandas DataFrame as a checked data set."""

import warnings
from collections.abc import Collection, Hashable, Sequence
from typing import Any

import numpy as np

from fdjax.data.arrays import make_source
from fdjax.data.coding import Coded, code_labels, code_owners, listed, values_of
from fdjax.data.encoding import CATEGORIES, MISSING, Encoding, check, fit, plain
from fdjax.data.splitting import none_held_out, split_rows, tell_duplicates, tell_repeated
from fdjax.errors import DataWarning, InputError, a_kind, unknown
from fdjax.types import Source

_TEST_WORDS = ("test", "train")


def pandas() -> Any:
    """The module. Raises InputError where it is not installed."""
    try:
        import pandas
    except ImportError:
        raise InputError("tables need pandas: pip install 'fdjax[frames]'") from None
    return pandas


def from_frame(
    frame: Any,
    target: Any,
    owner: Any = None,
    *,
    test: Any = None,
    categories: str = "one_hot",
    missing: str = "refuse",
    ignore: Collection[Any] = (),
    row_id: Any = None,
    standardize: bool = True,
    name: str = "frame",
    labels: str = "",
    test_by: str = "label",
    seed: int = 0,
) -> Source:
    """A table as a data set: `fdjax.run(dataset=fdjax.from_frame(frame, target="income"), model="2nn")`.

    Numbers, bools and dates (days) become (x - mean) / std of the training rows; texts are categories. A level that no
    training row has is all zeros, or code 0. `source.encoding.inputs(rows)` makes inputs of rows to predict on.

    Args:
      frame: a pandas DataFrame of N rows.
      target: the column of labels, as `from_arrays` takes them.
      owner: the column of who holds each row, which is no input.
      test: the test rows: a fraction (0.2), another DataFrame, or a column of bools, 0 and 1, or "train" and "test".
      categories: a key of `encoding.CATEGORIES`.
      missing: what becomes of missing values, a key of `encoding.MISSING`. A target or an owner is never made up.
      ignore: columns that are no inputs.
      row_id: a column that is no input either, in which no value should be there twice.
      standardize: False leaves numbers as they are.
      name, labels, test_by, seed: as in `from_arrays`.

    Raises:
      InputError: for a table that clients cannot learn from, in one line.

    Warns:
      DataWarning: as `from_arrays`, and of rows left out, unseen levels, constant columns and columns like ids.
    """
    frame = _frame(name, frame)
    _check_options(name, frame, categories, missing, target=target, owner=owner, row_id=row_id, test=test)
    tests_name = name if test is None or np.isscalar(test) else f"{name}'s test rows"
    tests = None if tests_name == name else _frame(tests_name, test)
    split = str(test) if isinstance(test, str) else None
    inputs = _inputs(name, frame, [target, owner, row_id, split], names_of("ignore", ignore))
    needed = [*inputs, *(str(c) for c in (target, owner) if c is not None)]
    frame = _complete(name, frame, needed, str(target), owner, missing)
    check(name, frame, inputs)
    tests = None if tests is None else _complete(tests_name, tests, needed, str(target), owner, missing)
    train, tests, y, owners = _parts(name, frame, tests, str(target), owner, test, split, test_by, seed)
    columns = fit(name, train, inputs, categories, missing, standardize=standardize)
    space = labels or ("" if y.texts else f"{target}: ") + ", ".join(y.names)
    encoding = Encoding(columns, categories, missing, str(target), y.names, space)
    x, x_test = encoding.inputs(train, name), encoding.inputs(tests, tests_name)
    if row_id is not None and str(row_id) in tests.columns:
        tell_repeated(name, *(part[str(row_id)].astype(str).to_numpy() for part in (train, tests)))
    if tests is not train:
        tell_duplicates(name, x, x_test)
    more = {"mean": (0.0,), "std": (1.0,), "encoding": encoding, "categories": encoding.sizes, "fitted": standardize}
    return make_source(name, x, x_test, y, owners, space, train.index.to_numpy(), **more)


def rows_like(frame: Any, name: str, like: Source) -> Source:
    """All rows of a table as proxy data: inputs by the encoding of `like`, and its labels, if they have its target.

    With missing=drop rows with missing values are left out here too. Raises InputError where `like` is no table.
    """
    encoding: Encoding | None = like.encoding
    if encoding is None:
        raise InputError(f"--proxy={name} is a table, but {like.name} is none; give a table as --dataset too")
    frame = _frame(name, frame)
    has_labels = encoding.target in frame.columns
    needed = [*(column.name for column in encoding.columns), *([encoding.target] if has_labels else [])]
    if encoding.missing == "drop":
        frame = _complete(name, frame, needed, encoding.target, None, "drop")
    x = encoding.inputs(frame, name)
    y, labels = np.zeros(len(x), np.int32), f"{name} without labels"
    if has_labels:
        values = frame[encoding.target].to_numpy()
        texts = values_of(name, f"column {encoding.target!r}", values, labels=True).astype(str)
        if strange := sorted({*texts} - {*encoding.classes}):
            raise unknown(f"label of {name}", strange[0], encoding.classes)
        y, labels = np.array([encoding.classes.index(text) for text in texts], np.int32), encoding.labels
    return Source(name, x, y, x, y, len(encoding.classes), labels=labels, classes=encoding.classes, encoding=encoding)


def _frame(name: str, frame: Any) -> Any:
    """A table whose columns have texts for names, each another one, and whose rows have their places for index."""
    pd = pandas()
    if not isinstance(frame, pd.DataFrame):
        raise InputError(f"{name} is {a_kind(frame)}, expected a pandas DataFrame; give arrays to fdjax.from_arrays")
    if not len(frame):
        raise InputError(f"{name} has no rows; give at least one")
    return plain(name, frame)


def _check_options(name: str, frame: Any, categories: Any, missing: Any, **columns: Any) -> None:
    """Raises InputError for a target that is none, for values where the name of their column is expected, and for other
    ways than ours.
    """
    for option, value, known in (("categories", categories, CATEGORIES), ("missing", missing, MISSING)):
        if value not in known:
            raise unknown(option, value, known)
    if columns["target"] is None:
        raise InputError(f"{name}: target=None, expected the column of labels; give one of {listed(frame.columns)}")
    for option, value in columns.items():
        if isinstance(value, Hashable) or (option == "test" and hasattr(value, "columns")):
            continue
        if isinstance(value, list) and len(value) == 1 and str(value[0]) in frame.columns:
            raise InputError(f"{name}: {option}={value!r} is a list, expected a column's name; give {value[0]!r}")
        more = "a fraction, another DataFrame or a column's name" if option == "test" else "a column's name"
        raise InputError(
            f"{name}: {option} is {a_kind(value)}, expected {more}; make a column of the values, such as by "
            f"frame.assign({option}=...), and give {option}={option!r}"
        )


def names_of(option: str, given: Any) -> list[str]:
    """Columns, given as text with commas between them or one by one. Raises InputError for what are none."""
    if isinstance(given, str):
        return [part.strip() for part in given.split(",") if part.strip()]
    if not isinstance(given, Collection):
        raise InputError(f"{option}={given!r}: expected names of columns")
    return [str(column) for column in given]


def _inputs(name: str, frame: Any, outside: Sequence[Any], ignore: list[str]) -> list[str]:
    """The columns that are inputs, beside the target and what else is outside. Raises InputError for unknown ones."""
    others = [str(column) for column in outside if column is not None]
    for column in (*others, *ignore):
        if column not in frame.columns:
            raise unknown(f"column of {name}", column, frame.columns)
    if len({*others}) < len(others) or {*others} & {*ignore}:
        raise InputError(
            f"{name}: target, owner, row_id, test and ignore name {listed([*others, *ignore])}; expected different ones"
        )
    return [column for column in frame.columns if column not in {*others, *ignore}]


def _complete(name: str, frame: Any, needed: Sequence[str], target: str, owner: Any, missing: str) -> Any:
    """The table without the rows that are not to be in it. Raises InputError for missing values that nobody wants."""
    absent = [column for column in needed if column not in frame.columns]
    if absent:
        raise InputError(f"{name}: no column {listed(absent)}, which the training rows have; add it")
    gone = frame[list(needed)].isna()
    counts = {column: int(count) for column, count in gone.sum().items() if count}
    if not counts:
        return frame
    never = [column for column in counts if column in (target, str(owner))]
    if missing == "drop":
        kept = frame[~gone.any(axis=1)]
        if not len(kept):
            raise InputError(f"{name}: every row has a missing value, so that missing=drop leaves none; ignore columns")
        text = f"{name}: {len(frame) - len(kept):,} of {len(frame):,} rows left out for their missing values"
        warnings.warn(text, DataWarning, stacklevel=4)
        return kept
    if never or missing == "refuse":
        counts = {column: counts[column] for column in never} if missing != "refuse" else counts
        where = listed(f"{column} {count:,}" for column, count in counts.items())
        advice = "drop" if never else "drop, mean or level"
        raise InputError(
            f"{name}: missing values among {len(frame):,} rows: {where}; give missing={advice}, or mend them"
        )
    return frame


def _parts(
    name: str, frame: Any, tests: Any, target: str, owner: Any, test: Any, split: str | None, by: str, seed: int
) -> tuple[Any, Any, Coded, Coded | None]:
    """Training rows, test rows, labels, owners."""
    if split is not None:
        rows = _test_rows(name, frame[split])
        frame, tests = frame[~rows], frame[rows]

    def coded(part: Any, role: str, column: str) -> Any:
        if part is None or column not in part.columns:
            return None
        return values_of(name, f"{role} column {column!r}", part[column].to_numpy(), labels=role == "target")

    y = code_labels(name, coded(frame, "target", target), coded(tests, "target", target))
    owners = None
    if owner is not None:
        owners = code_owners(name, coded(frame, "owner", str(owner)), coded(tests, "owner", str(owner)))
    if tests is not None:
        return frame, tests, y, owners
    if none_held_out(name, test):  # as proxy data
        return frame, frame, y._replace(test=y.train), owners
    rows = split_rows(name, y.train, None if owners is None else owners.train, 0.2 if test is None else test, by, seed)
    return frame[~rows], frame[rows], y.split(rows), None if owners is None else owners.split(rows)


def _test_rows(name: str, column: Any) -> np.ndarray:
    """Which rows a column says are test rows, [N] bool."""
    values = column.to_numpy()
    if set(values) <= {0, 1}:
        rows = values.astype(bool)
    elif set(values) <= {*_TEST_WORDS}:
        rows = values == _TEST_WORDS[0]
    else:
        raise InputError(
            f"{name}: column {column.name!r} has {listed(dict.fromkeys(values))}; expected train and test, or bools"
        )
    if rows.all() or not rows.any():
        raise InputError(
            f"{name}: column {column.name!r} makes {rows.sum():,} of {len(rows):,} rows test rows; expected some"
        )
    return rows
