"""A federation's rounds, compiled: the pure functions of `step` and `evaluate`, bound to an algorithm and jitted.

init -> setup (once, of methods that have one) -> run (a superstep) -> evaluate -> run -> evaluate ...
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from fdjax.client.trained import path_of
from fdjax.contract import ENSEMBLE, Algorithm, Exchange, HParams, Received
from fdjax.data.federation import replicated
from fdjax.engine import compiling, evaluate, rows, step
from fdjax.engine.check import Checker, check_algorithm
from fdjax.engine.layout import Layout, Report, State, classes_of
from fdjax.engine.new_clients import fine_tune
from fdjax.engine.storage import by_rows, on_host, placed
from fdjax.errors import InputError
from fdjax.exchange import traffic
from fdjax.types import Federation, PyTree


class Pure(NamedTuple):
    """The functions of one (algorithm, layout), to be lifted or jitted by whoever wants to."""

    init: Callable[[Any, Federation], State]  # (seed, federation)
    setup: Callable[[State, Federation, HParams], tuple[State, Report]] | None  # once, of all clients
    run: Callable[..., tuple[State, Report]]  # (state, federation, hparams, rounds, count=rounds): see step.superstep
    evaluate: Callable[..., tuple[dict[str, jax.Array], dict[str, jax.Array]]]
    # (state, federation, hparams, examples=all): scalars, and values of each client [C]


class Simulation(NamedTuple):
    """The same, compiled; new hparams, seeds and epochs compile nothing. `setup` and `run` donate the state."""

    init: Callable[[Any, Federation], State]
    setup: Callable[[State, Federation, HParams], tuple[State, Report]] | None
    run: Callable[..., tuple[State, Report]]  # rounds are static, `count` is not
    evaluate: Callable[..., tuple[dict[str, jax.Array], dict[str, jax.Array]]]
    fine_tune: Callable[[State, Federation, HParams], dict[str, jax.Array]] | None  # and test clients that never train
    traffic: Callable[[Federation, HParams], traffic.Traffic]
    leaf: Callable[[Federation, HParams, int, int, int], str]  # (..., cohort, exchange, NonFinite.leaf) -> its name
    shapes: Callable[[Federation], State]  # of a state, and where it lies, with nothing allocated
    fetch: Callable[[State], State]  # to the host, the clients of a cohort [C_j, ...] as in the federation
    place: Callable[[State], State]  # and back
    pure: Pure


class _Placement(NamedTuple):
    """Of each part of a `State`."""

    server: NamedSharding
    clients: NamedSharding
    round: NamedSharding
    root: NamedSharding


def simulation(algorithm: Algorithm, layout: Layout) -> Simulation:
    """Bind an algorithm to its cohorts, participants and devices.

    Raises InputError for an algorithm that cannot be run or tested so; what its functions return is checked later, when
    they are traced.
    """
    if algorithm.central is ENSEMBLE and layout.central_eval and not layout.full_eval:
        raise InputError(
            f"{algorithm.name} tests an ensemble of personal models: use --local_eval=full or auto, or "
            "--central_eval=false"
        )
    run_round = functools.partial(step.round_step, algorithm, layout)
    looping = layout.lifting.kind == "loop"
    # A round is jitted by itself, so that supersteps of other lengths use the same trace.
    traced_round = run_round if looping else jax.jit(run_round)
    pure = Pure(
        init=functools.partial(_init, algorithm, layout),
        setup=functools.partial(step.setup_step, algorithm, layout) if algorithm.setup else None,
        run=functools.partial(_loop if looping else step.superstep, traced_round),
        evaluate=functools.partial(evaluate.evaluate, algorithm, layout),
    )
    compiled = (lambda function, **options: function) if looping else jax.jit
    # Results have one placement, or the second superstep would compile anew.
    everywhere = replicated(layout.lifting.mesh)
    placement = _Placement(everywhere, by_rows(layout.lifting.mesh), everywhere, everywhere)
    state: Any = State(*placement)  # pyright: ignore[reportArgumentType]  a prefix of the tree
    tuned = functools.partial(fine_tune, algorithm, layout)
    tunes = algorithm.params_of_client and layout.fine_tuning and any(layout.new)
    return Simulation(
        init=compiled(pure.init, out_shardings=state, compiler_options=compiling.quick(layout.lifting.mesh)),
        setup=compiled(pure.setup, out_shardings=(state, everywhere), donate_argnums=0) if pure.setup else None,
        run=compiled(pure.run, out_shardings=(state, everywhere), static_argnums=3, donate_argnums=0),
        evaluate=compiled(pure.evaluate, out_shardings=everywhere),
        fine_tune=compiled(tuned, out_shardings=everywhere) if tunes else None,
        traffic=functools.partial(_traffic, algorithm, layout),
        leaf=functools.partial(_leaf, algorithm, layout),
        shapes=functools.partial(_state_shapes, pure, placement),
        fetch=functools.partial(_fetch, layout),
        place=functools.partial(_place, layout),
        pure=pure,
    )


def _init(algorithm: Algorithm, layout: Layout, seed: Any, federation: Federation) -> State:
    check_algorithm(algorithm, classes_of(layout, federation))
    return step.initial_state(algorithm, layout, seed, federation)


def _state_shapes(pure: Pure, shardings: _Placement, federation: Federation) -> State:
    shapes = jax.eval_shape(pure.init, 0, federation)
    return State(
        *(
            jax.tree.map(lambda x, s=s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), part)
            for part, s in zip(shapes, shardings, strict=True)
        )
    )


def _fetch(layout: Layout, state: State) -> State:
    others = jax.device_get(state._replace(clients=()))
    return others._replace(clients=on_host(layout.storages, state.clients, layout.lifting.mesh))


def _place(layout: Layout, state: State) -> State:
    mesh = layout.lifting.mesh
    others = jax.device_put(state._replace(clients=()), replicated(mesh))
    return others._replace(clients=placed(layout.storages, state.clients, mesh))


def _loop(
    step: Callable, state: State, federation: Federation, hparams: HParams, rounds: int, count: int | None = None
) -> tuple[State, Report]:
    """A superstep as a Python loop."""
    reports = []
    for _ in range(rounds if count is None else int(count)):
        state, report = step(state, federation, hparams)
        reports.append(report)
    return state, jax.tree.map(lambda *x: jnp.stack(x), *reports)


def _shapes(algorithm: Algorithm, layout: Layout, federation: Federation, hparams: HParams):
    """A function of (exchange, cohort): what a client returns, and what it receives, as shapes."""
    start = jax.eval_shape(functools.partial(_init, algorithm, layout), 0, federation)

    def of(exchange: Exchange, cohort: int) -> tuple[PyTree, Received]:
        model = layout.cohorts[cohort].model

        def client(state, federation, hparams):
            check = Checker(algorithm, exchange, cohort)
            moment = step.Moment(federation, hparams, state.round, jax.random.key(0))
            ctx = step.context(moment, layout.central, moment.key, cohort=cohort)
            sent = check.broadcast(exchange.broadcast(ctx, state.server), cohort, layout.cohorts[cohort].size)
            received = Received(sent.shared, jax.tree.map(lambda x: x[0], sent.own), sent.known)
            row = jax.tree.map(lambda x: x[0], rows.of_all(layout, federation, state)[cohort])
            row = row._replace(state=row.state.tree)
            ctx = step.context(moment, model, moment.key, row.client, cohort)
            data = step.ClientData(federation.train, federation.train_holdings.order, row.start, row.count)
            return check.client(exchange.client(ctx, received, row.state, data), row.state), received

        return jax.eval_shape(client, start, federation, dict(hparams))

    return of


def _traffic(algorithm: Algorithm, layout: Layout, federation: Federation, hparams: HParams) -> traffic.Traffic:
    shapes = _shapes(algorithm, layout, federation, hparams)

    def sizes(exchange: Exchange, cohort: int) -> traffic.Sizes:
        (_, upload, _), received = shapes(exchange, cohort)
        up = traffic.size(upload.tree) if upload.bytes is None else None
        down = traffic.size((received.shared, received.own)) if upload.bytes_received is None else None
        return traffic.Sizes(exchange.label, cohort, up, down)

    round_, setup = (
        tuple(tuple(sizes(exchange, j) for j in range(len(layout.cohorts))) for exchange in exchanges)
        for exchanges in (algorithm.round, algorithm.setup)
    )
    return traffic.Traffic(round_, setup, layout.participants, tuple(cohort.size for cohort in layout.cohorts))


def _leaf(
    algorithm: Algorithm,
    layout: Layout,
    federation: Federation,
    hparams: HParams,
    cohort: int,
    exchange: int,
    leaf: int,
) -> str:
    (state, upload, metrics), _ = _shapes(algorithm, layout, federation, hparams)(algorithm.round[exchange], cohort)
    path, _ = jax.tree.leaves_with_path(step.client_leaves(state, upload.tree, metrics))[leaf]
    return path_of(path)
