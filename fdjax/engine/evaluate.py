"""Tests of the central model, of every client's own model, and of their ensemble; one compiled call."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fdjax import keys
from fdjax.client import losses, testing
from fdjax.client.data import ClientData, whole
from fdjax.contract import ENSEMBLE, Algorithm, HParams
from fdjax.engine import lift, new_clients
from fdjax.engine.check import check_logits
from fdjax.engine.layout import Layout, State, classes_of, rows_of
from fdjax.engine.step import Moment, context
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

    @property
    def has_personal(self) -> bool:
        return self.algorithm.personal is not None

    @property
    def votes(self) -> bool:
        return self.algorithm.central is ENSEMBLE


def evaluate(
    algorithm: Algorithm, layout: Layout, state: State, federation: Federation, hparams: HParams
) -> tuple[Scalars, dict[str, jax.Array]]:
    """Scalars by name, and values of each client [C].

    Central: the central model, or the ensemble, on the test set. Local: the mean over clients of their own model there.
    Own: the client's model (the central one for methods without personal ones) on the client's own test part.
    Validation, where the federation has such examples: the central model or the ensemble on them, or else the mean over
    clients of their own model.
    """
    key = keys.stream(jax.random.wrap_key_data(state.root), "evaluate", state.round)
    moment = Moment(federation, hparams, state.round, key)
    test = _Test(algorithm, layout, moment, state.server, min(classes_of(layout, federation).values()))
    new = new_clients.never_train(layout)
    trained = jnp.asarray((federation.train_holdings.count > 0) & ~new, jnp.float32)
    scalars: Scalars = {}
    if algorithm.central is not None and not test.votes:
        scalars["central_accuracy"], scalars["central_loss"] = _central(test, federation.test)
    own_accuracy, own_loss = _own_parts(test, state)
    clients = {"own_accuracy": own_accuracy, "own_loss": own_loss}
    if not test.has_personal:
        scalars["local_accuracy"], scalars["local_loss"] = scalars["central_accuracy"], scalars["central_loss"]
    elif layout.full_eval:
        accuracy, loss, votes = _personal(test, state, trained, federation.test)
        clients |= {"local_accuracy": accuracy, "local_loss": loss}
        scalars["local_accuracy"] = losses.weighted_mean(accuracy, trained)
        scalars["local_loss"] = losses.weighted_mean(loss, trained)
        if test.votes:
            scalars["central_accuracy"], scalars["central_loss"] = _ensemble(votes, federation.test.y)
    if federation.validation is not None:
        validation = _validation(test, state, trained, federation.validation)
        scalars["validation_accuracy"], scalars["validation_loss"] = validation
    tested = federation.test_holdings.count > 0
    scalars |= _across_clients(own_accuracy, own_loss, tested & ~new, federation.train_holdings.count)
    scalars |= new_clients.as_they_are(layout, own_accuracy, own_loss, tested)
    return scalars, clients


def _validation(test: _Test, state: State, trained: jax.Array, examples: Examples) -> tuple[jax.Array, jax.Array]:
    if test.algorithm.central is not None and not test.votes:
        return _central(test, examples)
    accuracy, loss, votes = _personal(test, state, trained, examples)
    if test.votes:
        return _ensemble(votes, examples.y)
    return losses.weighted_mean(accuracy, trained), losses.weighted_mean(loss, trained)


def _central(test: _Test, examples: Examples) -> tuple[jax.Array, jax.Array]:
    """Accuracy and loss of the central model on all of `examples`, whose batches are dealt to the devices."""
    layout = test.layout
    central: Any = test.algorithm.central  # neither None nor ENSEMBLE here

    def batch(shared, row):
        server, moment, examples = shared
        ctx = context(moment, layout.central, moment.key)
        everything = jnp.arange(len(examples.y), dtype=jnp.int32)

        def model(x):
            return check_logits(test.algorithm, "central", central(ctx, server, x), x, test.classes)

        return (), lift.Partials(testing.test(model, ClientData(examples, everything, *row), layout.eval_batch))

    start = jnp.arange(0, len(examples.y), layout.eval_batch, dtype=jnp.int32)
    batches = start, jnp.minimum(layout.eval_batch, len(examples.y) - start)
    kind = "chunk" if layout.lifting.kind == "vmap" else layout.lifting.kind
    lifting = layout.lifting._replace(narrow=(), chunk=1, kind=kind)
    _, total = lift.over_clients(
        batch, (test.server, test.moment, examples), batches, lifting, stage="central evaluation"
    )
    return total.sum.mean()


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


def _own_parts(test: _Test, state: State) -> tuple[jax.Array, jax.Array]:
    """Accuracy and loss [C] of each client on its own test part."""
    federation, scores = test.moment.federation, []
    for j, part in enumerate(test.layout.slices):
        model = _model_of(test, j)

        def client(shared, row, model=model):
            server, moment = shared
            order = moment.federation.test_holdings.order
            data = ClientData(moment.federation.test, order, row.start, row.count)
            return testing.test(model(moment, server, row), data, test.layout.own_batch), lift.Partials()

        rows = rows_of(federation, federation.test_holdings, part, state.clients[j])
        score, _ = lift.over_clients(
            client, (test.server, test.moment), rows, test.layout.lifting, storage=test.layout.storages[j],
            stage="evaluation", names=rows.client,
        )  # fmt: skip
        scores.append(score)
    return jax.tree.map(lambda *x: jnp.concatenate(x), *scores).mean()


def _personal(test: _Test, state: State, trained: jax.Array, examples: Examples) -> tuple[jax.Array, jax.Array, Any]:
    """Accuracy and loss [C] of each client's own model on all of `examples`, and the ensemble's `_Votes`, if any."""
    federation, layout = test.moment.federation, test.layout
    scores, totals = [], []
    for j, part in enumerate(layout.slices):
        model = _model_of(test, j)

        def client(shared, row_and_trained, model=model):
            (server, moment, examples), (row, trained) = shared, row_and_trained
            predict, votes = model(moment, server, row), ()
            if test.votes:
                logits = testing.predict(predict, examples, layout.eval_batch)
                votes = _Votes(trained * jax.nn.softmax(logits), trained)
            return testing.test(predict, whole(examples), layout.eval_batch), lift.Partials(votes)

        rows = rows_of(federation, federation.test_holdings, part, state.clients[j])
        score, total = lift.over_clients(
            client, (test.server, test.moment, examples), (rows, trained[part]),
            layout.lifting._replace(narrow=()), storage=layout.storages[j], stage="evaluation", names=rows.client,
        )  # fmt: skip
        scores.append(score)
        totals.append(total)
    accuracy, loss = jax.tree.map(lambda *x: jnp.concatenate(x), *scores).mean()
    return accuracy, loss, lift.combine(*totals).sum


def _ensemble(votes: Any, y: Array) -> tuple[jax.Array, jax.Array]:
    """Accuracy and loss of the mean of softmax outputs."""
    logits = jnp.log(jnp.maximum(votes.total / jnp.maximum(votes.voters, 1), _CERTAIN))
    return jnp.mean(losses.correct(logits, y)), jnp.mean(losses.cross_entropy(logits, y))


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
