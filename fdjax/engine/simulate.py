"""A federation's rounds, compiled.

setup (once): lift(client's setup)
round: sample participants -> broadcast -> lift(client) -> reduce -> server
superstep: a scan of rounds; then the host may evaluate, draw progress, checkpoint
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fdjax import keys
from fdjax.client import local
from fdjax.engine import lift
from fdjax.engine.evaluate import Evaluate, evaluation
from fdjax.engine.layout import Layout, Row, State, compiler, rows_of
from fdjax.errors import InputError, unknown
from fdjax.exchange import communication
from fdjax.types import Algorithm, Cohort, Federation, HParams, Model, PyTree, Reduction

# Metrics of a round that say which client's numbers were not finite first; the runner turns them into a sentence.
BAD_CLIENTS, BAD_CLIENT, BAD_LEAF = "nonfinite_clients", "_bad_client", "_bad_leaf"


class Simulation(NamedTuple):
    """The compiled functions of one (algorithm, layout); new hparams, seeds and epochs compile nothing."""

    init: Callable[[int, Federation], State]  # (seed, federation)
    setup: Callable[[State, Federation, HParams], State] | None  # before the first round; state donated
    run: Callable[[State, Federation, HParams, int], tuple[State, dict[str, jax.Array]]]
    # rounds: static; state donated
    evaluate: Evaluate  # scalars, and values of each client [C]
    traffic: Callable[[Federation], communication.Traffic]
    leaf: Callable[[Federation, int, int], str]  # (federation, cohort, BAD_LEAF) -> its name


def resolve_hparams(algorithm: Algorithm, given: dict[str, Any]) -> HParams:
    """The algorithm's hparams with `given` in place of defaults, as arrays.

    Raises `InputError` for a name the algorithm does not have.
    """
    for name in given:
        if name not in algorithm.hparams:
            raise unknown(f"hparam of {algorithm.name}", name, algorithm.hparams)
    values = {name: given.get(name, default) for name, default in algorithm.hparams.items()}
    values = {name: values[value] if isinstance(value, str) else value for name, value in values.items()}
    return {
        name: np.asarray(v, np.int32 if name.endswith(("epochs", "steps")) else np.float32)
        for name, v in values.items()
    }


def simulation(algorithm: Algorithm, layout: Layout) -> Simulation:
    """Bind an algorithm to its cohorts, participants and devices."""
    if algorithm.cohorts is not None and len(layout.cohorts) != algorithm.cohorts:
        raise InputError(
            f"{algorithm.name} serves {algorithm.cohorts} architecture(s), but {len(layout.cohorts)} were given; "
            "use one model for all clients or another algorithm"
        )
    slices, lifting, compiled = layout.slices, layout.lifting, compiler(layout)
    reductions = (algorithm.reduction, *([algorithm.within] if algorithm.within else []))

    def init_of(cohort: Cohort):
        return lambda key, client: (algorithm.init_client(cohort.model, keys.stream(key, "client", client)), ())

    inits = [init_of(cohort) for cohort in layout.cohorts]

    @compiled
    def init(seed, federation):
        _check_classes(algorithm, layout, federation)
        key = jax.random.key(seed)
        clients = tuple(
            lift.over_clients(one, key, federation.client[part], lifting, stage="init", names=federation.client[part])[
                0
            ]
            for one, part in zip(inits, slices, strict=True)
        )
        server = algorithm.init_server(keys.stream(key, "server"))
        return State(server, clients, jnp.int32(0), jax.random.key_data(key))

    def setup_of(cohort: Cohort):
        def one(shared, row: Row):
            federation, hparams, key = shared
            assert algorithm.setup is not None
            key = keys.stream(key, "client", row.client)
            return algorithm.setup(cohort.model, row.state, _data(federation, row), federation.proxy, hparams, key), ()

        return one

    setups = [setup_of(cohort) for cohort in layout.cohorts]

    @functools.partial(compiled, donate_argnums=0)
    def setup(state, federation, hparams):
        key = keys.stream(jax.random.wrap_key_data(state.root), "setup")
        clients = []
        for j, (one, part) in enumerate(zip(setups, slices, strict=True)):
            rows = rows_of(federation, federation.train_holdings, part, state.clients[j])
            shared = federation, hparams | {"round": jnp.int32(0)}, key
            clients.append(lift.over_clients(one, shared, rows, lifting, stage="setup", names=rows.client)[0])
        return state._replace(clients=tuple(clients))

    def client_of(cohort: Cohort):
        """One client's turn: (shared, row) -> ((state, metrics, weight, bad leaf, gathered), partials)."""

        def one(shared, row_and_address: tuple[Row, PyTree]):
            (row, addressed), (broadcast, federation, hparams, key) = row_and_address, shared
            received = (broadcast, addressed) if algorithm.address else broadcast
            key = keys.stream(key, "client", row.client)
            results = algorithm.client(
                cohort.model, received, row.state, _data(federation, row), federation.proxy, hparams, key
            )
            weight, bad = jnp.asarray(row.count, jnp.float32), _bad_leaf(results)
            state, upload, metrics = results
            if layout.drop_nonfinite:
                fine = bad < 0
                weight = jnp.where(fine, weight, 0)
                state = _where(fine, state, row.state)
                upload, metrics = _where(fine, upload, None), _where(fine, metrics, None)
            if algorithm.examine:
                upload = algorithm.examine(cohort.model, upload, federation.proxy, hparams)
            partials = tuple(() if r.gather else r.partial(upload, weight) for r in reductions)
            gathered = tuple(r.partial(upload, weight) if r.gather else () for r in reductions)
            return (state, metrics, weight, bad, gathered), partials

        return one

    turns = [client_of(cohort) for cohort in layout.cohorts]

    def shared_of(state: State, federation: Federation, hparams: HParams, j: int):
        key = keys.stream(jax.random.wrap_key_data(state.root), "round", state.round)
        return algorithm.broadcast(state.server, j), federation, hparams | {"round": state.round}, key

    def everyone_of(state: State, federation: Federation, j: int):
        addressed = algorithm.address(state.server) if algorithm.address else ()
        rows = rows_of(federation, federation.train_holdings, slices[j], state.clients[j])
        return rows, jax.tree.map(lambda x: x[slices[j]], addressed)

    def round_(state: State, federation: Federation, hparams: HParams) -> tuple[State, dict[str, jax.Array]]:
        stage = f"round {int(state.round) + 1}" if layout.kind == "loop" else ""
        clients, partials, gathered, metrics, weights, bads, ids = [], [], [], [], [], [], []
        for j, (cohort, size) in enumerate(zip(layout.cohorts, layout.participants, strict=True)):
            shared = shared_of(state, federation, hparams, j)
            everyone = everyone_of(state, federation, j)
            rows, chosen = everyone, None
            if size < cohort.size:
                chosen = jax.random.choice(
                    keys.stream(shared[3], "participants", j), cohort.size, (size,), replace=False
                )
                chosen = jnp.sort(chosen)  # keeps the order of work
                rows = jax.tree.map(lambda x, chosen=chosen: x[chosen], everyone)
            (kept, metric, weight, bad, mine), partial = lift.over_clients(
                turns[j], shared, rows, lifting, stage=stage, names=rows[0].client
            )
            if chosen is not None:
                kept = jax.tree.map(lambda x, new, chosen=chosen: x.at[chosen].set(new), everyone[0].state, kept)
                mine = jax.tree.map(lambda x, c=chosen, n=cohort.size: _scatter(x, c, n), (mine, weight))
            else:
                mine = mine, weight
            for held, value in (
                (clients, kept), (partials, partial), (gathered, mine), (metrics, metric), (weights, weight),
                (bads, bad), (ids, rows[0].client),
            ):  # fmt: skip
                held.append(value)
        summary = _summary(algorithm, partials, gathered)
        weight, bad, client = (jnp.concatenate(x) for x in (weights, bads, ids))
        total = jnp.sum(weight)
        metrics = jax.tree.map(lambda *x: jnp.concatenate(x), *metrics)
        metrics = {
            name: jnp.sum(x) if name.startswith("bytes_") else jnp.vdot(x, weight) / jnp.maximum(total, 1)
            for name, x in metrics.items()
        }
        key = keys.stream(shared_of(state, federation, hparams, 0)[3], "server")
        server, server_metrics = algorithm.server(
            state.server, summary, federation.proxy, hparams | {"round": state.round}, key
        )
        server = _where(total > 0, server, state.server)
        first = jnp.argmax(bad >= 0)
        everyone_receives = sum(layout.participants)
        server_metrics = {n: x * everyone_receives if n.startswith("bytes_") else x for n, x in server_metrics.items()}
        metrics |= server_metrics | {
            BAD_CLIENTS: jnp.sum(bad >= 0),
            BAD_CLIENT: jnp.where(bad[first] >= 0, client[first], -1),
            BAD_LEAF: bad[first],
        }
        return State(server, tuple(clients), state.round + 1, state.root), metrics

    def loop(state, federation, hparams, rounds):
        history = []
        for _ in range(rounds):
            state, metrics = round_(state, federation, hparams)
            history.append(metrics)
        return state, jax.tree.map(lambda *x: jnp.stack(x), *history)

    one_round = jax.jit(round_)  # so that supersteps of other lengths use the same trace

    @functools.partial(compiled, static_argnums=3, donate_argnums=0)
    def run(state, federation, hparams, rounds):
        return lax.scan(lambda state, _: one_round(state, federation, hparams), state, length=rounds)

    def shapes(federation: Federation, j: int):
        """What a client of cohort j returns, and what it receives, as shapes."""

        def turn(state, federation):
            broadcast, _, hparams, key = shared_of(state, federation, resolve_hparams(algorithm, {}), j)
            row, addressed = jax.tree.map(lambda x: x[0], everyone_of(state, federation, j))
            received = (broadcast, addressed) if algorithm.address else broadcast
            model, data = layout.cohorts[j].model, _data(federation, row)
            return algorithm.client(model, received, row.state, data, federation.proxy, hparams, key), received

        return jax.eval_shape(turn, jax.eval_shape(init, 0, federation), federation)

    def traffic(federation: Federation) -> communication.Traffic:
        sizes = []
        for j in range(len(layout.cohorts)):
            (_, upload, _), received = shapes(federation, j)
            sizes.append((communication.size(upload), communication.size(received)))
        up, down = zip(*sizes, strict=True)
        return communication.Traffic(up, down, layout.participants)

    def leaf(federation: Federation, j: int, number: int) -> str:
        state, upload, metrics = shapes(federation, j)[0]
        named = {"metrics": metrics, "upload": upload, "state": state}
        path, _ = jax.tree.leaves_with_path(named)[number]
        return jax.tree_util.keystr(path, simple=True, separator="/")

    return Simulation(
        init=init,
        setup=setup if algorithm.setup else None,
        run=loop if layout.kind == "loop" else run,
        evaluate=evaluation(algorithm, layout),
        traffic=traffic,
        leaf=leaf,
    )


