"""What a run, or the same with several seeds, gave: as a table and as curves."""

import collections
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fdjax.errors import InputError
from fdjax.run import comparison, metrics, report
from fdjax.run.record import Result

_NAMES = {
    "central_accuracy": "central accuracy, %",
    "local_accuracy": "mean local accuracy, {examples} test examples, %",
    "own_accuracy": "mean accuracy on clients' own test parts, uniform, %",
    "own_accuracy_weighted": "the same, weighted by n_k, %",
    "own_accuracy_by_test_size": "the same, weighted by test examples, %",
    "worst_client": "worst client, own test part, %",
    "quantile_10": "10 % quantile of clients, %",
    "client_std": "std across clients, %",
    "new_accuracy": "new clients as they are, own test part, %",
    "new_accuracy_tuned": "new clients after fine-tuning, own test part, %",
    "validation_accuracy": "accuracy on the validation split, %",
}
_ATTACKED = {
    "central_auc": "the central model",
    "local_auc": "clients' own models",
    "upload_auc": "what one client sends",
    "consensus_auc": "what the server makes of it",
}
_MEASURED = {
    "central": "central model",
    "local": "mean of clients' models on the test set",
    "own": "mean on clients' own test parts",
    "validation": "validation split",
    "new": "new clients",
}
_CLASSES = 10  # so many of a metric by class are shown; all are in results.json and in result.final
_DRAWN = ("central_accuracy", "local_accuracy", "own_accuracy", "worst_client", "validation_accuracy")


def summary(results: Result | Sequence[Result]) -> str:
    """The last evaluation, bytes and seconds as a table; of several seeds, means and sample standard deviations.

    Raises InputError unless it is given a result, or several that differ by their seeds alone.
    """
    results = _of_seeds(results)
    first, final = results[0], results[0].final
    tested = first.evaluations.get("local_examples", [])
    between = ", ".join(f"{n:,.0f}" for n in sorted({*tested[:-1]})) if len({*tested}) > 1 else ""
    examples = f"{final.get('local_examples', 0):,.0f}"
    losses = [f"{kind}_loss" for kind in ("central", "local") if f"{kind}_loss" in final]
    setup = [way for way in ("up", "down") if first.setup.get(f"bytes_{way}")]
    rows = [
        *((text.format(examples=examples), _percent(results, n)) for n, text in _NAMES.items() if n in final),
        *((name.replace("_", " "), _spread(results, name, 4)) for name in losses),
        *_measured(results),
        *([("test examples for local accuracy at evaluations before", between)] if between else []),
        *_reached(results),
        *_trained_on(results),
        *_privacy(results),
        *(
            (f"AUC of a membership attack on {text}", _spread(results, n))
            for n, text in _ATTACKED.items()
            if n in final
        ),
        ("bytes up, of one client a round", _of_one_client(results, "up")),
        ("bytes down, to one client a round", _of_one_client(results, "down")),
        *((f"bytes {way} of the set-up, all clients", report.byte_size(first.setup[f"bytes_{way}"])) for way in setup),
        ("bytes of the whole run", report.byte_size(_mean(results, lambda r: report.bytes_until(r, r.round)))),
        *_stopped(results),
        ("seconds, of which compilation", f"{first.seconds:.1f}, {first.compile_seconds:.1f}"),
    ]
    seeds = ", ".join(str(result.settings.seed) for result in results)
    more = f"; mean ± std, seeds {seeds}" if len(results) > 1 else ""
    return report.table(rows, (_title(first), f"round {_rounds(results)}{more}"))


def _of_seeds(results: Any) -> Sequence[Result]:
    results = [results] if isinstance(results, Result) else results
    if not isinstance(results, Sequence) or not results or not all(isinstance(one, Result) for one in results):
        raise InputError(f"fdjax.summary: {str(results)[:80]}: expected a result, or a list of those of several seeds")
    first, *others = (result.settings.public() for result in results)
    for other in others:
        if names := comparison.differing(first, other):
            name = names[0]
            raise InputError(
                f"fdjax.summary: {name} is {first.get(name)} and {other.get(name)}: expected results that differ by "
                "their seeds alone; give those of each setting by themselves, or compare folders by fdjax-compare"
            )
    seeds = collections.Counter(result.settings.seed for result in results)
    if twice := [seed for seed, count in seeds.items() if count > 1]:
        raise InputError(f"fdjax.summary: seed {twice[0]} is given twice; leave one of these results out")
    return results


