"""Checkpoints of a run by orbax: the state bit for bit, the history so far, and what was being run.

A checkpoint is whole if its files have the checksums beside them, which are written last.
"""

import contextlib
import functools
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from fdjax.engine import hosts
from fdjax.engine.layout import State
from fdjax.engine.storage import Storage, placed
from fdjax.errors import InputError
from fdjax.run import checksums
from fdjax.types import PyTree

_KEPT = 2
_WAIT_SECONDS = 300  # for the other hosts to have written their parts
_NAMED = 5  # folders in a message
FOLDER = "checkpoints"  # of a run's folder


class UnsavedError(Exception):
    """A checkpoint could not be written; the message is the reason."""


class Checkpoints:
    """The checkpoints of one run, the newest two kept. A save is complete or absent, also if the process is killed.

    Reading changes nothing in the folder. `open` makes it ready to be written to.
    """

    def __init__(self, folder: os.PathLike | str):
        self.folder = Path(folder).absolute()
        self.damaged: dict[int, str] = {}  # rounds later than the latest that is whole, and what is wrong with them
        self._looked, self._latest = False, -1
        self._manager: Any = None

    def latest(self) -> int | None:
        """The last round saved whole, or None."""
        if not self._looked:
            if hosts.is_first():
                self._look()
            self._latest, self._looked = hosts.first_says(self._latest), True
        return None if self._latest < 0 else self._latest

    def _look(self) -> None:
        for step in sorted(steps(self.folder), reverse=True):
            words = checksums.damage(self._of(step))
            if not words:
                self._latest = step
                return
            self.damaged[step] = words

    def _of(self, step: int | None = None) -> Path:
        """The folder of a step, by default of the latest."""
        return self.folder / str(self.latest() if step is None else step)

    def open(self) -> None:
        """Make ready to write: what was damaged after the latest whole one is removed, and what killed saves left.

        Raises InputError if nothing can be written.
        """
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(
            max_to_keep=_KEPT, async_options=ocp.options.AsyncOptions(timeout_secs=_WAIT_SECONDS)
        )
        try:
            with hosts.all_or_none():
                self.make_folder()
                self._make_room()
            handlers = {"state": ocp.StandardCheckpointHandler(), "record": ocp.JsonCheckpointHandler()}
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
            _silence()
        except OSError as error:
            raise self._unwritable(error) from None

    def make_folder(self) -> None:
        """Raises InputError if there can be no such folder."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from None

    def _make_room(self) -> None:
        try:
            if hosts.is_first():
                for path in (*map(self._of, self.damaged), *self.folder.glob("*.orbax-checkpoint-tmp")):
                    shutil.rmtree(path)
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(f"cannot write checkpoints to {self.folder}: {error.strerror}; choose another --out")

    def save(self, state: State, record: dict[str, Any]) -> None:
        """Write the state and `record`, which must survive JSON; returns when both are on disk.

        Raises UnsavedError, on all hosts, if that is not possible; nothing of it is left then.
        """
        import orbax.checkpoint as ocp

        if self._manager is None:
            self.open()
        assert self._manager is not None
        step, reason = int(state.round), ""
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
        try:
            self._manager.save(step, args=args, force=True)
            self._manager.wait_until_finished()
            if hosts.is_first():
                checksums.write(self._of(step))
        except Exception as error:  # of orbax, tensorstore or the operating system, whatever the cause
            reason = _reason(error)
            _wait_for_threads()
        if hosts.any_of(bool(reason)):
            self._discard(step)
            raise UnsavedError(reason or "another host cannot write its part")
        self._latest, self._looked = step, True

    def _discard(self, step: int) -> None:
        """Remove what is left of a save that failed."""
        if hosts.is_first():
            for path in (self._of(step), *self.folder.glob("*.orbax-checkpoint-tmp")):
                shutil.rmtree(path, ignore_errors=True)
        hosts.wait()
        self._manager.reload()

    def record(self) -> dict[str, Any]:
        """The record of the latest checkpoint."""
        return json.loads((self._of() / "record" / "metadata").read_text())

    def restore(self, like: State, then: Sequence[Storage] | None = None, now: Sequence[Storage] = ()) -> State:
        """The state of the latest checkpoint, with the structure, shapes, dtypes and placement of `like`.

        `then` and `now` say where states of clients lay (None: by rank, as on one device) and are to lie. If these
        differ, as on another number of devices, each host reads all states into its own memory first.
        """
        then = then or [Storage(each.clients, 1, 1, each.clients) for each in now]
        moves = list(then) != list(now)
        state = self._read(like._replace(clients=tuple(map(_on_host, like.clients, then))) if moves else like)
        return state._replace(clients=tuple(map(_moved, state.clients, like.clients, then, now))) if moves else state

    def read(self, like: State, then: Sequence[Storage]) -> State:
        """The same as arrays of NumPy, states of clients in the rows where they lay."""
        others = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like._replace(clients=()))
        return self._read(others._replace(clients=tuple(map(_on_host, like.clients, then))))

    def _read(self, like: State) -> State:
        import orbax.checkpoint as ocp

        path: Any = self._of() / "state"
        handler = ocp.StandardCheckpointHandler()
        # orbax raises for another shape, but casts another dtype in silence.
        dtypes = [np.dtype(leaf.dtype) for leaf in jax.tree.leaves(handler.metadata(path).tree)]
        if sorted(map(str, dtypes)) != sorted(str(leaf.dtype) for leaf in jax.tree.leaves(like)):
            raise InputError(f"the checkpoint in {self.folder} has other dtypes than this run; start a new --out")
        with contextlib.closing(ocp.Checkpointer(handler)) as checkpointer:
            return checkpointer.restore(path, args=ocp.args.StandardRestore(like))

    def close(self) -> None:
        """Release orbax's threads."""
        if self._manager is not None:
            self._manager.close()


