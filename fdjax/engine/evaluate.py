"""Tests of the central model, of every client's own model, and of their ensemble; one compiled call."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fdjax import keys
from fdjax.client import losses, testing
from fdjax.client.data import ClientData, label_counts, whole
from fdjax.contract import ENSEMBLE, Algorithm, HParams
from fdjax.engine import lift, membership, new_clients
from fdjax.engine.check import check_logits
from fdjax.engine.client_means import across_clients, measured_across, measured_means
from fdjax.engine.layout import Layout, State, classes_of, rows_of
from fdjax.engine.moment import Moment, context
from fdjax.types import Array, Examples, Federation, PyTree

Scalars = dict[str, jax.Array]
_CERTAIN = 1e-30  # least probability of an ensemble, whose logarithm is a logit


class _Votes(NamedTuple):
    """Softmax outputs of personal models, summed, and of how many."""

    total: jax.Array  # [M, K]
    voters: jax.Array  # []


class _Test(NamedTuple):
    """What every function here needs: static parts, and what a test may read."""

    algorithm: Algorithm
    layout: Layout
    moment: Moment
    server: PyTree
    classes: int  # K, by the clients' models

    def finished(self, score: testing.Score) -> testing.Score:
        """A score of the model of all clients, with the values of metrics, but for those of what one client holds."""
        return score.finished([metric for metric in self.layout.metrics if not metric.holds])

    @property
    def has_personal(self) -> bool:
        return self.algorithm.personal is not None

    @property
    def has_central(self) -> bool:
        return self.algorithm.central is not None and not self.has_ensemble

    @property
    def has_ensemble(self) -> bool:
        return self.algorithm.central is ENSEMBLE


class _Part(NamedTuple):
    """Some of the examples: those of the first `count` of `order`."""

    examples: Examples
    order: Array  # [M] int32
    count: Array  # [] int32, traced: a subsample and all of them are one compiled function


@jax.named_scope("evaluate")
def evaluate(
    algorithm: Algorithm,
    layout: Layout,
    state: State,
    federation: Federation,
    hparams: HParams,
    examples: Array | int | None = None,
) -> tuple[Scalars, dict[str, jax.Array]]:
    """Scalars by name, and values of each client [C]; NaN where there was nothing to test.

    Central: the central model on the test set, or the ensemble where the clients' models are tested. Local: the mean
    over clients of their own model on the first `examples` (None: all) of the test set in its random order, and how
    many these are; of a method without personal models, what the central one has. Own: the client's model (the central
    one for methods without personal ones) on the client's own test part. What the layout says is not tested is not
    there.
    Validation, where the federation has such examples: the central model or the ensemble on them, or else the mean over
    clients of their own model. Metrics of the layout likewise: [] and [C], or by class [K] and [C, K]. Membership, if
    the layout says so: see `membership.attack`.
    """
    key = keys.stream(jax.random.wrap_key_data(state.root), "evaluate", state.round)
    moment = Moment(federation, hparams, state.round, key)
    test = _Test(algorithm, layout, moment, state.server, min(classes_of(layout, federation).values()))
    new = new_clients.never_train(layout)
    trained = jnp.asarray((federation.train_holdings.count > 0) & ~new, jnp.float32)
    part = _part(federation, examples)
    scalars: Scalars = {}
    clients: dict[str, jax.Array] = {}
    central = _central(test, federation.test) if test.has_central and layout.central_eval else None
    if central is not None:
        scalars |= _named("central", test.finished(central))
    own, local, votes = _clients_tests(test, state, trained, part)
    if own is not None:
        clients |= _named("own", own)
        tested = federation.test_holdings.count > 0
        scalars |= across_clients(own, tested & ~new, federation.train_holdings.count)
        scalars |= new_clients.as_they_are(layout, *own.mean(), tested)
        scalars |= measured_means("own", own.metrics, tested & ~new)
        scalars |= measured_across(layout.metrics, own.mean()[0], tested & ~new)
        scalars |= measured_means("new", own.metrics, tested & new) if any(layout.new) else {}
    if local is not None:
        clients |= _named("local", local)
        scalars |= {name: losses.weighted_mean(clients[name], trained) for name in ("local_accuracy", "local_loss")}
        scalars |= measured_means("local", local.metrics, trained > 0)
        scalars["local_examples"] = jnp.asarray(part.count, jnp.float32)
    elif central is not None and not test.has_personal:
        scalars |= _named("local", test.finished(central))
        scalars["local_examples"] = jnp.float32(len(federation.test.y))
        if any(metric.holds for metric in layout.metrics):
            by_holdings = _by_holdings(test, central)
            clients |= {f"local_{name}": values for name, values in by_holdings.items()}
            scalars |= measured_means("local", by_holdings, trained > 0)
    if votes is not None:
        scalars |= _named("central", _ensemble(test, votes, part))
    if federation.validation is not None:
        scalars |= _validation(test, state, trained, federation.validation)
    if layout.membership:
        means, each = membership.attack(algorithm, layout, state, federation, hparams)
        return scalars | means, clients | each
    return scalars, clients


def _part(federation: Federation, examples: Array | int | None) -> _Part:
    size = len(federation.test.y)
    order = jnp.arange(size, dtype=jnp.int32) if federation.test_order is None else federation.test_order
    return _Part(federation.test, order, jnp.asarray(size if examples is None else examples, jnp.int32))


def _named(kind: str, score: testing.Score) -> Scalars:
    """Accuracy, loss and metrics of a finished score."""
    accuracy, loss = score.mean()
    metrics = {f"{kind}_{name}": values for name, values in score.metrics.items()}
    return {f"{kind}_accuracy": accuracy, f"{kind}_loss": loss, **metrics}


def _validation(test: _Test, state: State, trained: jax.Array, examples: Examples) -> Scalars:
    if test.has_central:
        return _named("validation", test.finished(_central(test, examples)))
    everything = whole(examples)
    part = _Part(examples, everything.order, everything.count)
    score, votes = _personal(test, state, trained, part, votes=test.has_ensemble)
    if test.has_ensemble:
        return _named("validation", _ensemble(test, votes, part))
    means = {name: losses.weighted_mean(values, trained) for name, values in
             zip(("validation_accuracy", "validation_loss"), score.mean(), strict=True)}  # fmt: skip
    return means | measured_means("validation", score.metrics, trained > 0)


def _held(test: _Test, start: Array | None = None, count: Array | None = None) -> jax.Array | None:
    """[K] training examples of each label in a stretch of what clients hold; None where none is asked for."""
    if start is None or count is None:
        return None
    federation = test.moment.federation
    return label_counts(ClientData(federation.train, federation.train_holdings.order, start, count), test.classes)


def _by_holdings(test: _Test, central: testing.Score) -> dict[str, jax.Array]:
    """Of the central model, for each client [C]: the metrics that depend on what it holds."""
    layout, holdings = test.layout, test.moment.federation.train_holdings
    metrics = [metric for metric in layout.metrics if metric.holds]

    def client(shared, row):
        moment, central = shared
        held = _held(test._replace(moment=moment), *row)
        return central.finished(metrics, held).metrics, lift.Partials()

    rows = jnp.asarray(holdings.start), jnp.asarray(holdings.count)
    shared = test.moment, central
    return lift.over_clients(client, shared, rows, layout.lifting._replace(narrow=()), stage="evaluation")[0]


def _central(test: _Test, examples: Examples) -> testing.Score:
    """Sums of the central model over all of `examples`, whose batches are dealt to the devices."""
    layout = test.layout
    central: Any = test.algorithm.central  # neither None nor ENSEMBLE here

    def batch(shared, row):
        server, moment, examples = shared
        ctx = context(moment, layout.central, moment.key)
        everything = jnp.arange(len(examples.y), dtype=jnp.int32)

        def model(x):
            return check_logits(test.algorithm, "central", central(ctx, server, x), x, test.classes)

        data = ClientData(examples, everything, *row)
        return (), lift.Partials(testing.test(model, data, layout.eval_batch, layout.metrics))

    start = jnp.arange(0, len(examples.y), layout.eval_batch, dtype=jnp.int32)
    batches = start, jnp.minimum(layout.eval_batch, len(examples.y) - start)
    kind = "chunk" if layout.lifting.kind == "vmap" else layout.lifting.kind
    lifting = layout.lifting._replace(narrow=(), chunk=1, kind=kind)
    _, total = lift.over_clients(
        batch, (test.server, test.moment, examples), batches, lifting, stage="central evaluation"
    )
    return total.sum


def _model_of(test: _Test, cohort: int) -> Callable:
    """(moment, server, row) -> the model, x -> logits, that a client of this cohort predicts with."""
    layout = test.layout
    central: Any = test.algorithm.central
    personal: Any = test.algorithm.personal

    def own_model(moment, server, row):
        key = keys.stream(moment.key, "client", row.client)
        ctx = context(moment, layout.cohorts[cohort].model, key, row.client, cohort)
        return lambda x: check_logits(test.algorithm, "personal", personal(ctx, server, row.state, x), x, test.classes)

    def central_model(moment, server, row):
        ctx = context(moment, layout.central, moment.key)
        return lambda x: check_logits(test.algorithm, "central", central(ctx, server, x), x, test.classes)

    return own_model if test.has_personal else central_model


def _clients_tests(
    test: _Test, state: State, trained: jax.Array, part: _Part
) -> tuple[testing.Score | None, testing.Score | None, Any]:
    """Scores [C] of each client on its own test part, and on the test set; the ensemble's `_Votes`; None for neither.

    Both tests are turns of one loop, so that each cohort's model is compiled for them once.
    """
    layout = test.layout
    in_full = test.has_personal and layout.full_eval
    votes = in_full and test.has_ensemble and layout.central_eval
    if votes:
        own = _own_parts(test, state, None) if layout.own_eval else None
        local, total = _personal(test, state, trained, part, votes=True)
        return None if own is None else own[0], local, total
    if layout.own_eval:
        own = _own_parts(test, state, part if in_full else None)
        return own[0], own[1] if in_full else None, None
    return None, _personal(test, state, trained, part, votes=False)[0] if in_full else None, None


def _own_parts(test: _Test, state: State, part: _Part | None) -> list[testing.Score]:
    """Scores [C] of each client on its own test part, and of its personal model on `part` of the test set, if any."""
    federation, layout, scores = test.moment.federation, test.layout, []
    order, count, first = federation.test_holdings.order, jnp.int32(0), len(federation.test_holdings.order)
    if part is not None:
        order, count = jnp.concatenate([order, part.order]), part.count
    for j, rows_of_cohort in enumerate(layout.slices):
        model = _model_of(test, j)

        def client(shared, row_and_holds, model=model):
            (server, moment, order, count), (row, holds) = shared, row_and_holds
            predict, held = model(moment, server, row), _held(test._replace(moment=moment), *holds)

            def one(turn):
                data = ClientData(moment.federation.test, order, *turn)
                score = testing.test(predict, data, layout.own_batch, layout.metrics)
                return score.finished(layout.metrics, held)

            own = jnp.asarray(row.start), jnp.asarray(row.count)
            if part is None:
                return jax.tree.map(lambda x: x[None], one(own)), lift.Partials()
            common = jnp.full_like(own[0], first), jnp.where(row.active, count, 0)  # nothing for rows of padding
            both = jax.tree.map(lambda *x: jnp.stack(x), own, common)
            return lax.scan(lambda _, turn: ((), one(turn)), (), both)[1], lift.Partials()

        rows = rows_of(federation, federation.test_holdings, rows_of_cohort, state.clients[j])
        lifting = layout.lifting if part is None else layout.lifting._replace(narrow=())
        score, _ = lift.over_clients(
            client, (test.server, test.moment, order, count), (rows, _holds(test, rows_of_cohort)), lifting,
            storage=layout.storages[j],
            stage="evaluation", names=rows.client,
        )  # fmt: skip
        scores.append(score)
    together = jax.tree.map(lambda *x: jnp.concatenate(x), *scores)  # [C, 1 or 2]
    own, *common = [jax.tree.map(lambda x, i=i: x[:, i], together) for i in range(1 if part is None else 2)]
    of_test_set = {metric.name for metric in layout.metrics if metric.holds}
    return [own._replace(metrics={n: v for n, v in own.metrics.items() if n not in of_test_set}), *common]


def _personal(test: _Test, state: State, trained: jax.Array, part: _Part, *, votes: bool) -> tuple[testing.Score, Any]:
    """Score [C] of each client's own model on `part`, and the ensemble's `_Votes`, if asked for."""
    federation, layout = test.moment.federation, test.layout
    scores, totals = [], []
    for j, rows_of_cohort in enumerate(layout.slices):
        model = _model_of(test, j)

        def client(shared, row_and_more, model=model):
            (server, moment, part), (row, trained, holds) = shared, row_and_more
            predict, held = model(moment, server, row), _held(test._replace(moment=moment), *holds)
            data = ClientData(part.examples, part.order, jnp.int32(0), part.count)
            if not votes:
                score = testing.test(predict, data, layout.eval_batch, layout.metrics)
                return score.finished(layout.metrics, held), lift.Partials()
            logits = testing.predict_first(predict, data, len(part.order), layout.eval_batch)
            score = testing.score(logits, *_targets(part), layout.metrics).finished(layout.metrics, held)
            return score, lift.Partials(_Votes(trained * jax.nn.softmax(logits), trained))

        rows = rows_of(federation, federation.test_holdings, rows_of_cohort, state.clients[j])
        score, total = lift.over_clients(
            client, (test.server, test.moment, part), (rows, trained[rows_of_cohort], _holds(test, rows_of_cohort)),
            layout.lifting._replace(narrow=()), storage=layout.storages[j], stage="evaluation", names=rows.client,
        )  # fmt: skip
        scores.append(score)
        totals.append(total)
    return jax.tree.map(lambda *x: jnp.concatenate(x), *scores), lift.combine(*totals).sum


def _holds(test: _Test, rows: slice) -> Any:
    """Where the training examples of each of these clients begin, and how many they are, [C_j] each, if need be."""
    holdings = test.moment.federation.train_holdings
    asked = any(metric.holds for metric in test.layout.metrics)
    return (jnp.asarray(holdings.start[rows]), jnp.asarray(holdings.count[rows])) if asked else ()


def _targets(part: _Part) -> tuple[jax.Array, jax.Array]:
    """Labels [M] in the order of `part`, and weights [M] of 1 for those that belong to it."""
    size = len(part.order)
    return jnp.asarray(part.examples.y)[part.order], (jnp.arange(size) < part.count).astype(jnp.float32)


def _ensemble(test: _Test, votes: Any, part: _Part) -> testing.Score:
    """The finished score of the mean of softmax outputs."""
    logits = jnp.log(jnp.maximum(votes.total / jnp.maximum(votes.voters, 1), _CERTAIN))
    return test.finished(testing.score(logits, *_targets(part), test.layout.metrics))
