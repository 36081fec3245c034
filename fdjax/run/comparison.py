"""Runs side by side: results.json of several folders, grouped by setting, and differences tested over seeds."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fdjax.errors import InputError, unknown
from fdjax.run import report
from fdjax.run.settings import FOLDERS, of_role

_HOW = (
    "lifting", "chunk", "devices", "ordered_sums", "memory_limit", "metrics", "targets", "client_history",
)  # fmt: skip
# settings of how a run is carried out, and of what is told of it, alone
FEWEST = 3  # pairs of seeds that a test needs


class Run(NamedTuple):
    """A run as its results.json has it: histories as in `record.Result`, NaN where there is null."""

    folder: Path
    settings: dict[str, Any]
    rounds: dict[str, list[float]]
    evaluations: dict[str, list[float]]
    setup: dict[str, float]
    metrics: dict[str, dict[str, str]]  # of those that it was asked for: unit, and what is better

    @property
    def seed(self) -> int:
        """The seed."""
        return self.settings["seed"]

    @property
    def round(self) -> int:
        """Rounds done."""
        return len(self.rounds["bytes_up"])


class Group(NamedTuple):
    """Runs that differ by their seeds alone."""

    label: str
    runs: tuple[Run, ...]  # in the order of their seeds


def read(folder: Path) -> list[Run]:
    """The runs of a folder, one for each seed. Raises InputError if it holds no results of runs."""
    path = folder / "results.json"
    try:
        content = json.loads(path.read_text())
    except OSError:
        there = sorted(str(found.parent) for found in folder.glob("*/results.json"))
        could = f"; give {', '.join(there[:3])}{' ...' if len(there) > 3 else ''}" if there else ""
        raise InputError(f"{folder} holds no results.json, as a run leaves it in its --out{could}") from None
    except ValueError as error:
        raise InputError(f"{path} is no JSON ({error}); run the command that wrote it again") from None
    results: Any = content.get("results", [content.get("result")]) if isinstance(content, dict) else [None]
    try:
        if not results:
            raise KeyError("results")
        return [_run(folder, result) for result in results]
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is not of a run of fdjax; give folders that `fdjax --out=...` has written") from None


def _run(folder: Path, result: Mapping[str, Any]) -> Run:
    histories = {
        table: {n: [math.nan if x is None else x for x in values] for n, values in result[table].items()}
        for table in ("rounds", "evaluations")
    }
    run = Run(
        folder,
        {"seed": result["settings"]["seed"]} | result["settings"],
        **histories,
        setup=result["setup"],
        metrics=result.get("metrics", {}),
    )
    if not run.evaluations["round"] or run.round != run.evaluations["round"][-1]:
        raise KeyError("round")
    return run


def group(runs: Sequence[Run]) -> list[Group]:
    """The runs by setting, in the order given; labels say in what the groups differ.

    Raises InputError for two runs of one setting and one seed.
    """
    found: dict[str, list[Run]] = {}
    for run in runs:
        alike = found.setdefault(json.dumps(_defining(run.settings), sort_keys=True), [])
        if twice := [other for other in alike if other.seed == run.seed]:
            raise InputError(
                f"{twice[0].folder} and {run.folder} both have seed {run.seed} of the same setting; leave one out"
            )
        alike.append(run)
    groups = [sorted(alike, key=lambda run: run.seed) for alike in found.values()]
    return [Group(label, tuple(alike)) for label, alike in zip(_labels([g[0] for g in groups]), groups, strict=True)]


def _defining(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those that runs which differ by their seeds alone have in common."""
    return {name: value for name, value in settings.items() if name not in ("seed", *_HOW, *FOLDERS)}


