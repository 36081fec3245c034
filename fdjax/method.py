"""The record that makes a method known: its name, its paper, what it is built from and with which hyperparameters.

Every file in `fdjax/algorithms` holds such a record, `METHOD`; flags, checks, sweeps and tests read nothing else.
"""

import math
import reprlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from fdjax.contract import Algorithm
from fdjax.errors import InputError, unknown
from fdjax.types import Array, Model

_INT32_MAX = 2**31 - 1


class HParam(NamedTuple):
    """A traced hyperparameter: another value compiles nothing, and it may be an axis of a sweep."""

    default: float | str  # a name: the value of that other hyperparameter
    low: float = 0.0  # least value
    high: float = math.inf  # largest value
    integer: bool = False
    help: str = ""
    above: bool = False  # whether the value must be larger than `low`, and not only as large
    learning_rate: bool = False  # whether it is one, which the schedule "plateau" lowers
    only: tuple[str, ...] = ()  # an option of the method, and those of its values that use it; all if there is none

    def check(self, name: str, value: Any) -> float:
        """The value as a number. Raises InputError if it is none, or out of range."""
        wanted = self.expected()
        try:
            number = math.nan if isinstance(value, str | bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        fits = self.low < number if self.above else self.low <= number
        if not (fits and number <= self.high and math.isfinite(number)) or (self.integer and number != int(number)):
            raise InputError(f"--{name}={reprlib.repr(value)}: expected {wanted}")
        return number

    def described(self) -> str:
        """What it is, and with which options it is used, in words."""
        option, *values = self.only or ("",)
        return f"{self.help} ({option} {', '.join(values)})" if option else self.help

    def expected(self) -> str:
        """The range in words."""
        bounded = self.high < _INT32_MAX
        kind = "a whole number" if self.integer else "a number" if bounded else "a finite number"
        if not bounded:
            return f"{kind} {'above' if self.above else 'of at least'} {self.low:g}"
        return f"{kind} {'above' if self.above else 'from'} {self.low:g} to {self.high:g}"


def learning_rate(default: float | str = 0.01, help: str = "learning rate of the clients") -> HParam:
    """The usual record of a learning rate."""
    return HParam(default, help=help, learning_rate=True)


def epochs(default: float | str = 1, help: str = "epochs over a client's own examples in a round") -> HParam:
    """The usual record of a number of epochs or steps."""
    return HParam(default, low=1, high=_INT32_MAX, integer=True, help=help)


def temperature(default: float | str, help: str, only: tuple[str, ...] = ()) -> HParam:
    """The usual record of a temperature, which divides."""
    return HParam(default, above=True, help=help, only=only)


LOCAL_TRAINING = {  # what every method has
    "learning_rate": learning_rate(),
    "local_epochs": epochs(),
    "local_steps": HParam(
        0,
        high=_INT32_MAX,
        integer=True,
        help="optimiser steps of a client in a round, in place of local_epochs; 0: those",
    ),
}


class Training(NamedTuple):
    """How a model is trained, as far as it is static; learning rate and epochs are hyperparameters."""

    batch_size: int
    optimizer: Callable[[Array, Array], optax.GradientTransformation]  # (learning rate [], round []) -> optimiser
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None  # (key, x [B, ...]) -> x
    label_smoothing: float = 0.0  # of labels; probabilities are learned as they are
    drop_last: bool = False  # whether an epoch leaves its last batch out where it is short
    trained: Callable[[str], bool] | None = None  # whether the params at a path are trained; None: all are
    private: bool = False  # whether by DP-SGD, with the hparams `clip` and `noise_multiplier`
    name: str = "training"  # trainings of one name share the optimiser's state, where that is kept
    distils: bool = False  # whether it is that of a distillation: not of a client's own examples


class Task(NamedTuple):
    """What a method is built for: everything static that it may want to know."""

    model: Model  # the central one
    models: tuple[Model, ...]  # the clients', cohort by cohort
    sizes: tuple[int, ...]  # clients of each cohort
    training: Training  # on a client's own examples
    distilling: Training  # on proxy data
    serving: Training  # of the server's own net, on what clients uploaded
    classes: int
    largest: int = 0  # examples of the largest client
    proxy_size: int = 0  # M, 0 without proxy data
    proxy_per_round: int = 0  # of them used in one round
    options: Mapping[str, str] = MappingProxyType({})  # the method's choices by name
    inputs: tuple[int, ...] = ()  # shape of one example
    private_means: bool = False  # whether means by label are private by `exchange.private_means`, if it has label_means

    @property
    def clients(self) -> int:
        """Clients of all cohorts."""
        return sum(self.sizes)

    def ids(self, cohort: int) -> slice:
        """The ids of a cohort's clients, which are neighbours: tables [C, ...] by client id are cut with it."""
        first = sum(self.sizes[:cohort])
        return slice(first, first + self.sizes[cohort])


class Method(NamedTuple):
    """A method that programs, sweeps and tests can name."""

    name: str
    summary: str  # one line for --help, with the paper
    build: Callable[[Task], Algorithm]
    hparams: Mapping[str, HParam]
    options: Mapping[str, tuple[str, ...]] = MappingProxyType({})  # static choices by name, the default first
    proxy: str | None = None  # the proxy data that it needs: "labelled" or "unlabelled"
    labels_for: tuple[tuple[str, str], ...] = ()  # options with the value that needs them labelled
    joins_labels: bool = False  # whether models have outputs for proxy labels of another label space, beside the own
    distill_batch_size: int = 0  # examples of a step on proxy data if no flag says; 0: as many as of the own
    one_architecture: bool = False  # whether all clients must share the central model's architecture
    split: bool = False  # whether the central model takes what the first block of the clients' models gives
    parts: bool = False  # whether it uses `features` and `head` of models, or their `blocks`
    pooled: bool = False  # whether one client holds what all would hold
    averages: bool = False  # whether it exchanges params of the central model, so that clients can keep some; if more
    # than these are sent, they are the entry "params" of a dict
    needs_numbers: bool = False  # whether it makes inputs, changes them or measures distances: not of tokens
    needs_numbers_for: tuple[tuple[str, str], ...] = ()  # options with the value with which it does
    keeps_models: bool = False  # whether clients' own models never leave them, so that their statistics stay too
    stages: tuple[str, ...] = ()  # what it trains by beside `task.training`: "distill", "server", or both
    stages_for: tuple[str, str] | None = None  # an option and its value without which it does not
    example_fits: int = 0  # by how many fits on a client's own examples a round learns what is shared, if nothing else
    # of it depends on them; 0 if something does: then it cannot be private by example
    distils: bool = False  # whether a round has a distillation of its own, beside training on own examples: a fit by
    # `task.distilling` or `task.serving`, or a loop that calls `client.distillation.note`
    looks_back: str = ""  # the option that says on how many past rounds it draws
    label_means: bool = False  # whether means by label are all that it shares, private if `Task.private_means` says so
    keeps_optimizer: bool | None = False  # whether optimisers go on from round to round, unless --optimizer_state says
    # otherwise; None if they cannot, where a fit is of several nets, or of one that a round makes anew

    def algorithm(self, task: Task) -> Algorithm:
        """The method for a task, under its name. Raises InputError for models without the parts that it needs."""
        for model in task.models if self.split else (task.model, *task.models) if self.parts else ():
            model.parts(self.name)
        return self.build(task)._replace(name=self.name)

    def values(self, given: Mapping[str, Any]) -> dict[str, float]:
        """The value of every hyperparameter: as given, or its default.

        Raises InputError for a name that the method does not have and for a value out of range.
        """
        for name in given:
            if name not in self.hparams:
                raise unknown(f"hparam of {self.name}", name, self.hparams)
        values = {name: given.get(name, record.default) for name, record in self.hparams.items()}
        values = {n: values[v] if isinstance(v, str) and v in self.hparams else v for n, v in values.items()}
        return {name: self.hparams[name].check(name, value) for name, value in values.items()}

    def resolve(self, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The same as arrays [] of the dtypes that a compiled round takes."""
        values = self.values(given)
        return {n: np.asarray(v, np.int32 if self.hparams[n].integer else np.float32) for n, v in values.items()}

    def choices(self, given: Mapping[str, str]) -> dict[str, str]:
        """The value of every option. Raises InputError for what the method does not have."""
        for name, value in given.items():
            if name not in self.options:
                raise unknown(f"option of {self.name}", name, self.options)
            if value not in self.options[name]:
                raise unknown(name, str(value), self.options[name])
        return {name: given.get(name, allowed[0]) for name, allowed in self.options.items()}
