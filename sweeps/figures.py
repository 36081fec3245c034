"""Pictures of what a study gave."""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna

from fdjax.run import report
from sweeps.outcome import Outcome, Row, curve, last, word

CURVES = 5  # configurations, the best ones
_FEWEST = 10  # finished trials, for the importance of params
_LONGEST = 48  # characters of a legend's label


class Figure(NamedTuple):
    """A picture and what is to be said of it."""

    path: Path
    caption: str


def draw(made: Outcome, out: Path) -> tuple[list[Figure], list[str]]:
    """Draw what the study allows; returns the pictures, and why others are missing, a sentence each."""
    figures, missing = [], []
    for one in (_heatmap, _curves, _importance, _history):
        for result in one(made, out):
            (missing if isinstance(result, str) else figures).append(result)
    return figures, missing


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    _pyplot().close(figure)
    return path


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _heatmap(made: Outcome, out: Path) -> list[Figure | str]:
    """Mean over seeds of the objective, over the two params that vary."""
    if len(made.varying) != 2 or not all(_is_number(row.params.get(n)) for row in made.rows for n in made.varying):
        return ["No heatmap: it takes exactly two params that vary besides seeds, both numbers."]
    values = [sorted({row.params[n] for row in made.rows}) for n in made.varying]
    (down, rows), (across, columns) = sorted(zip(made.varying, values, strict=True), key=lambda one: len(one[1]))
    if len(made.rows) < len(rows) * len(columns) / 2:
        return [f"No heatmap: {len(made.rows)} configurations are too few for {len(rows)} x {len(columns)} cells."]
    cells = np.full((len(rows), len(columns)), np.nan)
    for row in made.rows:
        at = rows.index(row.params[down]), columns.index(row.params[across])
        cells[at] = made.scale * np.mean(last(row))
    plt = _pyplot()
    size = min(2.6 + 0.85 * len(columns), 16), min(1.6 + 0.5 * len(rows), 12)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    image = axis.imshow(cells, cmap="viridis" if made.maximize else "viridis_r", aspect="auto")
    axis.set(xlabel=across, ylabel=down, xticks=range(len(columns)), yticks=range(len(rows)))
    axis.set_xticklabels([word(v) for v in columns], rotation=90 if len(columns) > 12 else 0)
    axis.set_yticklabels([word(v) for v in rows])
    small = max(len(rows), len(columns)) > 12
    for (i, j), value in np.ndenumerate(cells):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            text = f"{value:.1f}" if made.percent else f"{value:.3g}"
            axis.text(
                j, i, text, ha="center", va="center", color="white" if dark else "black", fontsize=6 if small else 9
            )
    best = made.rows[0].params
    corner = columns.index(best[across]) - 0.5, rows.index(best[down]) - 0.5
    axis.add_patch(plt.Rectangle(corner, 1, 1, fill=False, edgecolor="red", linewidth=2, clip_on=False))
    figure.colorbar(image, ax=axis, label=made.quantity)
    caption = f"{made.quantity.capitalize()}, at the last evaluation, mean over seeds. The best cell is framed."
    return [Figure(_save(figure, out / "heatmap.png"), caption)]


def _curves(made: Outcome, out: Path) -> list[Figure | str]:
    """The objective of the best configurations and the worst, over rounds and over bytes."""
    chosen = {f"row {i + 1}{_label(made, row)}": row for i, row in enumerate(made.rows[:CURVES])}
    if len(made.rows) > CURVES:
        chosen[f"row {len(made.rows)}{_label(made, made.rows[-1])}"] = made.rows[-1]
    drawn = {label: curve(row, made.objective) for label, row in chosen.items()}
    drawn = {label: one for label, one in drawn.items() if len(one[0])}
    if max((len(one[0]) for one in drawn.values()), default=0) < 2:
        return ["No curves: the trials kept fewer than two evaluations."]
    if len(made.rows) == 1:
        which = "The only configuration."
    else:
        which = f"The best {min(CURVES, len(made.rows))} configurations"
        which += " and the worst" if len(made.rows) > CURVES else ""
        which += ", numbered by their rows in the table."
    band = " Bands: ± std over seeds." if any(one[3] is not None for one in drawn.values()) else ""
    over_rounds = [_banded(made, label, one[0], one) for label, one in drawn.items()]
    path = out / "curves.png"
    report.draw_curves(path, [(f"{made.name}: over rounds", "round", made.quantity, over_rounds)])
    results: list[Figure | str] = [Figure(path, f"{made.quantity.capitalize()}, over rounds. {which}{band}")]
    counted = {label: one for label, one in drawn.items() if len(one[1])}
    if not counted:
        return [*results, "No curves over bytes: the trials kept none."]
    ends = [one[1][-1] for one in counted.values()]
    over_bytes = [_banded(made, label, one[1] / 1e6, one) for label, one in counted.items()]
    path, sent = out / "bytes.png", "MB sent, up and down, all clients"
    panel = (f"{made.name}: over bytes", sent, made.quantity, over_bytes)
    report.draw_curves(path, [panel], log_x=bool(min(ends) > 0 and max(ends) > 10 * min(ends)))
    return [*results, Figure(path, f"{made.quantity.capitalize()}, over {sent}. {which}{band}")]


