"""Programs in processes of their own or within this one, and how tests are compiled."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from absl import app, flags, logging
from absl.testing import flagsaver
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


def environment() -> dict[str, str]:
    """Variables of a program in a process of its own: compiled fast, as tests are, and only once by all of them."""
    quickly = quick(os.environ.get("XLA_FLAGS", ""))
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quickly, "JAX_COMPILATION_CACHE_DIR": CACHE.name}


def run(module: str, *flags: str, xla_flags: str | None = None) -> subprocess.CompletedProcess[str]:
    """`python -m module`, ended; compiled fast, as tests are, if no other flags are given."""
    variables = environment() | ({} if xla_flags is None else {"XLA_FLAGS": xla_flags})
    command = [sys.executable, "-m", module, *flags]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=600)


def run_here(module: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """The same within this process, which saves seconds of imports and what has been compiled already.

    For what a program computes, writes, prints and refuses; signals, locks and limits need a process of their own.
    """
    from fdjax import own
    from fdjax.run import methods, program, saving

    app.define_help_flags()
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(program, "keep_compiled_code"))  # that is a choice of a whole process
        stack.enter_context(mock.patch.object(saving, "_unsaved", []))
        stack.enter_context(mock.patch.object(methods, "_OWN", own.Registry("method")))  # those of tests have no flags
        stack.enter_context(warnings.catch_warnings(action="default", category=UserWarning))  # told, and no errors
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(arguments(*flags))
        stack.callback(logging.set_verbosity, logging.get_verbosity())
        try:
            run_module(module)
        except SystemExit as end:
            code = end.code or 0
    return subprocess.CompletedProcess([module, *flags], code, out.getvalue(), err.getvalue())


def run_module(name: str) -> None:
    """`python -m name`, also of a module that another test has imported, which stays what it was."""
    names = [each for each in (name, f"{name}.__main__") if not hasattr(sys.modules.get(each), "__path__")]
    imported = {each: sys.modules.pop(each) for each in names if each in sys.modules}
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    finally:
        sys.modules.update(imported)


@contextlib.contextmanager
def arguments(*given: str) -> Iterator[None]:
    """The arguments and flags of a process that starts: flags that tests' imports have defined are away meanwhile."""
    others = {name: flags.FLAGS[name] for name in flags.FLAGS if not _is_absl(name)}
    for name in others:
        delattr(flags.FLAGS, name)
    saved = flagsaver.save_flag_values(flags.FLAGS)
    try:
        with mock.patch.object(sys, "argv", ["program", *given]):
            yield
    finally:
        flagsaver.restore_flag_values(saved, flags.FLAGS)
        for name, flag in others.items():
            flags.FLAGS[name] = flag


def _is_absl(name: str) -> bool:
    module = flags.FLAGS.find_module_defining_flag(name, "")
    return module == "absl" or module.startswith("absl.")
