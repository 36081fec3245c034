"""From settings to how a method trains: its trainings, and what of the params and optimisers stays where."""

from collections.abc import Callable, Mapping

import jax
import numpy as np

from fdjax.client.optimizers import with_kept_optimizers
from fdjax.client.trained import Paths, check_patterns, is_statistic, path_of, paths
from fdjax.contract import Algorithm
from fdjax.errors import InputError
from fdjax.exchange.parts import exchanging
from fdjax.exchange.privacy import locally_private, private
from fdjax.method import Task, Training
from fdjax.run.accounting import Ledger, noise_of, own_releases
from fdjax.run.optimizers import STAGES, build_optimizer, optimizer_of, plateau
from fdjax.run.settings import Settings
from fdjax.types import Model


def trainings(settings: Settings, augment: Callable | None) -> tuple[Training, Training, Training]:
    """The trainings on a client's own examples, on proxy data, and of the server on what clients upload.

    Those of equal optimisers have one name, and so share an optimiser's state where it is kept.
    """
    chosen = [optimizer_of(settings, stage) for stage in STAGES]
    sizes = settings.batch_size, settings.distill_batch_size or settings.batch_size, settings.batch_size
    first, on_proxy, at_server = (
        Training(
            batch_size=size,
            optimizer=build_optimizer(optimizer, settings.rounds),
            augment=None if stage else augment,
            label_smoothing=settings.label_smoothing,
            drop_last=settings.drop_last,
            trained=paths(settings.trained) if settings.trained else None,
            private=settings.privacy == "example" and not stage,
            name=(STAGES[chosen.index(optimizer)] or "client_").removesuffix("_"),
            distils=bool(stage),
        )
        for stage, optimizer, size in zip(STAGES, chosen, sizes, strict=True)
    )
    return first, on_proxy, at_server


def hparams_of(settings: Settings, ledger: Ledger | None) -> dict[str, np.ndarray]:
    """The hyperparameters of the method, and of privacy if there is a ledger of it, as a compiled round takes them."""
    hparams = settings.method.resolve(dict(settings.hparams))
    if ledger is None:
        return hparams
    clip = np.inf if settings.clip is None else settings.clip
    noise = noise_of(settings, ledger)
    more = {"clip": clip, "noise_multiplier": noise}
    if ledger.level == "means":
        more["count_noise_multiplier"] = ledger.counts_noise(noise)
    return hparams | {name: np.asarray(value, np.float32) for name, value in more.items()}


def hparams_now(
    settings: Settings, ledger: Ledger | None, evaluations: Mapping[str, list[float]]
) -> dict[str, np.ndarray]:
    """The hyperparameters of the next round with the schedule "plateau", after these evaluations."""
    hparams = hparams_of(settings, ledger)
    scale = plateau(evaluations.get("validation_loss", []), settings.decay, settings.decay_every)
    rates = {name for name, record in settings.method.hparams.items() if record.learning_rate}
    return {name: np.float32(scale) * value if name in rates else value for name, value in hparams.items()}


def method_of(settings: Settings, task: Task, participants: float, may_train: int) -> Algorithm:
    """The method for a task, with the params and the optimisers' states that are to stay where they are, and private.

    `participants` of the `may_train` clients that train are expected in a round.

    Raises InputError for patterns that mean nothing, and for a method whose exchanges they, or privacy, do not fit.
    """
    for flag in ("trained", "exchanged"):
        for model in {*task.models, task.model} if getattr(settings, flag) else ():
            check_patterns(flag, getattr(settings, flag), jax.eval_shape(model.init, jax.random.key(0)))
    algorithm = settings.method.algorithm(task)
    if settings.privacy == "example" and any(_has_statistics(model) for model in task.models):
        raise InputError("--privacy=example: statistics of BatchNorm are of all examples of a batch; give --norm=group")
    exchanged = _exchanged(settings, task)
    if exchanged is not None:
        algorithm = exchanging(algorithm, task.model, exchanged, task.training.trained)
    default = "kept" if settings.method.keeps_optimizer else "fresh"
    if (settings.optimizer_state or default) == "kept":
        algorithm = with_kept_optimizers(algorithm, task)
    own = [release.what for release in own_releases(algorithm)]
    if own and settings.privacy in ("client", "local"):
        raise InputError(
            f"--privacy={settings.privacy}: {settings.method.name} makes its {own[0]} private by itself, against "
            "another neighbour, and the two do not add up; leave it out"
        )
    if settings.privacy == "client":
        algorithm = algorithm._replace(
            round=tuple(private(exchange, participants) for exchange in algorithm.round),
            setup=tuple(private(exchange, may_train) for exchange in algorithm.setup),
        )
    if settings.privacy == "local":
        both = (tuple(map(locally_private, exchanges)) for exchanges in (algorithm.round, algorithm.setup))
        algorithm = algorithm._replace(**dict(zip(("round", "setup"), both, strict=True)))
    return algorithm


def _exchanged(settings: Settings, task: Task) -> Paths | None:
    """Which params are exchanged; None for all that the method exchanges."""
    by_pattern = paths(settings.exchanged) if settings.exchanged else None
    if by_pattern and not settings.method.averages:
        raise InputError(
            f"--exchanged={settings.exchanged}: {settings.method.name} does not average the params of one model, so no "
            "part of them can stay; use fedavg or fedprox"
        )
    if settings.norm_statistics == "averaged":
        return by_pattern
    if not any(_has_statistics(model) for model in task.models):
        raise InputError(f"--norm_statistics=local: {task.model.name} has none; give --norm=batch")
    if settings.method.averages:
        return lambda path: not is_statistic(path) and (by_pattern is None or by_pattern(path))
    if not settings.method.keeps_models:
        raise InputError(
            f"--norm_statistics=local: {settings.method.name} averages params and statistics; use averaged"
        )
    return None  # their models, statistics too, stay with them anyway


def _has_statistics(model: Model) -> bool:
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return any(is_statistic(path_of(keys)) for keys, _ in jax.tree.leaves_with_path(shapes))
