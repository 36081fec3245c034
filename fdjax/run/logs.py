"""What is told of runs while they run: to loggers and to a user's callback, between supersteps and never in one."""

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from fdjax import own
from fdjax.engine import hosts
from fdjax.engine.check import place_of
from fdjax.errors import InputError
from fdjax.run.accounting import accounted
from fdjax.run.loggers import CsvLogger, Logger, Progress, TensorBoardLogger, WandbLogger
from fdjax.run.record import Recording, Result
from fdjax.run.saving import reason_of, tell_unsaved
from fdjax.run.settings import Settings

METRICS = "metrics.csv"


class Told(NamedTuple):
    """To whom the progress of a run is told, beside metrics.csv, which every run with a folder writes."""

    tensorboard: bool = False  # to event files in the folder `tensorboard`
    wandb: bool = False  # to an offline run of Weights & Biases
    callback: Callable[[Progress], Any] | None = None  # which is called with every evaluation


class CallbackError(InputError):
    """A callback raised something, and the run ended there; `results` are what there is by then, one a seed.

    With a folder there is a checkpoint too, from which the run can go on.
    """

    def __init__(self, message: str, *results: Result):
        super().__init__(message)
        self.results = results

    @property
    def result(self) -> Result | None:
        """That of one run."""
        return self.results[0] if self.results else None


def check_told(told: Told, out: Path | None) -> None:
    """Raises InputError for loggers without a folder or whose package is missing, and for a callback that is none."""
    for name, given in (("tensorboard", told.tensorboard), ("wandb", told.wandb)):
        if not isinstance(given, bool):
            raise InputError(f"{name}={given!r}: expected True or False")
        if given and out is None:
            raise InputError(f"{name}=True writes to the folder of the run; give out as well")
    for given, package, extra in ((told.tensorboard, "tensorboardX", "tensorboard"), (told.wandb, "wandb", "wandb")):
        if given and importlib.util.find_spec(package) is None:
            raise InputError(f"--{extra} needs the package {package}; pip install 'fdjax[{extra}]', or leave it out")
    if told.callback is not None and not callable(told.callback):
        raise InputError(f"callback={told.callback!r}: expected a function of a fdjax.Progress")


class Logs:
    """All who are told of some runs, which differ by their seeds. A logger that fails is left alone, and told once."""

    def __init__(self, told: Told, out: Path | None, settings: Sequence[Settings]):
        self.failure = ""  # in words, what the callback raised and where
        self._callback = told.callback
        self._seen: dict[int, int] = {}  # evaluations told, by seed
        self._failed: dict[int, str] = {}  # by the number of the logger, why
        self._loggers: list[Logger] = []
        if out is not None and hosts.is_first():
            several = len(settings) > 1
            self._loggers = [
                CsvLogger(out / METRICS, several),
                *([TensorBoardLogger(out / "tensorboard", several)] if told.tensorboard else []),
                *([WandbLogger(out, several)] if told.wandb else []),
            ]

    def tell(self, recording: Recording, *, again: bool = False) -> None:
        """Tell what is new on record; `again`: it is from before a resumed start, and the callback has had it."""
        seed, evaluations = recording.settings.seed, recording.record["evaluations"]
        if not self._loggers and self._callback is None:
            return
        for progress in _since(recording, self._seen.get(seed, 0)):
            for number, logger in enumerate(self._loggers):
                self._write(number, logger, progress)
            if not again:
                self._call(progress)
        self._seen[seed] = len(evaluations["round"])

    def _write(self, number: int, logger: Logger, progress: Progress) -> None:
        if number in self._failed and not isinstance(logger, CsvLogger):
            return
        try:
            logger.write(progress)
        except Exception as error:  # of a disk, or of another library: no result may be lost for it
            if number not in self._failed:
                tqdm.write(f"warning: {logger.name} cannot be written: {reason_of(error)}; the run goes on", sys.stderr)
            self._failed[number] = reason_of(error)
        else:
            self._failed.pop(number, None)  # metrics.csv is whole again

    def _call(self, progress: Progress) -> None:
        if self._callback is None or self.failure or not hosts.is_first():
            return
        try:
            self._callback(progress)
        except Exception as error:
            self.failure = f"callback{place_of(self._callback)} raised {own.told(error)} after round {progress.round}"

    def failed(self) -> bool:
        """Whether the callback has raised something, known to all hosts."""
        return self._callback is not None and hosts.any_of(bool(self.failure))

    def close(self) -> None:
        """Close all loggers, and tell which of them have not written everything."""
        for number, logger in enumerate(self._loggers):
            try:
                logger.close()
            except Exception as error:
                self._failed[number] = reason_of(error)
            if number in self._failed and (not isinstance(logger, CsvLogger) or not logger.whole):
                tell_unsaved(logger.name, self._failed[number])

    def error(self, folder: Path | None, *results: Result) -> CallbackError:
        """What to raise where the callback failed; with a folder, a checkpoint is there."""
        failure = self.failure or "the callback on the first host failed"
        kept = "the result until then is .result of this error"
        more = f", and resume=True goes on from {folder}" if folder is not None else ""
        return CallbackError(f"{failure}; {kept}{more}", *results)


def _since(recording: Recording, first: int) -> Iterator[Progress]:
    """Of each evaluation on record, from the number `first` on."""
    record, settings = recording.record, recording.settings
    evaluations, clients = record["evaluations"], recording.clients_at
    ends = [int(n) for n in evaluations["round"]]
    rounds = recording.histories()
    if rounds.get("bytes_up"):
        rounds |= accounted(settings, recording.ledger, {"bytes_up": [0.0] * settings.rounds})[0] | rounds
    for i in range(first, len(ends)):
        begin, end = ends[i - 1] if i else 0, ends[i]
        sent = (rounds[name][end - 1] if end else record["setup"].get(name, 0.0) for name in ("bytes_up", "bytes_down"))
        yield Progress(
            settings,
            end,
            {name: values[begin:end] for name, values in rounds.items()} if end else {},
            {name: values[i] for name, values in evaluations.items() if i < len(values)},
            clients(i),
            *sent,
            stopped=recording.stopped if i == len(ends) - 1 else {},
        )
