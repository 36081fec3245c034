"""What is known about one setting: its kind, its range or choices, and what a change of it changes."""

import dataclasses
import math
import os
import reprlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from fdjax import own
from fdjax.errors import InputError, unknown

Role = Literal[
    "static",  # changes what is compiled
    "traced",  # an argument of what is compiled
    "data",  # which data: changes arrays alone
    "partition",  # the same, and handed to the partition scheme by its name
    "run",  # how or where the run is carried out
]


class Setting(NamedTuple):
    """What is known about one setting."""

    help: str
    kind: type  # str, int, float or bool; tuple for what has no flag of its own
    role: Role
    optional: bool  # whether it may be None
    low: float = -math.inf
    high: float = math.inf
    above: bool = False  # whether `low` itself is too little
    below: bool = False  # whether `high` itself is too much
    choices: Collection[str] = ()  # a mapping where each is explained
    noun: str = ""  # what an error calls the choices; the setting's name if there is no better word
    resumable: bool = False  # whether a run may go on with another value
    resolve: Callable[[Any], str] | None = None  # the plain value for a user's own file or value
    folder: bool = False  # whether it says where a machine keeps its files: hosts may differ, and results leave it out

    def check(self, name: str, value: Any) -> None:
        """Raises InputError if the value is of another kind, out of range or none of the choices."""
        if value is None and self.optional:
            return
        if not self._is_of_kind(value) or not self._is_in_range(value):
            raise InputError(f"--{name}={reprlib.repr(value)}: expected {self.expected()}")
        if self.choices and value not in self.choices and not (self.resolve and own.is_own(value)):
            raise unknown(self.noun or name, str(value), self.choices)

    def _is_of_kind(self, value: Any) -> bool:
        if self.kind is float:
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return isinstance(value, self.kind) and (self.kind is bool or not isinstance(value, bool))

    def _is_in_range(self, value: Any) -> bool:
        if self.kind not in (int, float):
            return True
        return (self.low < value if self.above else self.low <= value) and (
            value < self.high if self.below else value <= self.high
        )

    def expected(self) -> str:
        """The kind and the range in words."""
        if self.kind not in (int, float):
            return {str: "text", bool: "true or false", tuple: "pairs of a name and a value"}[self.kind]
        words = "a whole number" if self.kind is int else "a number" if math.isfinite(self.high) else "a finite number"
        low, high = (repr(int(x)) if math.isfinite(x) and x == int(x) else f"{x:g}" for x in (self.low, self.high))
        if math.isfinite(self.low) and math.isfinite(self.high) and not self.above and not self.below:
            return f"{words} from {low} to {high}"
        if math.isfinite(self.low):
            words += f" above {low}" if self.above else f" of at least {low}"
        if math.isfinite(self.high):
            words += f" and below {high}" if self.below else f" and at most {high}"
        return words

    def flag_help(self) -> str:
        """The help of its flag, which names the choices."""
        if isinstance(self.choices, Mapping):
            return f"{self.help}. {'; '.join(f'{name}: {summary(row)}' for name, row in self.choices.items())}"
        return f"{self.help}: {', '.join(self.choices)}" if self.choices else self.help


def summary(row: Any) -> str:
    """What a table of methods, models or data sets says of one of them."""
    return getattr(row, "summary", getattr(row, "help", row))


def setting_field(default: Any, help: str, kind: type | None = None, role: Role = "static", **more: Any) -> Any:
    """A field of a dataclass of settings, with its record; one whose default is None may be None."""
    record = Setting(help, kind or type(default), role, default is None, **more)
    return dataclasses.field(default=default, metadata={"setting": record})


def plain(value: Any) -> Any:
    """Scalars of NumPy and JAX as Python's and paths as text, so that settings can be compared and written as JSON."""
    if isinstance(value, np.generic | np.ndarray | jax.Array) and value.ndim == 0:
        return value.item()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def pairs(name: str, given: Any) -> tuple[tuple[str, Any], ...]:
    """Of a dict or of pairs of a name and a value: the pairs in order."""
    try:
        return tuple(sorted((name, plain(value)) for name, value in dict(given or {}).items()))
    except (TypeError, ValueError):
        raise InputError(f"{name}={given!r}: expected a dict of values by name, or pairs of both") from None
