"""A federation's rounds, compiled: the pure functions of `step` and `evaluate`, bound to an algorithm and jitted.

init -> setup (once, of methods that have one) -> run (a superstep) -> evaluate -> run -> evaluate ...
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fdjax.contract import ENSEMBLE, Algorithm, Exchange, HParams, Received
from fdjax.data.federation import replicated
from fdjax.engine import compiling, evaluate, step
from fdjax.engine.check import Checker, check_algorithm
from fdjax.engine.layout import Layout, Report, State, classes_of, rows_of
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
    traffic: Callable[[Federation, HParams], traffic.Traffic]
    leaf: Callable[[Federation, HParams, int, int, int], str]  # (..., cohort, exchange, NonFinite.leaf) -> its name
    pure: Pure


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
    # Results have one placement, or the second superstep would compile anew.
    compiled = (
        (lambda function, **options: function)
        if looping
        else functools.partial(jax.jit, out_shardings=replicated(layout.lifting.mesh))
    )
    init = compiled(pure.init, compiler_options=compiling.quick(layout.lifting.mesh))
    return Simulation(
        init=init,
        setup=compiled(pure.setup, donate_argnums=0) if pure.setup else None,
        run=compiled(pure.run, static_argnums=3, donate_argnums=0),
        evaluate=compiled(pure.evaluate),
        traffic=functools.partial(_traffic, algorithm, layout, init),
        leaf=functools.partial(_leaf, algorithm, layout, init),
        pure=pure,
    )


def _init(algorithm: Algorithm, layout: Layout, seed: Any, federation: Federation) -> State:
    check_algorithm(algorithm, classes_of(layout, federation))
    return step.initial_state(algorithm, layout, seed, federation)


def _loop(
    step: Callable, state: State, federation: Federation, hparams: HParams, rounds: int, count: int | None = None
) -> tuple[State, Report]:
    """A superstep as a Python loop."""
    reports = []
    for _ in range(rounds if count is None else int(count)):
        state, report = step(state, federation, hparams)
        reports.append(report)
    return state, jax.tree.map(lambda *x: jnp.stack(x), *reports)


def _shapes(algorithm: Algorithm, layout: Layout, init: Callable, federation: Federation, hparams: HParams):
    """A function of (exchange, cohort): what a client returns, and what it receives, as shapes.

    `init` is the simulation's own, whose trace is shared.
    """
    start = jax.eval_shape(init, 0, federation)

    def of(exchange: Exchange, cohort: int) -> tuple[PyTree, Received]:
        model, part = layout.cohorts[cohort].model, layout.slices[cohort]

        def client(state, federation, hparams):
            check = Checker(algorithm, exchange, cohort)
            moment = step.Moment(federation, hparams, state.round, jax.random.key(0))
            ctx = step.context(moment, layout.central, moment.key, cohort=cohort)
            sent = check.broadcast(exchange.broadcast(ctx, state.server), cohort, layout.cohorts[cohort].size)
            received = Received(sent.shared, jax.tree.map(lambda x: x[0], sent.own), sent.known)
            rows = rows_of(federation, federation.train_holdings, part, state.clients[cohort])
            row = jax.tree.map(lambda x: x[0], rows)
            ctx = step.context(moment, model, moment.key, row.client, cohort)
            data = step.ClientData(federation.train, federation.train_holdings.order, row.start, row.count)
            return check.client(exchange.client(ctx, received, row.state, data), row.state), received

        return jax.eval_shape(client, start, federation, dict(hparams))

    return of


def _traffic(
    algorithm: Algorithm, layout: Layout, init: Callable, federation: Federation, hparams: HParams
) -> traffic.Traffic:
    shapes = _shapes(algorithm, layout, init, federation, hparams)

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
    init: Callable,
    federation: Federation,
    hparams: HParams,
    cohort: int,
    exchange: int,
    leaf: int,
) -> str:
    (state, upload, metrics), _ = _shapes(algorithm, layout, init, federation, hparams)(
        algorithm.round[exchange], cohort
    )
    path, _ = jax.tree.leaves_with_path(step.client_leaves(state, upload.tree, metrics))[leaf]
    return jax.tree_util.keystr(path, simple=True, separator="/")
