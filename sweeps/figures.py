"""Pictures of what a study gave."""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna

from fdjax.run import report
from sweeps.outcome import Curve, Outcome, Row, curve, last, word

CURVES = 5  # configurations, the best ones
_FEWEST = 10  # finished trials, for the importance of params
_LONGEST = 48  # characters of a legend's label


class Figure(NamedTuple):
    """A picture and what is to be said of it."""

    path: Path
    caption: str


def draw(results: Outcome, out: Path) -> tuple[list[Figure], list[str]]:
    """Draw what the study allows; returns the pictures, and why others are missing, a sentence each."""
    figures, missing = [], []
    for draw_kind in (_heatmap, _curves, _importance, _history):
        for drawn in draw_kind(results, out):
            if isinstance(drawn, Figure) and not drawn.path.is_file():
                drawn = f"No {drawn.path.name}: it could not be written."
            (missing if isinstance(drawn, str) else figures).append(drawn)
    return figures, missing


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> Path:
    report.save_figure(path, figure)
    return path


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _heatmap(results: Outcome, out: Path) -> list[Figure | str]:
    """Mean over seeds of the objective, over the two params that vary."""
    if len(results.varying) != 2 or not all(
        _is_number(row.params.get(n)) for row in results.rows for n in results.varying
    ):
        return ["No heatmap: it takes exactly two params that vary besides seeds, both numbers."]
    values = [sorted({row.params[n] for row in results.rows}) for n in results.varying]
    (down, rows), (across, columns) = sorted(zip(results.varying, values, strict=True), key=lambda param: len(param[1]))
    if len(results.rows) < len(rows) * len(columns) / 2:
        return [f"No heatmap: {len(results.rows)} configurations are too few for {len(rows)} x {len(columns)} cells."]
    cells = np.full((len(rows), len(columns)), np.nan)
    for row in results.rows:
        at = rows.index(row.params[down]), columns.index(row.params[across])
        cells[at] = results.scale * np.mean(last(row))
    plt = _pyplot()
    size = min(2.6 + 0.85 * len(columns), 16), min(1.6 + 0.5 * len(rows), 12)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    image = axis.imshow(cells, cmap="viridis" if results.maximize else "viridis_r", aspect="auto")
    axis.set(xlabel=across, ylabel=down, xticks=range(len(columns)), yticks=range(len(rows)))
    axis.set_xticklabels([word(v) for v in columns], rotation=90 if len(columns) > 12 else 0)
    axis.set_yticklabels([word(v) for v in rows])
    small = max(len(rows), len(columns)) > 12
    for (i, j), value in np.ndenumerate(cells):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            text = f"{value:.1f}" if results.percent else f"{value:.3g}"
            axis.text(
                j, i, text, ha="center", va="center", color="white" if dark else "black", fontsize=6 if small else 9
            )
    best = results.rows[0].params
    corner = columns.index(best[across]) - 0.5, rows.index(best[down]) - 0.5
    axis.add_patch(plt.Rectangle(corner, 1, 1, fill=False, edgecolor="red", linewidth=2, clip_on=False))
    figure.colorbar(image, ax=axis, label=results.quantity)
    caption = f"{results.quantity.capitalize()}, at the last evaluation, mean over seeds. The best cell is framed."
    return [Figure(_save(figure, out / "heatmap.png"), caption)]


def _curves(results: Outcome, out: Path) -> list[Figure | str]:
    """The objective of the best configurations and the worst, over rounds and over bytes."""
    chosen = {f"row {i + 1}{_label(results, row)}": row for i, row in enumerate(results.rows[:CURVES])}
    if len(results.rows) > CURVES:
        chosen[f"row {len(results.rows)}{_label(results, results.rows[-1])}"] = results.rows[-1]
    curves = {label: curve(row, results.objective) for label, row in chosen.items()}
    curves = {label: data for label, data in curves.items() if len(data.rounds)}
    if max((len(data.rounds) for data in curves.values()), default=0) < 2:
        return ["No curves: the trials kept fewer than two evaluations."]
    if len(results.rows) == 1:
        which = "The only configuration."
    else:
        which = f"The best {min(CURVES, len(results.rows))} configurations"
        which += " and the worst" if len(results.rows) > CURVES else ""
        which += ", numbered by their rows in the table."
    band = " Bands: ± std over seeds." if any(data.std is not None for data in curves.values()) else ""
    over_rounds = [_banded(results, label, data.rounds, data) for label, data in curves.items()]
    path = out / "curves.png"
    report.draw_curves(path, [(f"{results.name}: over rounds", "round", results.quantity, over_rounds)])
    figures: list[Figure | str] = [Figure(path, f"{results.quantity.capitalize()}, over rounds. {which}{band}")]
    counted = {label: data for label, data in curves.items() if len(data.bytes)}
    if not counted:
        return [*figures, "No curves over bytes: the trials kept none."]
    ends = [data.bytes[-1] for data in counted.values()]
    over_bytes = [_banded(results, label, data.bytes / 1e6, data) for label, data in counted.items()]
    path, sent = out / "bytes.png", "MB sent, up and down, all clients"
    panel = (f"{results.name}: over bytes", sent, results.quantity, over_bytes)
    report.draw_curves(path, [panel], log_x=bool(min(ends) > 0 and max(ends) > 10 * min(ends)))
    return [*figures, Figure(path, f"{results.quantity.capitalize()}, over {sent}. {which}{band}")]


