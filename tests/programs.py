"""Programs in processes of their own, and how tests are compiled."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from jaxlib.version import __version__ as jaxlib_version

ROOT = Path(__file__).resolve().parents[1]
CACHE = tempfile.TemporaryDirectory()  # of compiled code, for all programs that a test process starts
_LEVEL = "--xla_backend_optimization_level="
AS_IN_USE = f"{_LEVEL}3"


def quick(flags: str) -> str:
    """XLA_FLAGS for fast compilation and not for fast code, unless a level of optimisation is among `flags`.

    Most of a test's time is XLA's. AS_IN_USE among the flags is XLA's own choice.
    """
    if _LEVEL in flags:
        return flags
    emitters = " --xla_cpu_use_fusion_emitters=false" if jaxlib_version.startswith("0.10.") else ""
    return f"{flags} {_LEVEL}0{emitters}"


def run(module: str, *flags: str, xla_flags: str | None = None) -> subprocess.CompletedProcess[str]:
    """`python -m module`, ended; compiled fast, as tests are, if no other flags are given."""
    xla_flags = quick(os.environ.get("XLA_FLAGS", "")) if xla_flags is None else xla_flags
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags, "JAX_COMPILATION_CACHE_DIR": CACHE.name}
    command = [sys.executable, "-m", module, *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