def _check_classes(algorithm: Algorithm, layout: Layout, federation: Federation) -> None:
    """Raises InputError unless all models give logits for the same number of classes."""
    shape = 1, *federation.train.x.shape[1:]
    used = [cohort.model for cohort in layout.cohorts] + ([algorithm.central[0]] if algorithm.central else [])

    def logits(model: Model):
        return jax.eval_shape(lambda: model.apply(model.init(jax.random.key(0)), jnp.zeros(shape)))

    classes = [logits(model).shape[-1] for model in used]
    if len(set(classes)) > 1:
        each = ", ".join(dict.fromkeys(f"{model.name} {K}" for model, K in zip(used, classes, strict=True)))
        raise InputError(f"models differ in their number of classes ({each}); build all for those of the data")


def _data(federation: Federation, row: Row) -> local.ClientData:
    return local.ClientData(federation.train, federation.train_holdings.order, row.start, row.count)


def _summary(algorithm: Algorithm, partials: list[PyTree], gathered: list[PyTree]) -> PyTree:
    """The reduction over all cohorts and, if the algorithm asks for it, another one within each."""

    def finish(reduction: Reduction, number: int, cohorts: list[int]):
        if reduction.gather:
            uploads = [gathered[j][0][number] for j in cohorts]
            weights = jnp.concatenate([gathered[j][1] for j in cohorts])
            return reduction.finish(jax.tree.map(lambda *x: jnp.concatenate(x), *uploads), weights)
        return reduction.finish(jax.tree.map(lambda *x: sum(x[1:], x[0]), *(partials[j][number] for j in cohorts)))

    everyone = list(range(len(partials)))
    summary = finish(algorithm.reduction, 0, everyone)
    if algorithm.within is None:
        return summary
    return summary, tuple(finish(algorithm.within, 1, [j]) for j in everyone)


def _scatter(x: jax.Array, chosen: jax.Array, size: int) -> jax.Array:
    return jnp.zeros((size, *x.shape[1:]), x.dtype).at[chosen].set(x)


def _where(condition: jax.Array, yes: PyTree, no: PyTree | None) -> PyTree:
    """Leaf by leaf; None means zeros."""
    if no is None:
        return jax.tree.map(lambda x: jnp.where(condition, x, jnp.zeros_like(x)), yes)
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), yes, no)


def _bad_leaf(results: tuple[PyTree, PyTree, dict[str, jax.Array]]) -> jax.Array:
    """Number of the first leaf that is not finite in {metrics, state, upload}, or -1."""
    state, upload, metrics = results
    leaves = jax.tree.leaves({"metrics": metrics, "upload": upload, "state": state})
    finite = [
        jnp.all(jnp.isfinite(x)) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.bool(True)
        for x in map(jnp.asarray, leaves)
    ]
    bad = ~jnp.stack(finite)
    return jnp.where(jnp.any(bad), jnp.argmax(bad), -1).astype(jnp.int32)
