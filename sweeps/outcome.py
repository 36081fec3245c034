"""What a study gave: its trials grouped into configurations, and the numbers of each."""

import collections
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from fdjax.errors import InputError
from fdjax.run import report
from sweeps.storage import given_up
from sweeps.study import Study

TAIL = 10  # evaluations, whose mean stands beside the last one
SPLIT = "validation_accuracy"
_FRACTIONS = ("worst_client", "quantile_10", "client_std")  # and all accuracies: shown as percentages


class Row(NamedTuple):
    """One configuration: what its trials have in common, and those that finished, one for each seed."""

    params: dict[str, Any]  # without the seeds
    trials: tuple[FrozenTrial, ...]
    pruned: int  # seeds that were stopped early, which no mean has


class Outcome(NamedTuple):
    """A study as it was when it was read."""

    study: Study  # of the file
    name: str  # in the storage
    objective: str
    maximize: bool
    attributes: dict[str, Any]  # what the sweep wrote beside the trials
    states: dict[str, int]
    reasons: dict[str, list[int]]  # of failures: numbers of the trials
    repeated: int  # finished trials with the params of another finished trial
    given_up: int  # trials that count for nothing, see sweeps.storage
    finished: tuple[FrozenTrial, ...]  # in the order of their numbers, without those
    names: tuple[str, ...]  # of params other than seeds
    varying: tuple[str, ...]  # those of more than one value
    rows: tuple[Row, ...]  # best first, by the mean of the last evaluation

    @property
    def percent(self) -> bool:
        """Whether the objective is a fraction."""
        return self.objective.endswith("accuracy") or self.objective in _FRACTIONS

    @property
    def quantity(self) -> str:
        """The objective in words, with its unit."""
        return self.objective.replace("_", " ") + (", %" if self.percent else "")

    @property
    def scale(self) -> float:
        """What the objective is multiplied by in pictures."""
        return 100.0 if self.percent else 1.0


def read(study: Study, storage: optuna.storages.BaseStorage, name: str) -> Outcome:
    """The outcome of the study `name` of a storage.

    Raises InputError if the storage has no such study, or the study no finished trial.
    """
    try:
        stored = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        known = ", ".join(sorted(optuna.get_all_study_names(storage))) or "none"
        raise InputError(
            f"no study {name!r} in the storage; it has {known}: run the study first, or give --name"
        ) from None
    return outcome(study, name, stored.user_attrs, stored.direction, stored.get_trials(deepcopy=False))


def outcome(
    study: Study,
    name: str,
    attributes: Mapping[str, Any],
    direction: optuna.study.StudyDirection,
    trials: Sequence[FrozenTrial],
) -> Outcome:
    """The outcome of these trials."""
    total, trials = len(trials), [trial for trial in trials if not given_up(trial)]
    states = collections.Counter(trial.state for trial in trials)
    reasons: dict[str, list[int]] = {}
    for trial in trials:
        if trial.state == TrialState.FAIL:
            reasons.setdefault(str(trial.user_attrs["reason"]), []).append(trial.number)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if not complete:
        told = f"; {len(next(iter(reasons.values())))} failed: {_line(next(iter(reasons)))}" if reasons else ""
        raise InputError(f"study {name} has {len(trials)} trials and none is finished{told}")
    unlike: dict[tuple, FrozenTrial] = {}
    for trial in complete:
        unlike.setdefault(_key(trial.params, ()), trial)
    finished = tuple(unlike.values())
    found = dict.fromkeys(n for trial in finished for n in trial.params if n not in study.seeds)
    names = tuple(sorted(found, key=lambda n: [*study.space, n].index(n)))
    maximize = direction == optuna.study.StudyDirection.MAXIMIZE
    grouped: dict[tuple, list[FrozenTrial]] = {}
    for trial in finished:
        grouped.setdefault(_key(trial.params, study.seeds), []).append(trial)
    pruned = collections.Counter(
        _key(trial.params, study.seeds) for trial in trials if trial.state == TrialState.PRUNED
    )
    rows = [
        Row({n: alike[0].params[n] for n in names if n in alike[0].params}, tuple(alike), pruned[key])
        for key, alike in grouped.items()
    ]
    rows.sort(key=lambda row: float(np.mean(last(row))), reverse=maximize)
    return Outcome(
        study=study,
        name=name,
        objective=attributes.get("description", {}).get("objective", study.objective),
        maximize=maximize,
        attributes=dict(attributes),
        states={state.name.lower(): states[state] for state in TrialState},
        reasons=reasons,
        repeated=len(complete) - len(finished),
        given_up=total - len(trials),
        finished=finished,
        names=names,
        varying=tuple(n for n in names if len({repr(row.params.get(n)) for row in rows}) > 1),
        rows=tuple(rows),
    )


