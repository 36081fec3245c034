"""Everything that defines one run. Each field of `Settings` carries all that any program knows about that setting.

Flags, checks, the sharing of compilations, resumption, the agreement of hosts and reports follow from these records,
and for hyperparameters and options from the method's own record.
"""

import dataclasses
import difflib
import functools
import math
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
from absl import flags

from fdjax import data
from fdjax.algorithms import ALGORITHMS
from fdjax.client.augment import AUGMENTATIONS
from fdjax.engine.lift import KINDS
from fdjax.errors import InputError, unknown
from fdjax.method import Method
from fdjax.models import MODELS

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = MappingProxyType(
    {"constant": "the same in every round", "exponential": "times decay a round", "cosine": "to 0 after the last round"}
)
LOCAL_EVALS = MappingProxyType(
    {
        "auto": "on as many test examples as take a quarter of the time at most, on all at the last evaluation",
        "full": "on the full test set at every evaluation",
        "own": "on the client's own part of it alone",
        "none": "on nothing, and no client on its own part",
    }
)

Role = Literal[
    "static",  # changes what is compiled
    "traced",  # an argument of what is compiled
    "data",  # which data: changes arrays alone
    "partition",  # the same, and handed to the partition scheme by its name
    "run",  # how or where the run is carried out
]


class Setting(NamedTuple):
    """What is known about one setting."""

    help: str
    kind: type  # str, int, float or bool; tuple for what has no flag of its own
    role: Role
    optional: bool  # whether it may be None
    low: float = -math.inf
    high: float = math.inf
    above: bool = False  # whether `low` itself is too little
    below: bool = False  # whether `high` itself is too much
    choices: Collection[str] = ()  # a mapping where each is explained
    noun: str = ""  # what an error calls the choices; the setting's name if there is no better word
    resumable: bool = False  # whether a run may go on with another value
    folder: bool = False  # whether it says where a machine keeps its files: hosts may differ, and results leave it out

    def check(self, name: str, value: Any) -> None:
        """Raises InputError if the value is of another kind, out of range or none of the choices."""
        if value is None and self.optional:
            return
        if not self._is_of_kind(value) or not self._is_in_range(value):
            raise InputError(f"--{name}={value!r}: expected {self.expected()}")
        if self.choices and value not in self.choices:
            raise unknown(self.noun or name, str(value), self.choices)

    def _is_of_kind(self, value: Any) -> bool:
        if self.kind is float:
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return isinstance(value, self.kind) and (self.kind is bool or not isinstance(value, bool))

    def _is_in_range(self, value: Any) -> bool:
        if self.kind not in (int, float):
            return True
        return (self.low < value if self.above else self.low <= value) and (
            value < self.high if self.below else value <= self.high
        )

    def expected(self) -> str:
        """The kind and the range in words."""
        if self.kind not in (int, float):
            return {str: "text", bool: "true or false", tuple: "pairs of a name and a value"}[self.kind]
        words = "a whole number" if self.kind is int else "a number" if math.isfinite(self.high) else "a finite number"
        low, high = (repr(int(x)) if math.isfinite(x) and x == int(x) else f"{x:g}" for x in (self.low, self.high))
        if math.isfinite(self.low) and math.isfinite(self.high) and not self.above and not self.below:
            return f"{words} from {low} to {high}"
        if math.isfinite(self.low):
            words += f" above {low}" if self.above else f" of at least {low}"
        if math.isfinite(self.high):
            words += f" and below {high}" if self.below else f" and at most {high}"
        return words

    def flag_help(self) -> str:
        """The help of its flag, which names the choices."""
        if isinstance(self.choices, Mapping):
            return f"{self.help}. {'; '.join(f'{name}: {_summary(row)}' for name, row in self.choices.items())}"
        return f"{self.help}: {', '.join(self.choices)}" if self.choices else self.help


def _summary(row: Any) -> str:
    """What a table of methods, models or data sets says of one of them."""
    return getattr(row, "summary", getattr(row, "help", row))


def _setting(default: Any, help: str, kind: type | None = None, role: Role = "static", **more: Any) -> Any:
    record = Setting(help, kind or type(default), role, default is None, **more)
    return dataclasses.field(default=default, metadata={"setting": record})


_data = functools.partial(_setting, role="data")
_partition = functools.partial(_setting, None, role="partition")
_run = functools.partial(_setting, role="run")


