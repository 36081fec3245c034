"""Settings of the optimisers: the clients', of training on proxy data, and of the server's net; and what they build."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import optax

from fdjax.errors import InputError
from fdjax.run.setting import setting_field
from fdjax.types import Array

# Of optax, all that need no more than gradients and the parameters that have flags here.
OPTIMIZERS = (
    "sgd", "adam", "adamw", "amsgrad", "adabelief", "adadelta", "adafactor", "adagrad", "adamax", "adamaxw", "adan",
    "fromage", "lamb", "lars", "lion", "nadam", "nadamw", "novograd", "radam", "rmsprop", "sign_sgd", "yogi",
)  # fmt: skip
SCHEDULES = MappingProxyType(
    {
        "constant": "the same always",
        "step": "times decay every decay_every",
        "exponential": "times decay^(t / decay_every)",
        "cosine": "to 0 over schedule_length",
        "plateau": "all learning rates times decay when the validation loss has not fallen for decay_every evaluations",
    }
)
_OF_SCHEDULES = {
    "decay": ("step", "exponential", "plateau"),
    "decay_every": ("step", "exponential", "plateau"),
    "schedule_length": ("cosine",),
}
STAGES = ("", "distill_", "server_")
_OF_STAGE = {
    "distill_": "training on proxy data by these flags",
    "server_": "training of the server's net, on uploads or by their mean",
}
_ARGUMENTS = {"momentum": "momentum", "nesterov": "nesterov", "beta1": "b1", "beta2": "b2", "epsilon": "eps"}
# Settings of an optimiser, and what optax calls them.


class _Flag(NamedTuple):
    """A setting that each stage has, of the clients under its own name."""

    default: Any
    help: str
    kind: type
    more: Mapping[str, Any] = MappingProxyType({})


_METHOD = {
    "optimizer": _Flag("sgd", "the optimiser, of optax", str, {"choices": OPTIMIZERS}),
    "momentum": _Flag(0.0, "momentum, of optimisers that have it", float, {"low": 0, "high": 1, "below": True}),
    "nesterov": _Flag(False, "Nesterov's momentum", bool),
    "beta1": _Flag(None, "decay of the first moment; default: optax's", float, {"low": 0, "high": 1, "below": True}),
    "beta2": _Flag(None, "decay of the second moment; default: optax's", float, {"low": 0, "high": 1, "below": True}),
    "epsilon": _Flag(None, "added to the divisor of adaptive optimisers; default: optax's", float, {"low": 0}),
    "weight_decay": _Flag(0.0, "decoupled where the optimiser has it, else in the gradient", float, {"low": 0}),
}  # fmt: skip
_AROUND = {
    "clip_norm": _Flag(0.0, "largest norm of the gradient; 0: not clipped", float, {"low": 0}),
    "clip_value": _Flag(0.0, "largest absolute value in the gradient; 0: not clipped", float, {"low": 0}),
    "schedule": _Flag("constant", "the learning rate's factor", str, {"choices": SCHEDULES}),
    "schedule_every": _Flag(
        "round", "what t counts", str,
        {"choices": {"round": "rounds", "step": "steps of a fit, or of all where the optimiser's state is kept"}},
    ),
    "decay": _Flag(0.99, "factor of step, exponential and plateau", float, {"low": 0, "above": True, "high": 1}),
    "decay_every": _Flag(1, "rounds, steps or evaluations between them", int, {"low": 1}),
    "schedule_length": _Flag(0, "rounds or steps of the cosine; 0: all rounds", int, {"low": 0}),
    "warmup": _Flag(0, "rounds or steps over which the factor first rises to 1", int, {"low": 0}),
}  # fmt: skip
_FLAGS = _METHOD | _AROUND


def _fields() -> list[tuple[str, Any, Any]]:
    found = []
    for stage in STAGES:
        for name, flag in _FLAGS.items():
            default = None if stage else flag.default
            text = f"the same of {_OF_STAGE[stage]}; default: the clients'" if stage else flag.help
            more: dict[str, Any] = {**flag.more, "noun": name} if "choices" in flag.more else {**flag.more}
            found.append((stage + name, flag.kind, setting_field(default, text, flag.kind, **more)))
    return found


OptimizerSettings = dataclasses.make_dataclass("OptimizerSettings", _fields(), frozen=True)
OptimizerSettings.__doc__ = "The settings of all stages' optimisers, which `Settings` has among its own."


class Optimizer(NamedTuple):
    """The settings of one stage, every default filled in."""

    optimizer: str
    momentum: float
    nesterov: bool
    beta1: float | None
    beta2: float | None
    epsilon: float | None
    weight_decay: float
    clip_norm: float
    clip_value: float
    schedule: str
    schedule_every: str
    decay: float
    decay_every: int
    schedule_length: int
    warmup: int


def optimizer_of(settings: Any, stage: str = "") -> Optimizer:
    """The optimiser of a stage. Flags not given are the clients', but for one that names an optimiser of its own."""
    own = stage and getattr(settings, f"{stage}optimizer") is not None

    def value(name):
        given = getattr(settings, stage + name)
        if given is not None:
            return given
        return _METHOD[name].default if own and name in _METHOD else getattr(settings, name)

    return Optimizer(**{name: value(name) for name in _FLAGS})


