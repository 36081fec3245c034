"""What methods that exchange outputs on proxy data have in common: which examples, their targets, and learning these.

Of M proxy examples a round uses n, drawn without replacement and announced by ids of 4 bytes each. Where n = M ids say
nothing and none are sent: they are () then, here and in a server's state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fdjax import keys, method
from fdjax.client import losses, testing
from fdjax.client.data import Targets
from fdjax.client.training import fit, from_probabilities, of_stage
from fdjax.contract import Broadcast, ClientWork, Context, Exchange, InitServer, Reduction, Upload
from fdjax.errors import InputError
from fdjax.exchange import reductions
from fdjax.method import HParam, Task
from fdjax.types import Array, Examples, PyTree

_BATCH = 256  # of predictions


class SoftLabels(NamedTuple):
    """Labels of some proxy examples, as a codec sends them."""

    ids: Any  # [n] int32, or () for all
    labels: Array  # [n, K]: probabilities, or a codec's symbols
    given: Array | bool = True  # [] bool: whether there are labels, or as yet ids alone


class Labelled(NamedTuple):
    """Values of proxy examples of which some have none, as `selection.py` has them."""

    values: jax.Array  # [n, K]; anything where there are none
    there: jax.Array  # [n] bool


class Agreement(NamedTuple):
    """A server's state: proxy examples and what the clients' outputs on them were aggregated to."""

    ids: Any  # of the round's examples
    consensus: Any  # [n, K] for the examples of the last exchange of outputs; `Labelled` if they are selected


def draw_ids(task: Task, key: jax.Array, labels: Array | None = None) -> Any:
    """Ids [n] int32 of the proxy examples of a round, or () where it uses all of them. The key is consumed.

    Given `labels` [M] they are stratified: of M_l examples of label l, floor or ceil of n M_l / M, and every example
    with the same probability n / M. This is systematic sampling of the examples in order of labels: one in each of n
    stretches of M / n, all at the same random place.
    """
    n, size = task.proxy_per_round, task.proxy_size
    if n == size:
        return ()
    if labels is None:
        return jax.random.choice(key, size, (n,), replace=False).astype(jnp.int32)
    shuffled = jax.random.permutation(keys.stream(key, "order"), size).astype(jnp.int32)
    by_label = shuffled[jnp.argsort(jnp.asarray(labels)[shuffled], stable=True)]
    start, ends = jax.random.randint(keys.stream(key, "start"), (), 0, size), np.arange(n) * size  # int64, on the host
    return by_label[(ends // n).astype(np.int32) + ((ends % n).astype(np.int32) + start) // n]


def in_two(size: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Ids of two parts of `size` proxy examples, the first of `share` of them; the same parts for every seed.

    Raises InputError if one of them has none.
    """
    first = round(share * size)
    if not 0 < first < size:
        raise InputError(
            f"--proxy_size={size}: parts of {share:g} and {1 - share:g} have {first} and {size - first} examples; each "
            "needs one, so give more"
        )
    order = np.random.default_rng(0).permutation(size).astype(np.int32)
    return np.sort(order[:first]), np.sort(order[first:])


def _draw_ids(task: Task, ctx: Context) -> Any:
    """The same, stratified if the method has the option `subset` and it says so."""
    stratified = task.options.get("subset") == "stratified"
    assert ctx.proxy is not None
    return draw_ids(task, ctx.key, ctx.proxy.y if stratified else None)


def no_agreement(task: Task) -> InitServer:
    """`init_server` of an `Agreement`: the first round's examples, and nothing that was aggregated."""
    return lambda ctx, params: Agreement(_draw_ids(task, ctx), no_labels(task))


def no_labels(task: Task) -> Any:
    """What a server keeps as the values of a round's examples before there are any: in the form of those to come."""
    nothing = jnp.zeros((task.proxy_per_round, task.classes))
    if task.options.get("selection", "off") == "off":
        return nothing
    return Labelled(nothing, jnp.zeros(task.proxy_per_round, bool))


