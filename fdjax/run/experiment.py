"""From settings to a simulation that is ready to run: load, partition, bind."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from fdjax import data, models
from fdjax.algorithms import ALGORITHMS
from fdjax.client.augment import AUGMENTATIONS
from fdjax.client.local import Task, Training
from fdjax.data.federation import federate, replicated
from fdjax.data.holdings import from_counts
from fdjax.engine import hosts, plan, simulate
from fdjax.engine.layout import Layout
from fdjax.errors import InputError
from fdjax.models.split import Split, build_split
from fdjax.run.settings import Settings
from fdjax.types import Algorithm, Cohort, Federation, Holdings, HParams, Model, Source

# What a compiled round does not depend on: runs that differ only here share their compilations.
_NOT_COMPILED = (
    "seed", "partition_seed", "hparams", "eval_every", "dataset", "data_dir", "cache_dir", "writers", "standardize",
    "train_fraction", "validation_fraction",
    "partition", "alpha", "beta", "iid", "samples_per_client", "shards_per_client", "labels_per_client", "min_size",
    "scarce_labels", "scarce_size", "merge", "lifting", "chunk", "devices", "memory_limit", "proxy", "proxy_size",
)  # fmt: skip
_PARTITIONING = (
    "alpha", "beta", "shards_per_client", "labels_per_client", "min_size", "scarce_labels", "scarce_size", "merge",
)  # fmt: skip
# Of these, what makes other data, which a batch of trials may differ in.
DATA = frozenset(_NOT_COMPILED[: _NOT_COMPILED.index("lifting")]) - {"hparams", "eval_every"} | {"proxy", "proxy_size"}
_DEFAULTS: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(Settings) if f.name in _NOT_COMPILED}


class Experiment(NamedTuple):
    """Settings made real."""

    settings: Settings
    source: Source
    holdings: Holdings
    federation: Federation
    algorithm: Algorithm
    simulation: simulate.Simulation
    hparams: HParams
    layout: Layout
    plan: plan.Plan
    rechunked: Callable[[int], "Experiment"]  # the same, lifted in other chunks
    signature: tuple[Any, ...]  # what is static about it: experiments of one signature can share a simulation
    shapes: "_Shapes"


def load(settings: Settings) -> tuple[Source, Holdings, data.Proxy | None]:
    """The data set, who holds what of it, and the proxy data."""
    seed = settings.data_seed
    options = {name: getattr(settings, name) for name in _PARTITIONING if getattr(settings, name) is not None}
    clients = settings.num_clients
    source_options: dict[str, Any] = {"writers": settings.writers} if settings.writers else {}
    for name in ("iid", "samples_per_client"):
        if getattr(settings, name) is not None:
            source_options[name] = getattr(settings, name)
    if settings.partition_name == "scarce" and "samples_per_client" in source_options:
        options["samples_per_client"] = source_options.pop("samples_per_client")
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
    proxy = None
    if settings.proxy is not None:
        folders = {"data_dir": settings.data_dir, "cache_dir": settings.cache_dir}
        source, proxy = data.take_proxy(source, settings.proxy, settings.proxy_size, seed, **folders)
        entry = ALGORITHMS[settings.algorithm]
        if (entry.proxy == "labelled" or entry.labels_for in settings.options) and not proxy.labelled:
            name, value = entry.labels_for or ("", "")
            what = settings.algorithm if entry.proxy == "labelled" else f"{settings.algorithm} with --{name}={value}"
            raise InputError(
                f"{what} needs labelled proxy data, but --proxy={settings.proxy} has none of the {source.num_classes} "
                "labels; give --proxy=held_out, or a data set of the same classes"
            )
    source = data.take_validation(source, settings.validation_fraction, seed)
    name = settings.partition_name
    if clients is None and name not in ("writer", "natural"):
        clients = 30 if settings.dataset == "synthetic" else 10
    if settings.dataset == "synthetic" and name == "natural":
        clients = None
    holdings = data.partition(
        name, source.train_y, clients, seed, owner=source.train_owner, num_classes=source.num_classes, **options
    )
    if ALGORITHMS[settings.algorithm].pooled:
        holdings = from_counts(np.asarray(holdings.order), np.asarray(holdings.count).sum(keepdims=True))
    return source, holdings, proxy


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
    cohorts = cohorts_of(settings.models)
    total = sum(size for _, size in cohorts)
    if total != clients:
        raise InputError(f"--models={settings.models} names {total} clients, but the partition has {clients}")
    return cohorts


def cohorts_of(models: str) -> tuple[tuple[str, int], ...]:
    """(model, clients) of each cohort of --models. Raises InputError for what is not of its form."""
    cohorts = []
    for part in models.split(","):
        name, _, size = part.partition(":")
        if not size.isdecimal() or int(size) < 1:
            raise InputError(f"--models={models}: {part!r} is not of the form name:clients, e.g. cnn1:3")
        cohorts.append((name.strip(), int(size)))
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


def build(settings: Settings, held: Callable[[Holdings], Holdings] | None = None) -> Experiment:
    """Everything a run needs. Runs of one architecture and shapes share one simulation, and so its compilations.

    `held` makes other holdings of the partition's, such as everybody's for everybody.
    """
    with hosts.all_or_none():
        source, holdings, proxy = load(settings)
    if held is not None:
        holdings = held(holdings)
    cohorts = cohort_sizes(settings, len(holdings.count))
    largest = int(holdings.count.max())
    batch_size = min(settings.batch_size or largest, largest)
    if largest == 0:
        raise InputError("no client holds a single training example; use another partition or more data")
    rounds = settings.rounds if settings.schedule == "cosine" else 1
    static = dataclasses.replace(settings, **_DEFAULTS | {"batch_size": batch_size, "rounds": rounds})
    test = data.own_test_part(
        source.train_y, holdings, source.test_y, source.num_classes, settings.data_seed,
        train_owner=source.train_owner, test_owner=source.test_owner,
    )  # fmt: skip
    shapes = _Shapes(
        cohorts=cohorts,
        inputs=source.train_x.shape[1:],
        classes=source.num_classes,
        own_batch=min(_power_of_two(int(test.count.max())), settings.eval_batch),
        largest=_power_of_two(largest),
        proxy=0 if proxy is None else len(proxy.y),
    )
    used = _models(static, shapes)
    participants = _participants(settings, cohorts)
    steps = np.split(-(-holdings.count // batch_size), np.cumsum([size for _, size in cohorts])[:-1])
    chosen = plan.choose(
        settings.lifting,
        settings.chunk,
        settings.devices,
        [used.central, *used.clients],
        participants,
        steps,
        ordered=settings.ordered_sums,
    )
    algorithm, simulation, layout = _simulation(static, shapes, chosen.kind, chosen.mesh, chosen.chunk, chosen.narrow)
    sizes = tuple(size for _, size in cohorts)
    federation = federate(source, holdings, test, sizes, chosen.mesh, None if proxy is None else (proxy.x, proxy.y))
    hparams = simulate.resolve_hparams(algorithm, dict(settings.hparams))
    hparams = jax.device_put(hparams, replicated(chosen.mesh))

    def rechunked(chunk: int) -> Experiment:
        narrow = plan.narrower(steps, participants, chunk, chosen.mesh) if chosen.narrow else ()
        _, simulation, layout = _simulation(static, shapes, chosen.kind, chosen.mesh, chunk, narrow)
        return made._replace(simulation=simulation, layout=layout)

    own = shapes._replace(largest=0, own_batch=0)
    arrays = tuple(leaf.shape for leaf in jax.tree.leaves(federation))
    signature = static, own, arrays, settings.rounds, settings.eval_every, chosen.chunk
    made = Experiment(
        settings, source, holdings, federation, algorithm, simulation, hparams, layout, chosen, rechunked, signature,
        shapes,
    )  # fmt: skip
    return made


def common(like: Sequence[Experiment]) -> Experiment:
    """The first of experiments of one signature, with a simulation that can run all of them."""
    first = like[0]
    largest, own_batch = (max(getattr(e.shapes, name) for e in like) for name in ("largest", "own_batch"))
    shapes, layout = first.shapes._replace(largest=largest, own_batch=own_batch), first.layout
    static, *_ = first.signature
    algorithm, simulation, layout = _simulation(static, shapes, layout.kind, layout.mesh, layout.chunk, layout.narrow)
    return first._replace(algorithm=algorithm, simulation=simulation, layout=layout, shapes=shapes)


class _Shapes(NamedTuple):
    """What of the data a compiled round depends on."""

    cohorts: tuple[tuple[str, int], ...]
    inputs: tuple[int, ...]
    classes: int
    own_batch: int
    largest: int
    proxy: int


def _power_of_two(size: int) -> int:
    """Rounded up, so that like partitions share compilations."""
    return 1 << int(size - 1).bit_length()


def _participants(settings: Settings, cohorts: tuple[tuple[str, int], ...]) -> tuple[int, ...]:
    return tuple(max(1, round(settings.participation * size)) for _, size in cohorts)


class _Models(NamedTuple):
    """Built: the central model, the clients' cohort by cohort, and these in two parts if the method needs it."""

    central: Model
    clients: tuple[Model, ...]
    splits: tuple[Split, ...] = ()


