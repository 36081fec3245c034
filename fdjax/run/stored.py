"""A run read back from its folder."""

import contextlib
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from fdjax import own
from fdjax.algorithms import ALGORITHMS
from fdjax.client.metric import Metric
from fdjax.errors import InputError
from fdjax.method import Method
from fdjax.run import methods, metrics
from fdjax.run.checkpoint import FOLDER, Checkpoints, runs_at, storages_of
from fdjax.run.data import DATA_FILES
from fdjax.run.experiment import build, traffic_of
from fdjax.run.record import Recording, Result
from fdjax.run.saves import check_same, tell_damage
from fdjax.run.settings import FLAGS, Settings, cohorts_of, make
from fdjax.run.trained_model import Trained, leave_devices


def load(folder: str | os.PathLike, **named: Any) -> Result:
    """The result of the run in a folder, as far as it has come, with the models of its latest whole checkpoint.

        result = fdjax.load("runs/x")
        result.settings, result.final["central_accuracy"], result.evaluations["round"]
        result.central.predict(images), result.personal(3).params

    It may have been run on any number of devices. Its data are loaded anew: where they lie elsewhere here, give
    `data_dir`. A method, net or data set of your own is found by its file; give it (`algorithm=METHOD`, `model=net`,
    `dataset=source`) if it came as a value or if its file has moved.

    Raises InputError for a folder without a whole checkpoint, for other settings than the run had, and for a method,
    net or data set of your own that has changed since.
    """
    if not isinstance(folder, str | os.PathLike):
        raise InputError(f"fdjax.load({folder!r}): expected the folder of a run")
    path = Path(folder).expanduser()
    if jax.process_count() > 1:
        raise InputError("fdjax.load works in a process of its own, and not in one of several hosts")
    checkpoints = Checkpoints(path / FOLDER)
    latest = checkpoints.latest()
    tell_damage(path, checkpoints)
    if latest is None:
        there = runs_at(path)
        could = f"there are runs in {there}" if there else "give the --out of a run"
        if (path / "results.json").is_file():
            could = "of several seeds no models are kept: read results.parquet or results.json, or run one seed"
        raise InputError(f"fdjax.load: {path} holds no checkpoint of a run; {could}")
    record = checkpoints.record()
    storages, files, then = storages_of(record), record.pop("files", {}), record.pop("settings")
    settings = _settings(then, files, named)
    check_same(path, then, settings, "fdjax.load needs the method, nets and settings as they were")
    leave_devices()
    # One device will do, and the results are the run's own.
    experiment = build(dataclasses.replace(settings, devices=1, lifting="auto"))
    like = experiment.simulation.shapes(experiment.federation)
    trained = Trained(experiment._replace(settings=settings), like, folder=path, storages=storages, on_disk=latest)
    recording = Recording(experiment._replace(settings=settings), traffic_of(experiment), record)
    return recording.result(record, trained)


def _settings(then: dict[str, Any], files: dict[str, str], named: dict[str, Any]) -> Settings:
    """The settings of a record, and what is given in their place."""
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    given = {n: v for n, v in then.items() if n not in FLAGS or v != defaults[n]}  # of all that a run has
    given |= {n: files[held] for n, held in then.items() if n in DATA_FILES and held in files}
    given["algorithm"] = _method(then["algorithm"], files)
    given["model"] = _net(then["model"], files)
    if then.get("models"):
        nets = [f"{_net(name, files)}:{size}" for name, size in cohorts_of(then["models"])]
        given["models"] = ",".join(nets)
    if then.get("metrics"):
        given["metrics"] = ",".join(_metric(name, files) for name in metrics.names_of(then["metrics"]))
    return make(**given | named)


def _method(name: str, files: dict[str, str]) -> str:
    """A method by what `make` takes: of the records in its file, the one that the run had."""
    if name in ALGORITHMS or name not in files:
        return name
    return _thing(name, files[name], "algorithm", Method, methods.resolve)


def _metric(name: str, files: dict[str, str]) -> str:
    """A metric likewise."""
    return _thing(name, files[name], "metrics", Metric, metrics.resolve) if name in files else name


def _thing(name: str, file: str, flag: str, kind: type, resolve: Callable[[str], str]) -> str:
    """Of the things of a kind in a file, the one that a run had; the file itself if it has none such."""
    called = own.load(file, flag).having(kind)
    for given in (file, *(f"{file}:{each}" for each in called)):
        with contextlib.suppress(InputError):  # the file may have no thing by the usual name
            if own.recorded(resolve(given)) == name:
                return given
    return file


def _net(name: str, files: dict[str, str]) -> str:
    """A net likewise; its own name is that in its file."""
    return f"{files[name]}:{name.partition('@')[0]}" if name in files else name
