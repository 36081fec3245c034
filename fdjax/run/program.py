"""The frame of every program: flags, one-line errors, Ctrl-C, and compiled code that is kept for the next start."""

import contextlib
import os
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import jax
from absl import app, flags, logging

from fdjax.engine import hosts
from fdjax.errors import InputError, show_warning
from fdjax.run.checkpoint import FOLDER, check_resumable, runs_at, steps
from fdjax.run.parsing import parse_flags
from fdjax.run.runner import InterruptedRun
from fdjax.run.saving import unsaved
from fdjax.runtime import use_all_cores


def define_output_flags(out: str | None) -> None:
    """--out, --resume, --overwrite, --checkpoint_every."""
    flags.DEFINE_string("out", out, "folder for results, pictures and checkpoints")
    flags.DEFINE_boolean("resume", False, "go on from the checkpoints in --out")
    flags.DEFINE_boolean("overwrite", False, "begin again although --out holds a run")
    flags.DEFINE_integer("checkpoint_every", 0, "rounds between checkpoints; 0: about every 30 seconds", lower_bound=0)


def define_host_flags() -> None:
    """--coordinator, --num_processes, --process_id."""
    flags.DEFINE_string(
        "coordinator", None, "host:port of process 0, when several hosts share a run; auto: ask the cluster"
    )
    flags.DEFINE_integer("num_processes", None, "hosts that share the run")
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0")


def keep_compiled_code(folder: str) -> None:
    """Let JAX keep in `folder` everything that it compiles from here on, and look there first; empty: not at all.

    A folder that cannot be written to is left alone with a warning: the run takes longer, and that is all. JAX does
    not write its files atomically: of a process that is killed as it writes, one may stay that cannot be read. JAX then
    says so and compiles that function at every start, until the folder is removed.
    """
    path: Path | None = Path(folder).expanduser() if folder else None
    if path is not None:
        try:
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        except OSError as error:
            path = None
            sys.stderr.write(
                f"warning: --compile_cache={folder}: {error.strerror}; compiled code is not kept, give another folder\n"
            )
    jax.config.update("jax_compilation_cache_dir", None if path is None else str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@contextlib.contextmanager
def _silent():
    """Only the first host prints."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


class _Unbreakable:
    """A stream whose reader may end, as `head` does, without ending the program: what follows goes nowhere."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._unless_broken(lambda: self._stream.write(text)) or len(text)

    def flush(self) -> None:
        self._unless_broken(self._stream.flush)

    def _unless_broken(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except BrokenPipeError:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


def start(main: Callable[..., None], arguments: str = "") -> None:
    """Parse the flags and call `main`. Bad input ends in one line and exit code 2, a stop in 130.

    `arguments` says what the arguments beside flags are, of a program that takes some: `main` gets them.
    Where `main` ends well, but something that was asked for could not be saved, the exit code is 1.
    """

    about = sys.modules[main.__module__].__doc__
    sys.modules["__main__"].__doc__ = about  # which --help begins with; a console command has none

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1 and not arguments:
            sys.exit(_complain(f"unexpected argument {argv[1]!r}; settings are flags, e.g. --rounds=20 (see --help)"))
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # orbax tells every step of a save at level info
        given = flags.FLAGS
        resume = "resume" in given and given.resume
        if resume and given.overwrite:
            sys.exit(_complain("--resume and --overwrite exclude each other; give one of them"))
        if resume and not given.out:
            could = runs_at(Path("runs"))
            runs = f", {'one of ' if ',' in could else ''}{could}" if could else ""
            sys.exit(_complain(f"--resume needs the --out of the run that is to go on{runs}"))
        warnings.showwarning = show_warning
        use_all_cores()
        keep_compiled_code(given.compile_cache)
        try:
            if "coordinator" in given:
                hosts.join(given.coordinator, given.num_processes, given.process_id)
            elif resume:  # of several runs, some of which may not have begun
                check_resumable(Path(given.out).expanduser())
            with contextlib.nullcontext() if hosts.is_first() else _silent():
                main(*argv[1:])
        except InputError as error:
            where = [note for note in getattr(error, "__notes__", []) if not note.startswith("---")]  # not JAX's own
            sys.exit(_complain("\n".join([str(error), *where])))
        except InterruptedRun as stop:
            out = "" if stop.out is None else shlex.quote(f"--out={stop.out}")
            kept = f"; the same command with {out} --resume (and no --overwrite) goes on" if out else ""
            sys.exit(_complain(f"stopped after round {stop.round}{kept}", 130))
        except KeyboardInterrupt:
            kept = "out" in given and given.out and steps(Path(given.out).expanduser() / FOLDER)
            more = f"; --resume goes on from the checkpoint after round {max(kept)}" if kept else ""
            sys.exit(_complain(f"stopped at once{more}", 130))
        if unsaved():
            sys.exit(1)

    flags.DEFINE_string(
        "compile_cache",
        os.environ.get("JAX_COMPILATION_CACHE_DIR", "~/.cache/fdjax/compiled"),
        "folder where compiled code is kept, so that the next start of the same command compiles nothing; it may be "
        "removed at any time. Empty: nothing is kept",
    )
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        if module.startswith(("fdjax.", "benchmarks.", "sweeps.")):
            for flag in defined:  # so that --help lists them as this program's own
                flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    sys.stdout, sys.stderr = _Unbreakable(sys.stdout), _Unbreakable(sys.stderr)
    app.run(guarded, flags_parser=parse_flags)


def _complain(message: str, code: int = 2) -> int:
    sys.stderr.write(f"error: {message}\n" if code == 2 else f"{message}\n")
    return code
