"""A folder of images by class, and opened images as one array."""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fdjax.data.arrays import from_arrays
from fdjax.data.coding import listed
from fdjax.errors import DataWarning, InputError
from fdjax.types import Source

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
_GREY = ("1", "L", "LA")
_DEEP = ("I", "I;16", "I;16B", "I;16L", "F")  # modes whose pixels do not fit into eight bits

Opened = tuple[str, Callable[[], Any]]  # what an error calls an image, and what opens it


def is_folder_of_images(path: Path) -> bool:
    """Whether a folder has other folders in it."""
    return path.is_dir() and bool(_folders(path))


def read_images(
    path: Path,
    name: str,
    *,
    image_size: int | None = None,
    test_data: Path | None = None,
    test_fraction: float | None = None,
    test_by: str = "label",
    seed: int = 0,
) -> Source:
    """A folder with a folder of images for each class, or with two such, train and test; `test_data` is another one.

    Images are of one size, or become `image_size` x `image_size`; grey if all of them are, else in three colours.
    Hidden files are nothing; others that are no images are told.
    """
    folders = {folder.name.lower(): folder for folder in _folders(path)}
    has_parts = "train" in folders and {*folders} <= {"train", "test"}
    train, y = _listed(folders["train"] if has_parts else path)
    tests = folders.get("test") if has_parts else test_data
    if has_parts and test_data is not None and "test" in folders:
        raise InputError(f"{path.name} has a folder test already; leave --test_data out")
    if tests is None:
        x = stack(name, train, image_size)
        return from_arrays(x, y, name=name, test_fraction=test_fraction, test_by=test_by, seed=seed)
    test, y_test = _listed(tests)
    both = stack(name, [*train, *test], image_size)
    x, x_test = both[: len(train)], both[len(train) :]
    return from_arrays(x, y, x_test, y_test, name=name, test_fraction=test_fraction, test_by=test_by, seed=seed)


def stack(name: str, opened: Sequence[Opened], size: int | None) -> np.ndarray:
    """Images as uint8 [N, height, width, 1 or 3]. Raises InputError for one that cannot be read, and for many sizes."""
    seen = [_look(where, open_image) for where, open_image in opened]
    deep = [where for (where, _), (mode, _) in zip(opened, seen, strict=True) if mode in _DEEP]
    if deep:
        raise InputError(f"{name}: {deep[0]} has more than 8 bits a pixel ({len(deep):,} such); convert them to 8 bits")
    sizes = Counter(found for _, found in seen)
    if size is None and len(sizes) > 1:
        common = listed(f"{width} x {height} ({count:,})" for (width, height), count in sizes.most_common())
        raise InputError(f"{name}: images of {len(sizes):,} sizes: {common}; give --image_size=..., which all become")
    width, height = (size, size) if size is not None else next(iter(sizes))
    mode = "L" if all(found in _GREY for found, _ in seen) else "RGB"
    x = np.empty((len(opened), height, width, 1 if mode == "L" else 3), np.uint8)
    for i, (where, open_image) in enumerate(opened):
        x[i] = _pixels(where, open_image, mode, (width, height)).reshape(x.shape[1:])
    return x


def _look(where: str, open_image: Callable[[], Any]) -> tuple[str, tuple[int, int]]:
    """Mode and size of an image, without its pixels where its file says them."""
    try:
        with open_image() as image:
            return image.mode, image.size
    except Exception as error:  # whatever a decoder raises
        raise InputError(f"{where} cannot be read as an image: {_reason(error)}; mend or remove it") from None


def _pixels(where: str, open_image: Callable[[], Any], mode: str, size: tuple[int, int]) -> np.ndarray:
    from PIL import Image

    try:
        with open_image() as image:
            image = image.convert(mode)
            return np.asarray(image if image.size == size else image.resize(size, Image.Resampling.BILINEAR))
    except Exception as error:
        raise InputError(f"{where} cannot be read as an image: {_reason(error)}; mend or remove it") from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _folders(path: Path) -> list[Path]:
    return sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))


def _listed(path: Path) -> tuple[list[Opened], np.ndarray]:
    """The images of a folder of classes, and their classes."""
    from PIL import Image

    classes = _folders(path) if path.is_dir() else []
    if not classes:
        raise InputError(f"{path} has no folders; expected a folder of images for each class")
    opened, y, strange = [], [], []
    for folder in classes:
        files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not _hidden(file, folder)]
        images = [file for file in files if file.suffix.lower() in SUFFIXES]
        strange += [file for file in files if file not in images]
        if not images:
            raise InputError(f"{folder} has no images ({', '.join(SUFFIXES)}); remove it, or add some")
        opened += [(str(file), lambda file=file: Image.open(file)) for file in images]
        y += [folder.name] * len(images)
    if strange:
        text = f"{path.name}: {len(strange):,} files are no images ({listed(file.name for file in strange)}); left out"
        warnings.warn(text, DataWarning, stacklevel=4)
    return opened, np.array(y)


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)