def storages_of(record: dict[str, Any]) -> list[Storage] | None:
    """Where states of clients lay when a record was saved, which is taken out of it; None: by rank."""
    stored = record.pop("storages", None)
    return None if stored is None else [Storage(*each) for each in stored]


def steps(folder: Path) -> list[int]:
    """The rounds of which a folder has a checkpoint, whole or not."""
    if not folder.is_dir():
        return []
    return [int(path.name) for path in folder.iterdir() if path.name.isascii() and path.name.isdecimal()]


def check_resumable(folder: Path) -> None:
    """Raises InputError, which names the folders beside it that could be resumed, if this one has no checkpoint.

    The folder of a table has its runs' checkpoints below it.
    """
    if _has_any(folder):
        return
    others = runs_at(folder.parent)
    could = f"{others} could be resumed" if others else "nor does anything beside it"
    raise InputError(f"{folder} holds no checkpoint to resume; {could}; without --resume a new run begins")


def runs_at(folder: Path) -> str:
    """The folders in this one that hold checkpoints, the latest first, in words; empty if there are none."""
    if not folder.is_dir():
        return ""
    runs = [str(path) for path in sorted(folder.iterdir(), key=_changed, reverse=True) if _has_any(path)]
    return ", ".join(runs[:_NAMED]) + (f" and {len(runs) - _NAMED} more" if len(runs) > _NAMED else "")


def _has_any(folder: Path) -> bool:
    return any(steps(path) for path in (folder / FOLDER, *folder.glob(f"runs/*/{FOLDER}")))


def _changed(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


@functools.cache
def _silence() -> None:
    """From here on, nothing of the tracebacks of a save that fails: it raises too, and is told in one line.

    Some come when it is over: of writes that end after the first one has failed, when nobody listens any more.
    """
    for logger in (logging.get_absl_logger(), getLogger("asyncio")):
        logger.addFilter(_not_of_orbax)
    before = sys.unraisablehook

    def hook(raised: Any) -> None:
        if str(raised.exc_value) != "Event loop is closed":
            before(raised)

    sys.unraisablehook = hook


def _not_of_orbax(record: Any) -> bool:
    """A filter of what orbax logs, and asyncio of its tasks."""
    return "orbax" not in record.pathname and not (record.name == "asyncio" and "orbax" in record.getMessage())


def _wait_for_threads() -> None:
    """Until nothing of a save that failed is written any more."""
    end = time.monotonic() + _WAIT_SECONDS
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            with contextlib.suppress(Exception):  # which the thread ended in, and is known
                thread.join(max(end - time.monotonic(), 0))


def _reason(error: Exception) -> str:
    """Why a save failed, in a few words: what the operating system says, if it is that."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    if "Barrier timed out" in text:
        return "another host did not write its part"
    found = re.search(r"([^:\[\]]+) \[os_error_code", text)
    return found[1].strip() if found else f"{type(error).__name__}: {text[:200]}"


def _on_host(like: PyTree, then: Storage) -> PyTree:
    """What orbax takes for arrays of NumPy."""
    return jax.tree.map(lambda x: np.empty((then.rows, *x.shape[1:]), x.dtype), like)


def _moved(clients: PyTree, like: PyTree, then: Storage, now: Storage) -> PyTree:
    meshes = [leaf.sharding.mesh for leaf in jax.tree.leaves(like)]
    by_rank = jax.tree.map(lambda x: then.collect(np.asarray(x)), clients)
    return placed([now], (by_rank,), meshes[0])[0] if meshes else clients  # a client may keep nothing
