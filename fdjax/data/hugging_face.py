"""Data sets of Hugging Face's `datasets`, as its `save_to_disk` leaves them."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from fdjax.data.arrays import from_arrays
from fdjax.data.coding import listed
from fdjax.data.frames import from_frame, names_of, rows_like
from fdjax.data.images import VALIDATION, stack
from fdjax.errors import DataWarning, InputError, unknown
from fdjax.types import Source


def is_saved(path: Path) -> bool:
    """Whether a folder is what `save_to_disk` leaves of a Dataset or a DatasetDict."""
    prepared = (path / "features.json").is_file()  # by tensorflow-datasets, which writes a dataset_info.json too
    return not prepared and any((path / file).is_file() for file in ("dataset_dict.json", "dataset_info.json"))


def read_saved(
    path: Path,
    name: str,
    *,
    target: str | None = None,
    owner: str | None = None,
    ignore: str | None = None,
    row_id: str | None = None,
    categories: str = "one_hot",
    missing: str = "refuse",
    standardize: bool = True,
    image_size: int | None = None,
    test_fraction: float | None = None,
    test_by: str = "label",
    seed: int = 0,
) -> Source:
    """A Dataset, or a DatasetDict with a split train and maybe test (or else validation).

    The target is by default its only ClassLabel. Of an Image feature, images are the inputs, as `read_images` has them;
    of one of arrays (Array2D, List of numbers), those; of anything else, all other columns, as `from_frame` has them.
    """
    train, test = _splits(path)
    target = _target(path, train, target)
    for column in (owner, row_id):
        if column is not None and column not in train.column_names:
            raise unknown(f"column of {name}", column, train.column_names)
    if test is not None and test_fraction:
        raise InputError(f"test_fraction={test_fraction:g}, but {path.name} has a test split; leave it out")
    ignored = names_of("ignore", ignore or ())
    column = _array_column(path, train, {target, owner, row_id, *ignored})
    split = {"test_by": test_by, "seed": seed}
    if column is None:
        frames = [None if part is None else _frame(part, target) for part in (train, test)]
        return from_frame(
            frames[0], target, owner, test=test_fraction if test is None else frames[1], categories=categories,
            missing=missing, ignore=ignored, row_id=row_id, standardize=standardize, name=name, **split,
        )  # fmt: skip
    parts = [part for part in (train, test) if part is not None]
    x = _inputs(name, parts, column, image_size)
    given = {"x": x[: len(train)], "y": _labels(train, target)}
    given |= {key: np.asarray(train[c]) for key, c in (("owner", owner), ("ids", row_id)) if c is not None}
    if test is not None:
        given |= {"x_test": x[len(train) :], "y_test": _labels(test, target)}
        given |= {f"{key}_test": np.asarray(test[c]) for key, c in (("owner", owner), ("ids", row_id)) if c is not None}
    return from_arrays(**given, name=name, test_fraction=test_fraction, **split)


def _splits(path: Path) -> tuple[Any, Any]:
    """Training rows, and test rows or None."""
    try:
        import datasets
    except ImportError:
        raise InputError(f"{path} is of Hugging Face's datasets: pip install 'fdjax[hf]'") from None
    try:
        saved = datasets.load_from_disk(str(path), keep_in_memory=False)
    except Exception as error:  # of Arrow, of JSON, of its own
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path} cannot be read as a saved data set: {reason}; save it again with save_to_disk"
        ) from None
    if not isinstance(saved, dict):
        return saved, None
    if "train" not in saved:
        raise InputError(f"{path} has the splits {listed(saved)}; expected train, and maybe test")
    held = next((split for split in ("test", *VALIDATION) if split in saved), None)
    others = [split for split in saved if split not in ("train", held)]
    if held in VALIDATION:
        text = f"{path.name} has no split test; its split {held} is tested on"
        warnings.warn(text, DataWarning, stacklevel=4)
    if others:
        text = f"{path.name}: the splits {listed(others)} are left out; --validation_fraction takes some of train"
        warnings.warn(text, DataWarning, stacklevel=4)
    return saved["train"], None if held is None else saved[held]


def _target(path: Path, rows: Any, target: str | None) -> str:
    import datasets

    if target is not None:
        if target not in rows.column_names:
            raise unknown(f"column of {path.name}", target, rows.column_names)
        return target
    labels = [name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(labels) != 1:
        raise InputError(
            f"{path.name} has {len(labels)} ClassLabel features among {listed(rows.column_names)}; name its labels, "
            "--target=..."
        )
    return labels[0]


def _array_column(path: Path, rows: Any, outside: set[str | None]) -> str | None:
    """The feature that is images or arrays; None where all are plain values."""
    import datasets

    found = [n for n, f in rows.features.items() if n not in outside and not isinstance(f, datasets.Value)]
    found = [name for name in found if not isinstance(rows.features[name], datasets.ClassLabel)]
    if len(found) > 1:
        raise InputError(f"{path.name} has the array features {listed(found)}; leave out all but one, --ignore=...")
    return found[0] if found else None


def _inputs(name: str, parts: list[Any], column: str, size: int | None) -> np.ndarray:
    import datasets

    if isinstance(parts[0].features[column], datasets.Image):
        opened = [
            (f"{column} of row {i} of {name}", lambda part=part, i=i: part[i][column])
            for part in parts
            for i in range(len(part))
        ]
        return stack(name, opened, size)
    values = [part.with_format("numpy")[column][:] for part in parts]
    try:
        return np.concatenate([np.stack(list(value)) for value in values])
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{name}: feature {column!r} is no array of one shape ({error}); pad it, or --ignore it"
        ) from None


def _labels(rows: Any, target: str) -> np.ndarray:
    """The values of a column, by name where the feature has names."""
    import datasets

    feature, values = rows.features[target], rows.with_format("numpy")[target][:]
    if not isinstance(feature, datasets.ClassLabel):
        return np.asarray(values)
    values = np.asarray(values)
    if len(values) and values.min() < 0:
        raise InputError(
            f"{target} is -1, no label, in {(values < 0).sum():,} of {len(values):,} rows; leave these out"
        )
    return np.asarray(feature.names)[values]


def _frame(rows: Any, target: str | None) -> Any:
    """The rows as pandas has them, with names in the place of a ClassLabel's numbers; of inputs, -1 is missing."""
    import datasets

    frame = rows.to_pandas()
    for column, feature in rows.features.items():
        if column == target:
            frame[column] = _labels(rows, column)
        elif isinstance(feature, datasets.ClassLabel):
            names = np.array([*feature.names, None], object)
            codes = frame[column].fillna(-1).to_numpy(int)
            frame[column] = names[np.where(codes < 0, len(feature.names), codes)]
    return frame


def read_like(path: Path, name: str, like: Source) -> Source:
    """As proxy data: the training rows of a saved table as `rows_like` has them, or images and arrays as they are."""
    rows, _ = _splits(path)
    if _array_column(path, rows, set()) is None:
        return rows_like(_frame(rows, None), name, like)
    return read_saved(path, name, test_fraction=0.0)
