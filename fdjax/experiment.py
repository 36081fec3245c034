"""From settings to a simulation that is ready to run: load, partition, bind."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from fdjax import data, lift, models, simulate
from fdjax.algorithms import ALGORITHMS
from fdjax.augment import AUGMENTATIONS
from fdjax.errors import InputError
from fdjax.federation import federate
from fdjax.local import Training
from fdjax.settings import Settings
from fdjax.types import Cohort, Federation, Holdings, HParams, Source

_CACHE_BYTES = 1 << 21  # that a chunk may keep hot on a CPU core
_COPIES = 4  # of each client's parameters: received, trained, gradient, update
_WIDEST = 256


# What a compiled round does not depend on: runs that differ only here share their compilations.
_NOT_COMPILED = (
    "seed", "partition_seed", "hparams", "eval_every", "dataset", "data_dir", "cache_dir", "writers", "standardize",
    "train_fraction",
    "partition", "alpha", "beta", "iid", "samples_per_client", "shards_per_client", "labels_per_client", "min_size",
    "merge",
)  # fmt: skip
_DEFAULTS: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(Settings) if f.name in _NOT_COMPILED}


class Experiment(NamedTuple):
    """Settings made real."""

    settings: Settings
    source: Source
    holdings: Holdings
    federation: Federation
    simulation: simulate.Simulation
    hparams: HParams
    layout: simulate.Layout


def load(settings: Settings) -> tuple[Source, Holdings]:
    """The data set and who holds what of it."""
    seed = settings.data_seed
    options = {
        name: getattr(settings, name)
        for name in ("alpha", "beta", "shards_per_client", "labels_per_client", "min_size", "merge")
        if getattr(settings, name) is not None
    }
    clients = settings.num_clients
    source_options: dict[str, Any] = {"writers": settings.writers} if settings.writers else {}
    for name in ("iid", "samples_per_client"):
        if getattr(settings, name) is not None:
            source_options[name] = getattr(settings, name)
    if settings.dataset == "synthetic":
        if settings.partition_name.startswith(("dirichlet", "quantity")):
            raise InputError(
                f"--partition={settings.partition_name} of synthetic: --alpha and --beta would be both the data's and "
                "the partition's; use natural or iid"
            )
        source_options |= {name: options.pop(name) for name in ("alpha", "beta") if name in options} | {"seed": seed}
        if clients is not None:
            source_options["num_clients"] = clients
    source = data.load(settings.dataset, data_dir=settings.data_dir, cache_dir=settings.cache_dir, **source_options)
    if not settings.standardize:
        source = source._replace(mean=(0.0,), std=(1.0,))
    source = _fraction(source, settings.train_fraction, seed)
    name = settings.partition_name
    if clients is None and name not in ("writer", "natural"):
        clients = 30 if settings.dataset == "synthetic" else 10
    if settings.dataset == "synthetic" and name == "natural":
        clients = None
    return source, data.partition(
        name, source.train_y, clients, seed, owner=source.train_owner, num_classes=source.num_classes, **options
    )


def _fraction(source: Source, fraction: float, seed: int) -> Source:
    if fraction == 1:
        return source
    size = len(source.train_y)
    keep = np.sort(np.random.default_rng(seed).choice(size, max(1, round(fraction * size)), replace=False))
    owner = None if source.train_owner is None else source.train_owner[keep]
    return source._replace(train_x=source.train_x[keep], train_y=source.train_y[keep], train_owner=owner)


def cohort_sizes(settings: Settings, clients: int) -> tuple[tuple[str, int], ...]:
    """(model, clients) of each cohort, in order. Raises InputError unless they add up."""
    if settings.models is None:
        return ((settings.model, clients),)
    cohorts = []
    for part in settings.models.split(","):
        name, _, size = part.partition(":")
        if not size.isdigit() or int(size) < 1:
            raise InputError(f"--models={settings.models}: {part!r} is not of the form name:clients, e.g. cnn1:3")
        cohorts.append((name.strip(), int(size)))
    total = sum(size for _, size in cohorts)
    if total != clients:
        raise InputError(f"--models={settings.models} names {total} clients, but the partition has {clients}")
    return tuple(cohorts)


def optimizer_of(settings: Settings) -> Callable[[HParams], optax.GradientTransformation]:
    """The clients' optimiser as a function of the traced hparams, among them the round."""

    def scale(round):
        if settings.schedule == "exponential":
            return optax.exponential_decay(1.0, 1, settings.decay)(round)
        if settings.schedule == "cosine":
            return optax.cosine_decay_schedule(1.0, settings.rounds)(round)
        return 1.0

    def build(hparams):
        learning_rate = hparams["learning_rate"] * scale(hparams["round"])
        if settings.optimizer == "adamw":
            return optax.adamw(learning_rate, weight_decay=settings.weight_decay)
        step = optax.adam(learning_rate) if settings.optimizer == "adam" else optax.sgd(
            learning_rate, settings.momentum or None
        )  # fmt: skip
        return optax.chain(optax.add_decayed_weights(settings.weight_decay), step) if settings.weight_decay else step

    return build


