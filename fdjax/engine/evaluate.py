"""Tests of the central model, of every client's own model, and of their ensemble; one compiled call."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fdjax.client import local, losses
from fdjax.engine import lift
from fdjax.engine.layout import Layout, Row, State, compiler, rows_of
from fdjax.errors import InputError
from fdjax.types import Algorithm, Cohort, Federation

Evaluate = Callable[[State, Federation], tuple[dict[str, jax.Array], dict[str, jax.Array]]]


def evaluation(algorithm: Algorithm, layout: Layout) -> Evaluate:
    """`evaluate(state, federation) -> (scalars, values of each client [C])`.

    Central: the central model, or the ensemble, on the test set. Local: the mean over clients of their own model there.
    Own: the client's model (the central one for methods without personal ones) on the client's own test part. For a
    method with `predict` that is a client's own model. Validation, where the federation has such examples: the central
    model or the ensemble on them, or else the mean over clients of their own model.
    """
    personal, predict = algorithm.personal, algorithm.predict
    has_own = personal is not None or predict is not None
    if algorithm.central is None and not has_own:
        raise InputError(f"{algorithm.name} names neither a central model nor personal ones: nothing can be tested")
    if algorithm.ensemble and (not has_own or not layout.full_eval):
        raise InputError(f"{algorithm.name} tests an ensemble of personal models: use --local_eval=full")
    slices, lifting = layout.slices, layout.lifting
    alike = lifting._replace(narrow=())  # for tests that are the same work for every client

    def model_of(j: int, cohort: Cohort):
        """(server state, client state) -> (apply, params) of whom a client predicts with."""
        if predict is not None:
            both = predict(j)
            return lambda server, state: (lambda params, x: both(params[0], params[1], x), (server, state))
        if (params_of := personal) is not None:
            return lambda server, state: (cohort.model.apply, params_of(state))
        assert algorithm.central is not None
        central, central_params = algorithm.central
        return lambda server, state: (central.apply, central_params(server))

    def central_turn(shared, row):
        params, examples = shared
        assert algorithm.central is not None
        everything = jnp.arange(len(examples.y), dtype=jnp.int32)
        data = local.ClientData(examples, everything, *row)
        return (), local.test(algorithm.central[0].apply, params, data, layout.eval_batch)

    def own_of(j: int, cohort: Cohort):
        model = model_of(j, cohort)

        def one(shared, row: Row):
            server, federation = shared
            apply, params = model(server, row.state)
            data = local.ClientData(federation.test, federation.test_holdings.order, row.start, row.count)
            return local.test(apply, params, data, layout.own_batch), ()

        return one

    def full_of(j: int, cohort: Cohort):
        model = model_of(j, cohort)

        def one(shared, row):
            server, examples = shared
            row, trained = row
            apply, params = model(server, row.state)
            data = local.everything(examples)
            vote = ()
            if algorithm.ensemble:
                vote = trained * jax.nn.softmax(local.predict(apply, params, examples, layout.eval_batch)), trained
            return local.test(apply, params, data, layout.eval_batch), vote

        return one

    owns, fulls = ([of(j, cohort) for j, cohort in enumerate(layout.cohorts)] for of in (own_of, full_of))

    def central_on(state, examples):
        assert algorithm.central is not None
        central = algorithm.central[1](state.server)
        batches = _split(len(examples.y), layout.eval_batch)
        by_batch = alike._replace(chunk=1, kind="chunk" if lifting.kind == "vmap" else lifting.kind)
        _, score = lift.over_clients(central_turn, (central, examples), batches, by_batch, stage="central evaluation")
        return score.mean()

    def each_on(state, server, federation, trained, examples):
        """Accuracy and loss [C] of each client's own model on all of `examples`, and the ensemble's sums."""
        scores, votes = [], []
        for j, part in enumerate(slices):
            rows = rows_of(federation, federation.test_holdings, part, state.clients[j])
            names = {"stage": "evaluation", "names": rows.client}
            score, vote = lift.over_clients(fulls[j], (server, examples), (rows, trained[part]), alike, **names)
            scores.append(score)
            votes.append(vote)
        return jax.tree.map(lambda *x: jnp.concatenate(x), *scores).mean(), jax.tree.map(
            lambda *x: sum(x[1:], x[0]), *votes
        )

    @compiler(layout)
    def evaluate(state, federation):
        test, validation, scalars, per_client = federation.test, federation.validation, {}, {}
        # Only what clients predict with: not the server's whole state to every device.
        server = state.server if predict is not None or personal is None else ()
        if algorithm.central is not None:
            scalars["central_accuracy"], scalars["central_loss"] = central_on(state, test)
        trained = jnp.asarray(federation.train_holdings.count > 0, jnp.float32)
        own = []
        for j, part in enumerate(slices):
            rows = rows_of(federation, federation.test_holdings, part, state.clients[j])
            names = {"stage": "evaluation", "names": rows.client}
            own.append(lift.over_clients(owns[j], (server, federation), rows, lifting, **names)[0])
        own_accuracy, own_loss = jax.tree.map(lambda *x: jnp.concatenate(x), *own).mean()
        per_client |= {"own_accuracy": own_accuracy, "own_loss": own_loss}
        if not has_own:
            scalars["local_accuracy"], scalars["local_loss"] = scalars["central_accuracy"], scalars["central_loss"]
        elif layout.full_eval:
            (accuracy, loss), votes = each_on(state, server, federation, trained, test)
            per_client |= {"local_accuracy": accuracy, "local_loss": loss}
            scalars["local_accuracy"] = losses.weighted_mean(accuracy, trained)
            scalars["local_loss"] = losses.weighted_mean(loss, trained)
            if algorithm.ensemble:
                scalars["central_accuracy"], scalars["central_loss"] = _ensemble(votes, test.y)
        if validation is not None:
            if algorithm.central is not None:
                score = central_on(state, validation)
            else:
                each, votes = each_on(state, server, federation, trained, validation)
                mean = [losses.weighted_mean(x, trained) for x in each]
                score = _ensemble(votes, validation.y) if algorithm.ensemble else mean
            scalars["validation_accuracy"], scalars["validation_loss"] = score
        tested = federation.test_holdings.count > 0
        scalars |= _across_clients(own_accuracy, own_loss, tested, federation.train_holdings.count)
        return scalars, per_client

    return evaluate


def _ensemble(votes, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Accuracy and loss of the mean of softmax outputs; `votes`: their sum [M, K], and of how many."""
    total, count = votes
    logits = jnp.log(jnp.maximum(total / jnp.maximum(count, 1), 1e-30))
    return jnp.mean(losses.correct(logits, y)), jnp.mean(losses.cross_entropy(logits, y))


def _split(size: int, batch: int) -> tuple[jax.Array, jax.Array]:
    """Start and count of the batches of `[0, size)`."""
    start = jnp.arange(0, size, batch, dtype=jnp.int32)
    return start, jnp.minimum(batch, size - start)


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
