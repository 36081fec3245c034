"""A user's own data set: a `Source` as a value, or a file or folder, in the place of a name of ours.

Settings hold it by its name and a digest of its content (`fdjax.own`): the same file in another folder is the same data
set, and an edited one another.
"""

import functools
import hashlib
import inspect
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fdjax import digest, own
from fdjax.data import arrays, hugging_face, images, pfllib, prepared, tables, text_files
from fdjax.data.checked import checked
from fdjax.data.options import call
from fdjax.errors import InputError, a_kind, unknown
from fdjax.types import Source


class Reader(NamedTuple):
    """How one kind of file or folder becomes a `Source`; its keyword-only arguments are the options that it has."""

    what: str
    read: Callable[..., Source]  # (path, name, *, option=...) -> Source
    suffixes: tuple[str, ...] = ()  # of a file; none of a folder
    has_owners: Callable[[Path], bool] = lambda path: False  # whether the file says by itself who holds each example
    is_folder: Callable[[Path], bool] = lambda path: False  # whether a folder is one that it reads
    read_like: Callable[..., Source] | None = None  # (path, name, like, *, option=...) -> Source, proxy data for `like`
    check_form: Callable[[Path], None] = lambda path: None  # raises InputError for what is told by names of files alone


READERS: dict[str, Reader] = {
    "npz": Reader("arrays by name in an npz", arrays.read_npz, (".npz",), arrays.npz_has_owners),
    "table": Reader("a table", tables.read_table, (*tables.CSV, ".parquet"), read_like=tables.read_like),
    "pfllib": Reader(
        "a data folder of PFLlib or HtFLlib",
        pfllib.read_folder,
        has_owners=pfllib.is_folder,
        is_folder=pfllib.is_folder,
    ),
    "texts": Reader(
        "texts", text_files.read_texts, text_files.SUFFIXES, text_files.has_users, read_like=text_files.read_like
    ),
    "hugging_face": Reader(
        "a folder of Hugging Face's save_to_disk",
        hugging_face.read_saved,
        is_folder=hugging_face.is_saved,
        read_like=hugging_face.read_like,
    ),
    "images": Reader(
        "a folder of images by class",
        images.read_images,
        is_folder=images.is_folder_of_images,
        check_form=images.check_form,
    ),
}
# Settings that are options of some kind of file.
OPTIONS = (
    "target", "owner", "ignore", "row_id", "header", "categories", "missing", "image_size", "unit", "length", "stride",
    "vocabulary", "test_data", "test_fraction", "test_by",
)  # fmt: skip
FILES = ("test_data",)  # options that are files of their own, which settings hold as they hold the data set

_OWN = own.Registry("data set")
_KEPT = 4  # data sets that stay in memory as they were read, of all that a process reads from files
_SETTLED = 2.0  # seconds after which a file that was written again has another time


def resolve(given: Any, flag: str = "dataset", known: Collection[str] = ()) -> str:
    """The name by which settings hold a data set.

    Args:
      given: a name in `known`, the path of a file or folder, a `Source`, or what this function returned.
      flag: the setting, which an error begins with.
      known: names that are taken as they are.

    Raises:
      InputError: a name that nothing has, a file of no kind that can be read, a value that is no `Source`.
    """
    if isinstance(given, Source):
        return _of_value(given)
    if isinstance(given, os.PathLike):
        given = os.fspath(given)
    if not isinstance(given, str):
        raise InputError(
            f"--{flag}: {a_kind(given)} is no data set; give a name, a path, or what fdjax.from_arrays or "
            "fdjax.from_frame returns"
        )
    if given in known or given in _OWN:
        return given
    path = Path(given).expanduser()
    if path.exists() or (not own.is_own(given) and (_suffix(path) or "/" in given)):
        return _of_path(given, path, flag)
    if own.is_own(given):
        raise InputError(f"--{flag}={given} was a value, or a file that is not there now; give it again: {flag}=...")
    raise unknown({"dataset": "data set", "proxy": "proxy data"}.get(flag, flag), given, known)