def agree_and_learn(task: Task, reduce: Reduction, learn: ClientWork, shares: str) -> tuple[Exchange, Exchange]:
    """A round of an `Agreement`: ids down and outputs [n, K] up; then the consensus down, which clients learn.

    A client's state is its own model. Outputs are logits or their softmax, as `shares` says: "logits" or
    "probabilities". `learn` receives the consensus, and the ids as what it knows already.
    """

    def communicate(ctx, received, params, data):
        logits = predict(ctx, params, received.shared)
        return params, Upload(jax.nn.softmax(logits) if shares == "probabilities" else logits), {}

    def choose_next(ctx, server, summary):
        return server._replace(ids=_draw_ids(task, ctx)), {}

    return (
        Exchange(
            lambda ctx, server: Broadcast(server.ids), communicate, reduce,
            lambda ctx, server, mean: (server._replace(consensus=mean), {}), shares=shares,
        ),
        Exchange(
            lambda ctx, server: Broadcast(server.consensus, known=server.ids), learn, reductions.nothing(), choose_next
        ),
    )  # fmt: skip


def positions(proxy: Examples, ids: Any) -> jax.Array:
    """The same ids as an array, also where they are ()."""
    return jnp.arange(len(proxy.y), dtype=jnp.int32) if isinstance(ids, tuple) else ids


def targets(ctx: Context, ids: Any, values: PyTree) -> Targets:
    """The proxy examples `ids` with targets [n, ...], to be learned from; of `Labelled` ones those that are there."""
    assert ctx.proxy is not None
    at = positions(ctx.proxy, ids)
    if not isinstance(values, Labelled):
        return Targets(ctx.proxy, at, values)
    first = jnp.argsort(~values.there, stable=True)
    return Targets(ctx.proxy, at[first], values.values[first], jnp.sum(values.there))


def each(function: Callable[[jax.Array], jax.Array], values: Any) -> Any:
    """`function` of values [n, K], also of `Labelled` ones."""
    return values._replace(values=function(values.values)) if isinstance(values, Labelled) else function(values)


def mean_of(function: Callable[[jax.Array], jax.Array], values: Any) -> jax.Array:
    """The mean of `function`, [n, K] -> [n], over the values that are there, 0 of none."""
    if isinstance(values, Labelled):
        return losses.weighted_mean(function(values.values), values.there.astype(jnp.float32))
    return jnp.mean(function(values))


def predict(ctx: Context, params: PyTree, ids: Any) -> jax.Array:
    """Logits [n, K] of the context's model on the proxy examples `ids`."""
    assert ctx.proxy is not None
    chosen = ctx.proxy
    if not isinstance(ids, tuple):
        chosen = chosen._replace(x=chosen.x[ids], y=chosen.y[ids])
    return testing.predict(lambda x: ctx.model.apply(params, x), chosen, _BATCH)


def label(ctx: Context, params: PyTree, ids: Any) -> SoftLabels:
    """What the context's model says of the proxy examples `ids`: its softmax outputs [n, K]."""
    return SoftLabels(ids, jax.nn.softmax(predict(ctx, params, ids)), jnp.bool(True))


def distillation(epochs: int) -> dict[str, HParam]:
    """The hyperparameters of `distil`, which is to take so many epochs unless it is told."""
    return {
        "distill_learning_rate": method.learning_rate("learning_rate", "learning rate of the distillation"),
        "distill_epochs": method.epochs(epochs, "epochs of the distillation, of clients and server"),
    }


def distil(
    task: Task, ctx: Context, params: PyTree, ids: Any, labels: Any, given: Array | None = None
) -> tuple[PyTree, jax.Array]:
    """`fit` of CE(label, softmax(z)), without temperature, to soft labels [n, K] (or `Labelled`) of proxy examples.

    Nothing is learned where they are not `given` ([] bool). hparams are those of `distillation`. The context's key is
    consumed.
    """
    stage = of_stage(ctx, "distill")
    if given is not None:
        stage["epochs"] = jnp.where(given, stage["epochs"], 0)
    return fit(task.distilling, from_probabilities(ctx.model), params, targets(ctx, ids, labels), ctx, **stage)


def confusion(task: Task, ctx: Context, params: PyTree) -> jax.Array:
    """[K, K]: the share of the examples of class c that the context's model takes for class j; a row of 0 without any.

    Of all labelled proxy data, or of a fresh subset (`--proxy_per_round`); the context's key is consumed.
    """
    assert ctx.proxy is not None
    ids = draw_ids(task, ctx.at("subset").key)
    taken_for = jax.nn.one_hot(jnp.argmax(predict(ctx, params, ids), -1), task.classes)
    total, count = reductions.sum_by_label(taken_for, ctx.proxy.y[positions(ctx.proxy, ids)], task.classes)
    return jnp.asarray(total / jnp.maximum(count, 1)[:, None])
