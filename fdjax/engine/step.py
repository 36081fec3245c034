"""One exchange, one round, one superstep: pure functions of arrays, which a notebook can call and jit as it likes.

exchange_step: broadcast -> lift(client -> partials) -> finish -> server
round_step:    draw participants, gather their rows once, the round's exchange_steps, scatter them back once
superstep:     a scan of rounds
setup_step:    the set-up's exchange_steps, with all clients

What is compiled names the stages of an exchange (broadcast, client, reduce, server), so that a profile can.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fdjax import keys
from fdjax.client.data import ClientData
from fdjax.contract import Algorithm, Exchange, HParams, Received, Reduction, Stack
from fdjax.engine import distillations, lift
from fdjax.engine import rows as rows_module
from fdjax.engine.check import Checker, check_names, reductions_of
from fdjax.engine.layout import Layout, NonFinite, Report, Row, State
from fdjax.engine.moment import Moment, context
from fdjax.engine.storage import Storage, keep_by_rows
from fdjax.errors import InputError
from fdjax.exchange.traffic import Sent
from fdjax.types import Array, Federation, Model, PyTree


class _Kept(NamedTuple):
    """What stays of each participant after the client's part of an exchange, [S_j, ...] after lifting."""

    state: lift.Stored
    metrics: dict[str, jax.Array]
    sent: tuple[Any, Any]  # bytes of its upload and of what it received, where it counts them
    nonfinite: jax.Array  # number of the first leaf that is not finite, or -1
    stacked: dict[str, PyTree]  # partials of the reductions that combine by "stack"
    distilled: dict[str, jax.Array]  # accuracies before and after a distillation, if asked for


class _Standing(NamedTuple):
    """How far one client, or each of many, counts in an exchange."""

    took_part: jax.Array  # bool: holds examples, and was not left out before, so that it receives
    sends: jax.Array  # bool: and sends
    active: jax.Array  # bool: is not left out of what is to come of this round
    weight: jax.Array  # float32: what its upload counts for, 0 if it does not count


def _standing(layout: Layout, row: Row, nonfinite: jax.Array) -> _Standing:
    """Cheap enough to be computed inside of the lifted function and again outside, instead of being carried out."""
    count, active, weight = jnp.asarray(row.count), jnp.asarray(row.active), jnp.asarray(row.weight)
    took_part = (count > 0) & active if layout.drop_nonfinite else count > 0
    sends = took_part & (weight > 0)
    active = active & (nonfinite < 0) if layout.drop_nonfinite else active
    counts = sends & active if layout.drop_nonfinite else sends
    # Where it is n_k it comes from the count here: as an argument it cost ordered sums their last bit on other devices.
    weight = weight if layout.policy.alike else count.astype(jnp.float32)
    return _Standing(took_part, sends, active, jnp.where(counts, weight, 0))


def exchange_key(key: jax.Array, number: int) -> jax.Array:
    """The key of exchange `number` below that of its round (or of the set-up), which the first exchange has itself."""
    return keys.stream(key, "exchange", number) if number else key


def exchange_step(
    algorithm: Algorithm,
    exchange: Exchange,
    layout: Layout,
    moment: Moment,
    server: PyTree,
    rows: Sequence[Row],
    stage: str = "",
    storages: Sequence[Storage | None] = (),
) -> tuple[PyTree, tuple[Row, ...], Report]:
    """One exchange with the clients of `rows` (cohort by cohort): the server, the rows and what there is to report.

    `storages`: where the states of a cohort lie if its rows are all its clients; None for some, as by default.
    """
    check = Checker(algorithm, exchange)
    storages = storages or (None,) * len(rows)
    kept, totals = [], []
    for j, row in enumerate(rows):
        with jax.named_scope("broadcast"):
            ctx = context(moment, layout.central, keys.stream(moment.key, "broadcast", j), cohort=j)
            sent = check.broadcast(exchange.broadcast(ctx, server), j, layout.cohorts[j].size)
            own = jax.tree.map(lambda x, row=row, j=j: x[row.client - layout.slices[j].start], sent.own)
        with jax.named_scope("client"):
            cohort_kept, cohort_totals = lift.over_clients(
                _client_part(algorithm, exchange, layout, j), (sent.shared, sent.known, moment), (row, own),
                layout.lifting, storage=storages[j], stage=stage, names=row.client,
            )  # fmt: skip
        kept.append(cohort_kept)
        totals.append(cohort_totals)
    standing = [_standing(layout, row, k.nonfinite) for row, k in zip(rows, kept, strict=True)]
    weights = [cohort.weight for cohort in standing]
    with jax.named_scope("reduce"):
        summary = _summary(check, exchange, layout, moment, rows, kept, totals, weights)
    with jax.named_scope("server"):
        ctx = context(moment, layout.central, keys.stream(moment.key, "server"))
        ctx, noted = distillations.watched(layout, ctx)
        new, server_metrics = check.server(exchange.server(ctx, server, summary), server)
    after = [row._replace(state=k.state) for row, k in zip(rows, kept, strict=True)]
    more = distillations.of_server(noted, algorithm, layout, moment, (server, new), after, weights, storages)
    check_names(algorithm, (server_metrics, more))
    server_metrics = server_metrics | more
    anybody = jnp.sum(jnp.concatenate(weights)) > 0
    server = _where(anybody, new, server)
    server_metrics = _where(anybody, server_metrics, jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), server_metrics))
    report = _report(algorithm, exchange, rows, kept, standing)
    check_names(algorithm, (report.metrics, server_metrics))
    report = report._replace(metrics=report.metrics | server_metrics)
    rows = tuple(row._replace(state=k.state, active=s.active) for row, k, s in zip(rows, kept, standing, strict=True))
    return server, rows, report


