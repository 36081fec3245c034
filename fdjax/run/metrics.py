"""Metrics by what users call them: ours by name, a user's own by file, by value or by the name that settings keep.

    METRIC = fdjax.Metric("top_3", per_example=lambda logits, y: ...)          # in my.py

    python -m fdjax --metrics=balanced_accuracy,my.py                          # or my.py:OTHER
    fdjax.run(metrics=[METRIC, "balanced_accuracy"])

Each is measured wherever accuracy is, by the names that accuracy has: `central_top_3`, `local_top_3`, `own_top_3`,
`validation_top_3`, `new_top_3`. One by class has a name for each, `central_class_accuracy_0` to `_9`, so that JSON, CSV
and tables hold plain numbers alone.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fdjax import own
from fdjax.client.metric import Metric
from fdjax.client.metrics import FORGETTING, METRICS
from fdjax.contract import ENSEMBLE, Algorithm
from fdjax.engine.check_metric import check_metric
from fdjax.errors import InputError, a_kind, unknown

_OWN = own.Registry("metric")
_DEFAULT = "METRIC"  # the metric of a file, where no other name is given
KNOWN = METRICS | {FORGETTING.name: FORGETTING}
_TAKEN = {
    "accuracy", "accuracy_by_test_size", "accuracy_tuned", "accuracy_weighted", "auc", "examples", "loss",
}  # fmt: skip
_KINDS = ("central", "local", "own", "validation", "new")  # of models, whose values begin with these
_FALLING = ("_loss", "client_std")
_RISING = (
    "_accuracy", "_accuracy_by_test_size", "_accuracy_tuned", "_accuracy_weighted", "worst_client", "quantile_10",
)  # fmt: skip
# what evaluations give without asking that is better when it is smaller, and when it is larger; the AUC of an attack is
# neither, for that depends on the side
Described = str | Mapping[str, Mapping[str, str]] | None


def resolve(given: Any) -> str:
    """The names by which settings hold metrics, with commas between them.

    Args:
      given: names of ours, path/to/my.py, path/to/my.py:NAME, with commas between them; a `Metric`; a sequence of any.

    Raises:
      InputError: a name that nothing has, a file that does not import or has no such metric, a record that is none, a
        name that is taken or given twice.
    """
    if isinstance(given, Metric) or not isinstance(given, Sequence):
        given = [given]
    parts = [part.strip() for part in given.split(",")] if isinstance(given, str) else list(given)
    if not parts:
        raise InputError("--metrics=[]: expected metrics; leave it out for none")
    names = [_resolved(part) for part in parts]
    called = [_name(name) for name in names]
    if twice := [name for i, name in enumerate(called) if name in called[:i]]:
        raise InputError(f"--metrics: {twice[0]!r} is given twice; leave one of them out, or rename your own")
    return ",".join(names)


def _resolved(given: Any) -> str:
    if isinstance(given, Metric):
        ours = isinstance(given.name, str) and KNOWN.get(given.name) is given
        return given.name if ours else _add_value(given)
    if not isinstance(given, str):
        raise InputError(f"--metrics={given!r}: expected a metric's name, a file of your own (my.py) or a Metric")
    if given in KNOWN:
        return given
    if own.is_own(given):
        return _OWN[given] and given
    if own.is_file(given):
        return _of_file(given)
    path = Path(f"{given.partition(':')[0]}.py").expanduser()
    if path.is_file():
        raise InputError(f"unknown metric {given!r}; did you mean the file, --metrics={path}?")
    if "/" in given:
        raise InputError(f"--metrics={given} names no file: a file of your own ends in .py, and there is no {path}")
    raise InputError(f"{unknown('metric', given, KNOWN)}; accuracy and loss are there without asking")


def _add_value(metric: Metric) -> str:
    name = metric.name if isinstance(metric.name, str) else "metric"
    return _OWN.add_value(name, _checked(metric, f"metric {metric.name!r}"))


def _of_file(given: str) -> str:
    """The name of the metric in a file: of METRIC, or of what is named behind a colon."""
    path, _, wanted = given.partition(":")
    file, attribute, where = own.load(path, "metrics"), wanted or _DEFAULT, f"--metrics={given}"
    form = "fdjax.Metric(name, per_example=...)"
    metric = _checked(file.record(attribute, Metric, where, "a fdjax.Metric", form), f"{where}: {attribute}")
    return _OWN.add(metric.name, file.content_of(attribute), file.thing(metric))


def _checked(metric: Metric, where: str) -> Metric:
    """The record. Raises InputError for one that no evaluation could use."""
    if not (isinstance(metric.name, str) and re.fullmatch(r"[A-Za-z]\w*", metric.name)):
        raise InputError(f"{where}: its name is {metric.name!r}, expected letters, digits and _")
    if metric.name in _TAKEN or metric.name in KNOWN or metric.name.endswith("_undefined"):
        raise InputError(f"{where}: the name {metric.name!r} is taken; call it my_{metric.name}, say")
    forms = [name for name in ("per_example", "sums", "across") if getattr(metric, name) is not None]
    if len(forms) != 1:
        found = " and ".join(forms) or "none of them"
        raise InputError(f"{where}: expected one of per_example, sums (with finish) and across, but it has {found}")
    for name in (*forms, "finish"):
        function = getattr(metric, name)
        if function is not None and not callable(function):
            raise InputError(f"{where}: {name} is {a_kind(function)}, expected a function")
    if (metric.sums is None) != (metric.finish is None):
        raise InputError(f"{where}: sums and finish go together; give both, or per_example alone for a mean")
    if metric.holds and metric.finish is None:
        raise InputError(f"{where}: holds=True is for finish(sums, held); give sums and finish")
    if metric.better not in ("higher", "lower"):
        raise InputError(f"{where}: better is {metric.better!r}, expected 'higher' or 'lower'")
    return metric


def _name(held: str) -> str:
    """What a metric calls itself, by the name that settings hold it by."""
    return _OWN[held].value.name if own.is_own(held) else held


def title(held: str) -> str:
    """How errors and tables call it, with its file."""
    return _OWN[held].titled(held) if own.is_own(held) else held


def file_of(held: str) -> str:
    """The file that a metric is from; empty for ours."""
    return _OWN[held].file if own.is_own(held) else ""


def names_of(held: str | None) -> list[str]:
    """The single names of a setting of metrics."""
    return held.split(",") if held else []


def records(held: str | None) -> tuple[Metric, ...]:
    """The metrics that an evaluation measures for these names; forgetting is made of the accuracy by class."""
    names = [name for name in names_of(held) if name != FORGETTING.name]
    if forgets(held) and "class_accuracy" not in names:
        names.append("class_accuracy")
    return tuple(_OWN[name].value if own.is_own(name) else METRICS[name] for name in names)


def forgets(held: str | None) -> bool:
    """Whether forgetting is among these."""
    return FORGETTING.name in names_of(held)


def derived_names(held: str | None, names: Collection[str]) -> list[str]:
    """The names of values that records have beside those that an evaluation gives."""
    tested = [kind for kind in ("central", "local") if f"{kind}_class_accuracy" in names]
    return [f"{kind}_{FORGETTING.name}" for kind in tested] if forgets(held) else []


def metric_of(value: str, held: str | None) -> Metric | None:
    """The metric that gives an evaluation's value of this name, such as central_top_3; None if none of these does."""
    _, _, rest = value.partition("_")
    by_class = re.sub(r"_\d+$", "", rest)
    return next((metric for metric in _asked(held) if metric.name in (rest, by_class)), None)


