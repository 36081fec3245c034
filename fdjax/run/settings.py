"""Everything that defines one run. Each field of `Settings` carries all that any program knows about that setting.

Flags, checks, the sharing of compilations, resumption, the agreement of hosts and reports follow from these records,
and for hyperparameters and options from the method's own record.
"""

import dataclasses
import difflib
import functools
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from absl import flags

from fdjax import own
from fdjax.algorithms import ALGORITHMS
from fdjax.client.augment import AUGMENTATIONS, names_of
from fdjax.engine.lift import KINDS
from fdjax.errors import InputError, end
from fdjax.method import Method
from fdjax.models import MODELS
from fdjax.models import own as nets
from fdjax.run import methods
from fdjax.run import metrics as measures
from fdjax.run.data import DataSettings
from fdjax.run.evaluation import EvaluationSettings
from fdjax.run.optimizers import OptimizerSettings, check_optimizers, ends_with_rounds
from fdjax.run.participation import ParticipationSettings, check_participation
from fdjax.run.privacy import PrivacySettings, bound_to_rounds, check_privacy
from fdjax.run.setting import Role, Setting, pairs, plain, setting_field
from fdjax.run.stopping import StoppingSettings, check_stopping
from fdjax.run.unused import check_unused

_setting = setting_field
_run = functools.partial(setting_field, role="run")