def _client_part(algorithm: Algorithm, exchange: Exchange, layout: Layout, cohort: int) -> lift.Client:
    """One client's part of an exchange, as it is lifted."""
    check, reductions = Checker(algorithm, exchange, cohort), reductions_of(exchange)
    model = layout.cohorts[cohort].model

    def client(shared, row_and_own) -> tuple[_Kept, lift.Partials]:
        (broadcast, known, moment), (row, own) = shared, row_and_own
        ctx = context(moment, model, keys.stream(moment.key, "client", row.client), row.client, cohort, row.work)
        ctx, noted = distillations.watched(layout, ctx)
        data = ClientData(moment.federation.train, moment.federation.train_holdings.order, row.start, row.count)
        result = exchange.client(ctx, Received(broadcast, own, known), row.state, data)
        state, upload, metrics = check.client(result, row.state)
        nonfinite = _first_nonfinite(state, upload.tree, metrics)
        took_part, sends, _, weight = _standing(layout, row, nonfinite)
        nonfinite, counts = jnp.where(sends, nonfinite, -1), weight > 0
        ctx = ctx._replace(key=keys.stream(moment.key, "partial", row.client), distillations=None)
        with jax.named_scope("reduce"):
            partials = {
                label: check.partial(label, r, r.partial(ctx, upload.tree, weight)) for label, r in reductions.items()
            }

        def combined_by(kind):
            return {label: partials[label] for label, r in reductions.items() if r.combine == kind}

        kept = _Kept(
            state=lift.Stored(_where(counts, state, row.state)),
            metrics=_where(counts, metrics, jax.tree.map(jnp.zeros_like, metrics)),
            sent=(_counted(sends, upload.bytes), _counted(took_part, upload.bytes_received)),
            nonfinite=nonfinite,
            stacked=_where(counts, combined_by("stack"), jax.tree.map(jnp.zeros_like, combined_by("stack"))),
            distilled=distillations.of_client(noted, layout, moment, row.client, counts),
        )
        return kept, lift.identity_unless(counts, lift.Partials(*map(combined_by, ("sum", "min", "max"))))

    return client


def _summary(
    check: Checker,
    exchange: Exchange,
    layout: Layout,
    moment: Moment,
    rows: Sequence[Row],
    kept: list[_Kept],
    totals: list[lift.Partials],
    weights: list[jax.Array],
) -> PyTree:
    """What the server gets: every reduction finished, over all cohorts or for each apart."""

    def combined(label: str, reduction: Reduction, cohorts: Sequence[int]) -> Any:
        if reduction.combine == "stack":
            parts = [(kept[j].stacked[label], rows[j].client, weights[j]) for j in cohorts]
            check.same_partials(label, [jax.tree.map(lambda x: x[0], stacked) for stacked, *_ in parts])
            return Stack(*jax.tree.map(lambda *x: jnp.concatenate(x), *parts))
        check.same_partials(label, [getattr(totals[j], reduction.combine)[label] for j in cohorts])
        parts = [lift.Partials(**{reduction.combine: getattr(totals[j], reduction.combine)[label]}) for j in cohorts]
        return getattr(lift.combine(*parts), reduction.combine)

    def finished(number: int, label: str, reduction: Reduction) -> Any:
        ctx = context(moment, layout.central, keys.stream(moment.key, "finish", number))
        if not reduction.per_cohort:
            return reduction.finish(ctx, combined(label, reduction, range(len(rows))))
        return tuple(
            reduction.finish(ctx.at("cohort", j)._replace(cohort=j), combined(label, reduction, [j]))
            for j in range(len(rows))
        )

    summaries = {label: finished(i, label, r) for i, (label, r) in enumerate(reductions_of(exchange).items())}
    return summaries[""] if isinstance(exchange.reduce, Reduction) else summaries