def _key(params: Mapping[str, Any], without: Sequence[str]) -> tuple:
    return tuple(sorted((name, repr(value)) for name, value in params.items() if name not in without))


def _line(text: str) -> str:
    return " ".join(text.split())


def evaluations(trial: FrozenTrial, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Rounds, and a metric after each of them; of the objective what was reported, if nothing else was kept."""
    kept = trial.user_attrs.get("evaluations", {})
    if metric in kept:
        return np.asarray(kept["round"]), np.asarray(kept[metric], float)
    reported = sorted(trial.intermediate_values.items())
    return np.asarray([r for r, _ in reported], int), np.asarray([v for _, v in reported], float)


def last(row: Row) -> np.ndarray:
    """The objective of each seed."""
    return np.asarray([trial.value for trial in row.trials], float)


def tail(row: Row, objective: str) -> np.ndarray:
    """The mean over the last TAIL evaluations, or all if they are fewer, of each seed."""
    return np.asarray([np.mean(_at_hand(trial, objective)[-TAIL:]) for trial in row.trials])


def _at_hand(trial: FrozenTrial, objective: str) -> np.ndarray:
    rounds, values = evaluations(trial, objective)
    values = values[rounds > 0]  # before any round, trials of one seed are all the same
    return values if len(values) else np.asarray([trial.value], float)


def tail_sizes(rows: Sequence[Row], objective: str) -> list[int]:
    """Of how many evaluations `tail` is, each number once."""
    return sorted({min(TAIL, len(_at_hand(trial, objective))) for row in rows for trial in row.trials})


def has_split(row: Row) -> bool:
    """Whether every seed was tested on a validation split."""
    return all(trial.user_attrs.get("evaluations", {}).get(SPLIT) for trial in row.trials)


def on_split(row: Row, objective: str) -> np.ndarray:
    """The objective of each seed after the round of the best accuracy on the validation split, the first of equals."""
    best = []
    for trial in row.trials:
        rounds, accuracy = evaluations(trial, SPLIT)
        best.append(int(np.argmax(np.where(rounds > 0, np.nan_to_num(accuracy, nan=-1.0), -2.0))))
    return np.asarray([evaluations(trial, objective)[1][i] for trial, i in zip(row.trials, best, strict=True)])


def sent(row: Row) -> np.ndarray:
    """Bytes of a whole run, of each seed."""
    return np.asarray([(trial.user_attrs.get("bytes") or [np.nan])[-1] for trial in row.trials], float)


class Curve(NamedTuple):
    """The objective of a configuration over rounds: mean and, of two seeds or more, sample std over the seeds."""

    rounds: np.ndarray
    bytes: np.ndarray  # sent up to these rounds, mean over the seeds; empty if a trial kept none
    mean: np.ndarray
    std: np.ndarray | None


def curve(row: Row, objective: str) -> Curve:
    """The curve of a configuration at the rounds at which all of its seeds were evaluated."""
    each = [evaluations(trial, objective) for trial in row.trials]
    common = sorted(set.intersection(*(set(rounds.tolist()) for rounds, _ in each)))
    values = np.asarray([values[np.searchsorted(rounds, common)] for rounds, values in each])
    counted = [np.asarray(trial.user_attrs.get("bytes") or [], float) for trial in row.trials]
    complete = all(len(total) == len(rounds) for total, (rounds, _) in zip(counted, each, strict=True))
    at_common = [
        total[np.searchsorted(rounds, common)] for total, (rounds, _) in zip(counted, each, strict=True) if complete
    ]
    mean_bytes = np.mean(at_common, axis=0) if at_common else np.asarray([])
    return Curve(np.asarray(common), mean_bytes, values.mean(0), values.std(0, ddof=1) if len(values) > 1 else None)


def word(value: Any) -> str:
    """A param's value as it is printed."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def shown(results: Outcome, values: np.ndarray) -> str:
    """Mean ± std, as a percentage if the objective is a fraction."""
    mean, std = report.spread(values)
    if results.percent:
        return report.percent(mean, std)
    return f"{mean:.4g}" if std is None else f"{mean:.4g} ± {std:.2g}"


def table(results: Outcome) -> tuple[list[str], list[list[str]]]:
    """Headers, and the cells of each configuration, best first."""
    columns = _columns(results)
    lines = [
        [str(i), *(word(row.params.get(n, "")) for n in results.names), *(cell(row) for _, cell in columns)]
        for i, row in enumerate(results.rows, 1)
    ]
    return ["row", *results.names, *(header for header, _ in columns)], lines


def _size(count: float) -> str:
    return report.byte_size(count) if np.isfinite(count) else ""


def _columns(results: Outcome) -> list[tuple[str, Callable[[Row], str]]]:
    objective, sizes = results.objective, tail_sizes(results.rows, results.objective)
    count = " to ".join(str(size) for size in dict.fromkeys((sizes[0], sizes[-1])))
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("seeds", lambda row: str(len(row.trials)) + (f" + {row.pruned} pruned" if row.pruned else "")),
        ("last", lambda row: shown(results, last(row))),
        (f"mean of last {count}", lambda row: shown(results, tail(row, objective))),
    ]
    if any(has_split(row) for row in results.rows):
        columns.append(
            (
                "best on a validation split",
                lambda row: shown(results, on_split(row, objective)) if has_split(row) else "",
            )
        )
    if any(np.isfinite(sent(row)).all() for row in results.rows):
        columns.append(("bytes", lambda row: _size(float(np.mean(sent(row))))))
    return columns


