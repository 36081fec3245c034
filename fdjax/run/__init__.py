"""What defines a run, makes it ready, carries it out and keeps its results.

This package is also a function: `fdjax.run(...)` is `fdjax.run.runner.start(...)`, so that one word starts a run, while
its modules import as those of any package. Its module object has the class below for that.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fdjax.run.record import Result


class _CallablePackage(ModuleType):
    """A package that can be called."""

    def __call__(self, *args: Any, **named: Any) -> "Result":
        """Carry out a run: see `fdjax.run.runner.start`, which takes the same arguments."""
        from fdjax.run.runner import start

        return start(*args, **named)


sys.modules[__name__].__class__ = _CallablePackage