def _labels(firsts: Sequence[Run]) -> list[str]:
    """The algorithm of each, and what else differs between those of one algorithm.

    A user's own things go by name, with their digest only where two labels are alike without.
    """
    labels = []
    for run in firsts:
        rivals = [other for other in firsts if other.settings["algorithm"] == run.settings["algorithm"]]
        names = sorted({n for other in rivals for n in differing(run.settings, other.settings)})
        labels.append(", ".join([str(run.settings["algorithm"]), *(f"{n}={run.settings.get(n)}" for n in names)]))
    short = [re.sub(r"@[0-9a-f]{12}\b", "", label) for label in labels]
    return short if len({*short}) == len(short) else labels


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The names of the defining settings in which two runs differ."""
    one, other = _defining(one), _defining(other)
    return sorted(n for n in {*one, *other} if one.get(n) != other.get(n))


def warnings_of(groups: Sequence[Group]) -> Iterator[str]:
    """What speaks against comparing these, a sentence each."""
    first, *others = groups
    of_data = of_role("data", "partition")
    for other in others:
        names = [n for n in differing(first.runs[0].settings, other.runs[0].settings) if n in of_data]
        if names:
            one, two = first.runs[0].settings, other.runs[0].settings
            values = ", ".join(f"{n}={one.get(n)} and {two.get(n)}" for n in names)
            yield f"{first.label} and {other.label} are of different data ({values}): the difference may be theirs"
        if first.runs[0].settings.get("rounds") != other.runs[0].settings.get("rounds"):
            yield f"{first.label} and {other.label} were given different numbers of rounds"
    for each in groups:
        if len({run.round for run in each.runs}) > 1:
            yield f"the seeds of {each.label} ended after different rounds; numbers are of each seed's last evaluation"


def metric_of(groups: Sequence[Group], asked: str | None) -> str:
    """The metric to compare by: the one asked for, or the first accuracy that all runs have.

    Raises InputError if a run does not have it.
    """
    runs = [run for each in groups for run in each.runs]
    common = set.intersection(*({*run.evaluations} - {"round"} for run in runs))
    usual = [f"{kind}_accuracy" for kind in ("central", "local", "own", "validation")]
    name = asked or next((n for n in usual if n in common), usual[0])
    if not common:
        raise InputError(f"{runs[0].folder} and the others have no metric of evaluations in common; compare others")
    for run in runs:
        if name not in run.evaluations:
            raise InputError(f"{run.folder}: {unknown('metric', name, common)} (those that all these runs have)")
    return name


class Difference(NamedTuple):
    """Of two groups over the seeds that both have: values of the second less those of the first."""

    differences: np.ndarray  # [n], one for each of these seeds
    p_t: float  # of the paired t-test, two-sided; NaN for fewer than FEWEST pairs
    p_wilcoxon: float  # of Wilcoxon's signed-rank test, two-sided, exact for up to 50 pairs without ties or zeros


def difference(first: Group, other: Group, metric: str) -> Difference:
    """Differences at the last evaluations, and how likely such ones are without any.

    Tests are paired by seed: a seed draws the data's partition, the first weights and the participants of both.
    """
    values = [{run.seed: run.evaluations[metric][-1] for run in each.runs} for each in (first, other)]
    seeds = sorted({*values[0]} & {*values[1]})
    d = np.array([values[1][seed] - values[0][seed] for seed in seeds])
    if len(d) < FEWEST or not np.isfinite(d).all():
        return Difference(d, math.nan, math.nan)
    if not d.any():
        return Difference(d, 1.0, 1.0)
    return Difference(d, *_paired_tests(d))


def _paired_tests(d: np.ndarray) -> tuple[float, float]:
    from scipy import stats

    spread = float(np.std(d, ddof=1)) / math.sqrt(len(d))
    p_t = 2 * float(stats.t.sf(abs(float(np.mean(d))) / spread, len(d) - 1)) if spread else 0.0
    return p_t, float(stats.wilcoxon(d)[1])  # pyright: ignore[reportArgumentType]


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for as many comparisons as there are numbers among them (Holm 1979).

    In ascending order, p_(i) becomes the largest of min(1, (m - j + 1) p_(j)) for j <= i. NaN stays.
    """
    corrected, most = [math.nan] * len(p), 0.0
    order = sorted((i for i in range(len(p)) if not math.isnan(p[i])), key=lambda i: p[i])
    for place, i in enumerate(order):
        most = max(most, min(1.0, (len(order) - place) * p[i]))
        corrected[i] = most
    return corrected


def sent_until(run: Run) -> list[float]:
    """Bytes up and down of all clients by each evaluation."""
    return [report.bytes_until(run, int(r)) for r in run.evaluations["round"]]  # pyright: ignore[reportArgumentType]
