"""How columns of a table become inputs: numbers standardised, categories one-hot or codes, fitted to training rows."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fdjax.data.coding import listed
from fdjax.errors import DataWarning, InputError, a_kind

CATEGORIES = {
    "one_hot": "a 0/1 input for each level",
    "embedded": "one input, the level's code, which a net that embeds them takes",
}
MISSING = {
    "refuse": "says where they are, and ends",
    "drop": "leaves out the rows",
    "mean": "a number becomes the training mean, a category its most frequent level",
    "level": "a category has a level of its own for it, a number the training mean and a 0/1 input beside",
}
_ABSENT = "missing"  # the level of a category that is missing
_MOST_INPUTS = 10_000
_DAMAGED = 0.9  # the least share of a column's different texts that are numbers in one that was meant to be of numbers
_NUMBER = r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*|\s*[+-]?(nan|inf|infinity)\s*"
_WITH_COMMAS = r"\s*[+-]?(\d{1,3}(,\d{3})+(\.\d*)?|\d+,\d+)\s*"  # of thousands, or for a decimal point
_IN_WORDS = {"number": "numbers", "date": "dates", "category": "texts"}
_DATE = r"\d{4}-\d{2}-\d{2}([T ][\d:.]+(Z|[+-]\d\d:?\d\d)?)?"
_FEW = 20  # levels that no column has too many of


class Column(NamedTuple):
    """One column of a table, as training rows have it."""

    name: str
    kind: str  # "number", "date" (days), "category"
    levels: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0
    fill: str | float = ""  # what a missing value becomes: a level or a number
    marked: bool = False  # whether a number has an input beside it that says that it is missing


class Encoding(NamedTuple):
    """What makes inputs of rows. `inputs(frame)` gives those of other rows of the same columns, to predict on."""

    columns: tuple[Column, ...]
    categories: str
    missing: str
    target: str
    classes: tuple[str, ...]
    labels: str  # what the labels name

    @property
    def names(self) -> tuple[str, ...]:
        """What each of the F inputs is called."""
        found: list[str] = []
        for column in self.columns:
            if column.kind == "category" and self.categories == "one_hot":
                found += [f"{column.name}={level}" for level in column.levels]
            else:
                found += [column.name, *([f"{column.name} is missing"] if column.marked else [])]
        return tuple(found)

    @property
    def scaled(self) -> tuple[bool, ...]:
        """[F] whether each input is a number, which is standardised."""
        found: list[bool] = []
        for column in self.columns:
            if column.kind == "category":
                found += [False] * (len(column.levels) if self.categories == "one_hot" else 1)
            else:
                found += [True, *([False] if column.marked else [])]
        return tuple(found)

    @property
    def sizes(self) -> tuple[int, ...]:
        """[F] the codes of each input, 0 for a number, as `Source.categories` has them; () without codes."""
        if self.categories == "one_hot" or all(column.kind != "category" for column in self.columns):
            return ()
        return tuple(size for c in self.columns for size in ([len(c.levels) + 1] if c.levels else [0] * (1 + c.marked)))

    def inputs(self, frame: Any, name: str = "the table") -> np.ndarray:
        """Inputs [N, F] float32 of the rows of a table, or of what `pandas.DataFrame` makes one of.

        `name` is how errors call it. Raises InputError for a column that is not there or of another kind, and for
        missing values where the training rows were to have none; warns of levels that they do not have.
        """
        frame = plain(name, frame)
        absent = [column.name for column in self.columns if column.name not in frame.columns]
        if absent:
            raise InputError(f"{name} has no column {listed(absent)}, which the training rows have; add it")
        parts, unseen = [], {}
        for column in self.columns:
            series = frame[column.name]
            if self.missing in ("refuse", "drop") and series.isna().any():
                where = _where(series.isna())
                raise InputError(f"{name}: column {column.name!r} is missing in {where}; mend or drop these")
            if column.kind == "category":
                codes = _codes(column, series)
                if count := int((codes < 0).sum()):
                    unseen[column.name] = count
                parts.append(
                    _one_hot(codes, len(column.levels)) if self.categories == "one_hot" else codes[:, None] + 1
                )
            else:
                parts += _numbers(name, column, series)
        if unseen:
            where = ", ".join(f"{name} {count:,}" for name, count in unseen.items())
            warnings.warn(
                f"{len(frame):,} test rows have levels that no training row has ({where}); they count as no level",
                DataWarning,
                stacklevel=4,
            )
        return np.concatenate(parts, axis=1, dtype=np.float32)


def plain(name: str, frame: Any) -> Any:
    """A table whose columns have texts for names, each another one, and whose rows have their places for index.

    Raises InputError for what `pandas.DataFrame` makes no such table of.
    """
    import pandas as pd

    try:
        frame = frame if isinstance(frame, pd.DataFrame) else pd.DataFrame(frame)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{name} is {a_kind(frame)}, of which pandas makes no table ({reason}); give a DataFrame"
        ) from None
    columns = [str(column) for column in frame.columns]
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise InputError(f"{name} has more than one column called {listed(twice)}; rename them")
    return frame.set_axis(columns, axis=1).reset_index(drop=True)


def check(name: str, frame: Any, columns: Sequence[str]) -> None:
    """Raises InputError for a column of all rows, before some are held out, that is damaged or of no kind."""
    for column in columns:
        kind = kind_of(name, frame[column])
        if kind != "category":
            _as_numbers(name, frame[column], kind)


def fit(
    name: str, frame: Any, columns: Sequence[str], categories: str, missing: str, *, standardize: bool
) -> tuple[Column, ...]:
    """The columns of training rows. Raises InputError for one that is no input, or too many levels."""
    found = [_column(name, frame[column], missing, standardize=standardize) for column in columns]
    if not found:
        raise InputError(f"{name} has no column beside the target and those left out; give one to learn from")
    width = sum(len(column.levels) or 1 for column in found)
    if categories == "one_hot" and width > _MOST_INPUTS:
        most = max(found, key=lambda column: len(column.levels))
        raise InputError(
            f"{name}: one-hot codes are {width:,} inputs, {len(most.levels):,} of them of column {most.name!r}; leave "
            "it out (ignore), or give categories=embedded"
        )
    constant = [c.name for c in found if len(c.levels) == 1 or (not c.levels and c.std == 0)]
    if constant:
        _warn(f"{name}: the same in all training rows, so that nothing is learned from it: {listed(constant)}")
    return tuple(column._replace(std=column.std or 1.0) for column in found)


def kind_of(name: str, series: Any, *, fitted: bool = False) -> str:
    """The kind of a column. Raises InputError for one that holds neither numbers, dates, texts nor bools.

    Unless it is `fitted`, so that it has a kind that this is compared with, also for one that is damaged.
    """
    import pandas as pd

    types = pd.api.types
    if types.is_complex_dtype(series.dtype):
        raise InputError(f"{name}: column {series.name!r} holds complex numbers; give their parts as columns")
    if types.is_datetime64_any_dtype(series.dtype) or types.is_timedelta64_dtype(series.dtype):
        return "date"
    if isinstance(series.dtype, pd.CategoricalDtype):
        return "category"
    if types.is_numeric_dtype(series.dtype):  # bools too
        return "number"
    values = series.dropna()
    kinds = {type(value) for value in values}
    if kinds <= {bool, np.bool_}:  # with missing values, so that they are objects
        return "number"
    if kinds <= {str}:
        return _kind_of_texts(name, values, fitted=fitted)
    if kinds <= {int, float, np.float64, np.int64}:
        return "number"
    words = listed(sorted(kind.__name__ for kind in kinds))
    raise InputError(f"{name}: column {series.name!r} holds {words}; expected numbers, or texts, or dates, of one kind")


def _kind_of_texts(name: str, values: Any, *, fitted: bool) -> str:
    """The kind of a column of texts: dates of the form 2026-01-31, with or without a time, or else categories.

    Where at least nine in ten of its different values read as numbers, with commas maybe, or as dates, and some do not,
    the column is a damaged one, and refused: as categories it would silently be another data set. The share is ours.
    Texts that are all plain numbers are categories, as their owner made texts of them.
    """
    import pandas as pd

    levels = pd.Series(values.unique(), dtype=object)
    dates, numbers = levels.str.fullmatch(_DATE), levels.str.fullmatch(_NUMBER)
    if len(levels) and dates.all():
        return "date"
    if fitted:
        return "category"
    for what, good, readable in (
        ("numbers", numbers, numbers | levels.str.fullmatch(_WITH_COMMAS)),
        ("dates", dates, dates),
    ):
        if len(levels) and not good.all() and readable.mean() >= _DAMAGED:
            column, strange = values.name, ~values.isin(levels[good])
            commas = "without commas, " if values[strange].str.fullmatch(_WITH_COMMAS).all() else ""
            raise InputError(
                f"{name}: column {column!r} has {what} in {(~strange).sum():,} of {len(values):,} rows, but "
                f"{values[strange].iloc[0]!r} in {_where(strange)}; write {what} there, {commas}or make the column "
                f"categories in Python, by frame.astype({{{column!r}: 'category'}})"
            )
    return "category"


def _where(rows: Any) -> str:
    """Which rows of the data a column of bools says, in words; the first row is row 1."""
    found = rows.index[rows.to_numpy(bool)]
    first = f"row {found[0] + 1:,}"
    return first if len(found) == 1 else f"{len(found):,} rows, the first of them {first}"


def _column(name: str, series: Any, missing: str, *, standardize: bool) -> Column:
    kind, absent = kind_of(name, series, fitted=True), series.isna()  # `check` looked for damage, in all rows
    if absent.all():
        raise InputError(f"{name}: column {series.name!r} is missing in all training rows; leave it out (ignore)")
    if kind != "category":
        values = _as_numbers(name, series, kind)[~absent.to_numpy()]
        _tell_row_numbers(name, series, values)
        mean, std = (values.mean(), values.std()) if standardize else (0.0, 1.0)
        std = 0.0 if values.max() == values.min() else std
        filled = mean if standardize else values.mean()
        marked = missing == "level" and bool(absent.any())
        return Column(str(series.name), kind, mean=float(mean), std=float(std), fill=float(filled), marked=marked)
    counts = series[~absent].astype(str).value_counts()
    levels = tuple(sorted(counts.index))
    if len(levels) > _FEW and 2 * len(levels) > len(series):
        raise InputError(
            f"{name}: column {series.name!r} has {len(levels):,} different values in {len(series):,} training rows, as "
            "an id or free text has; leave it out (ignore)"
        )
    own_level = missing == "level" and bool(absent.any())
    levels += (_ABSENT,) if own_level and _ABSENT not in levels else ()
    fill = _ABSENT if own_level else str(counts.sort_index().idxmax()) if missing == "mean" else ""
    return Column(str(series.name), kind, levels=levels, fill=fill)


def _tell_row_numbers(name: str, series: Any, values: np.ndarray) -> None:
    """Warn of whole numbers that are there once each and without a gap, or nearly so, as the numbers of rows are."""
    if len(values) <= _FEW or values.dtype.kind != "f" or (values != np.round(values)).any():
        return
    if len(np.unique(values)) == len(values) and np.ptp(values) < 2 * len(values):
        _warn(
            f"{name}: column {series.name!r} has another whole number in each row, as an id has; leave it out (ignore)?"
        )


def _as_numbers(name: str, series: Any, kind: str) -> np.ndarray:
    """Numbers [N] float64, NaN where missing; dates in days since 1970."""
    import pandas as pd

    if kind == "date":
        if pd.api.types.is_timedelta64_dtype(series.dtype):
            return (series / pd.Timedelta(days=1)).to_numpy(float)
        try:
            times = pd.to_datetime(series, utc=True, format=None if series.dtype.kind == "M" else "ISO8601")
        except (ValueError, TypeError) as error:
            raise InputError(f"{name}: column {series.name!r} has what is no date ({error})") from None
        return ((times - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(days=1)).to_numpy(float)
    values = series.to_numpy(dtype=float, na_value=np.nan)
    if np.isinf(values).any():
        where = _where(pd.Series(np.isinf(values), index=series.index))
        raise InputError(f"{name}: column {series.name!r} is infinite in {where}; mend or leave these out")
    return values


def _numbers(name: str, column: Column, series: Any) -> list[np.ndarray]:
    kind, absent = kind_of(name, series, fitted=True), series.isna()
    if kind != column.kind and not absent.all():
        form = _DATE if column.kind == "date" else _NUMBER
        wrong = ~(absent | series.astype(str).str.fullmatch(form))
        such = f" ({str(series[wrong].iloc[0])!r} in {_where(wrong)})" if wrong.any() else ""
        expected, found = (_IN_WORDS[each] for each in (column.kind, kind))
        raise InputError(
            f"{name}: column {column.name!r} holds {expected} in the training rows, but {found} here{such}; give "
            f"{expected}"
        )
    values = _as_numbers(name, series, kind)
    absent = np.isnan(values)
    scaled = (np.where(absent, float(column.fill), values) - column.mean) / column.std
    return [part[:, None] for part in (scaled, *([absent] if column.marked else []))]


def _codes(column: Column, series: Any) -> np.ndarray:
    """The place of each row's level, -1 for one that no training row has."""
    import pandas as pd

    absent = series.isna().to_numpy()
    texts = np.where(absent, column.fill, series.astype(str).to_numpy())
    return pd.Index(column.levels).get_indexer(texts)


def _one_hot(codes: np.ndarray, levels: int) -> np.ndarray:
    return (codes[:, None] == np.arange(levels)).astype(np.float32)


def _warn(text: str) -> None:
    warnings.warn(text, DataWarning, stacklevel=5)