def check_optimizers(settings: Any) -> None:
    """Raises InputError for an optimiser's flag that it does not have, and for schedules that cannot work."""
    for stage in STAGES:
        chosen = optimizer_of(settings, stage)
        _check_that_it_trains(settings, stage)
        takes = inspect.signature(getattr(optax, chosen.optimizer)).parameters
        for name, argument in _ARGUMENTS.items():
            given = getattr(settings, stage + name)
            if given not in (None, _METHOD[name].default) and argument not in takes:
                raise InputError(
                    f"--{stage}{name}={given}: --{stage}optimizer={chosen.optimizer} has none; leave it out"
                )
        if chosen.nesterov and "momentum" in takes and not chosen.momentum:
            raise InputError(f"--{stage}nesterov needs --{stage}momentum above 0")
        _check_schedule(settings, stage, chosen)


def _check_that_it_trains(settings: Any, stage: str) -> None:
    """Raises InputError for a flag of a stage by which the method, with these options, does not train."""
    method, given = settings.method, [n for n in _FLAGS if stage and getattr(settings, stage + n) is not None]
    if not given:
        return
    flag = f"--{stage}{given[0]}={getattr(settings, stage + given[0])}"
    if stage.removesuffix("_") not in method.stages:
        raise InputError(f"{flag}: {method.name} has no {_OF_STAGE[stage]}; leave it out")
    option, needed = method.stages_for or ("", "")
    if option and method.choices(dict(settings.options))[option] != needed:
        raise InputError(f"{flag} is for --{option}={needed} of {method.name}; give that too, or leave it out")


def _check_schedule(settings: Any, stage: str, chosen: Optimizer) -> None:
    for name, schedules in _OF_SCHEDULES.items():
        given = getattr(settings, stage + name)
        if given not in (None, _FLAGS[name].default) and chosen.schedule not in schedules:
            raise InputError(
                f"--{stage}{name}={given} means nothing to --{stage}schedule={chosen.schedule}; give "
                f"--{stage}schedule={' or '.join(schedules)}, or leave it out"
            )
    every = getattr(settings, f"{stage}schedule_every")
    if every == "step" and (chosen.schedule == "plateau" or (chosen.schedule == "constant" and not chosen.warmup)):
        raise InputError(
            f"--{stage}schedule_every=step means nothing to --{stage}schedule={chosen.schedule}; give another schedule "
            f"or --{stage}warmup, or leave it out"
        )
    if stage and getattr(settings, f"{stage}schedule") == "plateau":
        raise InputError(f"--{stage}schedule=plateau: a plateau lowers all learning rates; give --schedule=plateau")
    if chosen.schedule == "plateau" and not settings.validation_fraction:
        raise InputError(f"--{stage}schedule=plateau goes by the validation loss; give --validation_fraction, e.g. 0.1")
    if chosen.schedule == "cosine" and chosen.schedule_every == "step" and not chosen.schedule_length:
        raise InputError(f"--{stage}schedule=cosine by steps needs --{stage}schedule_length, in steps")


def ends_with_rounds(settings: Any) -> bool:
    """Whether a schedule depends on the number of rounds."""
    chosen = (optimizer_of(settings, stage) for stage in STAGES)
    return any(o.schedule == "cosine" and not o.schedule_length for o in chosen)


def factor(chosen: Optimizer, rounds: int) -> Callable[[Array], Any]:
    """The schedule's factor of the learning rate as a function of t, which counts rounds or steps from 0."""
    every, decay, length = chosen.decay_every, chosen.decay, chosen.schedule_length or rounds
    if chosen.schedule == "cosine":
        after = optax.cosine_decay_schedule(1.0, max(length - chosen.warmup, 1))
    elif chosen.schedule in ("step", "exponential"):
        after = optax.exponential_decay(1.0, every, decay, staircase=chosen.schedule == "step")
    else:
        after = optax.constant_schedule(1.0)
    if not chosen.warmup:
        return after
    first = optax.linear_schedule(1 / chosen.warmup, 1.0, max(chosen.warmup - 1, 1))
    return optax.join_schedules([first, after], [chosen.warmup])


def build_optimizer(chosen: Optimizer, rounds: int) -> Callable[[Array, Array], optax.GradientTransformation]:
    """The optimiser as a function of a traced learning rate and of the round, which its schedule may go by."""
    make = getattr(optax, chosen.optimizer)
    takes = inspect.signature(make).parameters
    given = {argument: getattr(chosen, name) for name, argument in _ARGUMENTS.items() if argument in takes}
    # No momentum is None to sgd, which has none, and 0 to those that have it by default.
    given = {n: None if n == "momentum" and takes[n].default is None and not v else v for n, v in given.items()}
    given = {n: v for n, v in given.items() if v is not None}
    decoupled = "weight_decay" in takes
    more = given | ({"weight_decay": chosen.weight_decay} if decoupled else {})
    scale = factor(chosen, rounds)

    def optimizer(learning_rate, round):
        by_step = chosen.schedule_every == "step" and (chosen.schedule != "constant" or chosen.warmup)
        rate = (lambda step: learning_rate * scale(step)) if by_step else learning_rate * scale(round)
        before = [
            *([optax.clip_by_global_norm(chosen.clip_norm)] if chosen.clip_norm else []),
            *([optax.clip(chosen.clip_value)] if chosen.clip_value else []),
            *([optax.add_decayed_weights(chosen.weight_decay)] if chosen.weight_decay and not decoupled else []),
        ]
        step = make(rate, **more)
        return optax.chain(*before, step) if before else step

    return optimizer


def plateau(losses: list[float], factor: float, patience: int) -> float:
    """The factor of the learning rates after evaluations with these validation losses: `factor` for each time that
    `patience` evaluations in a row were not below the least one before them.
    """
    best, waited, scale = float("inf"), 0, 1.0
    for loss in losses:
        best, waited = (loss, 0) if loss < best else (best, waited + 1)
        if waited == patience:
            scale, waited = scale * factor, 0
    return scale
