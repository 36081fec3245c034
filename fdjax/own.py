"""A user's own files and values: loaded, and known by what they are called and what they say.

Settings are plain values, so they hold a user's method or net by a name such as `mine@3f2a91c04b7d`: what it calls
itself, and a digest of its content. Everything that compares settings (what is compiled already, batches of trials,
hosts, a resumed run, a study) then compares contents, and neither paths nor names that two of them may share.
"""

import ast
import builtins
import hashlib
import importlib
import importlib.machinery
import importlib.util
import re
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fdjax import digest
from fdjax.errors import InputError, a_kind

_AT = "@"


class Thing(NamedTuple):
    """A method or net of a user's own."""

    value: Any
    file: str  # the file that it came from, as it was given; empty if it was given as a value
    source: str  # what tells it from another one of equal digest; empty if there can be none

    def titled(self, name: str) -> str:
        """How tables and errors call it."""
        name = name.partition(_AT)[0]
        return f"{name} ({self.file})" if self.file else name


class Registry:
    """A user's own things of one kind that this process has met, by the names that settings hold them by."""

    def __init__(self, kind: str):
        self._kind, self._things = kind, dict[str, Thing]()

    def __contains__(self, name: object) -> bool:
        return name in self._things

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def __getitem__(self, name: str) -> Thing:
        if name not in self._things:
            raise InputError(f"{self._kind} {name!r} is of a file that this process has not read; give that file")
        return self._things[name]

    def add(self, called: str, content: str, thing: Thing) -> str:
        """The name of a thing that calls itself `called`: the one that it has if it is known."""
        label = re.sub(r"[^\w.+-]+", "_", called).strip("_") or self._kind
        name, number = f"{label}{_AT}{content}", 1
        while name in self._things and self._things[name].source != thing.source:
            number += 1  # they say the same, and may all the same be different: of the first names none is taken again
            name = f"{label}{_AT}{content}-{number}"
        if name in self._things:
            thing = thing._replace(value=self._things[name].value)
        self._things[name] = thing
        return name

    def replace(self, name: str, value: Any) -> None:
        """Keep another value under a name."""
        self._things[name] = self._things[name]._replace(value=value)

    def add_value(self, called: str, value: Any) -> str:
        """The same of a value that is known by its content or, if that cannot be told, by itself."""
        content, exact = digest.of(value)
        return self.add(called, content, Thing(value, "", "" if exact else f"value {id(value)}"))


def is_own(name: Any) -> bool:
    """Whether settings hold a user's own thing by this name, and not one of ours."""
    return isinstance(name, str) and _AT in name


def recorded(names: str) -> str:
    """What records hold for names in a setting: no number, which tells a thing from its like in this process alone."""
    return re.sub(rf"({_AT}[0-9a-f]+)-\d+", r"\1", names)


def changed(then: Any, now: Any) -> str:
    """Words for two values of a setting that differ in nothing but the content of a user's own file, or nothing."""
    before, after = (str(name).partition(_AT) for name in (then, now))
    return f" ({before[0]} has changed since)" if before[1] and before[:2] == after[:2] else ""


def is_file(given: str) -> bool:
    """Whether what was given names a Python file, or something in one, and not one of ours."""
    return given.partition(":")[0].endswith(".py")


class File(NamedTuple):
    """A user's file, imported."""

    given: str  # its path as it was given
    path: Path
    content: str  # digest of it and of the neighbours that it imports
    module: types.ModuleType

    def names(self) -> list[str]:
        """What the file defines itself."""
        return [
            name
            for name, value in vars(self.module).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == self.module.__name__
        ]

    def having(self, kind: type | tuple[type, ...]) -> list[str]:
        """The names of what it has of a kind."""
        return [name for name, value in vars(self.module).items() if isinstance(value, kind)]

    def record(self, name: str, kind: type, where: str, noun: str, form: str) -> Any:
        """What it calls `name`, a record of a kind.

        Raises InputError, which begins with where it was named, if there is none: `noun` and `form` say what is.
        """
        value = vars(self.module).get(name)
        if name not in vars(self.module):
            others = [f"{self.given}:{other}" for other in self.having(kind)]
            has = f"give {' or '.join(others)}" if others else f"it has {', '.join(self.names()) or 'nothing'}"
            raise InputError(f"{where} has no {name}, {noun}; {has}")
        if not isinstance(value, kind):
            what = value.__name__ if isinstance(value, type) else a_kind(value)
            raise InputError(f"{where}: {name} is {what}, expected a {form}")
        return value

    def content_of(self, name: str) -> str:
        """A digest for one of the things that it has."""
        return digest.shortened(hashlib.sha256(f"{self.content}:{name}".encode()))

    def thing(self, value: Any) -> Thing:
        """Something of this file."""
        return Thing(value, self.given, str(self.path))


_files: dict[tuple[Path, str], types.ModuleType] = {}


def load(given: str, flag: str) -> File:
    """Import a user's file, unless it and its neighbours are what they were when it was imported before.

    It runs as a script of its folder would: what it imports from beside it is found, and nobody else finds that.

    Raises InputError, which begins with the flag, if there is no such file or it does not import.
    """
    path = Path(given).expanduser()
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else None
        files = sorted(file.name for file in folder.glob("*.py"))[:10] if folder else []
        there = f"its folder has {', '.join(files)}" if files else "paths are relative to the working directory"
        raise InputError(f"--{flag}={given}: there is no such file; {there}")
    path = path.resolve()
    try:
        sources = _sources(path)
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"--{flag}={given} does not import: {told(error)}") from error
    hashed = hashlib.sha256()
    for name, source in sorted(sources.items()):
        name = "" if name == path else name.relative_to(path.parent).as_posix()
        hashed.update(f"{name} {len(source)} ".encode() + source)
    content = digest.shortened(hashed)
    if (path, content) not in _files:
        try:
            _files[path, content] = _import(path, content, sources)
        except (Exception, SystemExit) as error:
            raise InputError(f"--{flag}={given} does not import: {told(error)}") from error
    return File(given, path, content, _files[path, content])


