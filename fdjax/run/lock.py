"""A folder is one run's at a time."""

import contextlib
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from fdjax.errors import InputError

NAME = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder. The operating system lets go of it if the process dies, so a file that is left means nothing.

    A file system that knows no locks, or has no room for an empty file, is used without one, which is said.

    Raises InputError if another process, or another run of this one, holds it.
    """
    try:
        file = _hold(folder / NAME)
    except BlockingIOError:
        raise InputError(
            f"{folder} is in use{_by(folder / NAME)}; wait until that run is done, or give another --out"
        ) from None
    except OSError as error:
        sys.stderr.write(f"warning: {folder} cannot be locked ({error.strerror}); start no second run with it\n")
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / NAME).unlink()  # while it is held, so that nobody else's is removed
        os.close(file)


def _hold(path: Path) -> int:
    """An open file that is locked and still the one at `path`, which who held it before may have removed."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), path.stat()):
                    break
        except BaseException:
            os.close(file)
            raise
        os.close(file)
    with contextlib.suppress(OSError):  # only words for whoever is refused
        os.truncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return file


def _by(path: Path) -> str:
    """Whose it is, in words."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if text := path.read_text().strip():
            return f" by {text}"
    return ""
