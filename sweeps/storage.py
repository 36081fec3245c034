"""A study's storage, and which worker holds which trial.

A trial is RUNNING from the moment it is asked for, and its user attribute `worker` says for whom. A worker that was
killed leaves such trials behind: others take them over where they are, with the params that they have, so none is lost
and none appears twice. Two that take over the same trial at the same moment both run it, with the params that the
storage has, and Optuna lets only one of them finish it.
"""

import contextlib
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError
from tqdm import tqdm

from fdjax.errors import InputError

BEAT = 10.0  # seconds between the signs of life of a worker
GRACE = 90.0  # without one, a worker on another machine is taken for dead
UNNAMED = 75.0  # and a trial that no worker put its name to is taken for lost
_LOCKED = 60  # seconds that SQLite waits for another writer; UNNAMED is longer


def open_storage(url: str) -> optuna.storages.BaseStorage:
    """SQLite, a database server, or `journal:path`. Raises InputError if it cannot be opened."""
    try:
        if url.startswith("journal:"):
            path = Path(url.removeprefix("journal:"))
            path.parent.mkdir(parents=True, exist_ok=True)
            return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
        if url == "sqlite://" or ":memory:" in url:
            raise OSError("a study needs a storage that stays")
        if url.startswith("sqlite:///"):
            Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        arguments = {"connect_args": {"timeout": _LOCKED}} if url.startswith("sqlite") else {"pool_pre_ping": True}
        return optuna.storages.RDBStorage(url, engine_kwargs=arguments)
    except (SQLAlchemyError, OSError, ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--storage={url}: {reason}; give sqlite:///folder/x.db, journal:folder/x.log or a database's URL"
        ) from None


def patiently(write: Callable[[], Any]) -> Any:
    """What `write` returns, tried until the storage does it: a full disk or a locked database loses nothing."""
    wait = 1.0
    while True:
        try:
            return write()
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError, OSError) as error:
            reason = str(error).splitlines()[0]
            tqdm.write(f"the storage does not answer ({reason}); again in {wait:.0f} s", file=sys.stderr)
            time.sleep(wait)
            wait = min(2 * wait, 60)


def _place() -> str:
    """Where a process number means this process: the host and its namespace of processes."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{socket.gethostname()} {space}"


class Worker:
    """This process, as the storage knows it; a context in which it gives signs of life."""

    def __init__(self, study: optuna.Study):
        self.study = study
        created = psutil.Process().create_time()
        self.name = "|".join((_place(), str(os.getpid()), f"{created:.2f}", uuid.uuid4().hex[:6]))
        self._over, self._thread = threading.Event(), threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Worker":
        patiently(self._sign)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join(timeout=1)

    def _sign(self) -> None:
        self.study.set_user_attr(f"beat {self.name}", time.time())

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            with contextlib.suppress(Exception):  # of the storage: the next sign may arrive
                self._sign()

    def take(self, trial_id: int) -> optuna.Trial:
        """Put this worker's name to a trial."""
        trial = optuna.Trial(self.study, trial_id)
        trial.set_user_attr("worker", self.name)
        return trial

    def release(self, trial: optuna.Trial) -> None:
        """Let others have a trial at once."""
        trial.set_user_attr("worker", "")

    def left_behind(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """Those of `trials` that nobody runs any more."""
        beats = self.study.user_attrs
        return [t for t in trials if t.state == TrialState.RUNNING and not self._is_held(t, beats)]

    def _is_held(self, trial: FrozenTrial, beats: dict[str, Any]) -> bool:
        holder = trial.user_attrs.get("worker")
        if holder is None:
            assert trial.datetime_start is not None
            return time.time() - trial.datetime_start.timestamp() < UNNAMED
        if holder in ("", self.name):  # this worker asks when it holds nothing: it lost hold of such a trial
            return False
        place, pid, created, _ = holder.split("|")
        if place == _place():
            try:
                process = psutil.Process(int(pid))
                same = abs(process.create_time() - float(created)) < 2.0  # the clock may have been set
                return same and process.status() != psutil.STATUS_ZOMBIE
            except psutil.NoSuchProcess:
                return False
        return time.time() - beats.get(f"beat {holder}", 0.0) < GRACE

    def take_over(self, trials: list[FrozenTrial]) -> list[optuna.Trial]:
        """Take trials that were left behind, but for those that another worker takes at this moment."""
        mine = [self.take(t._trial_id) for t in trials]
        if mine:
            time.sleep(0.3)
        return [t for t in mine if optuna.Trial(self.study, t._trial_id).user_attrs.get("worker") == self.name]
