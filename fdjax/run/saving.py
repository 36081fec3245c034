"""What could not be saved: said in one line each, and remembered, so that the program's exit status tells."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

_unsaved: list[str] = []


def unsaved() -> tuple[str, ...]:
    """What was asked for and could not be saved by this process."""
    return tuple(_unsaved)


def tell_unsaved(what: str, reason: str) -> None:
    """Say that something that was asked for is not saved, and remember it."""
    _unsaved.append(what)
    tqdm.write(f"error: {what} cannot be written: {reason}; make room there or choose another folder", file=sys.stderr)


def reason_of(error: Exception) -> str:
    """Why something could not be written, in one line: what the operating system says, if it is that."""
    return getattr(error, "strerror", None) or (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A block that writes the temporary file that it is given, which then takes the place of `path`, or is removed."""
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def saving(path: Path) -> Iterator[Path]:
    """As `replacing`. If the file cannot be written that is told, `path` stays as it was, and the program goes on."""
    try:
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        tell_unsaved(str(path), reason_of(error))