@functools.lru_cache(maxsize=8)
def _models(settings: Settings, shapes: _Shapes) -> _Models:
    names = [name for name, _ in shapes.cohorts]
    options = {
        name: {"padding": settings.padding} if settings.padding and name in ("cnn1", "cnn2") else {}
        for name in (settings.model, *names)
    }
    if ALGORITHMS[settings.algorithm].split:
        if settings.models is None:
            raise InputError(
                f"--model of {settings.algorithm} is the server's, on features; name the clients' too, e.g. "
                f"--models=gkt_edge:{shapes.cohorts[0][1]}"
            )
        parts = {name: build_split(name, shapes.inputs, shapes.classes, **options[name]) for name in {*names}}
        inputs = parts[names[0]].feature_shape
        central = models.build(settings.model, inputs, shapes.classes, **options[settings.model])
        return _Models(central, tuple(parts[name].model for name in names), tuple(parts[name] for name in names))
    built = {name: models.build(name, shapes.inputs, shapes.classes, **given) for name, given in options.items()}
    return _Models(built[settings.model], tuple(built[name] for name in names))


@functools.lru_cache(maxsize=8)
def _simulation(
    settings: Settings, shapes: _Shapes, kind: str, mesh: Mesh, chunk: int, narrow: tuple[tuple[float, int], ...]
):
    built = _models(settings, shapes)
    augment = AUGMENTATIONS[settings.augment]
    if augment is not None and len(shapes.inputs) != 3:
        raise InputError(f"--augment={settings.augment} needs images, but examples have shape {shapes.inputs}")
    training = Training(settings.batch_size, optimizer_of(settings), augment)
    cohorts = tuple(Cohort(model, size) for model, (_, size) in zip(built.clients, shapes.cohorts, strict=True))
    entry = ALGORITHMS[settings.algorithm]
    algorithm = entry.build(
        Task(
            model=built.central,
            models=built.clients,
            splits=built.splits,
            training=training,
            distilling=training._replace(batch_size=settings.distill_batch_size or settings.batch_size, augment=None),
            clients=sum(cohort.size for cohort in cohorts),
            classes=shapes.classes,
            largest=shapes.largest,
            proxy_size=shapes.proxy,
            proxy_per_round=min(settings.proxy_per_round or shapes.proxy, shapes.proxy),
            options={name: allowed[0] for name, allowed in entry.options.items()} | dict(settings.options),
        )
    )
    own = {name for name, _ in shapes.cohorts} - {settings.model}
    if algorithm.personal is None and algorithm.cohorts == 1 and own:
        raise InputError(
            f"--models={settings.models}: clients of {settings.algorithm} have no model of their own, only "
            f"--model={settings.model}; leave --models out"
        )
    layout = Layout(
        cohorts=cohorts,
        participants=_participants(settings, shapes.cohorts),
        mesh=mesh,
        chunk=chunk,
        narrow=narrow,
        eval_batch=settings.eval_batch,
        own_batch=shapes.own_batch,
        full_eval=settings.local_eval == "full",
        kind=kind,
        ordered_sums=settings.ordered_sums,
        drop_nonfinite=settings.drop_nonfinite,
    )
    return algorithm, simulate.simulation(algorithm, layout), layout
