"""Runs side by side: one table in Markdown and LaTeX, differences tested over seeds, curves over rounds and bytes.

    fdjax-compare runs/fedavg runs/feddistill --targets=0.8
    python -m fdjax.compare runs/a runs/b runs/c --metric=own_accuracy --out=runs/comparison

Takes folders that `fdjax --out=...` has written, of one seed or several (`--seeds`); those that differ by their seeds
alone become one row. The others are compared with the first, paired by seed. Writes table.md, table.tex and curves.png.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags
from tabulate import tabulate

from fdjax.errors import InputError
from fdjax.run import comparison, derived, metrics, program, report
from fdjax.run.comparison import Group

_FEW = (
    f"Fewer than {comparison.FEWEST} seeds in common cannot tell a difference from chance: no test is made; run both "
    "with the same --seeds, such as 0,1,2,3,4."
)


def main(*folders: str) -> None:
    """Read the runs, print the table and write the files."""
    given = flags.FLAGS
    if len(folders) < 1:
        raise InputError("give the folders of runs, e.g. fdjax-compare runs/a runs/b")
    paths = [Path(folder).expanduser() for folder in folders]
    if again := [str(path) for i, path in enumerate(paths) if path.resolve() in {p.resolve() for p in paths[:i]}]:
        raise InputError(f"{again[0]} is given twice; leave one out")
    groups = comparison.group([run for path in paths for run in comparison.read(path)])
    metric = comparison.metric_of(groups, given.metric)
    fractions = _unit(groups, metric) == "%"
    asked = None if given.targets is None else derived.resolve(given.targets, accuracies=fractions)
    for warning in comparison.warnings_of(groups):
        sys.stderr.write(f"warning: {warning}\n")
    out = Path(given.out).expanduser()
    if (out / "results.json").exists():
        raise InputError(f"--out={given.out} is a run's folder, whose table and curves stay; choose another folder")
    out = report.prepare(out)
    write(out, groups, metric, derived.targets_of(asked))


def write(out: Path, groups: Sequence[Group], metric: str, targets: Sequence[float]) -> None:
    """Print the table, and write it and the curves to the folder `out`."""
    headers, rows = table(groups, metric, targets)
    notes = [*_notes(groups, metric, targets), *(f"Warning: {text}." for text in comparison.warnings_of(groups))]
    text = "\n\n".join([report.table(rows, headers), *notes])
    print(text)
    report.write_text(out / "table.md", text + "\n")
    report.write_text(out / "table.tex", latex(headers, rows, notes))
    ended = any(len({run.round for run in each.runs}) > 1 for each in groups)
    title = "each run until its first seed stopped" if ended else ""
    report.draw_curves(out / "curves.png", panels(groups, metric), title)
    print(f"\nwritten: {out}/table.md, table.tex, curves.png")


def _unit(groups: Sequence[Group], metric: str) -> str:
    return metrics.unit(metric, groups[0].runs[0].metrics)


def _shown(unit: str, values: Sequence[float] | np.ndarray) -> str:
    mean, std = report.spread(values)
    if unit == "%":
        return report.percent(mean, std)
    return f"{mean:.4g}" + (f" ± {std:.2g}" if std is not None else "")


def table(groups: Sequence[Group], metric: str, targets: Sequence[float]) -> tuple[list[str], list[list[str]]]:
    """Headers, and the cells of each group."""
    unit = _unit(groups, metric)
    of_unit = f", {unit}" if unit else ""
    differences = [comparison.difference(groups[0], other, metric) for other in groups[1:]]
    headers = ["run", "seeds", metric.replace("_", " ") + of_unit, "rounds", "bytes"]
    if differences:
        headers += [f"difference to {groups[0].label}{of_unit}", "p, paired t", "p, Wilcoxon"]
    headers += [f"{what} to {target:g}" for target in targets for what in ("rounds", "bytes")]
    corrected = [comparison.holm([getattr(d, test) for d in differences]) for test in ("p_t", "p_wilcoxon")]
    rows = []
    for i, each in enumerate(groups):
        last = [run.evaluations[metric][-1] for run in each.runs]
        sent = report.byte_size(float(np.mean([comparison.sent_until(run)[-1] for run in each.runs])))
        row = [each.label, str(len(each.runs)), _shown(unit, last), _range([run.round for run in each.runs]), sent]
        if differences and i == 0:
            row += [""] * 3
        elif differences:
            d = differences[i - 1].differences
            row += [f"{_shown(unit, d)} (n = {len(d)})" if len(d) else "no seed in common"]
            row += [_p(values[i - 1]) for values in corrected]
        rows.append(row + [cell for target in targets for cell in _until(each, metric, target)])
    return headers, rows


def _range(numbers: Sequence[int]) -> str:
    return f"{min(numbers)}" if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"


def _p(p: float) -> str:
    if np.isnan(p):
        return "cannot tell"
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _until(group: Group, metric: str, target: float) -> list[str]:
    """Rounds and bytes until the metric reached the target, of the seeds that did."""
    rounds, sent = [], []
    for run in group.runs:
        smaller = metrics.falls(metric, run.metrics)
        at = derived.rounds_to(run.evaluations["round"], run.evaluations[metric], target, falls=smaller)
        if at is not None:
            rounds.append(at)
            sent.append(derived.bytes_at(at, run.evaluations["round"], comparison.sent_until(run)) or 0.0)
    if not rounds:
        return ["never", "never"]
    some = f" ({len(rounds)} of {len(group.runs)})" if len(rounds) < len(group.runs) else ""
    mean, std = report.spread(rounds)
    spread = f" ± {std:.1f}" if std is not None else ""
    return [f"{mean:.1f}{spread}{some}", report.byte_size(float(np.mean(sent))) + some]


def _notes(groups: Sequence[Group], metric: str, targets: Sequence[float]) -> list[str]:
    spread = "; mean ± sample standard deviation over seeds" if any(len(each.runs) > 1 for each in groups) else ""
    name = metric.replace("_", " ").capitalize()
    notes = [f"{name} at the last evaluation{spread}. Bytes: up and down, all clients."]
    pairs = [len(comparison.difference(groups[0], other, metric).differences) for other in groups[1:]]
    if any(n >= comparison.FEWEST for n in pairs):
        notes.append(
            f"Differences are paired by seed, p two-sided, corrected for {len(pairs)} "
            f"{'comparisons' if len(pairs) > 1 else 'comparison'} by Holm. Wilcoxon's p is at least 2^(1-n) of n pairs "
            "before that: of fewer than 6 it is never below 0.05."
        )
    if any(n < comparison.FEWEST for n in pairs):
        notes.append(_FEW)
    if targets:
        notes.append("Rounds and bytes until the best value so far reaches a target, interpolated, of seeds that do.")
    return notes


def latex(headers: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """The table for LaTeX with booktabs, its notes as comments."""
    text = tabulate(list(rows), headers, tablefmt="latex_booktabs", disable_numparse=True)
    comments = "\n".join(f"% {note}" for note in notes)
    return f"{comments}\n% needs \\usepackage{{booktabs}}\n" + text.replace("±", r"$\pm$") + "\n"


def panels(groups: Sequence[Group], metric: str) -> list[report.Panel]:
    """The metric over rounds and over bytes, means in bands of their std, as far as all seeds of a group have come."""
    unit = _unit(groups, metric)
    scale = 100.0 if unit == "%" else 1.0
    over_rounds, over_bytes = [], []
    for each in groups:
        size = min(len(run.evaluations["round"]) for run in each.runs)
        rounds = each.runs[0].evaluations["round"][:size]
        values = scale * np.array([run.evaluations[metric][:size] for run in each.runs])
        sent = np.mean([comparison.sent_until(run)[:size] for run in each.runs], axis=0)
        band = [np.std(values, axis=0, ddof=1).tolist()] if len(values) > 1 else []
        y = values.mean(axis=0).tolist()
        over_rounds.append((each.label, rounds, y, *band))
        over_bytes.append((each.label, sent.tolist(), y, *band))
    name = metric.replace("_", " ")
    return [(name, "round", unit, over_rounds), (name, report.BYTES, unit, over_bytes)]


def command() -> None:
    """`fdjax-compare`, or `python -m fdjax.compare`."""
    flags.DEFINE_string("metric", None, "metric of evaluations; default: the first accuracy that all runs have")
    flags.DEFINE_string("targets", None, "values of the metric to reach, e.g. 0.8,0.9: rounds and bytes until then")
    flags.DEFINE_string("out", "runs/comparison", "folder for the table and the picture")
    program.start(main, "folders")


if __name__ == "__main__":
    command()
