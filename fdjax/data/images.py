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
VALIDATION = ("val", "valid", "validation")  # names of a part that is tested on where there is no test part
_GREY = ("1", "L", "LA")
_DEEP = ("I", "I;16", "I;16B", "I;16L", "F")  # modes whose pixels do not fit into eight bits

Opened = tuple[str, Callable[[], Any]]  # what an error calls an image, and what opens it


def is_folder_of_images(path: Path) -> bool:
    """Whether a folder has folders with an image in them, or such folders one deeper. Reads names alone."""
    classes = _folders(path) if path.is_dir() else []
    return any(_has_image(folder) or any(map(_has_image, _folders(folder))) for folder in classes)


def check_form(path: Path) -> None:
    """Raises InputError unless every class of a folder has images, and no folders. Reads names alone."""
    train, test, left_out = parts_of(path)
    for part in (train, test, left_out):
        for folder in [] if part is None else _classes(part):
            _images(folder)


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
    """A folder with a folder of images for each class, or with such, train and test; `test_data` is another one.

    Without a folder test, one called val, valid or validation is tested on. Images are of one size, or become
    `image_size` x `image_size`; grey if all of them are, else in three colours. Hidden files are nothing; others that
    are no images are told.
    """
    training, held, left_out = parts_of(path)
    train, y = _listed(training)
    if test_data is not None and held is not None:
        raise InputError(f"{path.name} has a folder {held.name} already; leave --test_data out")
    _tell_validation(path, held, left_out)
    tests = held or test_data
    if tests is None:
        x = stack(name, train, image_size)
        return from_arrays(x, y, name=name, test_fraction=test_fraction, test_by=test_by, seed=seed)
    test, y_test = _listed(tests)
    both = stack(name, [*train, *test], image_size)
    x, x_test = both[: len(train)], both[len(train) :]
    return from_arrays(x, y, x_test, y_test, name=name, test_fraction=test_fraction, test_by=test_by, seed=seed)


def parts_of(path: Path) -> tuple[Path, Path | None, Path | None]:
    """The folder with the classes of training images, that of test images, and that of a validation part beside it."""
    folders = {folder.name.lower(): folder for folder in _folders(path)} if path.is_dir() else {}
    validation = [folder for name, folder in folders.items() if name in VALIDATION]
    if "train" not in folders or {*folders} - {"train", "test", *VALIDATION} or len(validation) > 1:
        return path, None, None
    held = validation[0] if validation else None
    return (folders["train"], folders["test"], held) if "test" in folders else (folders["train"], held, None)


def _tell_validation(path: Path, test: Path | None, left_out: Path | None) -> None:
    """Warn of a validation part that is tested on, or that is beside a test part and not used."""
    if left_out is not None:
        text = f"{path.name}: {left_out.name} beside test is left out; --validation_fraction takes some of train"
    elif test is not None and test.name.lower() in VALIDATION:
        text = f"{path.name} has no folder test; its folder {test.name} is tested on"
    else:
        return
    warnings.warn(text, DataWarning, stacklevel=4)


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

    opened, y, strange = [], [], []
    for folder in _classes(path):
        images, others = _images(folder)
        strange += others
        opened += [(str(file), lambda file=file: Image.open(file)) for file in images]
        y += [folder.name] * len(images)
    if strange:
        text = f"{path.name}: {len(strange):,} files are no images ({listed(file.name for file in strange)}); left out"
        warnings.warn(text, DataWarning, stacklevel=4)
    return opened, np.array(y)


def _classes(path: Path) -> list[Path]:
    classes = _folders(path) if path.is_dir() else []
    if not classes:
        missing = what_is_missing(path) or "it has no folders: expected a folder of images for each class"
        raise InputError(f"{path} is no folder of images by class; {missing}")
    return classes


def what_is_missing(path: Path) -> str:
    """What keeps a folder from being one of images by class, in words; empty if that is not near at hand."""
    found = [file for file in path.iterdir() if not file.name.startswith(".")] if path.is_dir() else []
    pictures = sum(map(_is_image, found))
    if path.is_dir() and not found:
        return "it is empty: give the folder that has the data"
    if not pictures or _folders(path):
        return ""
    held = "a picture" if pictures == 1 else f"{pictures:,} pictures"
    return f"it holds {held}, but no folder for each class: move the pictures of each class into one"


def _images(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images of a class, and its other files. Raises InputError for one without images, or with folders."""
    if inner := _folders(folder):
        raise InputError(
            f"{folder} is a class with folders in it ({listed(f.name for f in inner)}); expected images alone: one "
            "folder a class, or train and test with these"
        )
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith(".")]
    images = [file for file in files if _is_image(file)]
    if not images:
        raise InputError(f"{folder} has no images ({listed(SUFFIXES)}); remove it, or add some")
    return images, [file for file in files if not _is_image(file)]


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".")


def _has_image(folder: Path) -> bool:
    return any(_is_image(file) for file in folder.iterdir())
