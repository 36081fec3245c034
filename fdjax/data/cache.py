"""Decoded data sets, kept as arrays so that they are decoded once."""

import os
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fdjax.errors import InputError

Arrays = dict[str, np.ndarray]
DAMAGED = (ValueError, EOFError, KeyError, AttributeError, zipfile.BadZipFile, zlib.error)  # as np.load may raise


def default_cache_dir() -> Path:
    """$FDJAX_CACHE, else $XDG_CACHE_HOME/fdjax, else ~/.cache/fdjax."""
    if os.environ.get("FDJAX_CACHE"):
        return Path(os.environ["FDJAX_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fdjax"


def cached(key: str, build: Callable[[], Arrays], cache_dir: str | os.PathLike | None) -> Arrays:
    """What `build()` returns, read from `<cache_dir>/<key>.npz` if that file is whole, else built and written there.

    The file appears under its name only when complete, so readers beside a writer, or after a killed one, never see a
    part of it; npz holds a checksum of each array, so a damaged file is noticed and rebuilt. A folder that cannot be
    written to costs a warning if it is the default one; raises InputError if the user named it.
    """
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    path = folder / f"{key}.npz"
    try:
        # Opened here, since np.load leaves a damaged file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, *DAMAGED):
        pass
    if cache_dir is not None:
        _check_writable(folder)
    arrays = build()
    try:
        _write(path, arrays)
    except OSError as error:
        if cache_dir is not None:
            raise InputError(
                f"cache_dir {str(folder)!r}: {_reason(error)}; give a folder that can be written to"
            ) from None
        warnings.warn(
            f"not cached: {str(folder)!r}: {_reason(error)}; set FDJAX_CACHE to a folder that can be written to",
            stacklevel=2,
        )
    return arrays


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cache_dir {str(folder)!r}: {_reason(error)}; give a folder that can be written to") from None


def _write(path: Path, arrays: Arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