def load(name: str, **options: Any) -> Source:
    """The data set of a name that `resolve` gave, with the options of its kind.

    Raises InputError for an option that it has not, and for a file that has changed since.
    """
    thing = _OWN[name]
    if isinstance(thing.value, Source):
        return call("data set", thing.titled(name), lambda: thing.value, **options)
    files = {n: resolve(options[n], n) for n in FILES if options.get(n) is not None}
    for held in (name, *files.values()):
        path = _OWN[held].value
        if isinstance(path, Source):
            raise InputError(f"test_data={title(held)} is a value; give a file, or both parts to fdjax.from_arrays")
        if not path.exists() or _content(path) != _digest_of(held):
            raise InputError(f"{_OWN[held].file} has changed since it was named, or is gone; give it again")
    return _read(name, tuple(sorted((options | files).items())))


def load_proxy(name: str, like: Source, **options: Any) -> Source:
    """The same as proxy data: where it has no test part of its own, all its examples are training examples.

    A table's are made inputs as the rows of `like` were, if that is a table, and texts read with its vocabulary.
    Those of `options` count that its kind of file has. Raises InputError if `like` is none, and for a value with an
    encoding of its own.
    """
    value = _OWN[name].value
    if isinstance(value, Source):
        _check_encoding(name, value, like)
        return load(name)
    reader = reader_of(value)
    if reader.read_like is not None:
        given = {option: options[option] for option in options.keys() & keywords(reader.read_like)}
        return checked(reader.read_like(value, name.partition("@")[0], like, **given))
    return load(name, **({"test_fraction": 0.0} if "test_fraction" in options_of(name) else {}))


def _check_encoding(name: str, proxy: Source, like: Source) -> None:
    """Raises InputError for rows that were made inputs by other columns, levels or means than those of `like`."""
    if proxy.encoding is None or proxy.encoding == like.encoding:
        return
    if like.encoding is None:
        raise InputError(f"--proxy={title(name)} is a table, but {like.name} is none; give a table as --dataset too")
    raise InputError(
        f"--proxy={title(name)} became inputs by columns, levels and means of its own, not those of {like.name}; with "
        f"the latter's source give fdjax.from_arrays(source.encoding.inputs(rows), rows[{like.encoding.target!r}], "
        "labels=source.labels, test_fraction=0)"
    )


def title(name: str) -> str:
    """How tables and errors call a data set: by its own name, and the file it is from."""
    return _OWN[name].titled(name) if name in _OWN else name


def file_of(name: str | None) -> str:
    """The file or folder that a data set is from, as it was given; empty for ours and for values."""
    return _OWN[name].file if name is not None and name in _OWN else ""


def is_known(name: Any) -> bool:
    """Whether a data set of a user's own has this name in this process."""
    return name in _OWN


def has_owners(name: str) -> bool:
    """Whether a user's own data set says who holds each example."""
    if name not in _OWN:
        return False
    value = _OWN[name].value
    return value.train_owner is not None if isinstance(value, Source) else reader_of(value).has_owners(value)


def options_of(name: str) -> frozenset[str]:
    """The options that a data set of a user's own has; none for ours and for values."""
    if name not in _OWN or isinstance(_OWN[name].value, Source):
        return frozenset()
    return keywords(reader_of(_OWN[name].value).read)


def keywords(read: Callable[..., Source]) -> frozenset[str]:
    """The options of what reads one kind of file."""
    parameters = inspect.signature(read).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


def reader_of(path: Path) -> Reader:
    """What reads a file or folder. Raises InputError for one of no kind that can be read."""
    suffix = _suffix(path)
    if not suffix:
        raise InputError(f"{str(path)!r} is of no kind that can be read; expected {expected()}")
    return READERS[suffix]


def expected() -> str:
    """The kinds of files and folders, in words."""
    kinds = [(reader.what, ", ".join(reader.suffixes)) for reader in READERS.values()]
    return ", ".join(f"{what} ({suffixes})" if suffixes else what for what, suffixes in kinds)


def _suffix(path: Path) -> str:
    """The kind of a path, a key of READERS; empty if it has none."""
    name = path.name.lower()
    if path.is_dir():
        return next((kind for kind, reader in READERS.items() if reader.is_folder(path)), "")
    return next((kind for kind, reader in READERS.items() if name.endswith(reader.suffixes)), "")


