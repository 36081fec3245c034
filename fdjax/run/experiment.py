"""From settings to a simulation that is ready to run: load the data, plan the lifting, bind the method to both."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from fdjax import data, models, own
from fdjax.client.augment import NORMALISE, augmentation, names_of, with_normalised_inputs
from fdjax.contract import ENSEMBLE, Algorithm, HParams
from fdjax.data.federation import federate, replicated
from fdjax.engine import hosts, plan, proportion
from fdjax.engine.layout import FineTuning, Layout
from fdjax.engine.lift import Lifting
from fdjax.engine.simulation import Simulation, simulation
from fdjax.errors import InputError
from fdjax.exchange.traffic import Traffic
from fdjax.method import Task
from fdjax.models import own as nets
from fdjax.run import metrics
from fdjax.run.accounting import Ledger, ledger_of
from fdjax.run.loading import cohort_sizes, load
from fdjax.run.participants import participants, policy_of
from fdjax.run.settings import Settings
from fdjax.run.training import hparams_of, method_of, trainings
from fdjax.types import Cohort, Federation, Holdings, Model, Source


class Shapes(NamedTuple):
    """What of the data a compiled round depends on."""

    cohorts: tuple[tuple[str, int], ...]  # model and clients of each
    inputs: tuple[int, ...]
    classes: int
    own_batch: int  # examples of a step of the test on a client's own part
    largest: int  # examples of the largest client, or more
    proxy: int
    participants: tuple[int, ...]  # of a round, of each cohort
    new: tuple[int, ...]  # clients of each cohort that never train
    features: models.Features = models.NUMBERS  # what inputs are

    @property
    def may_train(self) -> tuple[int, ...]:
        """Clients of each cohort that may train."""
        return tuple(
            size - new for (_, size), new in zip(self.cohorts, self.new or (0,) * len(self.cohorts), strict=True)
        )


class Signature(NamedTuple):
    """What experiments must have in common to run as trials of one batch."""

    static: Settings
    shapes: Shapes  # without the sizes that a batch takes the largest of
    arrays: tuple[tuple[int, ...], ...]  # shapes of the federation's leaves
    rounds: int
    eval_every: int
    chunk: int
    ordered: bool


class Experiment(NamedTuple):
    """A run that is ready to start: its settings, its data on the devices, and its compiled simulation."""

    settings: Settings
    source: Source
    holdings: Holdings
    federation: Federation
    algorithm: Algorithm
    simulation: Simulation
    hparams: HParams
    layout: Layout
    lifted: Callable[[Lifting], tuple[Layout, Simulation]]  # layout and simulation for another lifting
    plan: plan.Plan
    signature: Signature
    shapes: Shapes
    tests: proportion.Tests
    ledger: Ledger | None = None  # what there is to account for, if the run is private


def build(settings: Settings, change_holdings: Callable[[Holdings], Holdings] | None = None) -> Experiment:
    """Everything that a run needs. Runs of one architecture and shapes share one simulation, and so its compilations.

    `change_holdings` makes other holdings of the partition's, such as all examples for every client.
    Raises InputError for settings that cannot work with these data and devices.
    """
    with hosts.all_or_none():
        loaded = load(settings)
    source, holdings, proxy = loaded
    holdings = holdings if change_holdings is None else change_holdings(holdings)
    largest = int(np.max(holdings.count))
    if not largest:
        raise InputError("no client holds a single training example; use another partition or more data")
    own_tests = data.own_test_part(
        source.train_y, holdings, source.test_y, source.num_classes, settings.data_seed,
        train_owner=source.train_owner, test_owner=source.test_owner, only_own=settings.split_by_client is not None,
    )  # fmt: skip
    cohorts = cohort_sizes(settings, len(holdings.count))
    who = participants(settings, holdings, [size for _, size in cohorts])
    shapes = Shapes(
        cohorts=cohorts,
        inputs=source.train_x.shape[1:],
        classes=loaded.classes,
        own_batch=_own_batch(settings, own_tests),
        largest=_power_of_two(largest),
        proxy=0 if proxy is None else len(proxy.y),
        participants=who.places,
        new=who.new,
        features=models.Features(len(source.vocabulary), source.categories),
    )
    static = settings.static(largest)
    request = plan.Request(settings.lifting, settings.chunk, settings.devices, settings.ordered_sums)
    chosen = plan.choose(request, _work(static, shapes, holdings))
    bound = _bind(static, shapes)
    _check_that_something_is_tested(settings, bound.algorithm)
    layout, simulation = bound.lifted(chosen.lifting)
    mesh, sizes = chosen.lifting.mesh, tuple(size for _, size in shapes.cohorts)
    ledger = _ledger(settings, bound.algorithm, shapes, np.asarray(holdings.count)[~who.never_train])
    hparams = jax.device_put(hparams_of(settings, ledger), replicated(mesh))
    federation = federate(
        source, holdings, own_tests, sizes, mesh, None if proxy is None else (proxy.x, proxy.y),
        never_train=who.never_train, by_examples=who.policy.alike, test_seed=settings.data_seed,
    )  # fmt: skip
    ready = Experiment(
        settings=settings,
        source=source,
        holdings=holdings,
        federation=federation,
        algorithm=bound.algorithm,
        simulation=simulation,
        hparams=hparams,
        layout=layout,
        lifted=bound.lifted,
        plan=chosen,
        signature=_signature(settings, static, shapes, federation, chosen.lifting),
        shapes=shapes,
        tests=proportion.Tests(0, 0, ""),
        ledger=ledger,
    )
    return ready._replace(tests=tests_of(ready))


def _ledger(settings: Settings, algorithm: Algorithm, shapes: Shapes, held: np.ndarray) -> Ledger | None:
    return ledger_of(settings, algorithm, shapes.participants, shapes.may_train, held)


def _signature(
    settings: Settings, static: Settings, shapes: Shapes, federation: Federation, lifting: Lifting
) -> Signature:
    return Signature(
        static=static,
        shapes=shapes._replace(largest=0, own_batch=0),
        arrays=tuple(leaf.shape for leaf in jax.tree.leaves(federation)),
        rounds=settings.rounds,
        eval_every=settings.eval_every,
        chunk=lifting.chunk,
        ordered=lifting.ordered,
    )


def tests_of(experiment: Experiment) -> proportion.Tests:
    """On how many examples personal models are tested, which follows from what is trained and tested beside them."""
    settings, layout, federation = experiment.settings, experiment.layout, experiment.federation
    batch_size = experiment.signature.static.batch_size
    work = experiment.plan.work
    hparams = dict(settings.hparams)
    epochs, steps = hparams.get("local_epochs", 1), hparams.get("local_steps", 0)
    steps_of_all = sum(
        (steps or epochs * float(np.mean(each))) * size
        for each, size in zip(work.steps, work.participants, strict=True)
    )
    own = np.asarray(federation.test_holdings.count)
    central = experiment.algorithm.central not in (None, ENSEMBLE)
    examples = len(federation.test.y)
    chosen = proportion.choose(
        settings.local_eval,
        proportion.Work(
            trained=settings.eval_every * steps_of_all * batch_size,
            rounds=settings.eval_every,
            own=own if layout.own_eval else np.zeros_like(own),
            central=examples * (central and layout.central_eval) + _validated(experiment),
            examples=examples,
        ),
        layout.own_batch,
    )
    return chosen if experiment.algorithm.personal is not None else chosen._replace(between=examples, why="")


def _validated(experiment: Experiment) -> int:
    """Examples of an evaluation on the validation split, those of each client's model if there is no central one."""
    validation, clients = experiment.federation.validation, len(experiment.federation.client)
    passes = clients if experiment.algorithm.central in (None, ENSEMBLE) else 1
    return 0 if validation is None else passes * len(validation.y)