def _report(
    algorithm: Algorithm, exchange: Exchange, rows: Sequence[Row], kept: Sequence[_Kept], standing: Sequence[_Standing]
) -> Report:
    """The clients' metrics averaged (NaN where nobody counts), what was sent, and who was not finite first."""
    names = [", ".join(sorted(k.metrics)) for k in kept]
    if len({*names}) > 1:
        raise InputError(
            f"{algorithm.name}, exchange {exchange.label}: client gives other metrics in other cohorts "
            f"({' and '.join(names)}); give the same in all"
        )
    metrics = jax.tree.map(lambda *x: jnp.concatenate(x), *(k.metrics for k in kept))
    weight = jnp.concatenate([cohort.weight for cohort in standing])
    total = jnp.sum(weight)
    total = jnp.where(total > 0, total, jnp.nan)
    bad, client = jnp.concatenate([k.nonfinite for k in kept]), jnp.concatenate([row.client for row in rows])
    first = jnp.argmax(bad >= 0)
    metrics = {name: jnp.vdot(x, weight) / total for name, x in metrics.items()}
    distilled = distillations.means([k.distilled for k in kept], [cohort.weight for cohort in standing])
    check_names(algorithm, (metrics, distilled))
    return Report(
        metrics=metrics | distilled,
        sent=(
            tuple(
                Sent(_number(s.took_part), *_summed(k.sent), _number(s.sends))
                for k, s in zip(kept, standing, strict=True)
            ),
        ),
        nonfinite=NonFinite(_number(bad >= 0), jnp.where(bad[first] >= 0, client[first], -1), jnp.int32(0), bad[first]),
    )


def exchanges_step(
    algorithm: Algorithm,
    exchanges: Sequence[Exchange],
    layout: Layout,
    moment: Moment,
    server: PyTree,
    rows: tuple[Row, ...],
    stage: str = "",
    storages: Sequence[Storage | None] = (),
) -> tuple[PyTree, tuple[Row, ...], Report]:
    """Exchanges with the same clients, one after another; `moment.key` is that of all of them."""
    reports = []
    for number, exchange in enumerate(exchanges):
        own = moment._replace(key=exchange_key(moment.key, number))
        where = f"{stage}, exchange {exchange.label}" if len(exchanges) > 1 else stage
        server, rows, report = exchange_step(algorithm, exchange, layout, own, server, rows, where, storages)
        reports.append(report)
    check_names(algorithm, [report.metrics for report in reports])
    distillations.check_told(algorithm, layout, {name: value for r in reports for name, value in r.metrics.items()})
    bad = jax.tree.map(lambda *x: jnp.stack(x), *(report.nonfinite for report in reports))
    first = jnp.argmax(bad.clients > 0)
    some = bad.clients[first] > 0
    return server, rows, Report(
        metrics={name: value for report in reports for name, value in report.metrics.items()},
        sent=tuple(sent for report in reports for sent in report.sent),
        nonfinite=NonFinite(
            bad.clients[first], bad.client[first], jnp.where(some, first, -1).astype(jnp.int32), bad.leaf[first]
        ),
    )  # fmt: skip


def round_step(
    algorithm: Algorithm, layout: Layout, state: State, federation: Federation, hparams: HParams
) -> tuple[State, Report]:
    """One round."""
    key = keys.stream(jax.random.wrap_key_data(state.root), "round", state.round)
    chosen = rows_module.draw(layout, federation, key)
    rows = rows_module.of_round(layout, federation, state, chosen, key, hparams)
    storages = [storage if drawn is None else None for storage, drawn in zip(layout.storages, chosen, strict=True)]
    stage = f"round {int(state.round) + 1}" if layout.lifting.kind == "loop" else ""
    moment = Moment(federation, hparams, state.round, key)
    server, rows, report = exchanges_step(
        algorithm, algorithm.round, layout, moment, state.server, rows, stage, storages
    )
    clients = rows_module.scatter(layout, state, rows, chosen)
    return State(server, clients, state.round + 1, state.root), report


