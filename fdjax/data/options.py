"""Named functions with options, and one-line errors when either is unknown."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from fdjax.errors import InputError, unknown


def call(kind: str, name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """`function(*args, **options)`; raises InputError, listing the keyword-only parameters, for any other option."""
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if not known:
            raise InputError(f"{kind} {name!r} takes no options, but {option!r} was given; leave it out")
        if option not in known:
            raise unknown(f"option of {kind} {name!r}:", option, known)
    return function(*args, **options)


def positive(name: str, value: Any) -> float:
    """A finite float > 0; raises InputError otherwise."""
    if isinstance(value, bool | str) or not np.isscalar(value) or not np.isfinite(value) or value <= 0:  # pyright: ignore
        raise InputError(f"{name}={value!r}: expected a finite number above 0")
    return float(value)  # pyright: ignore


def concentration(name: str, value: Any) -> float:
    """A Dirichlet parameter; raises InputError outside [1e-9, 1e9], beyond which NumPy's draws degenerate."""
    if not 1e-9 <= positive(name, value) <= 1e9:
        raise InputError(f"{name}={value!r}: expected a number from 1e-9 (one label a client) to 1e9 (IID)")
    return float(value)


def at_least(name: str, value: Any, least: int) -> int:
    """An int >= `least`; raises InputError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise InputError(f"{name}={value!r}: expected a whole number of at least {least}")
    return int(value)