def build(settings: Settings) -> Experiment:
    """Everything a run needs. Runs of one architecture and shapes share one simulation, and so its compilations."""
    source, holdings = load(settings)
    clients = len(holdings.count)
    cohorts = cohort_sizes(settings, clients)
    available = jax.devices()
    if settings.devices > len(available):
        raise InputError(f"--devices={settings.devices}, but there are {len(available)}; give at most as many")
    mesh = lift.make_mesh(available[: settings.devices or None])
    input_shape = source.train_x.shape[1:]
    largest = int(holdings.count.max())
    batch_size = min(settings.batch_size or largest, largest)
    rounds = settings.rounds if settings.schedule == "cosine" else 1
    static = dataclasses.replace(settings, **_DEFAULTS | {"batch_size": batch_size, "rounds": rounds})
    test = data.own_test_part(
        source.train_y, holdings, source.test_y, source.num_classes, settings.data_seed,
        train_owner=source.train_owner, test_owner=source.test_owner,
    )  # fmt: skip
    own_batch = 1 << int(test.count.max() - 1).bit_length()  # rounded up, so that like partitions share compilations
    algorithm, simulation, layout = _simulation(
        static, cohorts, input_shape, source.num_classes, min(own_batch, settings.eval_batch), mesh
    )
    federation = federate(source, holdings, test, tuple(size for _, size in cohorts), mesh)
    hparams = simulate.resolve_hparams(algorithm, dict(settings.hparams))
    return Experiment(settings, source, holdings, federation, simulation, hparams, layout)


@functools.lru_cache(maxsize=8)
def _simulation(
    settings: Settings,
    cohorts: tuple[tuple[str, int], ...],
    input_shape: tuple[int, ...],
    classes: int,
    own_batch: int,
    mesh: Mesh,
):
    def model(name):
        options = {"padding": settings.padding} if settings.padding and name in ("cnn1", "cnn2") else {}
        return models.build(name, input_shape, classes, **options)

    built = {name: model(name) for name in {settings.model, *(name for name, _ in cohorts)}}
    augment = AUGMENTATIONS[settings.augment]
    if augment is not None and len(input_shape) != 3:
        raise InputError(f"--augment={settings.augment} needs images, but examples have shape {input_shape}")
    training = Training(settings.batch_size, optimizer_of(settings), augment)
    algorithm = ALGORITHMS[settings.algorithm].build(built[settings.model], training)
    own = {name for name, _ in cohorts} - {settings.model}
    if algorithm.personal is None and own:
        raise InputError(
            f"--models={settings.models}: clients of {settings.algorithm} have no model of their own, only "
            f"--model={settings.model}; leave --models out"
        )
    layout = simulate.Layout(
        cohorts=tuple(Cohort(built[name], size) for name, size in cohorts),
        participants=tuple(max(1, round(settings.participation * size)) for _, size in cohorts),
        mesh=mesh,
        chunk=settings.chunk or automatic_chunk(list(built.values()), mesh),
        eval_batch=settings.eval_batch,
        own_batch=own_batch,
        full_eval=settings.local_eval == "full",
    )
    return algorithm, simulate.simulation(algorithm, layout), layout


def automatic_chunk(used: list[models.Model], mesh: Mesh) -> int:
    """Clients to vmap together: on a CPU as many as keep their parameters in cache, elsewhere many."""
    if mesh.devices.flat[0].platform != "cpu":
        return _WIDEST
    largest = max(simulate.communication.size(jax.eval_shape(model.init, jax.random.key(0))) for model in used)
    return max(1, min(_WIDEST, _CACHE_BYTES // (_COPIES * largest)))