def _check_that_something_is_tested(settings: Settings, algorithm: Algorithm) -> None:
    metrics.check_tested(settings.metrics, algorithm, settings.local_eval, settings.central_eval)
    if settings.local_eval != "none" or settings.validation_fraction:
        return
    if algorithm.central is None:
        raise InputError(
            f"--local_eval=none: {algorithm.name} has no central model, so nothing would be tested; use own or auto"
        )
    if not settings.central_eval:
        raise InputError("--local_eval=none and --central_eval=false: nothing would be tested; leave one of them out")


def with_plan(experiment: Experiment, changed: plan.Plan) -> Experiment:
    """The same experiment with another lifting."""
    layout, simulation = experiment.lifted(changed.lifting)
    return experiment._replace(plan=changed, layout=layout, simulation=simulation)


def put_hparams(experiment: Experiment, hparams: HParams) -> HParams:
    """Hyperparameters on the devices of an experiment, placed as its own are."""
    return jax.device_put(hparams, replicated(experiment.layout.lifting.mesh))


def traffic_of(experiment: Experiment) -> Traffic:
    """Bytes that one participant of each cohort sends and receives."""
    return experiment.simulation.traffic(experiment.federation, experiment.hparams)


def common(experiments: Sequence[Experiment]) -> Experiment:
    """The first of experiments of one signature, with a simulation that can run all of them."""
    first = experiments[0]
    largest, own_batch = (max(getattr(e.shapes, name) for e in experiments) for name in ("largest", "own_batch"))
    shapes = first.shapes._replace(largest=largest, own_batch=own_batch)
    bound = _bind(first.signature.static, shapes)
    return with_plan(first._replace(algorithm=bound.algorithm, lifted=bound.lifted, shapes=shapes), first.plan)