def records(results: Outcome) -> list[dict[str, Any]]:
    """The table as numbers: fractions, not percentages; empty where there is none."""
    lines = []
    for row in results.rows:
        measured = {"last": last(row), "tail": tail(row, results.objective)}
        measured["on_split"] = on_split(row, results.objective) if has_split(row) else np.asarray([np.nan])
        line: dict[str, Any] = {name: row.params.get(name, "") for name in results.names}
        line |= {"seeds": len(row.trials), "pruned": row.pruned}
        for name, values in measured.items():
            mean, std = report.spread(values)
            line |= {f"{name}_mean": mean if np.isfinite(mean) else "", f"{name}_std": "" if std is None else std}
        bytes_sent = float(np.mean(sent(row)))
        lines.append(
            line
            | {
                "tail_evaluations": "-".join(map(str, tail_sizes([row], results.objective))),
                "bytes": bytes_sent if np.isfinite(bytes_sent) else "",
                "trials": " ".join(str(trial.number) for trial in row.trials),
            }
        )
    return lines


def status(results: Outcome) -> list[str]:
    """How many trials of how many, in sentences."""
    words = {"pruned": "pruned", "fail": "failed", "running": "running", "waiting": "waiting"}
    counted = ", ".join(f"{results.states[state]} {text}" for state, text in words.items())
    lines = [f"{results.states['complete']} of {results.study.total} trials are complete; {counted}."]
    lines += [
        f"Failed: {_line(reason)} ({len(numbers)} {'trials' if len(numbers) > 1 else 'trial'}: "
        f"{', '.join(map(str, numbers[:8]))}{', ...' if len(numbers) > 8 else ''})."
        for reason, numbers in sorted(results.reasons.items(), key=lambda item: -len(item[1]))
    ]
    if results.repeated:
        lines.append(f"{results.repeated} complete trials have the params of another complete trial and are left out.")
    if results.given_up:
        lines.append(f"Not counted: {results.given_up} trials that workers gave up; other trials stand for them.")
    then = results.attributes.get("description")
    if then is not None and then != json.loads(json.dumps(results.study.description())):
        lines.append("The study file has been changed since: settings and space below are those of the storage.")
    return lines