@dataclasses.dataclass(frozen=True)
class Settings:
    """One run: what a researcher would write in the caption of a table. `make` gives checked ones."""

    algorithm: str = _setting("fedavg", "the method", choices=ALGORITHMS)
    dataset: str = _data("mnist_sample", "the data set", choices=data.SOURCES, noun="data set")
    data_dir: str | None = _data(None, "folder of the data set's files", str, resumable=True, folder=True)
    cache_dir: str | None = _data(
        None, "folder for decoded tfds sets; default $FDJAX_CACHE or ~/.cache/fdjax", str, resumable=True, folder=True
    )
    writers: str | None = _data(
        None, "npz with the writers of mnist's images (train_writer, test_writer)", str, folder=True
    )

    partition: str | None = _data(
        None, "who holds what; default natural for synthetic, else iid", str, choices=data.PARTITIONS
    )
    num_clients: int | None = _data(
        None, "number of clients; default 30 for synthetic, all for writer, else 10", int, low=1
    )
    alpha: float | None = _partition("concentration of a Dirichlet partition, or alpha of synthetic", float, low=0)
    beta: float | None = _partition("concentration of the quantity partition, or beta of synthetic", float, low=0)
    iid: bool | None = _data(None, "synthetic: whether all clients draw from one distribution", bool)
    samples_per_client: int | None = _data(
        None, "synthetic: examples of every client, instead of lognormally many; scarce: before labels are cut", int,
        low=1,
    )  # fmt: skip
    shards_per_client: int | None = _partition("partitions shards and shards_fedntd", int, low=1)
    labels_per_client: int | None = _partition("partitions labels and jiang", int, low=1)
    min_size: int | None = _partition("least examples of a client: dirichlet_a, _e, _f, quantity", int, low=0)
    scarce_labels: int | None = _partition("partition scarce: labels of a client that are cut", int, low=0)
    scarce_size: int | None = _partition("partition scarce: examples that are left of each of them", int, low=0)
    merge: bool | None = _partition("partition writer: several writers to a client", bool)
    standardize: bool = _data(True, "inputs to mean 0 and std 1 per channel; otherwise images are in [0, 1]")
    train_fraction: float = _data(
        1.0, "fraction of the training examples that is used, drawn by partition_seed", low=0, above=True, high=1
    )
    validation_fraction: float = _data(
        0.0, "fraction of these, less proxy data, that nobody trains on and every evaluation tests too; 0: none",
        low=0, high=1, below=True,
    )  # fmt: skip

    model: str = _setting("2nn", "the central (student) model", choices=MODELS)
    models: str | None = _setting(
        None, "the clients' own (teacher) models as name:clients,..., e.g. cnn1:3,cnn2:2; default: model for all", str
    )
    padding: str | None = _setting(None, "padding of the models that have the option", str, choices=("SAME", "VALID"))

    rounds: int = _setting(10, "communication rounds", low=1, resumable=True)
    participation: float = _setting(
        1.0, "fraction of the clients (of each cohort) that takes part in a round; at least 1 client",
        low=0, above=True, high=1,
    )  # fmt: skip
    batch_size: int = _setting(32, "examples of a step; 0: all of a client's", low=0)
    optimizer: str = _setting("sgd", "the clients' optimiser, which starts fresh every round", choices=OPTIMIZERS)
    momentum: float = _setting(0.0, "momentum of sgd", low=0)
    weight_decay: float = _setting(0.0, "added to the gradient (sgd, adam) or decoupled (adamw)", low=0)
    schedule: str = _setting("constant", "learning rate over the rounds", choices=SCHEDULES)
    decay: float = _setting(0.99, "factor of a round of the exponential schedule", low=0)
    augment: str = _setting("none", "augmentation of training batches", choices=tuple(AUGMENTATIONS))

    seed: int = _setting(0, "seed of initialisation, sampling and shuffling", role="traced", low=0, high=2**31 - 1)
    partition_seed: int | None = _data(
        None, "seed of the partition and of synthetic data; default: seed", int, low=0, high=2**63 - 1
    )
    eval_every: int = _run(1, "rounds between evaluations, compiled as one call", low=1)
    eval_batch: int = _setting(500, "examples of a step of an evaluation", low=1)
    local_eval: str = _setting("auto", "where personal models are tested", choices=LOCAL_EVALS)
    central_eval: bool = _setting(True, "test the central model, or the ensemble, on the full test set")
    proxy: str | None = _data(
        None, "proxy data, by default none: the name of a data set, or a kind", str,
        choices={**data.PROXIES, **data.SOURCES}, noun="proxy data",
    )  # fmt: skip
    proxy_size: int = _data(1000, "number of proxy examples", low=1)
    proxy_per_round: int = _setting(0, "proxy examples that a round uses, a fresh subset each; 0: all", low=0)
    distill_batch_size: int = _setting(0, "examples of a step on proxy data; 0: batch_size", low=0)

    lifting: str = _run(
        "auto", "how clients run side by side", choices={"auto": "by the clients, models and devices", **KINDS},
        resumable=True,
    )  # fmt: skip
    chunk: int = _run(0, "clients trained at once on a device; 0: by the size of the model on a CPU, else 256", low=0)
    devices: int = _run(0, "devices that share the clients, of all hosts together; 0: all", low=0, resumable=True)
    ordered_sums: bool = _run(False, "add uploads in an order that does not depend on the devices; costs memory")
    drop_nonfinite: bool = _setting(False, "leave a client out of a round in which its numbers are not finite")
    memory_limit: float = _run(0.0, "GB that a device may use; 0: what is free", low=0, resumable=True)

    hparams: tuple[tuple[str, float], ...] = _setting((), "hyperparameters of the method", role="traced")
    options: tuple[tuple[str, str], ...] = _setting((), "static choices of the method")

    @property
    def method(self) -> Method:
        """The record of the algorithm."""
        return ALGORITHMS[self.algorithm]

    @property
    def partition_name(self) -> str:
        """The partition that `partition` names or defaults to."""
        return self.partition or ("natural" if self.dataset == "synthetic" else "iid")

    @property
    def data_seed(self) -> int:
        """The seed of everything that is drawn before training."""
        return self.seed if self.partition_seed is None else self.partition_seed

    @property
    def resumable(self) -> frozenset[str]:
        """The settings that may be others when a run goes on. A cosine schedule depends on the number of rounds."""
        return frozenset(name for name, s in SETTINGS.items() if s.resumable) - (
            {"rounds"} if self.schedule == "cosine" else set()
        )

    def static(self, largest_client: int) -> "Settings":
        """What a compiled round depends on: the static settings, all others being at their defaults.

        Batches are no larger than the largest client, and without a schedule that ends, rounds do not matter.
        """
        others = {f.name: f.default for f in dataclasses.fields(self) if SETTINGS[f.name].role != "static"}
        batch_size = min(self.batch_size or largest_client, largest_client)
        rounds = self.rounds if self.schedule == "cosine" else 1
        return dataclasses.replace(self, **others | {"batch_size": batch_size, "rounds": rounds})

    def check(self) -> "Settings":
        """The same with all hyperparameters and options of the method, at their defaults where none are given.

        Raises InputError for what can be seen to be wrong before any data are loaded.
        """
        for name, setting in SETTINGS.items():
            setting.check(name, getattr(self, name))
        options = self.method.choices(dict(self.options))
        hparams = self.method.values(dict(self.hparams))
        whole = {name: int(v) if self.method.hparams[name].integer else v for name, v in hparams.items()}
        if self.method.proxy and self.proxy is None:
            labels = "with labels" if self.method.proxy == "labelled" else "whose labels it does not use"
            raise InputError(f"{self.algorithm} needs proxy data, {labels}; give --proxy=held_out, or another (--help)")
        if self.proxy is not None and self.proxy_per_round > self.proxy_size:
            raise InputError(
                f"--proxy_per_round={self.proxy_per_round}, but --proxy_size={self.proxy_size}; give at most as many"
            )
        if self.models is not None:
            self._check_models(self.models)
        return dataclasses.replace(self, hparams=tuple(sorted(whole.items())), options=tuple(sorted(options.items())))

    def _check_models(self, models: str) -> None:
        names = [name for name, _ in cohorts_of(models)]
        for name in names:
            if name not in MODELS:
                raise unknown("model", name, MODELS)
        if self.method.one_architecture and names != [self.model]:
            raise InputError(
                f"--models={models}: clients of {self.algorithm} have no model of their own, only "
                f"--model={self.model}; leave --models out"
            )

    def public(self) -> dict[str, Any]:
        """As a flat dict for results and checkpoints: hyperparameters and options beside the other settings."""
        return {name: getattr(self, name) for name in FLAGS} | dict(self.options) | dict(self.hparams)


