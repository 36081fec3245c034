"""Checkpoints of a run by orbax: the state bit for bit, the history so far, and what was being run."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fdjax.engine.layout import State
from fdjax.engine.storage import Storage, placed
from fdjax.errors import InputError
from fdjax.types import PyTree


class Checkpoints:
    """The checkpoints of one run, the newest two kept. A save is complete or absent, also if the process is killed."""

    def __init__(self, folder: os.PathLike | str):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self.folder = Path(folder).absolute()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Named here, or a process that only reads could not see the dtypes of what another one saved.
            handlers = {"state": ocp.StandardCheckpointHandler(), "record": ocp.JsonCheckpointHandler()}
            self._manager = ocp.CheckpointManager(
                self.folder, options=ocp.CheckpointManagerOptions(max_to_keep=2), item_handlers=handlers
            )
        except OSError as error:
            raise InputError(f"cannot write checkpoints to {folder}: {error.strerror}; choose another --out") from None

    def latest(self) -> int | None:
        """The last round saved, or None."""
        return self._manager.latest_step()

    def save(self, state: State, record: dict[str, Any]) -> None:
        """Write the state and `record`, which must survive JSON; returns when both are on disk."""
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardSave(state),
            record=self._ocp.args.JsonSave(record),
        )
        self._manager.save(int(state.round), args=args, force=True)
        self._manager.wait_until_finished()

    def record(self) -> dict[str, Any]:
        """The record of the latest checkpoint."""
        args = self._ocp.args.Composite(record=self._ocp.args.JsonRestore())
        return self._manager.restore(self.latest(), args=args)["record"]

    def restore(self, like: State, then: Sequence[Storage] | None = None, now: Sequence[Storage] = ()) -> State:
        """The state of the latest checkpoint, with the structure, shapes, dtypes and placement of `like`.

        `then` and `now` say where states of clients lay (None: by rank, as on one device) and are to lie. If these
        differ, as on another number of devices, each host reads all states into its own memory first.
        """
        then = then or [Storage(each.clients, 1, 1, each.clients) for each in now]
        found = self._manager.item_metadata(self.latest() or 0)["state"]
        # orbax raises for another shape, but casts another dtype in silence.
        dtypes = [np.dtype(leaf.dtype) for leaf in jax.tree.leaves(found)]
        if sorted(map(str, dtypes)) != sorted(str(leaf.dtype) for leaf in jax.tree.leaves(like)):
            raise InputError(f"the checkpoint in {self.folder} has other dtypes than this run; start a new --out")
        moves = list(then) != list(now)
        asked = like._replace(clients=tuple(map(_on_host, like.clients, then))) if moves else like
        args = self._ocp.args.Composite(state=self._ocp.args.StandardRestore(asked))
        state = self._manager.restore(self.latest(), args=args)["state"]
        return state._replace(clients=tuple(map(_moved, state.clients, like.clients, then, now))) if moves else state

    def close(self) -> None:
        """Release orbax's threads."""
        self._manager.close()


def _on_host(like: PyTree, then: Storage) -> PyTree:
    """What orbax takes for arrays of NumPy."""
    return jax.tree.map(lambda x: np.empty((then.rows, *x.shape[1:]), x.dtype), like)


def _moved(clients: PyTree, like: PyTree, then: Storage, now: Storage) -> PyTree:
    meshes = [leaf.sharding.mesh for leaf in jax.tree.leaves(like)]
    by_rank = jax.tree.map(lambda x: then.collect(np.asarray(x)), clients)
    return placed([now], (by_rank,), meshes[0])[0] if meshes else clients  # a client may keep nothing
