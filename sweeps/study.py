"""A study: which question is asked of which settings. A study file holds one, named STUDY."""

import hashlib
import importlib.util
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution

import fdjax
from fdjax.errors import InputError, unknown
from fdjax.run import metrics, settings
from fdjax.run.settings import Settings

SEARCHES = ("grid", "random", "tpe")


class Study(NamedTuple):
    """What is asked, of what, and how it is searched.

    `fixed` and `space` name settings, options and hparams as the flags of `python -m fdjax` do. A dimension of `space`
    is a sequence of values, or for random and TPE searches one of Optuna's distributions.
    """

    name: str
    paper: str  # whose method or claim
    question: str
    runtime: str  # of the whole study, and where
    fixed: Mapping[str, Any]
    space: Mapping[str, Sequence[Any] | BaseDistribution]
    objective: str = "central_accuracy"  # of the last evaluation
    direction: str = "maximize"
    search: str = "grid"
    trials: int = 0  # of random and TPE searches
    batch: int = 0  # trials asked for at once; 0: all that are left, for TPE 8
    pruner: optuna.pruners.BasePruner | None = None
    seeds: tuple[str, ...] = ("seed", "partition_seed")  # what the report takes the mean and std over
    smoke: Mapping[str, Any] = MappingProxyType({})  # fields in place of these, for a run of seconds

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """The space in Optuna's words."""
        return {
            name: d if isinstance(d, BaseDistribution) else CategoricalDistribution(tuple(d))
            for name, d in self.space.items()
        }

    @property
    def total(self) -> int:
        """Trials of the whole study."""
        return math.prod(len(values) for values in self._values()) if self.search == "grid" else self.trials

    def _values(self) -> list[Sequence[Any]]:
        return [d.choices for d in self.distributions.values() if isinstance(d, CategoricalDistribution)]

    def point(self, number: int) -> dict[str, Any]:
        """Params of trial `number` of a grid or random search: the same whoever asks, and whenever."""
        if self.search == "grid":
            return dict(zip(self.space, next(itertools.islice(itertools.product(*self._values()), number, None))))
        return {name: self._drawn(name, number) for name in self.space}

    def _drawn(self, name: str, number: int) -> Any:
        seed = int.from_bytes(hashlib.sha256(f"{self.name} {name} {number}".encode()).digest()[:4])
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
        return study.ask({name: self.distributions[name]}).params[name]

    def settings(self, params: Mapping[str, Any]) -> Settings:
        """What a trial runs. Raises InputError as `Settings.check` does, and for a name that nothing has."""
        try:
            return settings.make(**{**self.fixed, **params})
        except TypeError as error:
            raise InputError(f"study {self.name}: {error}; give values of the types that the flags have") from None

    def files(self) -> dict[str, str]:
        """For each user's file that the study names, what settings hold for it, which has a digest of its content."""
        searched = [(n, v) for n, d in self.distributions.items() for v in getattr(d, "choices", ())]
        return settings.contents([*self.fixed.items(), *searched])

    def smaller(self) -> "Study":
        """The smoke variant, a study of its own."""
        smoke = dict(self.smoke)
        fixed = {**self.fixed, **smoke.pop("fixed", {})}
        return self._replace(name=f"{self.name}_smoke", fixed=fixed, **smoke)

    def check(self) -> "Study":
        """Self. Raises InputError for what cannot be searched or run."""
        if self.search not in SEARCHES:
            raise unknown("search", self.search, SEARCHES)
        if self.direction not in ("maximize", "minimize"):
            raise unknown("direction", self.direction, ("maximize", "minimize"))
        for name, values in self.space.items():
            if self.search == "grid" and isinstance(values, BaseDistribution):
                raise InputError(f"study {self.name}: a grid needs values of {name}, not a distribution; list them")
            if not isinstance(values, BaseDistribution | list | tuple | range):
                raise InputError(f"study {self.name}: {name}={values!r} is no list of values; give ({values!r},)")
            if not isinstance(values, BaseDistribution):
                if not len(values):
                    raise InputError(f"study {self.name}: {name} has no values; give one at least")
                if bad := [v for v in values if not isinstance(v, str | int | float | None)]:
                    raise InputError(f"study {self.name}: {name} has {bad[0]!r} among its values; give plain ones")
            if name in self.fixed:
                raise InputError(f"study {self.name}: {name} is both fixed and searched; leave one of them out")
        if self.total < 1:
            raise InputError(f"study {self.name}: a {self.search} search of {self.trials} trials; give trials=...")
        if self.search == "grid":
            points = [self.point(number) for number in range(self.total)]
        else:
            ends = {name: _ends(distribution) for name, distribution in self.distributions.items()}
            first = {name: values[0] for name, values in ends.items()}
            points = [first | {name: value} for name, values in ends.items() for value in values]
        for point in points:
            self._check_direction(self.settings(point))
        return self

    def _check_direction(self, settings: Settings) -> None:
        """Raises InputError for a direction in which the objective gets worse."""
        right = {"higher": "maximize", "lower": "minimize"}.get(metrics.better(self.objective, settings.metrics))
        if right not in (None, self.direction):
            raise InputError(
                f"study {self.name}: direction={self.direction!r} of {self.objective}, which is better when it is "
                f"{'larger' if right == 'maximize' else 'smaller'}; give direction={right!r}"
            )

    def description(self) -> dict[str, Any]:
        """What makes it this study, as plain JSON values."""
        space = {n: json.loads(optuna.distributions.distribution_to_json(d)) for n, d in self.distributions.items()}
        return {
            "fixed": settings.described(self.fixed), "space": space, "objective": self.objective,
            "direction": self.direction, "search": self.search, "pruner": _described(self.pruner),
        }  # fmt: skip


def _described(pruner: Any) -> Any:
    """A pruner by its name and fields, among which may be another."""
    if isinstance(pruner, optuna.pruners.BasePruner):
        return {"pruner": type(pruner).__name__} | {name: _described(v) for name, v in vars(pruner).items()}
    return repr(pruner)


def _ends(distribution: BaseDistribution) -> tuple[Any, ...]:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    return getattr(distribution, "low"), getattr(distribution, "high")  # noqa: B009


def shipped() -> dict[str, Path]:
    """The files of our own studies, by their names."""
    return {file.stem: file for file in sorted(Path(__file__).parent.glob("*.py")) if "\nSTUDY = " in file.read_text()}


def load(path: str) -> Study:
    """The study of a file, or one of ours by its name. Raises InputError if there is none."""
    ours, file = shipped(), Path(path).expanduser()
    file = ours.get(path, file)
    if not file.is_file():
        raise InputError(f"--study={path}: no such file; a study file defines STUDY. Ours, by name: {', '.join(ours)}")
    spec = importlib.util.spec_from_file_location(f"study_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    study = getattr(module, "STUDY", None)
    if not isinstance(study, Study):
        raise InputError(f"--study={path} defines no STUDY; it must be a sweeps.study.Study")
    return study


def fingerprint_of_code() -> str:
    """A hash of fdjax's sources: trials of other code would not be of one study."""
    folder = Path(fdjax.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()[:12]