def _measured(results: Sequence[Result]) -> list[tuple[str, str]]:
    """The settings' metrics of every kind of model; those by class in one row, if they are few."""
    rows, final, held = [], results[0].final, results[0].settings.metrics
    for name in final:
        if name.endswith("_0") and (row := _by_class(results, name[:-2])):
            rows.append(row)
        kind, metric = name.partition("_")[0], metrics.metric_of(name, held)
        if metric is None or name != f"{kind}_{metric.name}" or kind not in _MEASURED:
            continue
        if _is_central(results[0], kind, name):
            continue
        missing = _mean(results, lambda r, name=name: r.final.get(f"{name}_undefined", 0.0))
        more = f" ({missing:.3g} clients have none)" if missing else ""
        value = _percent(results, name) if metric.unit == "%" else _spread(results, name)
        unit = f", {metric.unit}" if metric.unit else ""
        rows.append((f"{metric.name.replace('_', ' ')}, {_MEASURED[kind]}{unit}", value + more))
    return rows


def _is_central(result: Result, kind: str, name: str) -> bool:
    """Whether a value of clients' models is the central one's, which every client has."""
    return kind == "local" and name not in result.clients and name.replace("local", "central", 1) in result.final


def _by_class(results: Sequence[Result], name: str) -> tuple[str, str] | None:
    """Means of a metric by class, of name_0, name_1 ...; None if it is another one, or has too many for a row."""
    kind, final = name.partition("_")[0], results[0].final
    metric = metrics.metric_of(f"{name}_0", results[0].settings.metrics)
    values = [key for key in (f"{name}_{label}" for label in range(_CLASSES + 1)) if key in final]
    if metric is None or name != f"{kind}_{metric.name}" or kind not in _MEASURED or len(values) > _CLASSES:
        return None
    if _is_central(results[0], kind, f"{name}_0"):
        return None
    called = results[0].classes or tuple(map(str, range(len(values))))
    means = [_mean(results, lambda r, key=key: r.final[key]) for key in values]
    shown = [report.percent(mean) if metric.unit == "%" else f"{mean:.3f}" for mean in means]
    cells = ", ".join(f"{label}: {value}" for label, value in zip(called, shown, strict=False))
    unit = f", {metric.unit}" if metric.unit else ""
    return f"{metric.name.replace('_', ' ')}, {_MEASURED[kind]}{unit}", cells


def _reached(results: Sequence[Result]) -> list[tuple[str, str]]:
    """Rounds and bytes until each target, the means of all seeds if all reach it."""
    rows, each = [], [report.reached(result) for result in results]
    for target, first in each[0].items():
        of, found = first["of"].replace("_", " "), [reached[target] for reached in each]
        missed = sum(one["round"] is None for one in found)
        words = f"not in {results[0].round}" + (f", in {missed} of {len(results)} seeds" if len(results) > 1 else "")
        text = f"rounds to {of} {report.percent(float(target))} %"
        if missed:
            rows.append((text, words))
            continue
        mean, std = report.spread([one["round"] for one in found])
        rows.append((text, f"{mean:.1f}" + (f" ± {std:.1f}" if std is not None else "")))
        rows.append(("bytes until then", report.byte_size(float(np.mean([one["bytes"] for one in found])))))
    return rows


def _title(result: Result) -> str:
    chosen = result.settings
    return f"{chosen.algorithm_title}, {chosen.dataset_title}, {chosen.partition_title}"


def _mean(results: Sequence[Result], of: Callable[[Result], float]) -> float:
    return float(np.mean([of(result) for result in results]))


def _percent(results: Sequence[Result], name: str) -> str:
    return report.percent(*report.spread([result.final[name] for result in results]))


def _spread(results: Sequence[Result], name: str, digits: int = 3) -> str:
    mean, std = report.spread([result.final[name] for result in results])
    form = f".{digits}f" if abs(mean) < 1e6 else ".3e"  # such as the loss of a run that diverges
    return f"{mean:{form}}" + (f" ± {std:{form}}" if std is not None else "")


def _trained_on(results: Sequence[Result]) -> list[tuple[str, str]]:
    """How many examples clients trained on, and what became of the proxy data."""
    settings = results[0].settings
    trained = _mean(results, lambda r: float(np.dot(r.holdings["n_k"], ~np.array(r.holdings["never_trains"]))))
    rows = [("training examples of all clients", f"{trained:,.0f}")]
    if settings.proxy is None:
        return rows
    use = "" if settings.method.proxy else f", which {settings.method.name} does not use"
    return [*rows, ("proxy examples, of no client", f"{settings.proxy_size:,} ({settings.proxy_title}{use})")]


