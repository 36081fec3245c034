"""What a Python value says, as a hash: equal for a method or net that was written again unchanged, in any process.

Functions and classes of a user's own count by their code, by what they close over and by the globals that they name;
those of installed packages, of the standard library and of fdjax by their names.
"""

import dataclasses
import enum
import functools
import hashlib
import re
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LENGTH = 12  # characters of a digest
_PLAIN = (type(None), bool, int, float, complex, str, bytes, range, slice, type(Ellipsis), np.generic, np.dtype)
_HEAP_TYPE = 1 << 9
_GENERATED = re.compile(r"__(?!call__|init__)\w+__|_abc_impl|_state|_module_checks")  # by Python, dataclasses and flax


def of(value: Any) -> tuple[str, bool]:
    """The digest, and whether it is exact: whether nothing was met whose content cannot be told, such as an open file.

    Values of one exact digest do the same. Nothing of the kind can be said of others: they are known by identity.
    """
    walk = _Walk()
    walk.add(value)
    return shortened(walk.hash), walk.exact


def shortened(hash: Any) -> str:
    """The digest of a hash of hashlib."""
    return hash.hexdigest()[:LENGTH]


class _Walk:
    """One walk through a value; what is met again is named by its place."""

    def __init__(self):
        self.hash, self.exact = hashlib.sha256(), True
        self._met: dict[int, int] = {}
        self._kept: list[Any] = []  # so that no id is used again

    def _say(self, *words: Any) -> None:
        for word in words:
            self.hash.update(repr(word).encode() + b"\0")

    def add(self, value: Any) -> None:
        """Take a value into the hash."""
        if isinstance(value, _PLAIN):
            return self._say(type(value).__name__, value)
        if not isinstance(value, tuple):  # whether equal constants are one tuple is the compiler's own business
            if id(value) in self._met:
                return self._say("again", self._met[id(value)])
            self._met[id(value)] = len(self._met)
            self._kept.append(value)
        if name := _library_name(value):
            return self._say("named", name)
        return self._add_content(value)

    def _add_content(self, value: Any) -> None:
        if isinstance(value, np.ndarray | jax.Array):
            self._add_array(value)
        elif isinstance(value, Mapping):
            self._say("mapping", len(value))
            for key in sorted(value, key=repr):
                self._add_all(key, value[key])
        elif isinstance(value, set | frozenset):
            self.exact = self.exact and all(isinstance(x, _PLAIN) for x in value)
            self._say("set", *sorted(map(repr, value)))
        elif isinstance(value, list | tuple):
            self._say(type(value).__name__, len(value))
            self._add_all(*value)
        elif isinstance(value, types.ModuleType):
            self._add_module(value)
        elif isinstance(value, type):
            self._add_class(value)
        elif isinstance(value, types.FunctionType):
            self._add_function(value)
        elif isinstance(value, types.CodeType):
            self._add_code(value)
        elif isinstance(value, types.MethodType):
            self._add_all("method", value.__func__, value.__self__)
        elif isinstance(value, functools.partial):
            self._add_all("partial", value.func, value.args, value.keywords)
        elif isinstance(value, property):
            self._add_all("property", value.fget)
        elif isinstance(value, enum.Enum):
            self._add_all(type(value), value.name)
        else:
            self._add_instance(value)

    def _add_all(self, *values: Any) -> None:
        for value in values:
            self.add(value)

    def _add_array(self, value: Any) -> None:
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        array = np.asarray(value)
        self._say("array", str(array.dtype), array.shape)
        if array.dtype == object:
            self._add_all(*array.ravel().tolist())
        else:
            self.hash.update(np.ascontiguousarray(array).tobytes())

    def _add_module(self, module: types.ModuleType) -> None:
        file = getattr(module, "__file__", None)
        try:
            self._say("module", hashlib.sha256(Path(file or "").read_bytes()).hexdigest())
        except OSError:
            self.exact = False

    def _add_class(self, cls: type) -> None:
        self._say("class", cls.__name__)
        self._add_all(*cls.__bases__)
        for name, member in sorted(vars(cls).items()):
            made = name == "__init__" and dataclasses.is_dataclass(cls)
            if not _GENERATED.fullmatch(name) and not made:
                self._say(name)
                self.add(member)
        for name, field in sorted(getattr(cls, "__dataclass_fields__", {}).items()):
            self._say(name)
            if field.default_factory is not dataclasses.MISSING:
                self.add(field.default_factory)

    def _add_function(self, function: types.FunctionType) -> None:
        self._say("function")
        if _is_library(getattr(function, "__module__", None)):  # made by a library, which is known by its version
            self._say(function.__module__, function.__qualname__)
        else:
            self._add_code(function.__code__)
            names = {name for code in _codes(function.__code__) for name in code.co_names}
            for name in sorted(names & function.__globals__.keys()):
                self._say(name)
                self.add(function.__globals__[name])
        self._add_all(function.__defaults__, function.__kwdefaults__)
        for cell in function.__closure__ or ():
            try:
                self.add(cell.cell_contents)
            except ValueError:
                self._say("empty")

    def _add_code(self, code: types.CodeType) -> None:
        self._say("code", code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        self._say(code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        self._say(code.co_exceptiontable)
        for constant in code.co_consts:
            self._add_code(constant) if isinstance(constant, types.CodeType) else self.add(constant)

    def _add_instance(self, value: Any) -> None:
        """What its type is, and its fields; of what has none, nothing can be told."""
        wrapped = getattr(value, "__wrapped__", getattr(value, "__func__", None))  # jit, staticmethod and the like
        if wrapped is not None:
            return self._add_all(type(value).__name__, wrapped)
        self.add(type(value))
        if dataclasses.is_dataclass(value):
            # The place of a linen module among others and its name are no part of what it computes.
            names = [f.name for f in dataclasses.fields(value) if f.name not in ("parent", "name")]
            return self._add_all(*((name, getattr(value, name, None)) for name in names))
        if not (hasattr(value, "__dict__") and type(value).__flags__ & _HEAP_TYPE):  # what is written in C hides things
            self.exact = False
            return None
        return self.add(vars(value))


def _codes(code: types.CodeType) -> list[types.CodeType]:
    """A code object and those inside of it."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return [code, *(one for each in inner for one in _codes(each))]


def _library_name(value: Any) -> str | None:
    """The full name of a module, class or function of a library, by which it can be found; None for anything else."""
    if isinstance(value, types.ModuleType):
        return value.__name__ if _is_library(value.__name__) else None
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or not _is_library(module):
        return None
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return f"{module}.{name}" if found is value else None


@functools.cache
def _is_library(module: str | None) -> bool:
    """Whether a module is of fdjax, of the standard library or installed, and not a user's own."""
    if module is None:
        return False
    top = module.partition(".")[0]
    if top == "fdjax" or top in sys.stdlib_module_names:
        return top != "__main__"
    file = getattr(sys.modules.get(top), "__file__", None) or ""
    return not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)
