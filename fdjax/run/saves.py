"""When a run saves and from what it goes on: its settings are those of the checkpoint, and its folder is its alone."""

import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fdjax import own
from fdjax.engine import hosts
from fdjax.engine.layout import State
from fdjax.engine.storage import Storage
from fdjax.errors import InputError
from fdjax.run.checkpoint import FOLDER, Checkpoints, UnsavedError, storages_of
from fdjax.run.record import Clock, Record
from fdjax.run.saving import tell_unsaved
from fdjax.run.settings import Settings

_SAVE_SECONDS = 30


class Saves:
    """The saves of a run: whether there is one to go on from, and when to make the next. None without a folder."""

    def __init__(self, folder: Path | None, every: int, settings: Settings, time_spent: Clock):
        self.folder, self.round = folder, 0  # rounds done at the last save
        self.record: Record | None = None  # of the save from which the run goes on, if there is one
        self.storages: tuple[Storage, ...] = ()  # where states of clients lie
        self._stored: list[Storage] | None = None  # where they lay at that save
        self._every, self._settings, self._time_spent = every, settings, time_spent
        self._checkpoints = None if folder is None else Checkpoints(folder / FOLDER)
        self._saved_at, self._failing = time.perf_counter(), False

    def check(self, resume: bool) -> None:
        """Find the last save, and make ready to write others.

        Raises InputError if the folder holds a run that is not to go on, or that these settings cannot continue.
        """
        checkpoints, folder = self._checkpoints, self.folder
        if checkpoints is None or folder is None:
            return
        checkpoints.latest()  # the first host looks, and tells the others
        with hosts.all_or_none():
            self._check(checkpoints, folder, resume)
            checkpoints.make_folder()

    def _check(self, checkpoints: Checkpoints, folder: Path, resume: bool) -> None:
        latest, damaged = checkpoints.latest(), checkpoints.damaged  # damaged is known to the first host alone
        newest = max([*damaged, *([] if latest is None else [latest])], default=None)
        if newest is not None and not resume:
            raise InputError(
                f"{folder} holds {newest} rounds already; use --resume to go on, --overwrite to begin anew or "
                "another --out"
            )
        if latest is not None:
            record = checkpoints.record()
            self._stored = storages_of(record)
            record.pop("files", None)
            check_same(folder, record.pop("settings"), self._settings)
            if latest > self._settings.rounds:
                raise InputError(f"{folder} is at round {latest} already; give --rounds={latest} or more")
            self.round, self.record = latest, record
        tell_damage(folder, checkpoints, "; the next save removes the damaged ones")

    def restore(self, like: State) -> State:
        """The state of the last save, with the shapes and the placement of `like`."""
        assert self._checkpoints is not None
        self._saved_at = time.perf_counter()
        return self._checkpoints.restore(like, self._stored, self.storages)

    def save_if_due(self, state: State, record: Record, done: int, *, at_once: bool) -> None:
        """Save if enough rounds or seconds have passed on any host, or `at_once`.

        A save that fails is told, and tried again when the next one is due; one that is wanted at once, at once.
        """
        if self._checkpoints is None:
            return
        rounds, seconds = done - self.round, time.perf_counter() - self._saved_at
        due = rounds >= self._every if self._every else seconds > _SAVE_SECONDS
        if not (hosts.any_of(due) or at_once):
            return
        more = {
            "settings": self._settings.public(),
            "files": self._settings.files,
            "storages": [list(storage) for storage in self.storages],
        }
        for attempt in range(2 if at_once else 1):
            self._saved_at = time.perf_counter()
            try:
                self._checkpoints.save(state, self._time_spent.stamp(record) | more)
            except UnsavedError as error:
                self._tell(done, str(error), final=attempt == 1)
            else:
                self.round, self._failing = done, False
                return

    def _tell(self, done: int, reason: str, *, final: bool) -> None:
        if final:  # on every host, whose exit codes tell
            tell_unsaved(f"the checkpoint after round {done} in {self.folder}", reason)
        elif not self._failing and hosts.is_first():
            tqdm.write(
                f"warning: the checkpoint after round {done} cannot be written to {self.folder}: {reason}; the run "
                "goes on, and tries again",
                file=sys.stderr,
            )
        self._failing = True

    def close(self) -> None:
        """Release what the checkpoints hold."""
        if self._checkpoints is not None:
            self._checkpoints.close()


_ADVICE = "use the settings of the run that you resume, or another --out"


def check_same(folder: Path, then: dict[str, Any], settings: Settings, advice: str = _ADVICE) -> None:
    """Raises InputError, which ends in the advice, if a run with the settings `then` cannot go on with these."""
    now = settings.public()
    differing = sorted(n for n in {*then, *now} - settings.resumable if then.get(n) != now.get(n))
    if differing:
        name, more = differing[0], f" ({len(differing) - 1} more differ)" if len(differing) > 1 else ""
        changed = own.changed(then.get(name), now.get(name))
        raise InputError(f"{folder} was run with {name}={then.get(name)}, not {now.get(name)}{changed}{more}; {advice}")


def tell_damage(folder: Path, checkpoints: Checkpoints, then: str = "") -> None:
    """Say which checkpoints are damaged, and what is done then.

    Raises InputError if there are checkpoints and none is whole.
    """
    if not (damaged := checkpoints.damaged):
        return
    words = "; ".join(f"that of round {step}: {what}" for step, what in sorted(damaged.items(), reverse=True))
    latest = checkpoints.latest()
    if latest is None:
        raise InputError(
            f"no checkpoint in {folder} is whole ({words}); copy the folder back from where it is, or begin anew with "
            "--overwrite"
        )
    text = f"warning: damaged checkpoints in {folder} ({words}); that of round {latest} is whole{then}"
    tqdm.write(text, file=sys.stderr)