def superstep(
    step: Callable[[State, Federation, HParams], tuple[State, Report]],
    state: State,
    federation: Federation,
    hparams: HParams,
    rounds: int,
    count: Array | int | None = None,
) -> tuple[State, Report]:
    """`rounds` rounds of `step`, a round_step of an algorithm and a layout, with reports stacked [R, ...].

    With `count`, traced and at most `rounds`, only so many; what the report has room for beyond them is zeros. So
    supersteps of several lengths are one compiled function.
    """
    if count is None:
        return lax.scan(lambda state, _: step(state, federation, hparams), state, length=rounds)

    def one(number, carry):
        state, report = step(carry[0], federation, hparams)
        put = functools.partial(lax.dynamic_update_index_in_dim, index=number, axis=0)
        return state, jax.tree.map(put, carry[1], report)

    _, shapes = jax.eval_shape(step, state, federation, hparams)
    room = jax.tree.map(lambda x: jnp.zeros((rounds, *x.shape), x.dtype), shapes)
    return lax.fori_loop(0, count, one, (state, room))


def setup_step(
    algorithm: Algorithm, layout: Layout, state: State, federation: Federation, hparams: HParams
) -> tuple[State, Report]:
    """The exchanges of the set-up, with all clients; what they distil is not tested."""
    layout = layout._replace(before_distillation=False)
    moment = Moment(federation, hparams, state.round, keys.stream(jax.random.wrap_key_data(state.root), "setup"))
    rows = rows_module.of_all(layout, federation, state)
    server, rows, report = exchanges_step(
        algorithm, algorithm.setup, layout, moment, state.server, rows, "setup", layout.storages
    )
    clients = keep_by_rows(tuple(row.state.tree for row in rows), layout.lifting.mesh)
    return state._replace(server=server, clients=clients), report


def initial_state(algorithm: Algorithm, layout: Layout, seed: Array | int, federation: Federation) -> State:
    """The state before the set-up and the first round; contexts have no hyperparameters yet."""
    key = jax.random.key(seed)
    moment = Moment(federation, {}, jnp.int32(0), key)

    def client(cohort: int, model: Model):
        def init(shared, client):
            moment, params = shared
            own = keys.stream(moment.key, "client", client)
            ctx = context(moment, model, own, client, cohort)
            return lift.Stored(algorithm.init_client(ctx, params)), lift.Partials()

        return init

    params = layout.central.init(keys.stream(key, "server"))

    clients = tuple(
        lift.over_clients(
            client(j, cohort.model), (moment, _first_params(layout, j, key, params)), federation.client[part],
            layout.lifting, storage=layout.storages[j], stage="init", names=federation.client[part],
        )[0].tree
        for j, (cohort, part) in enumerate(zip(layout.cohorts, layout.slices, strict=True))
    )  # fmt: skip
    ctx = context(moment, layout.central, keys.stream(key, "server state"))
    return State(algorithm.init_server(ctx, params), clients, jnp.int32(0), jax.random.key_data(key))


def _first_params(layout: Layout, cohort: int, key: jax.Array, central: PyTree) -> PyTree:
    """The first parameters of a cohort's architecture: the central model's, or those of its first cohort."""
    model = layout.cohorts[cohort].model
    if model is layout.central:
        return central
    first = next(j for j, other in enumerate(layout.cohorts) if other.model is model)
    return model.init(keys.stream(key, "cohort", first))


def _where(condition: jax.Array, yes: PyTree, no: PyTree) -> PyTree:
    return jax.tree.map(functools.partial(jnp.where, condition), yes, no)


def _summed(sent: tuple[Any, Any]) -> tuple[Any, Any]:
    return jax.tree.map(jnp.sum, sent)


def _number(of: jax.Array) -> jax.Array:
    return jnp.sum(of, dtype=jnp.int32)


def _counted(condition: jax.Array, number: Array | float | None) -> jax.Array | tuple[()]:
    return () if number is None else jnp.where(condition, jnp.asarray(number, jnp.float32), 0)


def client_leaves(state: PyTree, upload: PyTree, metrics: PyTree) -> PyTree:
    """What is looked at for numbers that are not finite, in this order."""
    return {"metrics": metrics, "state": state, "upload": upload}


def _first_nonfinite(state: PyTree, upload: PyTree, metrics: PyTree) -> jax.Array:
    """Number of the first leaf of `client_leaves` that is not finite, or -1."""
    finite = [
        jnp.all(jnp.isfinite(x)) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.bool(True)
        for x in map(jnp.asarray, jax.tree.leaves(client_leaves(state, upload, metrics)))
    ]
    if not finite:
        return jnp.int32(-1)
    bad = ~jnp.stack(finite)
    return jnp.where(jnp.any(bad), jnp.argmax(bad), -1).astype(jnp.int32)
