"""Everything that defines one run, with its flags: the fields of `Settings` are the flags of every program."""

import dataclasses
from typing import Any

from absl import flags

from fdjax import data
from fdjax.algorithms import ALGORITHMS
from fdjax.client.augment import AUGMENTATIONS
from fdjax.engine.lift import KINDS
from fdjax.errors import InputError, unknown
from fdjax.models import MODELS

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "exponential", "cosine")
LOCAL_EVALS = ("full", "own")
PADDINGS = ("SAME", "VALID")


def _table(rows) -> str:
    return "; ".join(f"{name}: {getattr(row, 'summary', getattr(row, 'help', row))}" for name, row in rows.items())


def _field(default, help: str, kind: type | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "kind": kind or type(default)})


@dataclasses.dataclass(frozen=True)
class Settings:
    """One run: what a researcher would write in the caption of a table."""

    algorithm: str = _field("fedavg", _table(ALGORITHMS))
    dataset: str = _field("mnist_sample", _table(data.SOURCES))
    data_dir: str | None = _field(None, "folder of the data set's files", str)
    cache_dir: str | None = _field(None, "folder for decoded tfds sets; default $FDJAX_CACHE or ~/.cache/fdjax", str)
    writers: str | None = _field(None, "npz with the writers of mnist's images (train_writer, test_writer)", str)

    partition: str | None = _field(
        None, f"who holds what; default natural for synthetic, else iid. {_table(data.PARTITIONS)}", str
    )
    num_clients: int | None = _field(None, "clients; default 30 for synthetic, all for writer, else 10", int)
    alpha: float | None = _field(None, "concentration of a Dirichlet partition, or alpha of synthetic", float)
    beta: float | None = _field(None, "concentration of the quantity partition, or beta of synthetic", float)
    iid: bool | None = _field(None, "synthetic: the IID variant", bool)
    samples_per_client: int | None = _field(
        None, "synthetic: examples of every client, not lognormal; partition scarce: before labels are cut", int
    )
    shards_per_client: int | None = _field(None, "partitions shards and shards_fedntd", int)
    labels_per_client: int | None = _field(None, "partitions labels and jiang", int)
    min_size: int | None = _field(None, "least examples of a client: dirichlet_a, _e, _f, quantity", int)
    scarce_labels: int | None = _field(None, "partition scarce: labels of a client that are cut", int)
    scarce_size: int | None = _field(None, "partition scarce: examples that are left of each of them", int)
    merge: bool | None = _field(None, "partition writer: several writers to a client", bool)
    standardize: bool = _field(True, "inputs to mean 0 and std 1 per channel; else images are in [0, 1]")
    train_fraction: float = _field(1.0, "fraction of the training examples that is used, drawn by partition_seed")
    validation_fraction: float = _field(
        0.0, "fraction of these, less proxy data, that nobody trains on and every evaluation tests too; 0: none"
    )

    model: str = _field("2nn", f"the central (student) model. {_table(MODELS)}")
    models: str | None = _field(
        None, "the clients' own (teacher) models as name:clients,..., e.g. cnn1:3,cnn2:2; default: model for all", str
    )
    padding: str | None = _field(None, "SAME or VALID, for the models that have the option", str)

    rounds: int = _field(10, "communication rounds")
    participation: float = _field(
        1.0, "fraction of the clients (of each cohort) that takes part in a round; at least 1 client"
    )
    batch_size: int = _field(32, "examples of a step; 0: all of a client's")
    optimizer: str = _field("sgd", f"the clients' optimiser: {', '.join(OPTIMIZERS)}; starts fresh every round")
    momentum: float = _field(0.0, "of sgd")
    weight_decay: float = _field(0.0, "added to the gradient (sgd, adam) or decoupled (adamw)")
    schedule: str = _field(
        "constant", f"learning rate over rounds: {', '.join(SCHEDULES)} (towards 0 after the last round)"
    )
    decay: float = _field(0.99, "factor a round of the exponential schedule")
    augment: str = _field("none", f"of training batches: {', '.join(AUGMENTATIONS)}")

    seed: int = _field(0, "of initialisation, sampling and shuffling")
    partition_seed: int | None = _field(None, "of the partition and of synthetic data; default: seed", int)
    eval_every: int = _field(1, "rounds between evaluations, compiled as one call")
    eval_batch: int = _field(500, "examples of an evaluation step")
    local_eval: str = _field(
        "full", "personal models are tested on the full test set too (full) or on their own part alone (own)"
    )
    proxy: str | None = _field(
        None, f"proxy data: the name of a data set, or one of {_table(data.PROXIES)}; default: none", str
    )
    proxy_size: int = _field(1000, "proxy examples")
    proxy_per_round: int = _field(0, "of them used in a round, a fresh subset each; 0: all")
    distill_batch_size: int = _field(0, "examples of a step on proxy data; 0: batch_size")
    lifting: str = _field("auto", f"how clients run side by side: auto; {_table(KINDS)}")
    chunk: int = _field(0, "clients trained at once on a device; 0: by the size of the model on a CPU, else 256")
    devices: int = _field(0, "devices that share the clients, of all hosts together; 0: all")
    ordered_sums: bool = _field(False, "add uploads in an order that does not depend on the devices; costs memory")
    drop_nonfinite: bool = _field(False, "leave a client out of a round in which its numbers are not finite")
    memory_limit: float = _field(0.0, "GB that a device may use; 0: what is free")

    hparams: tuple[tuple[str, float], ...] = dataclasses.field(default=(), metadata={})
    options: tuple[tuple[str, str], ...] = dataclasses.field(default=(), metadata={})

    @property
    def partition_name(self) -> str:
        """The partition that `partition` names or defaults to."""
        return self.partition or ("natural" if self.dataset == "synthetic" else "iid")

    @property
    def data_seed(self) -> int:
        """The seed of everything that is drawn before training."""
        return self.seed if self.partition_seed is None else self.partition_seed

    def check(self) -> "Settings":
        """Self. Raises InputError for what can be seen to be wrong before any data are loaded."""
        for kind, given, known in (
            ("algorithm", self.algorithm, ALGORITHMS),
            ("data set", self.dataset, data.SOURCES),
            ("partition", self.partition_name, data.PARTITIONS),
            ("model", self.model, MODELS),
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("schedule", self.schedule, SCHEDULES),
            ("augment", self.augment, AUGMENTATIONS),
            ("local_eval", self.local_eval, LOCAL_EVALS),
            ("padding", self.padding or PADDINGS[0], PADDINGS),
            ("lifting", self.lifting, ("auto", *KINDS)),
            *((f"option of {self.algorithm}", name, ALGORITHMS[self.algorithm].options) for name, _ in self.options),
            *((name, value, ALGORITHMS[self.algorithm].options.get(name, ())) for name, value in self.options),
            *((f"hparam of {self.algorithm}", name, known_hparams(self.algorithm)) for name, _ in self.hparams),
        ):
            if given not in known:
                raise unknown(kind, given, known)
        for name, least in _LEAST.items():
            if getattr(self, name) is not None and not getattr(self, name) >= least:  # so that NaN is refused too
                raise InputError(f"--{name}={getattr(self, name)}: expected at least {least}")
            if getattr(self, name) == float("inf"):
                raise InputError(f"--{name}=inf: expected a finite number")
        if self.seed >= 2**31:
            raise InputError(f"--seed={self.seed}: expected less than 2147483648")
        for name in ("participation", "train_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"--{name}={getattr(self, name)}: expected a fraction above 0 and at most 1")
        if not 0 <= self.validation_fraction < 1:
            raise InputError(f"--validation_fraction={self.validation_fraction}: expected 0 or a fraction below 1")
        for name, value in self.hparams:
            _check_hparam(name, value)
        needed = ALGORITHMS[self.algorithm].proxy
        if needed and self.proxy is None:
            labels = "with labels" if needed == "labelled" else "whose labels it does not use"
            raise InputError(f"{self.algorithm} needs proxy data, {labels}; give --proxy=held_out, or another (--help)")
        if self.proxy is not None and self.proxy_per_round > self.proxy_size:
            raise InputError(
                f"--proxy_per_round={self.proxy_per_round}, but --proxy_size={self.proxy_size}; give at most as many"
            )
        return self

    def public(self) -> dict[str, Any]:
        """As a flat dict for results and checkpoints: hparams beside the other flags, defaults included."""
        fields = dataclasses.asdict(self)
        values = known_hparams(self.algorithm) | dict(fields.pop("hparams"))
        fields |= {name: allowed[0] for name, allowed in ALGORITHMS[self.algorithm].options.items()}
        fields |= dict(fields.pop("options"))
        return fields | {name: values[v] if isinstance(v, str) else v for name, v in values.items()}


_LEAST = {"rounds": 1, "num_clients": 1, "batch_size": 0, "eval_every": 1, "eval_batch": 1, "chunk": 0, "devices": 0,
          "seed": 0, "partition_seed": 0, "momentum": 0, "weight_decay": 0, "decay": 0,
          "proxy_size": 1, "proxy_per_round": 0, "distill_batch_size": 0, "memory_limit": 0}  # fmt: skip


def known_hparams(algorithm: str) -> dict[str, float | str]:
    """The traced hyperparameters of a registered algorithm and their defaults."""
    return ALGORITHMS[algorithm].hparams


def _check_hparam(name: str, value: float) -> None:
    if name.endswith(("epochs", "steps")) and not (1 <= value < 2**31 and value == int(value)):
        raise InputError(f"--{name}={value}: expected a whole number of at least 1")
    if name.endswith("temperature") and not 0 < value < float("inf"):
        raise InputError(f"--{name}={value}: expected a finite number above 0")
    if name == "weight" and not 0 <= value <= 1:
        raise InputError(f"--{name}={value}: expected a number in [0, 1]")
    if name.endswith(("learning_rate", "gamma", "era_beta", "mu")) and not 0 <= value < float("inf"):
        raise InputError(f"--{name}={value}: expected a finite number of at least 0")


def define_flags(skip: tuple[str, ...] = (), **defaults: Any) -> None:
    """Define a flag for each field of `Settings` not in `skip`, and for each hparam of any registered algorithm."""
    define = {
        str: flags.DEFINE_string,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        bool: flags.DEFINE_boolean,
    }
    for field in dataclasses.fields(Settings):
        if field.name not in skip and field.metadata:
            define[field.metadata["kind"]](field.name, defaults.get(field.name, field.default), field.metadata["help"])
    choices: dict[str, list[str]] = {}
    for algorithm, entry in ALGORITHMS.items():
        for name, allowed in entry.options.items():
            choices.setdefault(name, []).append(f"{algorithm} ({', '.join(allowed)})")
    for name, algorithms in choices.items():
        if name not in skip:
            flags.DEFINE_string(
                name, defaults.get(name), f"choice of {'; '.join(algorithms)}; the first is the default"
            )
    users: dict[str, list[str]] = {}
    for algorithm in ALGORITHMS:
        for name, default in known_hparams(algorithm).items():
            users.setdefault(name, []).append(f"{algorithm} (default {default})")
    for name, algorithms in users.items():
        if name not in skip:
            flags.DEFINE_float(name, defaults.get(name), f"traced hyperparameter of {', '.join(algorithms)}")


def from_flags(**overrides: Any) -> Settings:
    """The `Settings` that the parsed flags and `overrides` (fields or hparams, which win) describe, checked.

    Raises InputError for an hparam that the algorithm does not have.
    """
    given = {
        f.name: flags.FLAGS[f.name].value for f in dataclasses.fields(Settings) if f.name in flags.FLAGS and f.metadata
    }
    hparam_names = sorted({name for algorithm in ALGORITHMS for name in known_hparams(algorithm)})
    option_names = sorted({name for entry in ALGORITHMS.values() for name in entry.options})
    hparams = {name: flags.FLAGS[name].value for name in hparam_names if name in flags.FLAGS}
    options = {name: flags.FLAGS[name].value for name in option_names if name in flags.FLAGS}
    for name, value in overrides.items():
        (hparams if name in hparam_names else options if name in option_names else given)[name] = value
    return make(_given(hparams), _given(options), **given)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def make(hparams: dict[str, float] | None = None, options: dict[str, str] | None = None, **fields: Any) -> Settings:
    """`Settings` from keywords, checked."""
    chosen = {"hparams": tuple(sorted((hparams or {}).items())), "options": tuple(sorted((options or {}).items()))}
    return Settings(**chosen, **fields).check()