@dataclasses.dataclass(frozen=True)
class Settings(
    DataSettings, EvaluationSettings, OptimizerSettings, ParticipationSettings, PrivacySettings, StoppingSettings
):
    """One run: what a researcher would write in the caption of a table. `make` gives checked ones."""

    algorithm: str = _setting(
        "fedavg", "the method, or the file of one of your own (my.py)", choices=ALGORITHMS,
        resolve=lambda given: methods.resolve(given, SETTINGS),
    )  # fmt: skip
    model: str = _setting(
        "2nn", "the central (student) model, or one of your own (path/net.py:Net)", choices=MODELS, resolve=nets.resolve
    )
    models: str | None = _setting(
        None, "the clients' own (teacher) models as name:clients,..., e.g. cnn1:3,net.py:Net:2; default: model for all",
        str, resolve=nets.resolve_list,
    )  # fmt: skip
    padding: str | None = _setting(None, "padding of the models that have the option", str, choices=("SAME", "VALID"))
    norm: str | None = _setting(
        None, "normalisation of models that have one; default group", str, choices=("group", "batch", "none")
    )
    dropout: float = _setting(
        0.0, "rate of dropout of models that have the option (FedMD's)", low=0, high=1, below=True
    )
    dtype: str = _setting(
        "float32", "arithmetic of models; params, gradients and logits are float32", choices=("float32", "bfloat16")
    )
    lora_rank: int = _setting(
        0, "rank of low-rank adapters on the models' kernels (lora/... of params); 0: none", low=0
    )

    rounds: int = _setting(10, "communication rounds", low=1, resumable=True)
    batch_size: int = _setting(32, "examples of a step; 0: all of a client's", low=0)
    label_smoothing: float = _setting(
        0.0, "share of a label that is spread over all classes", low=0, high=1, below=True
    )
    drop_last: bool = _setting(False, "leave out an epoch's last batch where it is short")
    optimizer_state: str | None = _setting(
        None, "whether optimisers start anew in every fit or go on; default: as the method's authors do", str,
        choices=("fresh", "kept"),
    )  # fmt: skip
    trained: str | None = _setting(
        None, "patterns of the params that are trained, e.g. '*lora*' or '!Dense_0/*'; default: all", str
    )
    exchanged: str | None = _setting(
        None, "patterns of the params that are exchanged, the others staying with the client; default: all", str
    )
    norm_statistics: str = _setting(
        "averaged", "BatchNorm's statistics",
        choices={"averaged": "as the params are", "local": "stay with the client"},
    )  # fmt: skip
    augment: str = _setting(
        "none", "augmentations of training batches of images, with commas between them, in this order. "
        + "; ".join(f"{name}: {what}" for name, what in AUGMENTATIONS.items())
    )  # fmt: skip

    seed: int = _setting(0, "seed of initialisation, sampling and shuffling", role="traced", low=0, high=2**31 - 1)
    proxy_per_round: int = _setting(0, "proxy examples that a round uses, a fresh subset each; 0: all", low=0)
    distill_batch_size: int = _setting(0, "examples of a step on proxy data; 0: the method's own, or batch_size", low=0)

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
        return methods.of(self.algorithm)

    @property
    def algorithm_title(self) -> str:
        """The algorithm as tables call it, with the file of a user's own."""
        return methods.title(self.algorithm)

    @property
    def model_title(self) -> str:
        """The central model as tables call it, likewise."""
        return nets.title(self.model)

    @property
    def files(self) -> dict[str, str]:
        """The files that a user's own method, nets, data and metrics came from, by the names that settings hold."""
        names = {self.model, *(name for name, _ in self.cohorts)}
        found = {self.algorithm: methods.file_of(self.algorithm), **{name: nets.file_of(name) for name in names}}
        found |= self.data_files | {name: measures.file_of(name) for name in measures.names_of(self.metrics)}
        return {own.recorded(name): file for name, file in sorted(found.items()) if file}

    @property
    def cohorts(self) -> tuple[tuple[str, int], ...]:
        """(model, clients) of each cohort that `models` names; none if all clients have `model`."""
        return cohorts_of(self.models) if self.models is not None else ()

    @property
    def data_seed(self) -> int:
        """The seed of everything that is drawn before training."""
        return self.seed if self.partition_seed is None else self.partition_seed

    @property
    def distill_batch(self) -> int:
        """Examples of a step on proxy data: as given, else the method's own, else those of `batch_size`."""
        size = self.distill_batch_size or self.method.distill_batch_size or self.batch_size or self.proxy_size
        return size if self.proxy else 0

    @property
    def resumable(self) -> frozenset[str]:
        """The settings that may be others when a run goes on. Rounds decide a cosine schedule, and noise."""
        return frozenset(name for name, s in SETTINGS.items() if s.resumable) - bound_to_rounds(self)

    def static(self, largest_client: int) -> "Settings":
        """What a compiled round depends on: the static settings, all others being at their defaults.

        Batches of own examples are no larger than the largest client; rounds matter to a schedule that ends.
        """
        others = {f.name: f.default for f in dataclasses.fields(self) if SETTINGS[f.name].role != "static"}
        batch_size = min(self.batch_size or largest_client, largest_client)
        rounds = self.rounds if ends_with_rounds(self) else 1
        changed = {"batch_size": batch_size, "distill_batch_size": self.distill_batch, "rounds": rounds}
        return dataclasses.replace(self, **others | changed)

    def check(self) -> "Settings":
        """The same with all hyperparameters and options of the method, at their defaults where none are given.

        Raises InputError for what can be seen to be wrong before any data are loaded.
        """
        self = self._resolved()
        for name, setting in SETTINGS.items():
            setting.check(name, getattr(self, name))
        check_optimizers(self)
        names_of(self.augment)
        options = self.method.choices(dict(self.options))
        hparams = self.method.values(dict(self.hparams))
        whole = {name: int(v) if self.method.hparams[name].integer else v for name, v in hparams.items()}
        if self.method.proxy and self.proxy is None:
            labels = "with labels" if self.method.proxy == "labelled" else "whose labels it does not use"
            raise InputError(
                f"{self.method.name} needs proxy data, {labels}; give --proxy=held_out, or another (--help)"
            )
        if self.proxy is not None and self.proxy_per_round > self.proxy_size:
            raise InputError(
                f"--proxy_per_round={self.proxy_per_round}, but --proxy_size={self.proxy_size}; give at most as many"
            )
        if self.models is not None:
            self._check_models(self.models)
        check_participation(self)
        check_privacy(self)
        check_stopping(self)
        check_unused(self)
        return dataclasses.replace(self, hparams=tuple(sorted(whole.items())), options=tuple(sorted(options.items())))

    def _resolved(self) -> "Settings":
        """The same with plain values: for scalars of arrays, for paths, for a user's own files and values."""
        given = {name: plain(getattr(self, name)) for name in FLAGS}
        own_names = {n: FLAGS[n].resolve(v) for n, v in given.items() if v is not None and FLAGS[n].resolve}  # pyright: ignore
        both = {name: pairs(name, getattr(self, name)) for name in ("hparams", "options")}
        return dataclasses.replace(self, **given | own_names | both)

    def _check_models(self, models: str) -> None:
        names = [name for name, _ in self.cohorts]
        if self.method.one_architecture and names != [self.model]:
            raise InputError(
                f"--models={models}: clients of {self.method.name} have no model of their own, only "
                f"--model={self.model}; leave --models out"
            )

    def public(self) -> dict[str, Any]:
        """As a flat dict for results and checkpoints: hyperparameters and options beside the other settings."""
        values = {name: getattr(self, name) for name in FLAGS}
        own_names = {name: own.recorded(v) for name, v in values.items() if v is not None and FLAGS[name].resolve}
        return values | own_names | dict(self.options) | dict(self.hparams)


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
        name, _, size = part.rpartition(":")
        if not name or not size.isdecimal() or int(size) < 1:
            raise InputError(f"--models={models}: {part!r} is not of the form name:clients, e.g. cnn1:3")
        cohorts.append((name.strip(), int(size)))
    return tuple(cohorts)


