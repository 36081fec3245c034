"""A check of what models and uploads tell about who was trained on: an attack by the loss, reported as its AUC.

Whoever can see what a model says of an example takes it for a member, one that was trained on, if its loss is below a
threshold (Yeom, Giacomelli, Fredrikson, Jha, "Privacy Risk in Machine Learning", CSF 2018). Over all thresholds,

    AUC = P(loss of a member < loss of another example) + 1/2 P(both are equal)

which is 0.5 where losses tell nothing, and 1 where they tell everything. It is one weak attack: an AUC of 0.5 proves no
privacy, which is what an epsilon is for; one above 0.5 proves a leak.

The definition is ours: members are a client's training examples, and the others as many of its own test part, which has
its label distribution or is by the same owner, so that labels alone tell nothing. Both are drawn evenly over what the
client holds, up to `PAIRS` of each. Clients that never train, or have no test part, are left out.

- central: the central model, client by client, whose mean is told, as that of each of the following is
- local: each client's own model. It does not leave the client, where it is not uploaded: this is what there is to leak
- upload: what the server is sent by one client. Params are a model. Outputs on proxy data tell about these alone, so
  the attacker is a server that puts its candidates among them: the round that would be next is carried out with
  members and others of all clients, half of each, in place of the proxy data, and forgotten again. Noise that clients
  add is in what is attacked; where the server is trusted to see a noised sum alone, there is nothing to attack
- consensus: what becomes of these outputs, with the noise of a private sum; members are those of any client

Of FD and FAug there is no upload: means say the same of all examples of a label, so between those of like labels this
attack is a guess whatever they are. None is made either, and no AUC of it is told, where an upload

- is reduced in more than one way: FedBE, FedFTG, FedAUX, FedDistill+, and selected or cached outputs
- has more in it than one model or the outputs: FedGen, FedAD, FedMA, FedGEMS, CFD, FedKD (a change of low rank)
- has features or prototypes: FedGKT, FedDKC, FedProto, FedTGP, FedGH
- is a part of a model (`--exchanged`), or is a group's or for a group: group distillation, in both forms

So a run of these with `upload_auc` missing tells nothing of their uploads, which may leak as much as any other.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fdjax import keys
from fdjax.client import losses
from fdjax.client.data import ClientData
from fdjax.contract import ENSEMBLE, Algorithm, Broadcast, Exchange, HParams, Received, Reduction, Upload
from fdjax.engine import lift, rows
from fdjax.engine.layout import Layout, State, rows_of
from fdjax.engine.moment import Moment, context
from fdjax.engine.new_clients import never_train
from fdjax.engine.step import exchange_step
from fdjax.errors import InputError
from fdjax.exchange import proxy, reductions
from fdjax.exchange.wrappers import after
from fdjax.types import Array, Examples, Federation, Model, PyTree

PAIRS = 256  # members, and others, of one client, at most
_NOBODY = -1.0  # in the place of the AUC of a client that has none


class _Candidates(NamedTuple):
    """What takes the place of the proxy data."""

    examples: Examples
    owner: jax.Array  # [M] int32 ids
    member: jax.Array  # [M] bool
    counts: jax.Array  # [M] bool: False for what only fills up


class _Seen(NamedTuple):
    """The AUC of each upload [C], by id, `_NOBODY` where there is none, and of the consensus."""

    uploads: jax.Array
    consensus: jax.Array


def area(members: Array, others: Array, counts: tuple[Array, Array] | None = None) -> jax.Array:
    """P(member < other) + 1/2 P(equal) over all pairs of losses [A] and [B]: Mann and Whitney's statistic, by ranks.

    `counts`: which of both [A], [B] are there; NaN if no pair is. A loss that is not a number is the largest.
    """
    a, b = (jnp.where(jnp.isnan(x), jnp.inf, x) for x in map(jnp.asarray, (members, others)))
    is_a, is_b = (jnp.ones(a.shape, bool), jnp.ones(b.shape, bool)) if counts is None else counts
    order, number = jnp.sort(jnp.where(is_b, b, jnp.inf)), jnp.sum(is_b)
    below, up_to = (jnp.minimum(jnp.searchsorted(order, a, side=side), number) for side in ("left", "right"))
    won = jnp.sum(jnp.where(is_a, number - (below + up_to) / 2, 0))
    pairs = jnp.sum(is_a).astype(jnp.float32) * number
    return won / jnp.where(pairs > 0, pairs, jnp.nan)


def evenly(key: jax.Array, rank: Array, of: Array | int, count: Array) -> jax.Array:
    """Position in [0, count) of draw number `rank` of so many: a random one in each of `of` equal stretches."""
    share = (rank + jax.random.uniform(key, jnp.shape(rank))) / of
    return jnp.clip((share * count).astype(jnp.int32), 0, jnp.maximum(count - 1, 0))


def attack(
    algorithm: Algorithm, layout: Layout, state: State, federation: Federation, hparams: HParams
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """AUCs by name, means over clients, and those of each client [C], by rows; NaN where there is nothing to attack."""
    root = jax.random.wrap_key_data(state.root)
    moment = Moment(federation, hparams, state.round, keys.stream(root, "membership"))
    clients = _of_models(algorithm, layout, state, moment)
    scalars: dict[str, jax.Array] = {}
    exchange = algorithm.round[0]
    one_by_one = not any(getattr(release, "of_sum", False) for release in exchange.releases)
    readable = exchange.shares and isinstance(exchange.reduce, Reduction)
    if readable and (one_by_one or exchange.shares != "params"):
        seen = _of_uploads(algorithm, exchange, layout, state, moment, keys.stream(root, "round", state.round))
        if one_by_one:
            by_rows = seen.uploads[federation.client]
            clients["upload_auc"] = jnp.where(by_rows == _NOBODY, jnp.nan, by_rows)
        if exchange.shares != "params":
            scalars["consensus_auc"] = jnp.where(seen.consensus == _NOBODY, jnp.nan, seen.consensus)
    return {name: jnp.nanmean(values) for name, values in clients.items()} | scalars, clients


def _there(layout: Layout, federation: Federation) -> jax.Array:
    """[C] bool, by rows: who trains, and has something of both kinds."""
    held = (federation.train_holdings.count > 0) & (federation.test_holdings.count > 0)
    return jnp.asarray(held) & ~never_train(layout)


def _of_pairs(key: jax.Array, model: Callable, data: ClientData, tests: ClientData) -> jax.Array:
    """The AUC of a model, x -> logits, on members and others of one client. The key is consumed."""
    rank = jnp.arange(PAIRS)

    def loss(name, of):
        x, y = of.take(evenly(keys.stream(key, name), rank, PAIRS, jnp.asarray(of.count)))
        return losses.cross_entropy(model(x), y)

    return area(loss("members", data), loss("others", tests))


def _of_models(algorithm: Algorithm, layout: Layout, state: State, moment: Moment) -> dict[str, jax.Array]:
    """[C] by name, of the central model and of clients' own, those that there are."""
    federation, personal = moment.federation, algorithm.personal
    central: Any = None if algorithm.central is ENSEMBLE else algorithm.central
    there, found = _there(layout, federation), []
    for j, (cohort, part) in enumerate(zip(layout.cohorts, layout.slices, strict=True)):

        def client(shared, row_and_test, model=cohort.model, j=j):
            (server, moment), (row, start, count) = shared, row_and_test
            data = ClientData(moment.federation.train, moment.federation.train_holdings.order, row.start, row.count)
            tests = ClientData(moment.federation.test, moment.federation.test_holdings.order, start, count)
            key = keys.stream(moment.key, "client", row.client)
            found = {}
            if central is not None:
                ctx = context(moment, layout.central, moment.key)
                found["central_auc"] = _of_pairs(key, functools.partial(central, ctx, server), data, tests)
            if personal is not None:
                ctx = context(moment, model, key, row.client, j)
                found["local_auc"] = _of_pairs(key, functools.partial(personal, ctx, server, row.state), data, tests)
            return found, lift.Partials()

        row = rows_of(federation, federation.train_holdings, part, state.clients[j])
        test = federation.test_holdings.start[part], federation.test_holdings.count[part]
        aucs, _ = lift.over_clients(
            client, (state.server, moment), (row, *test), layout.lifting._replace(narrow=()),
            storage=layout.storages[j], stage="membership", names=row.client,
        )  # fmt: skip
        found.append(aucs)
    together = jax.tree.map(lambda *x: jnp.concatenate(x), *found)
    return {name: jnp.where(there, values, jnp.nan) for name, values in together.items()}


