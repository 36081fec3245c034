"""Tables in files, as `from_frame` takes them: CSV and its like, and Parquet."""

import warnings
import zlib
from pathlib import Path
from typing import Any

from fdjax.data.coding import listed
from fdjax.data.frames import from_frame, pandas, rows_like
from fdjax.errors import InputError
from fdjax.types import Source

COMPRESSED = ("", ".gz", ".bz2", ".xz")
CSV = tuple(f"{kind}{end}" for kind in (".csv", ".tsv", ".data") for end in COMPRESSED)
_DELIMITERS = ",;\t|"
_ABSENT = ["?"]  # missing values beside those that pandas knows, as in the UCI repository's files


def read_table(
    path: Path,
    name: str,
    *,
    target: str | None = None,
    owner: str | None = None,
    ignore: str | None = None,
    row_id: str | None = None,
    header: bool | None = None,
    categories: str = "one_hot",
    missing: str = "refuse",
    standardize: bool = True,
    test_data: Path | None = None,
    test_fraction: float | None = None,
    test_by: str = "label",
    seed: int = 0,
) -> Source:
    """A CSV (delimiter by its first line) or Parquet table, of which `test_data` is another one with the test rows.

    Without a header, columns are called 0, 1, ...; by default the first row is one, unless it holds numbers, which is
    refused. `ignore` is columns with commas between them. As `from_frame` otherwise.
    """
    frame = read(path, header)
    if target is None:
        raise InputError(f"{path.name} needs its column of labels, --target=...; it has {listed(frame.columns)}")
    if test_data is not None and test_fraction:
        raise InputError(f"test_fraction={test_fraction:g} beside test data {test_data.name}; give one of them")
    test = test_fraction if test_data is None else read(test_data, header)
    return from_frame(
        frame, target, owner, test=test, categories=categories, missing=missing, ignore=ignore or (), row_id=row_id,
        standardize=standardize, name=name, test_by=test_by, seed=seed,
    )  # fmt: skip


def read_like(path: Path, name: str, like: Source, *, header: bool | None = None) -> Source:
    """All rows of a table as proxy data, as `rows_like` has them."""
    return rows_like(read(path, header), name, like)


def read(path: Path, header: bool | None = None) -> Any:
    """The table of a file. Raises InputError for one that is damaged, empty or without a header where it needs one."""
    pd = pandas()
    try:
        if path.name.lower().endswith(".parquet"):
            return pd.read_parquet(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return _read_csv(path, header)
    except InputError:
        raise
    except (OSError, EOFError, UnicodeError, ValueError, zlib.error, pd.errors.ParserWarning) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path.name} cannot be read as a table: {reason}; expected UTF-8 rows of equal length"
        ) from None


def _read_csv(path: Path, header: bool | None) -> Any:
    pd = pandas()
    lines = pd.read_csv(path, sep="\0", header=None, nrows=1, dtype=str, skip_blank_lines=True, quoting=3)
    line = str(lines.iloc[0, 0])
    delimiter = max(_DELIMITERS, key=line.count)
    common = {"sep": delimiter, "skipinitialspace": True, "na_values": _ABSENT, "index_col": False, "low_memory": False}
    first = pd.read_csv(path, **common, header=None, nrows=1, dtype=str, keep_default_na=False).iloc[0].tolist()
    if header is not False:
        _check_header(path, [str(cell) for cell in first], sure=header is True)
        return pd.read_csv(path, **common)
    frame = pd.read_csv(path, **common, header=None)
    return frame.set_axis([str(i) for i in range(frame.shape[1])], axis=1)


def _check_header(path: Path, cells: list[str], *, sure: bool) -> None:
    """Raises InputError for names that are there twice, and for numbers where nobody said that they are names."""
    twice = sorted({cell for cell in cells if cells.count(cell) > 1})
    numbers = [cell for cell in cells if _is_number(cell)]
    counting = numbers in ([str(i) for i in range(len(numbers))], [str(i + 1) for i in range(len(numbers))])
    if numbers and not counting and not sure:
        raise InputError(
            f"{path.name}: its first row has numbers ({listed(numbers)}), as data have; give --header=false, and "
            "columns as 0, 1, ..., or --header=true"
        )
    if twice:
        raise InputError(
            f"{path.name} has more than one column called {listed(twice)}; rename them, or give --header=false"
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
