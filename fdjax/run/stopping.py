"""When a run ends before its last round: an accuracy is reached, so many bytes are sent, or nothing gets better.

The host decides after every superstep, by what is on record alone: nothing is compiled for it, and a run that goes on
from a checkpoint decides as it would have done without having stopped.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fdjax.client.metric import flattened
from fdjax.errors import InputError, unknown
from fdjax.run import metrics
from fdjax.run.setting import setting_field

_run = functools.partial(setting_field, role="run", resumable=True)
_SPLIT = "validation_accuracy"


@dataclasses.dataclass(frozen=True)
class StoppingSettings:
    """The settings of an early end, which `Settings` has among its own."""

    stop_at_accuracy: float = _run(
        0.0, "stop after the first evaluation with an accuracy (of --stop_metric) of at least this; 0: never",
        low=0, high=1,
    )  # fmt: skip
    stop_at_bytes: float = _run(
        0.0, "stop after the superstep by which all clients together have sent and received so many bytes; 0: never",
        low=0,
    )  # fmt: skip
    patience: int = _run(
        0, "stop after so many evaluations in a row without a better --stop_metric than the best before; 0: never",
        low=0,
    )  # fmt: skip
    min_delta: float = _run(0.0, "by how much a metric has to be better to count for --patience", low=0)
    stop_metric: str | None = _run(
        None, "the metric of an evaluation that --patience and --stop_at_accuracy go by; default: the accuracy on the "
        "validation split where there is one, and for --stop_at_accuracy else that of the progress bar", str,
    )  # fmt: skip


RULES = tuple(field.name for field in dataclasses.fields(StoppingSettings))


def check_stopping(settings: Any) -> None:
    """Raises InputError for rules that mean nothing together, or that nothing could decide."""
    if settings.patience and settings.stop_metric is None and not settings.validation_fraction:
        raise InputError(
            f"--patience={settings.patience} goes by the accuracy on a validation split, and there is none; give "
            "--validation_fraction (e.g. 0.1), or another --stop_metric, such as central_accuracy"
        )
    named = settings.stop_metric
    if named == _SPLIT and not settings.validation_fraction:
        raise InputError(f"--stop_metric={named}: there is no validation split; give --validation_fraction, e.g. 0.1")
    if settings.stop_at_accuracy and named is not None and metrics.falls(named, settings.metrics):
        raise InputError(
            f"--stop_at_accuracy={settings.stop_at_accuracy:g} with --stop_metric={named}, which is better when it is "
            "smaller; name an accuracy, or use --patience"
        )


def check_watched(experiment: Any) -> None:
    """Raises InputError, before anything compiles, if evaluations do not give the metric that is to decide."""
    named = experiment.settings.stop_metric
    if named is not None and named not in (names := values_of(experiment)):
        raise unknown("--stop_metric", named, names)


def values_of(experiment: Any) -> tuple[str, ...]:
    """The names of what an evaluation gives, as records have them: a metric by class has one for each class."""
    simulation, federation = experiment.simulation, experiment.federation
    state = simulation.shapes(federation)
    found, _ = jax.eval_shape(simulation.pure.evaluate, state, federation, experiment.hparams, np.int32(0))
    names = {name: np.zeros(value.shape) for name, value in found.items()}
    return (*flattened(names, 0), *metrics.derived_names(experiment.settings.metrics, found))


def reason_to_stop(settings: Any, record: Mapping[str, Any], shown: str) -> dict[str, Any]:
    """{"round", "rule", "why", "settings"} if a run with this record ends here; {} if it goes on.

    `shown` is the accuracy that decides where none is named and there is no validation split. The rules, of the values
    v_0 ... v_e of the metric at the evaluations so far:

        stop_at_accuracy a:  v_e >= a
        stop_at_bytes b:     bytes up + bytes down, the set-up's among them, >= b
        patience p:          e - i >= p, where i is the last evaluation that counts as better: v_i > v_h + min_delta, h
                             being the one that counted before it, and the first number the first to count

    A value that is not a number never counts, nor does it reach anything.
    """
    evaluations = record["evaluations"]
    named = settings.stop_metric or (_SPLIT if settings.validation_fraction else shown)
    found: dict[str, str] = {}
    if settings.stop_at_accuracy and evaluations[named][-1] >= settings.stop_at_accuracy:
        found["accuracy"] = f"{named} of {evaluations[named][-1]:.4g} reached {settings.stop_at_accuracy:g}"
    if settings.stop_at_bytes and (sent := bytes_sent(record)) >= settings.stop_at_bytes:
        found["bytes"] = f"{sent:,.0f} bytes were sent, and {settings.stop_at_bytes:,.0f} were to end it"
    if settings.patience:
        waited = _waited(evaluations[named], settings.min_delta, metrics.falls(named, settings.metrics))
        if waited >= settings.patience:
            found["patience"] = f"{named} got no better in {waited} evaluations"
    if not found:
        return {}
    rules = {name: getattr(settings, name) for name in RULES}
    return {
        "round": int(evaluations["round"][-1]), "rule": next(iter(found)), "why": "; ".join(found.values()),
        "settings": rules,
    }  # fmt: skip


def still_stopped(settings: Any, record: Mapping[str, Any]) -> bool:
    """Whether the run of this record ended by the very rules that these settings have."""
    rules = {name: getattr(settings, name) for name in RULES}
    return record.get("stopped", {}).get("settings") == rules


def bytes_sent(record: Mapping[str, Any]) -> float:
    """Bytes up and down of all clients until now, those of the set-up among them."""
    return sum(
        record["setup"].get(name, 0.0) + math.fsum(record["rounds"].get(name, ()))
        for name in ("bytes_up", "bytes_down")
    )


def _waited(values: Sequence[float], least: float, lower: bool) -> int:
    """Evaluations since the last one that was better than all before it by more than `least`."""
    best, at = math.nan, 0
    for i, value in enumerate(-v if lower else v for v in values):
        if (math.isnan(best) and not math.isnan(value)) or value > best + least:
            best, at = value, i
    return len(values) - 1 - at