def _asked(held: str | None) -> tuple[Metric, ...]:
    """Those that an evaluation measures, and those that follow from them."""
    return (*records(held), *([FORGETTING] if forgets(held) else []))


def described(held: str | None) -> dict[str, dict[str, str]]:
    """What results.json says of these metrics, for whoever reads it without their files: see `better`."""
    return {metric.name: {"better": metric.better, "unit": metric.unit} for metric in _asked(held)}


def better(value: str, asked: Described) -> str:
    """Whether "higher" or "lower" is better for an evaluation's value of this name, "" if nothing says so.

    By the record of the metric that gives it, such as `own_top_3`; of what is there without asking, by its name.

    Args:
      value: as records have it, such as central_loss.
      asked: metrics, as settings hold them or as results.json describes them.
    """
    found = _fact("better", value, asked)
    if found is not None:
        return found
    return "lower" if value.endswith(_FALLING) else "higher" if value.endswith(_RISING) else ""


def unit(value: str, asked: Described) -> str:
    """The unit of an evaluation's value of this name: "%" of a fraction that is shown so, "" of a plain number."""
    found = _fact("unit", value, asked)
    return found if found is not None else "%" if value.endswith((*_RISING, "client_std")) else ""


def _fact(field: str, value: str, asked: Described) -> str | None:
    """What the record of the metric that gives a value says in a field; None if no metric does."""
    facts = asked if isinstance(asked, Mapping) else described(asked)
    known = {name: getattr(metric, field) for name, metric in KNOWN.items()} | {n: f[field] for n, f in facts.items()}
    kind, _, name = value.partition("_")
    names = (name, re.sub(r"_\d+$", "", name)) if kind in _KINDS else ()
    return next((known[each] for each in names if each in known), None)


