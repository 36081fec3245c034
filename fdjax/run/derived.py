"""What follows from the evaluations of a run: rounds and bytes until an accuracy is reached, and what was forgotten."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from fdjax.errors import InputError


def resolve(given: Any, *, accuracies: bool = True) -> str:
    """Targets as text, with commas between them, of such text or of numbers.

    Raises InputError for what are no different accuracies above 0 and at most 1; without `accuracies`, as for targets
    of a loss, for what are no different finite numbers.
    """
    if isinstance(given, str):
        parts: list[Any] = [part.strip() for part in given.split(",")]
    else:
        parts = list(given) if isinstance(given, Sequence | np.ndarray) else [given]
    numbers = [_number(part) for part in parts]
    allowed = (0 < x <= 1 for x in numbers) if accuracies else map(math.isfinite, numbers)
    if not numbers or not all(allowed) or len({*numbers}) < len(numbers):
        expected = "accuracies above 0 and at most 1, each another, e.g. 0.8,0.9"
        expected = expected if accuracies else "finite numbers, each another, e.g. 1.5,0.5"
        raise InputError(f"--targets={given!r}: expected {expected}")
    return ",".join(f"{x:.10g}" for x in numbers)


def _number(given: Any) -> float:
    try:
        return math.nan if isinstance(given, bool) else float(given)
    except (TypeError, ValueError):
        return math.nan


def targets_of(text: str | None) -> list[float]:
    """The numbers of a setting of targets."""
    return [float(part) for part in text.split(",")] if text else []


def rounds_to(rounds: Sequence[float], values: Sequence[float], target: float, *, falls: bool = False) -> float | None:
    """The interpolated round at which the running maximum of `values` first reaches `target`; None if never.

    With `falls` it is the running minimum, as of a loss: see `metrics.falls`. A value that reaches the target without
    a finite one before it does so at its own round.
    Source: McMahan et al. (2017), section 3, whose curves are made monotone and interpolated so.
    """
    sign = -1.0 if falls else 1.0
    goal, before_round, before = sign * target, math.nan, -math.inf
    for round, value in zip(rounds, (sign * value for value in values), strict=True):
        if value >= goal:
            if not math.isfinite(before):
                return float(round)
            return before_round + (round - before_round) * (goal - before) / (value - before)
        before_round, before = float(round), max(before, value)  # which a NaN does not change
    return None


def bytes_at(round: float | None, rounds: Sequence[float], sent: Sequence[float]) -> float | None:
    """Bytes until a round, interpolated between those `sent` until each of `rounds`; None for a round never reached."""
    return None if round is None else float(np.interp(round, rounds, sent))


def forgetting(by_class: Any) -> np.ndarray:
    """F_t = mean_c (max_{s < t} A_c^s - A_c^t), [E] of the accuracies A [E, K] by class at E evaluations.

    NaN at the first one. Classes that an evaluation did not test are left out of the mean. Source: Lee et al. (2022),
    FedNTD, section 2, whose F is that of the last round.
    """
    A = np.asarray(by_class, float)
    best = np.fmax.accumulate(A, axis=0)[:-1]  # NaN where a class was not tested yet
    lost = best - A[1:]
    there = np.sum(~np.isnan(lost), axis=1)
    mean = np.nansum(lost, axis=1) / np.where(there, there, 1)
    return np.concatenate([[math.nan], np.where(there, mean, math.nan)])


def add_forgetting(evaluations: dict[str, list[float]]) -> None:
    """Add that of the latest evaluation: of the central model, and of the mean accuracies of clients' own."""
    for kind in ("central", "local"):
        if classes := [name for name in evaluations if re.fullmatch(rf"{kind}_class_accuracy_\d+", name)]:
            by_class = np.array([evaluations[name] for name in classes]).T
            evaluations.setdefault(f"{kind}_forgetting", []).append(float(forgetting(by_class)[-1]))
