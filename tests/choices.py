"""Which cases of a test are in `make test`, and which in `make test-all` alone."""

from collections.abc import Iterable
from typing import Any

import pytest


def some(cases: Iterable[Any], *usual: Any) -> list[Any]:
    """Parameters of a test, tuples if they are several: the `usual` cases, and the others in `make test-all`."""
    return [case if case in usual else _rare(case) for case in cases]


def _rare(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.exhaustive)
