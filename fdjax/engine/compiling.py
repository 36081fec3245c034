"""Compilation: several calls side by side, and quickly what runs once."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jax.sharding import Mesh
from jaxlib.version import __version__ as jaxlib_version

# Drawing random bits is much code, which runs once: XLA:CPU takes as long to optimise it as it does for a round. The
# same numbers come out. A level that XLA_FLAGS ask for is left alone, and jaxlib 0.11 and later have no other emitters
# of fusions to choose.
_LEVEL = "xla_backend_optimization_level"
_QUICK = ({} if _LEVEL in os.environ.get("XLA_FLAGS", "") else {_LEVEL: 1}) | (
    {"xla_cpu_use_fusion_emitters": False} if jaxlib_version.startswith("0.10.") else {}
)


def quick(mesh: Mesh) -> dict[str, Any] | None:
    """Options of jit for what runs once on these devices."""
    return _QUICK if mesh.devices.flat[0].platform == "cpu" else None


def together(lowered: Sequence[Any], meanwhile: Callable[[], Any] = lambda: None) -> list[Any]:
    """All of what was lowered, compiled in threads; `meanwhile` is called in this one.

    XLA needs no Python as it compiles, and one call alone keeps few cores busy.
    """
    with ThreadPoolExecutor(max(len(lowered), 1)) as pool:
        compiled = [pool.submit(call.compile) for call in lowered]
        meanwhile()
        return [each.result() for each in compiled]