def _label(made: Outcome, row: Row) -> str:
    """What varies, where that is short enough for a legend; without it, the row's place in the table has to do."""
    text = ", ".join(f"{n} {word(row.params.get(n))}" for n in made.varying)
    return f": {text}" if 0 < len(text) <= _LONGEST else ""


def _banded(made: Outcome, label: str, x: np.ndarray, one: Any) -> report.Curve:
    _, _, mean, std = one
    y = (made.scale * mean).tolist()
    return (label, x.tolist(), y) if std is None else (label, x.tolist(), y, (made.scale * std).tolist())


def importances(made: Outcome) -> dict[str, float] | str:
    """How much each varying param, and the seed, has to do with being among the best; or why that cannot be told."""
    if len(made.varying) < 2:
        return "No importance of params: fewer than two vary besides seeds."
    if len(made.finished) < _FEWEST:
        return f"No importance of params: {len(made.finished)} finished trials are too few, of at least {_FEWEST}."
    seeds = [n for n in made.study.seeds if len({repr(trial.params.get(n)) for trial in made.finished}) > 1]
    study = optuna.create_study(direction="maximize" if made.maximize else "minimize")
    study.add_trials(made.finished)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing is told apart, which is said below
            found = optuna.importance.get_param_importances(study, params=[*made.varying, *seeds])
    except (ValueError, RuntimeError, ImportError) as error:
        return f"No importance of params: {str(error).splitlines()[0]}"
    if len({round(value, 9) for value in found.values()}) == 1:
        return "No importance of params: these trials do not tell them apart."
    return found


def _importance(made: Outcome, out: Path) -> list[Figure | str]:
    found = importances(made)
    if isinstance(found, str):
        return [found]
    plt = _pyplot()
    names = sorted(found, key=lambda n: found[n])
    figure, axis = plt.subplots(figsize=(6.5, 1.1 + 0.35 * len(names)), layout="constrained")
    bars = axis.barh(
        names, [found[n] for n in names], color=["silver" if n in made.study.seeds else "tab:blue" for n in names]
    )
    axis.bar_label(bars, fmt="%.2f", padding=3)
    axis.set(xlim=(0, 1.1 * max(found.values())), xlabel="share of what tells the best tenth of trials from the others")
    axis.grid(axis="x", alpha=0.3)
    caption = "Importance of params for being among the best tenth of all trials (PED-ANOVA, Optuna's default)"
    caption += ". The seed's is noise." if any(n in made.study.seeds for n in names) else "."
    return [Figure(_save(figure, out / "importance.png"), caption)]


def _history(made: Outcome, out: Path) -> list[Figure | str]:
    """The best value so far, of searches that choose as they go or draw."""
    if made.study.search == "grid":
        return []
    trials = sorted(made.finished, key=lambda trial: trial.number)
    number, value = [t.number for t in trials], made.scale * np.asarray([t.value for t in trials], float)
    best = (np.maximum if made.maximize else np.minimum).accumulate(value)
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    axis.plot(number, value, ".", color="gray", label="a trial")
    axis.step(number, best, where="post", label="best so far")
    axis.set(xlabel="trial", ylabel=made.quantity)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    caption = (
        f"{made.quantity.capitalize()}, of every finished trial, and the best so far ({made.study.search} search)."
    )
    return [Figure(_save(figure, out / "history.png"), caption)]