def falls(value: str, asked: Described) -> bool:
    """Whether an evaluation's value of this name is better when it is smaller; see `better`."""
    return better(value, asked) == "lower"


def unsound(held: str | None, values: Mapping[str, float], told: set[str]) -> str:
    """Which of a user's own metrics has a value that is not finite for a model that is, in words, once for each.

    Ours are NaN as their definitions say. Empty words if there is none; `told` has those of which it was said before.
    """
    for name in names_of(held):
        if not own.is_own(name) or name in told:
            continue
        called = _name(name)
        for kind in ("central", "local", "own", "validation"):
            if not math.isfinite(values.get(f"{kind}_loss", math.nan)):
                continue  # nothing was tested, or the run diverged
            if not math.isfinite(value := values.get(f"{kind}_{called}", 0.0)):
                told.add(name)
                return f"metric {title(name)}: {kind}_{called} is {value}"
            if missing := values.get(f"{kind}_{called}_undefined", 0.0):
                told.add(name)
                return f"metric {title(name)}: {kind}_{called} leaves out {missing:.0f} clients, whose values are nan,"
    return ""


def checked_records(held: str | None, classes: int) -> tuple[Metric, ...]:
    """The same, whose functions have been tried. Raises InputError for one that returns what it should not."""
    found = records(held)
    titles = {_name(name): title(name) for name in names_of(held)}
    names: dict[str, str] = {}
    for metric in found:
        by_class = check_metric(metric, titles.get(metric.name, metric.name), classes)
        values = [f"{metric.name}_{label}" for label in range(classes)] if by_class else [metric.name]
        if clash := next((value for value in values if value in names), None):
            raise InputError(
                f"--metrics: {metric.name} and {names[clash]} both have a value {clash!r}; rename your own"
            )
        names |= dict.fromkeys(values, metric.name)
    return found


def check_tested(held: str | None, algorithm: Algorithm, local_eval: str, central_eval: bool) -> None:
    """Raises InputError for a metric of what is not tested in this run."""
    central = algorithm.central is not None and central_eval
    personal = algorithm.personal is not None
    in_full = personal and local_eval in ("auto", "full")
    own_alone = " or ".join(name for name in ("inside_accuracy", "outside_accuracy") if name in names_of(held))
    if own_alone and not in_full and (personal or not central):
        raise InputError(f"--metrics={own_alone}: no client's model is tested on the test set; give --local_eval=auto")
    for metric in records(held):
        if metric.across is not None and local_eval == "none":
            raise InputError(f"--metrics={metric.name}: no client's own part is tested; leave --local_eval=none out")
    if forgets(held) and not central and not in_full:
        kind = "an ensemble" if algorithm.central is ENSEMBLE else "no model"
        raise InputError(
            f"--metrics={FORGETTING.name}: {kind} of {algorithm.name} is tested on the test set; leave --local_eval or "
            "--central_eval out"
        )
