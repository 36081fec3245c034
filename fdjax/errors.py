"""The one exception that means "what you gave cannot work, and here is what to do"."""

import difflib
import sys
import warnings
from collections.abc import Iterable
from typing import Any, NoReturn


class InputError(ValueError):
    """Bad input. The message is one line: what was given, what was expected, what to do."""


class DataWarning(UserWarning):
    """Something in a user's own data that is dealt with, and that its owner should know. The message is one line."""


def a_kind(value: object) -> str:
    """What kind of thing a value is, with its article: "an int", "a list", and "None" of None itself."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeioAEIO' or name == 'ndarray' else 'a'} {name}"


def unknown(kind: str, given: object, known: Iterable[str]) -> InputError:
    """An `InputError` for a name outside `known`: it lists them, the nearest first if one is near."""
    known = sorted(known)
    if not known:
        return InputError(f"unknown {kind} {given!r}; there are none: leave it out")
    near = difflib.get_close_matches(str(given), known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return InputError(f"unknown {kind} {given!r}{hint}; known: {', '.join(known)}")


def show_warning(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
    """Show a warning of a program; one of a user's own data without the place in our code, which says nothing."""
    if issubclass(category, DataWarning):
        sys.stderr.write(f"warning: {message}\n")
    else:
        sys.stderr.write(warnings.formatwarning(message, category, *where[:2]))


def end(error: InputError) -> NoReturn:
    """End the program with the error in one line, and the exit code 2."""
    sys.stderr.write(f"error: {error}\n")
    sys.exit(2)