def _own_batch(settings: Settings, own_tests: Holdings) -> int:
    """Examples of a step of clients' tests, which are of their own models on the test set too if they have such."""
    personal = not settings.method.one_architecture or settings.exchanged or settings.norm_statistics == "local"
    whole = settings.local_eval in ("auto", "full") and bool(personal)
    return proportion.batch_of(own_tests.count, settings.eval_batch, whole=whole)


def _power_of_two(size: int) -> int:
    """Rounded up, so that like partitions share compilations."""
    return 1 << int(size - 1).bit_length()


def _work(settings: Settings, shapes: Shapes, holdings: Holdings) -> plan.Work:
    """What a round has to do, for a plan."""
    networks = _networks(settings, shapes)
    steps_of_each = -(-np.asarray(holdings.count) // settings.batch_size)
    ends = np.cumsum([size for _, size in shapes.cohorts])[:-1]
    return plan.Work(
        models=(networks.central, *networks.clients),
        participants=shapes.participants,
        steps=tuple(np.split(steps_of_each, ends)),
    )


class _Networks(NamedTuple):
    """The models of a run."""

    central: Model
    clients: tuple[Model, ...]  # cohort by cohort


@functools.lru_cache(maxsize=8)
def _networks(settings: Settings, shapes: Shapes) -> _Networks:
    names = [name for name, _ in shapes.cohorts]
    build = functools.partial(_network, settings, classes=shapes.classes)

    def of_data(name: str) -> Model:
        model = build(name, shapes.inputs, features=shapes.features)
        return with_normalised_inputs(model) if NORMALISE in names_of(settings.augment) else model

    clients = {name: of_data(name) for name in names}
    if not settings.method.split:
        central = clients.get(settings.model) or of_data(settings.model)
        return _Networks(central, tuple(clients[name] for name in names))
    if settings.models is None:
        raise InputError(
            f"--model of {settings.method.name} is the server's, on features; name the clients' too, e.g. "
            f"--models=gkt_edge:{shapes.cohorts[0][1]}"
        )
    x = clients[names[0]].example(shapes.inputs)
    features = {
        name: jax.eval_shape(lambda x, m=m: m.parts(settings.method.name)[0](m.init(jax.random.key(0)), x), x).shape[1:]
        for name, m in clients.items()
    }
    for name, model in clients.items():
        if _has_no_params(model.blocks[0], x):
            raise InputError(
                f"model {nets.title(name)!r} extracts no features: its first block has no params, so clients would "
                f"send their inputs; use another model of the clients of {settings.method.name}"
            )
    if len({*features.values()}) > 1:
        found = ", ".join(f"{name} {shape}" for name, shape in features.items())
        raise InputError(
            f"{settings.method.name} needs clients whose features have one shape, not {found}; use one model"
        )
    return _Networks(build(settings.model, features[names[0]]), tuple(clients[name] for name in names))


def _has_no_params(block: Callable[..., jax.Array], x: jax.ShapeDtypeStruct) -> bool:
    try:
        jax.eval_shape(lambda x: block({}, x), x)
    except Exception:  # whatever a block raises that misses its params
        return False
    return True


def _network(
    settings: Settings, name: str, inputs: tuple[int, ...], classes: int, features: models.Features = models.NUMBERS
) -> Model:
    """A model of the zoo as the settings and the data want it."""
    has = frozenset() if own.is_own(name) else models.options_of(name)
    options = {"norm": settings.norm, "dropout": settings.dropout or None}
    for option, value in options.items():
        if value is not None and option not in has:
            able = ", ".join(other for other in models.MODELS if option in models.options_of(other))
            raise InputError(
                f"--{option}={value}: model {nets.title(name)!r} has no {option}; leave it out, or choose of {able}"
            )
    options = {option: v for option, v in {"padding": settings.padding, **options}.items() if v and option in has}
    model = nets.build(name, inputs, classes, features, **options)
    if settings.dtype != "float32":
        model = models.in_precision(model, settings.dtype)
    return models.with_lora(model, settings.lora_rank) if settings.lora_rank else model


def _task(settings: Settings, shapes: Shapes) -> Task:
    """What the method is built for."""
    if names_of(settings.augment) and len(shapes.inputs) != 3:
        raise InputError(f"--augment={settings.augment} needs images, but examples have shape {shapes.inputs}")
    networks = _networks(settings, shapes)
    training, distilling, serving = trainings(settings, augmentation(settings.augment))
    return Task(
        model=networks.central,
        models=networks.clients,
        sizes=tuple(size for _, size in shapes.cohorts),
        training=training,
        distilling=distilling,
        serving=serving,
        classes=shapes.classes,
        largest=shapes.largest,
        proxy_size=shapes.proxy,
        proxy_per_round=min(settings.proxy_per_round or shapes.proxy, shapes.proxy),
        options=dict(settings.options),
        inputs=shapes.inputs,
        private_means=settings.privacy == "means",
    )


class _Bound(NamedTuple):
    """A method, and its clients laid out for any lifting."""

    algorithm: Algorithm
    lifted: Callable[[Lifting], tuple[Layout, Simulation]]


@functools.lru_cache(maxsize=8)
def _bind(settings: Settings, shapes: Shapes) -> _Bound:
    """Cached, and so are the simulations: experiments whose static settings are equal share what is compiled."""
    task = _task(settings, shapes)
    clients = sum(shapes.may_train)
    expected = settings.participation * clients if settings.sampling == "poisson" else sum(shapes.participants)
    algorithm = method_of(settings, task, expected, clients)
    measures = metrics.checked_records(settings.metrics, shapes.classes)

    @functools.lru_cache(maxsize=8)
    def lifted(lifting: Lifting) -> tuple[Layout, Simulation]:
        layout = Layout(
            central=task.model,
            cohorts=tuple(Cohort(model, size) for model, size in zip(task.models, task.sizes, strict=True)),
            participants=shapes.participants,
            lifting=lifting,
            eval_batch=settings.eval_batch,
            own_batch=shapes.own_batch,
            full_eval=settings.local_eval in ("auto", "full"),
            own_eval=settings.local_eval != "none",
            central_eval=settings.central_eval,
            drop_nonfinite=settings.drop_nonfinite,
            policy=policy_of(settings),
            new=shapes.new,
            membership=settings.membership,
            metrics=measures,
            before_distillation=settings.before_distillation,
            fine_tuning=FineTuning(task.training, settings.fine_tune_epochs) if any(shapes.new) else None,
        )
        return layout, simulation(algorithm, layout)

    return _Bound(algorithm, lifted)
