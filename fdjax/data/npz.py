"""An npz of plain arrays, as users give them."""

import zipfile
from pathlib import Path

import numpy as np

from fdjax.data.cache import DAMAGED
from fdjax.errors import InputError

_NPY = b"\x93NUMPY"  # how a file of one array begins


def arrays_of(path: Path, what: str) -> dict[str, np.ndarray]:
    """The arrays of an npz by their names. Raises InputError, which begins with `what`, for a file that is none."""
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise InputError(_refused(what, _instead(path)))
            file.seek(0)
            with np.load(file, allow_pickle=False) as found:
                return {name: found[name] for name in found.files}
    except InputError:
        raise
    except (OSError, TypeError, *DAMAGED) as error:
        reason = "it holds objects" if "allow_pickle" in str(error) else f"it is damaged ({error})"
        raise InputError(_refused(what, reason)) from None


def _instead(path: Path) -> str:
    """What a file is that is no zip archive, as an npz is one."""
    with path.open("rb") as file:
        begin = file.read(len(_NPY))
    if not begin:
        return "it is empty"
    return "it is an npy, of one array without a name" if begin == _NPY else "it is no npz, but another kind of file"


def _refused(what: str, reason: str) -> str:
    return f"{what} is not an npz of plain arrays: {reason}; write it with np.savez"
