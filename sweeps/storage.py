"""A study's storage, and which worker runs which of its trials.

Everything here uses Optuna's public interface, which lets a worker finish any trial but run only those that it asked
for itself. A trial is RUNNING from the moment it is asked for, and its user attribute `worker` says by whom. Trials of
a worker that has ended are run again like this:

1. Any other worker tells such a trial FAIL, without the attribute `reason` that every trial which failed by itself has.
2. Whoever sees a trial that was given up like that adds a new one with the same params to the queue; the attribute
   `replaces` of the new trial is the number of the old one.

A worker may be killed between any two steps: the next one goes on from what the storage says. A worker that was wrongly
taken for dead cannot finish its trial any more, because the storage refuses changes of a trial that is finished. Two
workers that add a replacement, or ask for the last trial, at the same moment leave one trial too many, which is given
up and never run. So every configuration is once among the trials that were not given up.

A replacement begins without intermediate values, so pruners do not see what a dead worker reported, with one exception:
`SuccessiveHalvingPruner` and `HyperbandPruner` also compare with trials that failed.
"""

import contextlib
import os
import random
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
import psutil
from filelock import FileLock
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from tqdm import tqdm

from fdjax.errors import InputError
from sweeps.study import Study

BEAT = 10.0  # seconds between a worker's signs of life
GRACE = 90.0  # seconds without such a sign after which a worker on another machine is taken for dead
UNNAMED = 75.0  # seconds after which a trial without the name of a worker is taken for lost
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
        return _open_database(url)
    except (SQLAlchemyError, OSError, ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--storage={url}: {reason}; give sqlite:///folder/x.db, journal:folder/x.log or a database's URL"
        ) from None


def _open_database(url: str, tries: int = 5) -> optuna.storages.BaseStorage:
    """The database, with Optuna's tables. Workers that create them at the same moment disturb one another.

    Those of a SQLite file take turns by a lock beside it, which ends with its process; a server's try again.
    """
    path = url.partition("sqlite:///")[2].partition("?")[0]
    arguments = {"connect_args": {"timeout": _LOCKED}} if path else {"pool_pre_ping": True}
    try:
        with _turn(path):
            return optuna.storages.RDBStorage(url, engine_kwargs=arguments)
    except SQLAlchemyError as error:
        if not tries or not (isinstance(error, IntegrityError) or "already exists" in str(error)):
            raise
    time.sleep(random.uniform(0.5, 2.0))
    return _open_database(url, tries - 1)


@contextlib.contextmanager
def _turn(path: str) -> Iterator[None]:
    """One worker at a time, where there is a file and its folder can be written to and knows locks."""
    with contextlib.ExitStack() as stack:
        if path and os.access(Path(path).parent, os.W_OK):
            with contextlib.suppress(OSError, NotImplementedError):
                stack.enter_context(FileLock(f"{path}.lock"))
        yield