def told(error: BaseException) -> str:
    """An exception in one line, with where it left a user's own code."""
    text = " ".join((str(error).strip().splitlines() or [""])[0].split())
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({Path(error.filename).name}:{error.lineno})"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_installed(f.filename)]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{place}"


def _is_installed(filename: str) -> bool:
    libraries = {Path(__file__).parent, Path(ast.__file__).parent}  # fdjax, and Python with what is installed
    installed = {"site-packages", "dist-packages"}.intersection(Path(filename).parts)
    return bool(installed) or filename.startswith("<frozen") or not libraries.isdisjoint(Path(filename).parents)


# What a file imports from beside it.


def _neighbour(folder: Path, name: str) -> Path | None:
    """The file of a module beside a user's file, or the folder of a package that has none; None if there is neither."""
    if name in ("fdjax", "__future__") or name in sys.builtin_module_names:
        return None
    base = folder.joinpath(*name.split("."))
    for file in (base / "__init__.py", base.with_name(base.name + ".py")):
        if file.is_file():
            return file
    if base.is_dir() and any(base.glob("*.py")):
        found = None if "." in name else importlib.machinery.PathFinder.find_spec(name)
        if found is None or found.origin is None:
            return base
    return None


def _sources(path: Path) -> dict[Path, bytes]:
    """The file and every neighbour that it or one of them imports, anywhere in its text."""
    found = {path: path.read_bytes()}
    ast.parse(found[path], str(path))
    waiting = [path]
    while waiting:
        file = waiting.pop()
        for name in _imported(file, found[file], path.parent):
            parts = name.split(".")
            for i in range(1, len(parts) + 1):
                beside = _neighbour(path.parent, ".".join(parts[:i]))
                if beside is not None and beside.is_file() and beside not in found:
                    found[beside] = beside.read_bytes()
                    waiting.append(beside)
    return found


def _imported(file: Path, source: bytes, folder: Path) -> set[str]:
    """The names of modules, and of what may be one, that a file imports, as seen from the folder."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # said when it is imported
        return set()
    package = file.parent.relative_to(folder).parts
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            origin = [*above, *(node.module.split(".") if node.module else ())]
            names |= {".".join([*origin, alias.name]) for alias in node.names if alias.name != "*" or not origin}
            names |= {".".join(origin)} if origin else set()
    return names


class _Folder(NamedTuple):
    """The modules of one user's file and of its neighbours: `prefix` is a package of which nobody else knows."""

    prefix: str
    path: Path
    sources: dict[Path, bytes]

    def importing(self) -> Any:
        """`__import__` as these modules see it: what lies beside them comes first, as for a script."""

        def own_import(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
            first = name.partition(".")[0]
            if level or _neighbour(self.path, first) is None:
                return builtins.__import__(name, globals, locals, fromlist, level)
            module = builtins.__import__(f"{self.prefix}.{name}", globals, locals, fromlist)
            return module if fromlist else sys.modules[f"{self.prefix}.{first}"]

        return own_import

    def loader(self, name: str, path: str) -> "_Loader":
        """Loads one of these modules."""
        return _Loader(name, path, self)


class _Loader(importlib.machinery.SourceFileLoader):
    """Runs a file's text as it was read, without compiled files beside it, which may be older than a quick edit."""

    def __init__(self, name: str, path: str, folder: _Folder):
        super().__init__(name, path)
        self._folder = folder

    def get_code(self, fullname: str) -> types.CodeType:
        path = self.get_filename(fullname)
        source = self._folder.sources.get(Path(path)) or self.get_data(path)
        return self.source_to_code(source, path)

    def exec_module(self, module: types.ModuleType) -> None:
        vars(module)["__builtins__"] = vars(builtins) | {"__import__": self._folder.importing()}
        super().exec_module(module)


class _Finder:
    """Finds the modules of users' files for Python's import, under the prefixes of their folders."""

    folders: dict[str, _Folder] = {}  # noqa: RUF012

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        prefix, _, rest = name.partition(".")
        if prefix not in cls.folders or not rest:
            return None
        folder = cls.folders[prefix]
        file = _neighbour(folder.path, rest)
        if file is None or file.is_dir():
            spec = importlib.machinery.ModuleSpec(name, None, is_package=True) if file else None
            if spec is not None:
                spec.submodule_search_locations = [str(file)]
            return spec
        package = [str(file.parent)] if file.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(
            name, file, loader=folder.loader(name, str(file)), submodule_search_locations=package
        )


def _import(path: Path, content: str, sources: dict[Path, bytes]) -> types.ModuleType:
    """Run a user's file as a module that only it and its neighbours can name."""
    prefix = f"own_{content}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    folder = _Finder.folders[prefix] = _Folder(prefix, path.parent, sources)
    if _Finder not in sys.meta_path:
        sys.meta_path.append(_Finder)  # pyright: ignore[reportArgumentType]
    package = types.ModuleType(prefix)
    package.__path__ = [str(path.parent)]
    stem = re.sub(r"\W", "_", path.stem)
    name = f"{prefix}.{stem}"
    spec = importlib.util.spec_from_file_location(name, path, loader=folder.loader(name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[prefix], sys.modules[name] = package, module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        for known in [known for known in sys.modules if known.partition(".")[0] == prefix]:
            del sys.modules[known]
        raise
    return module