def _label(results: Outcome, row: Row) -> str:
    """What varies, where that is short enough for a legend; without it, the row's place in the table has to do."""
    text = ", ".join(f"{n} {word(row.params.get(n))}" for n in results.varying)
    return f": {text}" if 0 < len(text) <= _LONGEST else ""


def _banded(results: Outcome, label: str, x: np.ndarray, data: Curve) -> report.Curve:
    y = (results.scale * data.mean).tolist()
    return (label, x.tolist(), y) if data.std is None else (label, x.tolist(), y, (results.scale * data.std).tolist())


def importances(results: Outcome) -> dict[str, float] | str:
    """How much each varying param, and the seed, has to do with being among the best; or why that cannot be told."""
    if len(results.varying) < 2:
        return "No importance of params: fewer than two vary besides seeds."
    if len(results.finished) < _FEWEST:
        return f"No importance of params: {len(results.finished)} finished trials are too few, of at least {_FEWEST}."
    seeds = [n for n in results.study.seeds if len({repr(trial.params.get(n)) for trial in results.finished}) > 1]
    study = optuna.create_study(direction="maximize" if results.maximize else "minimize")
    study.add_trials(results.finished)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing is told apart, which is said below
            found = optuna.importance.get_param_importances(study, params=[*results.varying, *seeds])
    except (ValueError, RuntimeError, ImportError) as error:
        return f"No importance of params: {str(error).splitlines()[0]}"
    if len({round(value, 9) for value in found.values()}) == 1:
        return "No importance of params: these trials do not tell them apart."
    return found


def _importance(results: Outcome, out: Path) -> list[Figure | str]:
    found = importances(results)
    if isinstance(found, str):
        return [found]
    plt = _pyplot()
    names = sorted(found, key=lambda n: found[n])
    figure, axis = plt.subplots(figsize=(6.5, 1.1 + 0.35 * len(names)), layout="constrained")
    bars = axis.barh(
        names, [found[n] for n in names], color=["silver" if n in results.study.seeds else "tab:blue" for n in names]
    )
    axis.bar_label(bars, fmt="%.2f", padding=3)
    axis.set(xlim=(0, 1.1 * max(found.values())), xlabel="share of what tells the best tenth of trials from the others")
    axis.grid(axis="x", alpha=0.3)
    caption = "Importance of params for being among the best tenth of all trials (PED-ANOVA, Optuna's default)"
    caption += ". The seed's is noise." if any(n in results.study.seeds for n in names) else "."
    return [Figure(_save(figure, out / "importance.png"), caption)]


def _history(results: Outcome, out: Path) -> list[Figure | str]:
    """The best value so far, of searches that choose as they go or draw."""
    if results.study.search == "grid":
        return []
    trials = sorted(results.finished, key=lambda trial: trial.number)
    number, value = [t.number for t in trials], results.scale * np.asarray([t.value for t in trials], float)
    best = (np.maximum if results.maximize else np.minimum).accumulate(value)
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    axis.plot(number, value, ".", color="gray", label="a trial")
    axis.step(number, best, where="post", label="best so far")
    axis.set(xlabel="trial", ylabel=results.quantity)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    search = results.study.search
    caption = f"{results.quantity.capitalize()}, of every finished trial, and the best so far ({search} search)."
    return [Figure(_save(figure, out / "history.png"), caption)]
