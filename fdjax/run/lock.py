"""A folder is one run's at a time."""

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from fdjax.errors import InputError

NAME = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder. The operating system lets go of it if the process dies, so the file that stays means nothing.

    A file system that knows no locks, or has no room for a small file, is used without one, which is said.

    Raises InputError if another process, or another run of this one, holds it.
    """
    path = folder / NAME
    lock = FileLock(path, blocking=False, is_singleton=False)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(f"{folder} is in use{_by(path)}; wait until that run is done, or give another --out") from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        sys.stderr.write(f"warning: {folder} cannot be locked ({reason}); start no second run with it\n")
        yield
        return
    try:
        with contextlib.suppress(OSError):  # only words for whoever is refused
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        lock.release()


def _by(path: Path) -> str:
    """Whose it is, in words."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if text := path.read_text().strip():
            return f" by {text}"
    return ""