SETTINGS: dict[str, Setting] = {field.name: field.metadata["setting"] for field in dataclasses.fields(Settings)}
FLAGS = {name: setting for name, setting in SETTINGS.items() if setting.kind is not tuple}
FOLDERS = tuple(name for name, setting in SETTINGS.items() if setting.folder)


def of_role(*roles: Role) -> frozenset[str]:
    """The names of the settings of these roles."""
    return frozenset(name for name, setting in SETTINGS.items() if setting.role in roles)


def cohorts_of(models: str) -> tuple[tuple[str, int], ...]:
    """(model, clients) of each cohort of --models. Raises InputError for what is not of its form."""
    cohorts = []
    for part in models.split(","):
        name, _, size = part.partition(":")
        if not size.isdecimal() or int(size) < 1:
            raise InputError(f"--models={models}: {part!r} is not of the form name:clients, e.g. cnn1:3")
        cohorts.append((name.strip(), int(size)))
    return tuple(cohorts)


def make(hparams: Mapping[str, Any] | None = None, options: Mapping[str, Any] | None = None, **named: Any) -> Settings:
    """Checked `Settings` from keywords: names of settings, and of hyperparameters and options of the method.

    The latter two may also be given as dicts. Raises InputError for a name that nothing has and for bad values.
    """
    fields: dict[str, Any] = {}
    hparams, options = dict(hparams or {}), dict(options or {})
    for name, value in named.items():
        if name in FLAGS:
            fields[name] = value
        elif name in _names_of_options():
            options[name] = str(value)
        elif name in _names_of_hparams():
            hparams[name] = value
        else:
            near = difflib.get_close_matches(name, [*FLAGS, *_names_of_options(), *_names_of_hparams()], n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise InputError(f"unknown setting {name!r}{hint}; python -m fdjax --help lists them all")
    for name, given in (("hparams", hparams), ("options", options)):
        fields[name] = tuple(sorted((name, _plain(value)) for name, value in given.items()))
    return Settings(**{name: _plain(value) for name, value in fields.items()}).check()


def _plain(value: Any) -> Any:
    """NumPy's scalars as Python's, so that settings can be compared and written as JSON."""
    return value.item() if isinstance(value, np.generic) else value


def _names_of_hparams() -> set[str]:
    return {name for method in ALGORITHMS.values() for name in method.hparams}


def _names_of_options() -> set[str]:
    return {name for method in ALGORITHMS.values() for name in method.options}


def define_flags(skip: Collection[str] = (), **defaults: Any) -> None:
    """Define a flag for each setting and for each hyperparameter and option of any method, but for those in `skip`."""
    define = {
        str: flags.DEFINE_string,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        bool: flags.DEFINE_boolean,
    }
    for field in dataclasses.fields(Settings):
        if field.name in FLAGS and field.name not in skip:
            setting = FLAGS[field.name]
            define[setting.kind](field.name, defaults.get(field.name, field.default), setting.flag_help())
    choices = _by_name((m.options.items(), m.name) for m in ALGORITHMS.values())
    for name, users in choices.items():
        if name not in skip:
            text = "; ".join(f"{' and '.join(methods)} ({', '.join(allowed)})" for allowed, methods in users.items())
            flags.DEFINE_string(name, defaults.get(name), f"choice of {text}; the first is the default")
    hparams = _by_name((m.hparams.items(), m.name) for m in ALGORITHMS.values())
    for name, users in hparams.items():
        if name not in skip:
            text = "; ".join(
                f"{', '.join(methods)} (default {record.default}){f': {record.help}' if record.help else ''}"
                for record, methods in users.items()
            )
            flags.DEFINE_float(name, defaults.get(name), f"hyperparameter of {text}")


def _by_name(rows: Iterable[tuple[Iterable[tuple[str, Any]], str]]) -> dict[str, dict[Any, list[str]]]:
    """For each name, which methods have the same record of it: {name: {record: [methods]}}."""
    found: dict[str, dict[Any, list[str]]] = {}
    for items, method in rows:
        for name, record in items:
            found.setdefault(name, {}).setdefault(record, []).append(method)
    return found


def from_flags(**overrides: Any) -> Settings:
    """The `Settings` that the parsed flags and `overrides` describe, checked.

    Overrides are named as the flags are and win over them; None takes back a hyperparameter or option that was given.
    Raises InputError for a hyperparameter or option that the method does not have.
    """
    names = [name for name in (*FLAGS, *_names_of_options(), *_names_of_hparams()) if name in flags.FLAGS]
    given = {name: flags.FLAGS[name].value for name in names} | overrides
    return make(**{name: value for name, value in given.items() if value is not None or name in FLAGS})
