"""Settings of what is tested, and when."""

import dataclasses
import functools
from types import MappingProxyType

from fdjax.run import derived, metrics
from fdjax.run.setting import setting_field

_setting = setting_field
_run = functools.partial(setting_field, role="run")

LOCAL_EVALS = MappingProxyType(
    {
        "auto": "on as many test examples as take a quarter of the time at most, on all at the last evaluation",
        "full": "on the full test set at every evaluation",
        "own": "on the client's own part of it alone",
        "none": "on nothing, and no client on its own part",
    }
)


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """The settings of evaluations, which `Settings` has among its own."""

    eval_every: int = _run(1, "rounds between evaluations, compiled as one call", low=1)
    eval_batch: int = _setting(500, "examples of a step of an evaluation", low=1)
    local_eval: str = _setting("auto", "where personal models are tested", choices=LOCAL_EVALS)
    central_eval: bool = _setting(True, "test the central model, or the ensemble, on the full test set")
    metrics: str | None = _setting(
        None, "what is measured wherever accuracy is, with commas between: " + "; ".join(
            f"{name}: {metric.summary}" for name, metric in metrics.KNOWN.items()
        ) + "; or the file of one of your own (my.py)", str, resolve=metrics.resolve,
    )  # fmt: skip
    before_distillation: bool = _setting(
        False, "test what is distilled into before and after each distillation of a round: clients' models on their "
        "own test parts, the server's on the test set",
    )  # fmt: skip
    targets: str | None = _run(
        None, "accuracies, such as 0.8,0.9, of which the table says after how many rounds and bytes they are reached",
        str, resolve=derived.resolve, resumable=True,
    )  # fmt: skip
    client_history: bool = _run(
        True, "keep every client's values of every evaluation, and not of the last one alone", resumable=True
    )