def make(hparams: Mapping[str, Any] | None = None, options: Mapping[str, Any] | None = None, **named: Any) -> Settings:
    """Checked `Settings` from keywords: names of settings, and of hyperparameters and options of the method.

    The latter two may also be given as dicts. Raises InputError for a name that nothing has and for bad values.
    """
    fields: dict[str, Any] = {}
    hparams, options = (dict(pairs(name, g)) for name, g in (("hparams", hparams), ("options", options)))
    algorithm = methods.resolve(named.get("algorithm", Settings.algorithm), SETTINGS)
    named, its = named | {"algorithm": algorithm}, methods.of(algorithm)
    for name, value in named.items():
        if name in FLAGS:
            fields[name] = value
        elif name in its.options or (name in _names_of_options() and name not in its.hparams):
            options[name] = str(value)
        elif name in _names_of_hparams():
            hparams[name] = value
        else:
            near = difflib.get_close_matches(name, [*FLAGS, *_names_of_options(), *_names_of_hparams()], n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise InputError(f"unknown setting {name!r}{hint}; python -m fdjax --help lists them all")
    return Settings(**fields, hparams=tuple(hparams.items()), options=tuple(options.items())).check()


def described(named: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the names of settings, as JSON has them: a user's own method or net by its name, files as given."""
    own_values = {n: v for n, v in named.items() if n in SETTINGS and SETTINGS[n].resolve and not isinstance(v, str)}
    return dict(named) | {n: SETTINGS[n].resolve(v) for n, v in own_values.items() if v is not None}  # pyright: ignore


def contents(named: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """Of pairs of a setting and a value: for each value that names files of a user's own, what settings hold for it."""
    texts = [(name, value) for name, value in named if name in SETTINGS and isinstance(value, str)]
    found = {value: SETTINGS[n].resolve(value) for n, value in texts if SETTINGS[n].resolve}  # pyright: ignore
    return {given: own.recorded(held) for given, held in sorted(found.items()) if held != given and own.is_own(held)}


def _names_of_hparams() -> set[str]:
    return {name for method in methods.known().values() for name in method.hparams}


def _names_of_options() -> set[str]:
    return {name for method in methods.known().values() for name in method.options}


def define_flags(skip: Collection[str] = (), **defaults: Any) -> None:
    """Define a flag for each setting and for each hyperparameter and option of any method, but for those in `skip`.

    Methods are ours and those of the files that --algorithm names on the command line. If one of these is no method,
    the program ends here with the reason.
    """
    try:
        theirs = methods.on_command_line(sys.argv, SETTINGS)
    except InputError as error:
        end(error)
    every = [*ALGORITHMS.values(), *theirs.values()]
    define = {
        str: flags.DEFINE_string,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        bool: flags.DEFINE_boolean,
    }
    for field in dataclasses.fields(Settings):
        if field.name in FLAGS and field.name not in skip:
            setting = FLAGS[field.name]
            more = theirs if field.name == "algorithm" else {}
            text = "; ".join([setting.flag_help(), *(f"{methods.title(n)}: {m.summary}" for n, m in more.items())])
            define[setting.kind](field.name, defaults.get(field.name, field.default), text)
    choices = _by_name((m.options.items(), m.name) for m in every)
    for name, users in choices.items():
        if name not in skip:
            text = "; ".join(f"{' and '.join(methods)} ({', '.join(allowed)})" for allowed, methods in users.items())
            flags.DEFINE_string(name, defaults.get(name), f"choice of {text}; the first is the default")
    hparams = _by_name((m.hparams.items(), m.name) for m in every)
    for name, users in hparams.items():
        if name not in skip:
            text = "; ".join(
                f"{', '.join(methods)} (default {record.default}){f': {record.described()}' if record.help else ''}"
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
    made = make(**{name: value for name, value in given.items() if value is not None or name in FLAGS})
    check_unused(made, [name for name in names if flags.FLAGS[name].present and name not in overrides])
    return made
