"""A federation's rounds and their evaluation, each one compiled call.

round: sample participants -> broadcast -> lift(client) -> reduce -> server
superstep: a scan of rounds; then the host may evaluate, draw progress, checkpoint
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from fdjax import communication, keys, lift, local, losses
from fdjax.errors import InputError, unknown
from fdjax.federation import replicated
from fdjax.types import Algorithm, Array, Cohort, Federation, Holdings, HParams, PyTree


class State(NamedTuple):
    """Everything that changes between rounds."""

    server: PyTree
    clients: tuple[PyTree, ...]  # one stacked pytree [C_j, ...] a cohort, rows as in the federation
    round: jax.Array  # [] int32: rounds done
    root: jax.Array  # [2] uint32: the root key's data; a typed key on several devices would miss jit's fast path


class Layout(NamedTuple):
    """What is static about a simulation besides its algorithm."""

    cohorts: tuple[Cohort, ...]
    participants: tuple[int, ...]  # per round, of each cohort
    mesh: Mesh
    chunk: int = 1  # clients vmapped together on one device
    eval_batch: int = 500
    own_batch: int = 500  # the same for the clients' own test parts, which may be small
    full_eval: bool = True  # test every personal model on the full test set too: C passes over it


class Simulation(NamedTuple):
    """The compiled functions of one (algorithm, layout); new hparams, seeds and epochs compile nothing."""

    init: Callable[[int, Federation], State]  # (seed, federation)
    run: Callable[
        [State, Federation, HParams, int], tuple[State, dict[str, jax.Array]]
    ]  # rounds: static; state donated
    evaluate: Callable[[State, Federation], tuple[dict[str, jax.Array], dict[str, jax.Array]]]  # scalars, [C] each
    traffic: Callable[[Federation], communication.Traffic]


class _Row(NamedTuple):
    client: Array
    start: Array
    count: Array
    state: PyTree


def resolve_hparams(algorithm: Algorithm, given: dict[str, Any]) -> HParams:
    """The algorithm's hparams with `given` in place of defaults, as arrays.

    Raises `InputError` for a name the algorithm does not have.
    """
    for name in given:
        if name not in algorithm.hparams:
            raise unknown(f"hparam of {algorithm.name}", name, algorithm.hparams)
    values = {name: given.get(name, default) for name, default in algorithm.hparams.items()}
    values = {name: values[value] if isinstance(value, str) else value for name, value in values.items()}
    return {name: np.asarray(v, np.int32 if name.endswith("epochs") else np.float32) for name, v in values.items()}


def simulation(algorithm: Algorithm, layout: Layout) -> Simulation:
    """Bind an algorithm to its cohorts, participants and devices."""
    if algorithm.cohorts is not None and len(layout.cohorts) != algorithm.cohorts:
        raise InputError(
            f"{algorithm.name} serves {algorithm.cohorts} architecture(s), but {len(layout.cohorts)} were given; "
            "use one model for all clients or another algorithm"
        )
    bounds = np.cumsum((0, *(cohort.size for cohort in layout.cohorts)))
    slices = [slice(int(low), int(high)) for low, high in itertools.pairwise(bounds)]
    central_model, central_params = algorithm.central

    def over_clients(one, shared, rows):
        return lift.over_clients(one, shared, rows, chunk=layout.chunk, mesh=layout.mesh)

    def rows(federation: Federation, holdings: Holdings, part: slice, state: PyTree) -> _Row:
        return _Row(federation.client[part], holdings.start[part], holdings.count[part], state)

    # State keeps one placement, or the second superstep would be compiled anew.
    placed = functools.partial(jax.jit, out_shardings=replicated(layout.mesh))

    @placed
    def init(seed, federation):
        key = jax.random.key(seed)
        clients = []
        for cohort, part in zip(layout.cohorts, slices, strict=True):

            def one(key, row, model=cohort.model):
                return algorithm.init_client(model, keys.stream(key, "client", row)), ()

            clients.append(over_clients(one, key, federation.client[part])[0])
        server = algorithm.init_server(keys.stream(key, "server"))
        return State(server, tuple(clients), jnp.int32(0), jax.random.key_data(key))

    def client_of(cohort: Cohort):
        """One client's turn: (shared, row) -> ((state, metrics, weight), partial of the reduction)."""

        def one(shared, row: _Row):
            broadcast, federation, hparams, key = shared
            data = local.ClientData(federation.train, federation.train_holdings.order, row.start, row.count)
            state, upload, metrics = algorithm.client(
                cohort.model,
                broadcast,
                row.state,
                data,
                federation.proxy,
                hparams,
                keys.stream(key, "client", row.client),
            )
            weight = jnp.asarray(row.count, jnp.float32)
            return (state, metrics, weight), algorithm.reduction.partial(upload, weight)

        return one

    def shared_of(state: State, federation: Federation, hparams: HParams):
        key = keys.stream(jax.random.wrap_key_data(state.root), "round", state.round)
        return algorithm.broadcast(state.server), federation, hparams | {"round": state.round}, key

    @jax.jit  # so that supersteps of other lengths use the same trace
    def round_(state: State, federation: Federation, hparams: HParams) -> tuple[State, dict[str, jax.Array]]:
        shared = shared_of(state, federation, hparams)
        _, _, hparams, key = shared
        clients, partials, metrics, weights = [], [], [], []
        for j, (cohort, part, size) in enumerate(zip(layout.cohorts, slices, layout.participants, strict=True)):
            everyone = rows(federation, federation.train_holdings, part, state.clients[j])
            if size < cohort.size:
                chosen = jax.random.choice(keys.stream(key, "participants", j), cohort.size, (size,), replace=False)
                chosen = jnp.sort(chosen)  # keeps the order of work
                chosen_rows = jax.tree.map(lambda x, chosen=chosen: x[chosen], everyone)
            else:
                chosen, chosen_rows = None, everyone
            (kept, metric, weight), partial = over_clients(client_of(cohort), shared, chosen_rows)
            if chosen is not None:
                kept = jax.tree.map(lambda x, new, chosen=chosen: x.at[chosen].set(new), everyone.state, kept)
            clients.append(kept)
            partials.append(partial)
            metrics.append(metric)
            weights.append(weight)
        weight = jnp.concatenate(weights)
        total = jnp.sum(weight)
        metrics = jax.tree.map(lambda *x: jnp.vdot(jnp.concatenate(x), weight) / jnp.maximum(total, 1), *metrics)
        summary = algorithm.reduction.finish(jax.tree.map(lambda *x: sum(x[1:], x[0]), *partials))
        server, server_metrics = algorithm.server(
            state.server, summary, federation.proxy, hparams, keys.stream(key, "server")
        )
        server = jax.tree.map(lambda new, old: jnp.where(total > 0, new, old), server, state.server)
        return State(server, tuple(clients), state.round + 1, state.root), metrics | server_metrics

    @functools.partial(placed, static_argnums=3, donate_argnums=0)
    def run(state, federation, hparams, rounds):
        return lax.scan(lambda state, _: round_(state, federation, hparams), state, length=rounds)

    @jax.jit
    def evaluate(state, federation):
        central = central_params(state.server)
        scalars = {}
        pieces = _split(len(federation.test.y), layout.mesh.size)
        score = _central_score(central_model, central, federation, pieces)
        scalars["central_accuracy"], scalars["central_loss"] = score.mean()
        own, full = [], []
        for j, (cohort, part) in enumerate(zip(layout.cohorts, slices, strict=True)):
            everyone = rows(federation, federation.test_holdings, part, state.clients[j])
            own.append(_own_score(cohort, central, federation, everyone))
            if algorithm.personal is not None and layout.full_eval:
                full.append(_full_score(cohort, central, federation, everyone))
        own_accuracy, own_loss = jax.tree.map(lambda *x: jnp.concatenate(x), *own).mean()
        per_client = {"own_accuracy": own_accuracy, "own_loss": own_loss}
        if algorithm.personal is None:
            scalars["local_accuracy"], scalars["local_loss"] = scalars["central_accuracy"], scalars["central_loss"]
        elif layout.full_eval:
            full_accuracy, full_loss = jax.tree.map(lambda *x: jnp.concatenate(x), *full).mean()
            per_client |= {"local_accuracy": full_accuracy, "local_loss": full_loss}
            trained = jnp.asarray(federation.train_holdings.count > 0, jnp.float32)
            scalars |= {
                "local_accuracy": losses.weighted_mean(full_accuracy, trained),
                "local_loss": losses.weighted_mean(full_loss, trained),
            }
        tested = federation.test_holdings.count > 0
        scalars |= _across_clients(own_accuracy, own_loss, tested, federation.train_holdings.count)
        return scalars, per_client

    def _central_score(model, params, federation, pieces):
        def one(shared, row):
            params, examples = shared
            everything = jnp.arange(len(examples.y), dtype=jnp.int32)
            return (), local.test(model.apply, params, local.ClientData(examples, everything, *row), layout.eval_batch)

        return lift.over_clients(one, (params, federation.test), pieces, chunk=1, mesh=layout.mesh)[1]

    def _own_score(cohort, central, federation, everyone):
        def one(shared, row: _Row):
            central, federation = shared
            data = local.ClientData(federation.test, federation.test_holdings.order, row.start, row.count)
            return _test_personal(cohort, central, row.state, data, layout.own_batch), ()

        return over_clients(one, (central, federation), everyone)[0]

    def _full_score(cohort, central, federation, everyone):
        def one(shared, row: _Row):
            central, examples = shared
            size = len(examples.y)
            data = local.ClientData(examples, jnp.arange(size, dtype=jnp.int32), jnp.int32(0), jnp.int32(size))
            return _test_personal(cohort, central, row.state, data, layout.eval_batch), ()

        return over_clients(one, (central, federation.test), everyone)[0]

    def _test_personal(cohort, central, client_state, data, batch_size):
        if algorithm.personal is None:
            return local.test(central_model.apply, central, data, batch_size)
        return local.test(cohort.model.apply, algorithm.personal(client_state), data, batch_size)

    def traffic(federation):
        state = jax.eval_shape(init, 0, federation)
        hparams = resolve_hparams(algorithm, {})

        def sent(state, federation, j, cohort):
            shared = shared_of(state, federation, hparams)
            row = rows(federation, federation.train_holdings, slices[j], state.clients[j])
            data = local.ClientData(federation.train, federation.train_holdings.order, row.start[0], row.count[0])
            mine = jax.tree.map(lambda x: x[0], row.state)
            broadcast, _, traced, key = shared
            _, upload, _ = algorithm.client(cohort.model, broadcast, mine, data, federation.proxy, traced, key)
            return upload, broadcast

        sizes = []
        for j, cohort in enumerate(layout.cohorts):
            upload, broadcast = jax.eval_shape(lambda s, f, j=j, c=cohort: sent(s, f, j, c), state, federation)
            sizes.append((communication.size(upload), communication.size(broadcast)))
        up, down = zip(*sizes, strict=True)
        return communication.Traffic(up, down, layout.participants)

    return Simulation(init, run, evaluate, traffic)