def patiently(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The call's result. It is repeated until the storage answers: a full disk or a locked database loses nothing."""
    wait = 1.0
    while True:
        try:
            return call(*args, **kwargs)
        except (SQLAlchemyError, StorageInternalError, OSError) as error:
            reason = str(error).splitlines()[0]
            tqdm.write(f"the storage does not answer ({reason}); again in {wait:.0f} s", file=sys.stderr)
            time.sleep(wait)
            wait = min(2 * wait, 60)


def replacements(trials: Sequence[FrozenTrial]) -> dict[int, int]:
    """The number of the first replacement of every trial that has one."""
    first: dict[int, int] = {}
    for trial in trials:
        if "replaces" in trial.user_attrs:
            first.setdefault(trial.user_attrs["replaces"], trial.number)
    return first


def given_up(trial: FrozenTrial) -> bool:
    """Whether the trial counts for nothing, because its worker ended or because it was one too many."""
    return trial.state == TrialState.FAIL and "reason" not in trial.user_attrs


def position(trials: Sequence[FrozenTrial], number: int) -> int:
    """The place in the study's plan of trial `number`, or of the next trial: replacements do not count."""
    return sum("replaces" not in trial.user_attrs for trial in trials[:number])


def _location() -> str:
    """Where the number of a process means the same process as here: the host and its namespace of processes."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{socket.gethostname()} {namespace}"


class Worker:
    """This process, as the storage knows it: a context in which it gives signs of life.

    If the context ends by an exception, the trials that the worker still had go back to the queue at once.
    """

    def __init__(self, plan: Study, study: optuna.Study):
        self.plan, self.study = plan, study
        created = psutil.Process().create_time()
        self.name = "|".join((_location(), str(os.getpid()), f"{created:.2f}", uuid.uuid4().hex[:6]))
        self._over, self._thread = threading.Event(), threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Worker":
        patiently(self._sign)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._over.set()
        self._thread.join(timeout=1)
        if kind is not None:
            with contextlib.suppress(Exception):  # from the storage; then another worker has to recover the trials
                while self.recover(self.study.get_trials(deepcopy=False)):
                    pass

    def _sign(self) -> None:
        self.study.set_user_attr(f"beat {self.name}", time.time())

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            with contextlib.suppress(Exception):  # from the storage; the next sign may arrive
                self._sign()

    def ask(self, count: int) -> list[optuna.Trial]:
        """Up to `count` trials to run, from the queue or new ones."""
        asked = []
        for _ in range(count):
            trial = patiently(self.study.ask, self.plan.distributions)
            try:
                patiently(trial.set_user_attr, "worker", self.name)
            except UpdateFinishedTrialError:  # it had no name for so long that another worker gave it up
                continue
            trials = patiently(self.study.get_trials, deepcopy=False)
            if self._is_surplus(trials[trial.number], trials):
                self.finish(trial, TrialState.FAIL)
            else:
                asked.append(trial)
        return asked

    def _is_surplus(self, trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> bool:
        replaced = trial.user_attrs.get("replaces")
        if replaced is None:
            return position(trials, trial.number) >= self.plan.total
        return not given_up(trials[replaced]) or replacements(trials)[replaced] != trial.number

    def finish(self, trial: optuna.Trial, state: TrialState, value: float | None = None, **attributes: Any) -> None:
        """Write the attributes and then the state, unless another worker took this one for dead and was faster."""
        with contextlib.suppress(UpdateFinishedTrialError):
            for name, content in attributes.items():
                patiently(trial.set_user_attr, name, content)
            patiently(self.study.tell, trial, value, state, skip_if_finished=True)

    def recover(self, trials: Sequence[FrozenTrial]) -> bool:
        """Take the next step for every trial whose worker has ended; returns whether there was any to take.

        Call it only while this worker runs nothing: trials that still bear its name count as lost.
        """
        replaced, beats, found = replacements(trials), self.study.user_attrs, False
        for trial in trials:
            if trial.state == TrialState.RUNNING and not self._is_held(trial, beats):
                with contextlib.suppress(UpdateFinishedTrialError):
                    self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
                found = True
            elif given_up(trial) and trial.number not in replaced and not self._is_surplus(trial, trials):
                self._add_replacement(trial, trials)
                found = True
        return found

    def _add_replacement(self, trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> None:
        params = trial.params
        if "replaces" not in trial.user_attrs and self.plan.search != "tpe":  # it may have been given up half sampled
            params = self.plan.point(position(trials, trial.number))
        distributions = {name: self.plan.distributions[name] for name in params}
        attributes = {"replaces": trial.number, "errors": trial.user_attrs.get("errors", 0)}
        new = optuna.create_trial(
            state=TrialState.WAITING, params=params, distributions=distributions, user_attrs=attributes
        )
        self.study.add_trial(new)

    def _is_held(self, trial: FrozenTrial, beats: dict[str, Any]) -> bool:
        """Whether a worker that lives has the trial."""
        holder = trial.user_attrs.get("worker")
        if holder is None:
            assert trial.datetime_start is not None
            return time.time() - trial.datetime_start.timestamp() < UNNAMED
        if holder == self.name:
            return False
        location, pid, created, _ = holder.split("|")
        if location != _location():
            return time.time() - beats.get(f"beat {holder}", 0.0) < GRACE
        try:
            process = psutil.Process(int(pid))
            same = abs(process.create_time() - float(created)) < 2.0  # the clock may have been set
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False
