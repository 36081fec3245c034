"""Where the numbers of a run go while it runs: a CSV file, TensorBoard's events, Weights & Biases offline.

A logger is given the `Progress` of runs, from the evaluation before the first round on, and writes all of it. When a
run goes on from a checkpoint it is given what is on record again, and begins its files anew: so no row is missing, and
none is there twice.
"""

import csv
import importlib
import io
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fdjax.run.saving import replacing
from fdjax.run.settings import FOLDERS, Settings


class Progress(NamedTuple):
    """One evaluation of a run, and the rounds since the evaluation before. `fdjax.run(..., callback=f)` calls f(it)."""

    settings: Settings
    round: int  # rounds done; 0: before the first one, after the set-up
    rounds: dict[str, list[float]]
    # of each round since the last evaluation: metrics of training, cumulative bytes_up and bytes_down ..., as in
    # `Result.rounds`; {} before the first round
    evaluation: dict[str, float]  # as in `Result.evaluations`
    clients: dict[str, list[float]]  # of every client in order of ids, as in `Result.clients`
    bytes_up: float  # of all clients until now, those of the set-up among them
    bytes_down: float
    stopped: Mapping[str, Any]  # the round and why, if the run ends here by its own rules, as in `Result.stopped`


class Logger(Protocol):
    """Something that keeps the progress of runs. What it raises is told once, and ends this logger and nothing else."""

    name: str  # in words

    def write(self, progress: Progress) -> None:
        """Keep one evaluation, and the rounds before it; it is on disk when this returns."""
        ...

    def close(self) -> None:
        """No more will come."""
        ...


class CsvLogger:
    """metrics.csv: a row for each round, and one before the first, with the evaluation after it where there was one.

    Cells of what was not measured, and of what is not a number, are empty. Of several seeds the first column is `seed`.
    """

    def __init__(self, path: Path, several: bool):
        self.name, self._path, self._several = str(path), path, several
        self._rows: list[dict[str, Any]] = []
        self._of_rounds: dict[str, None] = {}  # names of columns, in order
        self._of_evaluations: dict[str, None] = {}
        self._written: list[str] | None = None  # columns of the file; None: it has to be written anew

    def write(self, progress: Progress) -> None:
        """Append the rows, or write the file anew where there are new columns."""
        rows = self._rows_of(progress)
        self._rows += rows
        columns, before = self._columns(), self._written
        self._written = None  # until it has worked
        if columns == before:
            with self._path.open("a", newline="") as file:
                file.write(_csv(columns, rows))
            self._written = columns
        else:
            self._write_anew()

    @property
    def whole(self) -> bool:
        """Whether the file has all rows."""
        return self._written is not None

    def _rows_of(self, progress: Progress) -> list[dict[str, Any]]:
        evaluation = {  # which a method's metric may be called like
            f"evaluation.{name}" if name in progress.rounds else name: value
            for name, value in progress.evaluation.items()
            if name != "round"
        }
        self._of_rounds |= dict.fromkeys(progress.rounds)
        self._of_evaluations |= dict.fromkeys(evaluation)
        rows = [{"round": number} | values for number, values in each_round(progress)] or [{"round": progress.round}]
        rows[-1] |= evaluation
        return [{"seed": progress.settings.seed} | row for row in rows]

    def close(self) -> None:
        """Write the whole file once more if it could not be written before: there may be room now."""
        if not self.whole and self._rows:
            self._write_anew()

    def _columns(self) -> list[str]:
        return ["seed"] * self._several + ["round", *self._of_rounds, *self._of_evaluations]

    def _write_anew(self) -> None:
        with replacing(self._path) as temporary:
            temporary.write_text(_csv(self._columns(), self._rows, header=True), newline="")
        self._written = self._columns()


def _csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], *, header: bool = False) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([columns] if header else [])
    cells = ([row.get(name, math.nan) for name in columns] for row in rows)
    writer.writerows([["" if math.isnan(x) else x for x in row] for row in cells])
    return text.getvalue()