def _split(size: int, pieces: int) -> tuple[jax.Array, jax.Array]:
    """Start and count of `pieces` nearly equal parts of `[0, size)`."""
    bounds = np.linspace(0, size, pieces + 1).astype(np.int32)
    return jnp.asarray(bounds[:-1]), jnp.asarray(np.diff(bounds))


def _across_clients(accuracy, loss, tested, examples) -> dict[str, jax.Array]:
    """Statistics over the clients that have a test part: mean, n_k-weighted mean, worst, 10 % quantile, std."""
    count = jnp.maximum(jnp.sum(tested), 1)
    mean = jnp.sum(jnp.where(tested, accuracy, 0)) / count
    weight = jnp.where(tested, examples, 0).astype(jnp.float32)
    masked = jnp.where(tested, accuracy, jnp.nan)
    any_tested = jnp.any(tested)
    return {
        "own_accuracy": mean,
        "own_accuracy_weighted": jnp.vdot(accuracy, weight) / jnp.maximum(jnp.sum(weight), 1),
        "own_loss": jnp.sum(jnp.where(tested, loss, 0)) / count,
        "worst_client": jnp.where(any_tested, jnp.nanmin(masked), 0),
        "quantile_10": jnp.where(any_tested, jnp.nanquantile(masked, 0.1), 0),
        "client_std": jnp.sqrt(jnp.sum(jnp.where(tested, (accuracy - mean) ** 2, 0)) / count),
    }