def _of_uploads(
    algorithm: Algorithm, exchange: Exchange, layout: Layout, state: State, moment: Moment, key: jax.Array
) -> _Seen:
    """What the first exchange of the round with `key` would tell, whose participants those of the round are."""
    candidates = None
    federation = moment.federation
    if exchange.shares != "params":
        candidates = _candidates(layout, federation, moment.key)
        federation = federation._replace(proxy=candidates.examples)
    chosen = rows.draw(layout, federation, key)
    taken = rows.of_round(layout, federation, state, chosen, key, moment.hparams)
    storages = [storage if drawn is None else None for storage, drawn in zip(layout.storages, chosen, strict=True)]
    nothing = _Seen(jnp.full(len(federation.client), _NOBODY), jnp.float32(jnp.nan))
    layout = layout._replace(before_distillation=False)
    watched = _watched(exchange, layout, federation, candidates)
    now = moment._replace(federation=federation, key=key)
    (_, seen), *_ = exchange_step(
        algorithm, watched, layout, now, (state.server, nothing), taken, "membership", storages
    )
    return seen


def _candidates(layout: Layout, federation: Federation, key: jax.Array) -> _Candidates:
    """Members, then as many others, of all clients in turns, in the place of the proxy data."""
    assert federation.proxy is not None
    size, clients = len(federation.proxy.y), len(federation.client)
    row, rank = np.arange(size // 2) % clients, np.arange(size // 2) // clients
    draws = -(-(size // 2 - row) // clients)  # of this client

    def of(name, holdings, examples):
        position = evenly(keys.stream(key, name), rank, draws, holdings.count[row])
        index = holdings.order[jnp.clip(holdings.start[row] + position, 0, len(holdings.order) - 1)]
        return examples.x[index], examples.y[index]

    members = of("members", federation.train_holdings, federation.train)
    others = of("others", federation.test_holdings, federation.test)
    filling = [half[:1] for half in members] if size % 2 else [half[:0] for half in members]
    x, y = (jnp.concatenate(halves) for halves in zip(members, others, filling, strict=True))
    at = np.concatenate([row, row, np.zeros(size % 2, int)])
    half = np.arange(size)
    return _Candidates(
        Examples(x, y, federation.train.scale, federation.train.shift),
        owner=jnp.asarray(federation.client)[at],
        member=jnp.asarray(half < size // 2),
        counts=_there(layout, federation)[at] & jnp.asarray(half < size // 2 * 2),
    )


def _watched(exchange: Exchange, layout: Layout, federation: Federation, candidates: _Candidates | None) -> Exchange:
    """The exchange whose server keeps, beside its state, what an attacker makes of what it is sent."""
    by_id = jnp.argsort(jnp.asarray(federation.client))
    tests = [jnp.asarray(x)[by_id] for x in (federation.test_holdings.start, federation.test_holdings.count)]

    def broadcast(ctx, both):
        sent, part = exchange.broadcast(ctx, both[0]), layout.slices[ctx.cohort]
        known = sent.known, candidates, federation.test, federation.test_holdings.order
        return Broadcast(sent.shared, (sent.own, [x[part] for x in tests]), known)

    def client(ctx, received, state, data):
        (own, (start, count)), (known, candidates, test, order) = received.own, received.known
        state, upload, _ = exchange.client(ctx, Received(received.shared, own, known), state, data)
        if candidates is None:
            key, others = ctx.at("membership").key, ClientData(test, order, start, count)
            model = _model_of(exchange, upload.tree, layout.central, ctx.model)
            found = _of_pairs(key, functools.partial(model.apply, upload.tree), data, others)
            found = jnp.where(count > 0, found, _NOBODY)
        else:
            mine = candidates.counts & (candidates.owner == ctx.client)
            found = _of_outputs(exchange, upload.tree, candidates._replace(counts=mine), received.shared)
        return state, Upload({"sent": upload.tree, "auc": found}), {}

    def server(ctx, both, summary):
        (inner, seen), stack = both, summary["auc"]
        auc = jnp.where(stack.weight > 0, stack.partials, _NOBODY)
        seen = seen._replace(uploads=seen.uploads.at[stack.client].set(auc))
        if candidates is not None:
            ids = exchange.broadcast(ctx.at("ids"), inner).shared
            seen = seen._replace(consensus=_of_outputs(exchange, summary["sent"], candidates, ids))
        return (inner, seen), {}

    assert isinstance(exchange.reduce, Reduction)
    sent = after(lambda ctx, upload: upload["sent"], exchange.reduce)
    reduce = {"sent": sent, "auc": reductions.stack(lambda upload: upload["auc"])}
    return exchange._replace(broadcast=broadcast, client=client, reduce=reduce, server=server, name=exchange.label)


def _model_of(exchange: Exchange, params: PyTree, *models: Model) -> Model:
    """The first of the models whose params these are, by their shapes. Raises InputError if there is none."""
    for model in models:
        first = jax.eval_shape(model.init, jax.random.key(0))
        if jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, first):
            return model
    raise InputError(
        f"--membership: exchange {exchange.label} says that it shares params, but uploads something else; let it say "
        'shares=""'
    )


def _of_outputs(exchange: Exchange, tree: PyTree, candidates: _Candidates, ids: Any) -> jax.Array:
    """The AUC of outputs [n, K] in `tree` on the candidates with these ids; `_NOBODY` where none of them counts."""
    ids = proxy.positions(candidates.examples, ids)
    outputs = next(x for x in jax.tree.leaves(tree) if x.ndim == 2 and len(x) == len(ids))
    y, member, counts = candidates.examples.y[ids], candidates.member[ids], candidates.counts[ids]
    # Noise may make a probability negative; the order of losses is that of the label's probability anyway.
    by_label = -jnp.take_along_axis(outputs, y[:, None], 1)[:, 0]
    loss = losses.cross_entropy(outputs, y) if exchange.shares == "logits" else by_label
    found = area(loss, loss, (counts & member, counts & ~member))
    return jnp.where(jnp.isnan(found), _NOBODY, found)
