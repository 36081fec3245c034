"""Checksums beside the files of a folder, by which damage is found: one flipped byte, a file cut short or gone."""

import hashlib
from pathlib import Path

NAME = "checksums.sha256"


def write(folder: Path) -> None:
    """Write the checksums of all files below `folder`, at once or not at all."""
    temporary = folder / f"{NAME}.tmp"
    temporary.write_text(_text(folder))
    temporary.replace(folder / NAME)


def damage(folder: Path) -> str:
    """What of the folder is not as it was written, in words; empty if all of it is."""
    try:
        written = (folder / NAME).read_text()
    except (OSError, UnicodeDecodeError):
        return f"it has no {NAME}"
    try:
        found = _text(folder)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    if found == written:
        return ""
    before, now = (set(text.splitlines()) for text in (written, found))
    names = {line.partition("  ")[2] for line in before ^ now} or {NAME}
    return f"{sorted(names)[0]} is not as it was written"


def _text(folder: Path) -> str:
    """A line for each file, in the form of sha256sum."""
    lines = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or (path.parent == folder and path.name.startswith(NAME)):
            continue
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        lines.append(f"{digest}  {path.relative_to(folder).as_posix()}\n")
    return "".join(lines)