def _of_value(source: Source) -> str:
    parts = [source.train_x, source.train_y, source.test_x, source.test_y]
    if not all(isinstance(part, np.ndarray) for part in parts):
        raise InputError(f"{source.name}: a Source holds NumPy arrays; make it with fdjax.from_arrays(x, y, ...)")
    content, _ = digest.of(tuple(checked(source)._replace(train_index=None)))  # rows that they were teach nothing
    name = _OWN.add(source.name, content, own.Thing(source, "", ""))
    if _OWN[name].value is source:  # met for the first time
        _OWN.replace(name, _named(name, _frozen(source)))
    return name


def _frozen(source: Source) -> Source:
    """The same with arrays that nobody can change, so that it stays what its name says."""

    def kept(part: Any) -> Any:
        if isinstance(part, np.ndarray):
            part = part.copy()
            part.setflags(write=False)
        return part

    return source._replace(**{name: kept(part) for name, part in source._asdict().items()})


def _named(name: str, source: Source) -> Source:
    """The same whose labels, unless it says what they name, are those of no other data set."""
    return source if source.labels else source._replace(labels=name)


def _of_path(given: str, path: Path, flag: str) -> str:
    if not path.exists():
        folder = path.parent if path.parent.is_dir() else None
        files = sorted(file.name for file in folder.iterdir() if _suffix(file))[:10] if folder else []
        there = f"its folder has {', '.join(files)}" if files else "paths are relative to the working directory"
        raise InputError(f"--{flag}={given}: there is no such file or folder; {there}")
    path = path.resolve()
    try:
        kind = READERS[_suffix(path)] if _suffix(path) else None
        if kind is None:
            raise InputError(f"--{flag}={given} is of no kind that can be read; {_advice(path)}")
        kind.check_form(path)
        content = _content(path)
    except OSError as error:
        raise InputError(f"--{flag}={given} cannot be read: {(error.strerror or str(error)).lower()}") from None
    suffix = next((s for s in kind.suffixes if path.name.lower().endswith(s)), "")
    name = _OWN.add(path.name[: len(path.name) - len(suffix)], content, own.Thing(path, given, ""))
    _OWN.replace(name, path)  # where the content lies now
    return name


def _advice(path: Path) -> str:
    """What to do about a path of no kind: of data that tensorflow-datasets prepared, their name and folder."""
    found = prepared.found_in(path)
    if found is not None:
        return f"tensorflow-datasets prepared it: give a data set's name, and --data_dir={found}"
    if not path.is_dir():
        return f"expected {expected()}"
    return images.what_is_missing(path) or f"expected {', '.join(r.what for r in READERS.values() if not r.suffixes)}"


def _digest_of(name: str) -> str:
    return own.recorded(name).rpartition("@")[2]


@functools.lru_cache(maxsize=_KEPT)
def _read(name: str, options: tuple[tuple[str, Any], ...]) -> Source:
    given = {n: _OWN[v].value if n in FILES and v is not None else v for n, v in options}
    path = _OWN[name].value
    reader = reader_of(path)
    source = call(f"{reader.what}", str(path), reader.read, path, name.partition("@")[0], **given)
    return _frozen(_named(name, checked(source)))


def _content(path: Path) -> str:
    """A digest of what a file says, or of the names and contents of all files below a folder."""
    hashed = hashlib.sha256()
    for file in _files_below(path):
        state = file.stat()
        known = time.time() - state.st_mtime > _SETTLED
        of_file = _hash if known else _hash.__wrapped__
        hashed.update(f"{'' if file == path else file.relative_to(path).as_posix()}\0".encode())
        hashed.update(of_file(str(file), state.st_size, state.st_mtime_ns))
    return digest.shortened(hashed)


def _files_below(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    files: Sequence[Path] = sorted(path.rglob("*"))
    for file in files:
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts):
            yield file


@functools.lru_cache(maxsize=1 << 16)
def _hash(file: str, size: int, changed: int) -> bytes:
    del size, changed  # by which an edited file is another one
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()