def each_round(progress: Progress) -> Iterator[tuple[int, dict[str, float]]]:
    """The rounds since the last evaluation: the number of each, from 1, and its values by name."""
    size = max(map(len, progress.rounds.values()), default=0)
    for i in range(size):
        yield progress.round - size + 1 + i, {name: values[i] for name, values in progress.rounds.items()}


class TensorBoardLogger:
    """Event files below `folder`, which TensorBoard shows: scalars rounds/..., evaluations/..., and the settings.

    They are written by tensorboardX, at once and in this thread, so that what fails is known: its own SummaryWriter
    would wait for ever for a thread that a full disk has ended. TensorBoard's scalars are float32.
    """

    name = "TensorBoard's events"

    def __init__(self, folder: Path, several: bool):
        self._folder, self._several = folder, several
        self._writers: dict[int, Any] = {}  # by seed

    def write(self, progress: Progress) -> None:
        """Add events, the step being the round."""
        from tensorboardX.summary import scalar

        seed = progress.settings.seed
        writer = self._writers.get(seed) or self._open(progress.settings)
        scalars = [
            (number, f"rounds/{name}", value)
            for number, values in each_round(progress)
            for name, value in values.items()
        ]
        scalars += [
            (progress.round, f"evaluations/{name}", value)
            for name, value in progress.evaluation.items()
            if name != "round"
        ]
        for step, tag, value in scalars:
            writer.write_event(_event(scalar(tag, value), step))
        writer.flush()

    def _open(self, settings: Settings) -> Any:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.summary import text

        folder = self._folder / f"seed_{settings.seed}" if self._several else self._folder
        folder.mkdir(parents=True, exist_ok=True)
        for before in folder.glob("events.out.tfevents.*"):
            before.unlink()
        writer = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        self._writers[settings.seed] = writer
        rows = "\n".join(f"| {name} | {value} |" for name, value in shown_settings(settings).items())
        writer.write_event(_event(text("settings", f"| setting | value |\n|---|---|\n{rows}"), 0))
        return writer

    def close(self) -> None:
        """Close the files."""
        for writer in self._writers.values():
            writer.close()


def _event(summary: Any, step: int) -> Any:
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]  made by protobuf

    return Event(wall_time=time.time(), step=step, summary=summary)


class WandbLogger:
    """Runs of Weights & Biases below `folder`, offline: `wandb sync <folder>/wandb/offline-run-...` sends them."""

    name = "W&B's offline run"

    def __init__(self, folder: Path, several: bool):
        self._folder, self._several = folder, several
        self._runs: dict[int, Any] = {}  # by seed
        for before in folder.glob("wandb/offline-run-*"):
            shutil.rmtree(before, ignore_errors=True)

    def write(self, progress: Progress) -> None:
        """Log rounds, and the evaluation with the last of them, the step being the round."""
        run = self._runs.get(progress.settings.seed) or self._open(progress.settings)
        rows = dict(each_round(progress)) or {progress.round: {}}
        values = {step: {f"rounds/{name}": x for name, x in row.items()} for step, row in rows.items()}
        values[progress.round] |= {f"evaluations/{n}": x for n, x in progress.evaluation.items() if n != "round"}
        for step, row in values.items():
            run.log(row, step=step)

    def _open(self, settings: Settings) -> Any:
        wandb: Any = importlib.import_module("wandb")
        name = f"{settings.method.name}, seed {settings.seed}"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._runs[settings.seed] = wandb.init(
            project="fdjax", name=name, group=self._folder.resolve().name if self._several else None, mode="offline",
            dir=str(self._folder), config=shown_settings(settings), reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),
        )  # fmt: skip
        return self._runs[settings.seed]

    def close(self) -> None:
        """End the runs."""
        for run in self._runs.values():
            run.finish()


def shown_settings(settings: Settings) -> dict[str, Any]:
    """The settings by name, without folders, which mean nothing on another machine."""
    return {name: value for name, value in settings.public().items() if name not in FOLDERS and value is not None}