def _privacy(results: Sequence[Result]) -> list[tuple[str, str]]:
    """The epsilon of what was shared, the largest of all seeds, and what it is about."""
    spent = max((result.privacy for result in results), key=lambda privacy: privacy.get("epsilon", 0.0))
    by_itself = [
        (
            f"epsilon of {part['what']} alone at delta {part['delta']:g}, {part['relation']}",
            f"{part['epsilon']:.4g} (noise multiplier {part['noise_multiplier']:.4g})",
        )
        for part in _most_spent(results)
    ]
    if "epsilon" not in spent:
        return by_itself
    noise = f"{spent['noise_multiplier']:.4g}"
    if "count_noise_multiplier" in spent:
        noise += f" of sums, {spent['count_noise_multiplier']:.4g} of counts"
    return [
        *by_itself,
        (
            f"epsilon at delta {spent['delta']:g}, {spent['relation']}",
            f"{spent['epsilon']:.4g} ({spent['accountant']})",
        ),
        ("noise multiplier, clip", f"{noise}, {spent['clip']:g}"),
    ]


def _most_spent(results: Sequence[Result]) -> list[Mapping[str, Any]]:
    """What the method makes private by itself, each in the seed that spent most on it."""
    of_seeds = zip(*(result.privacy.get("parts", ()) for result in results), strict=True)
    return [max(seeds, key=lambda part: part["epsilon"]) for seeds in of_seeds]


def _rounds(results: Sequence[Result]) -> str:
    """Rounds done, and of how many where runs were stopped."""
    asked, done = results[0].settings.rounds, [result.round for result in results]
    if min(done) == asked:
        return f"{asked}"
    return f"{min(done)}{f' to {max(done)}' if max(done) > min(done) else ''} of {asked}, stopped"


def _stopped(results: Sequence[Result]) -> list[tuple[str, str]]:
    """Why runs ended before their last round; of several seeds, what the means are of then."""
    if len(results) == 1:
        return [("stopped because", f"{why}") for why in [results[0].stopped.get("why")] if why]
    rules = collections.Counter(r.stopped["rule"] for r in results if r.stopped)
    if not rules:
        return []
    rounds = ", ".join(str(result.round) for result in results)
    why = ", ".join(f"{rule} ({count})" for rule, count in rules.items())
    return [("rounds of each seed; the means are of each seed's last evaluation", rounds), ("stopped by (seeds)", why)]


def _of_one_client(results: Sequence[Result], way: str) -> str:
    """Bytes of each cohort's clients, or their mean where not all of them, or not all seeds, send the same."""
    sent = [report.bytes_of_one_client(result, way) for result in results]
    if isinstance(sent[0], tuple) and len({*sent}) == 1:
        return ", ".join(map(report.byte_size, sent[0]))
    return f"{report.byte_size(float(np.mean([np.mean(each) for each in sent])))} in the mean"


def draw(path: Path, results: Sequence[Result]) -> None:
    """Accuracy over rounds and over bytes, training losses; of several seeds, means in bands of their std.

    Of seeds that ended after different rounds, as far as all of them have come: a mean of some would be of others.
    """
    first = min(results, key=lambda result: result.round)
    rounds, size = list(range(1, first.round + 1)), len(first.evaluations["round"])
    evaluated = first.evaluations["round"]
    names = [name for name in _DRAWN[:-1] if name in first.evaluations] or [_DRAWN[-1]]
    curves = [_curve(n, evaluated, [100 * np.asarray(r.evaluations[n][:size]) for r in results]) for n in names]
    sent = [_mean(results, lambda r, at=int(at): report.bytes_until(r, at)) for at in evaluated]
    over_bytes: list[report.Curve] = [(label, sent, *values) for label, _, *values in curves[:1]]  # pyright: ignore
    of_loss = [name for name in first.rounds if "loss" in name]
    losses = [_curve(n, rounds, [np.asarray(r.rounds[n][: len(rounds)]) for r in results]) for n in of_loss]
    panels: list[report.Panel] = [
        ("accuracy", "round", "%", curves),
        ("communication", report.BYTES, "%", over_bytes),
        ("training loss", "round", "", losses),
    ]
    stopped = f", round {_rounds(results)}" if first.round < first.settings.rounds else ""
    if max(result.round for result in results) > first.round:
        stopped += f"; drawn until the first seed stopped, after round {first.round}"
    if np.isfinite(first.privacy.get("epsilon", np.inf)):
        panels.append(("privacy", "round", f"epsilon, {first.privacy['relation']}", [_spent(first)]))
    report.draw_curves(path, panels, _title(first) + stopped)


def _spent(result: Result) -> report.Curve:
    return (f"delta {result.privacy['delta']:g}", list(range(1, result.round + 1)), result.rounds["epsilon"])


def _curve(name: str, x: Sequence[float], y: Sequence[np.ndarray]) -> report.Curve:
    label, mean = name.replace("_", " "), np.mean(y, axis=0).tolist()
    return (label, x, mean, np.std(y, axis=0, ddof=1).tolist()) if len(y) > 1 else (label, x, mean)
