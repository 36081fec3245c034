"""Differential privacy of clients: what each of them adds to a sum is clipped, and the sum gets Gaussian noise.

McMahan, Ramage, Talwar, Zhang, "Learning Differentially Private Recurrent Language Models" (ICLR 2018), for any
exchange that is reduced by a sum. With S = hparam `clip`, z = `noise_multiplier`, w what was broadcast, and x_k what
client k adds to the sum, all leaves of it taken as one vector:

    clipped:  c(x_k) = w + min(1, S / |x_k - w|) (x_k - w)           w = 0 where no params of that form were sent
    noised:   sum_k (c(x_k) - w) + N(0, (z S)^2)
    mean:     w + (noised sum) / N                                   N a number that is public, `number`

- Clients count alike: a weight n_k is private itself.
- A mean is divided by the number of clients that is expected, and not by how many came. That number is private where
  each client comes by itself with probability q (Poisson), and what one client changes would not be bounded by S / N
  any more; with N = q C the mean is unbiased (the paper's first estimator). Where the number is fixed both are the
  same, but for clients without examples, which count as ones that upload w.
- Params alone are clipped around what was received: that itself, or its entry `params`. Outputs and sums by label are
  clipped around 0, whatever was received. With --privacy=local params that the server sent to this client alone count
  too; FedZKT's clients receive none before their second round, so what they send in the first is clipped around 0.
- Any other sum is clipped around 0 and noised whole, its counts with it; `finish` sees nothing else.
- A label of which the noised count is no more than twice the deviation of the noise is taken for one that nobody holds.
  This sees noised numbers alone, so it costs nothing, and is ours.
- An upload that is not finite counts as w: one client must not be able to spoil the sum.

Floats leak in their last bits what real numbers would not, and JAX's generator is no cryptographic one: this simulates
a private system, and is none. Metrics of the clients (`train_loss`) are the simulator's own, and are not private.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fdjax import keys
from fdjax.contract import Context, Exchange, Reduction, Stack
from fdjax.errors import InputError
from fdjax.exchange.reductions import Averaged, ByLabel, sends_nothing
from fdjax.exchange.traffic import Known
from fdjax.exchange.wrappers import require_sum
from fdjax.types import Array, PyTree

SURE = 2.0  # deviations of a noised count above which a label is held
_ADVICE = "use --privacy=local, or a method whose uploads are averaged"


class GaussianRelease(NamedTuple):
    """In `Exchange.releases`: a sum with Gaussian noise of `noise_multiplier` times what one client can add."""

    multiplier: str = "noise_multiplier"  # the hyperparameter
    of_sum: bool = True  # whether the server is to see the sum alone; otherwise clients add noise to their uploads


class OwnRelease(NamedTuple):
    """In `Exchange.releases`: what a method makes private by itself, by Gaussian noise and once, without --privacy."""

    what: str  # such as "certainty scores"
    relation: str  # between neighbouring federations, in words
    delta: str  # the hyperparameter
    multiplier: Callable[[Mapping[str, float], np.ndarray], float]
    # (hparams by name, n_k [C]) -> deviation of the noise over the sensitivity, where it is least; 0 without noise


class _Sent(NamedTuple):
    """An upload, and what its sender had received, around which it is clipped."""

    tree: PyTree
    received: Known


class _Summary(NamedTuple):
    """What the method's own `finish` made of noised partials, and the share of expected clients that did not come."""

    tree: PyTree
    absent: Any = None  # None for what is no mean


def private(exchange: Exchange, number: float) -> Exchange:
    """`exchange` whose sum is clipped and noised; hparams `clip` and `noise_multiplier` are read in every round.

    `number` is how many clients are expected. An exchange in which nothing is sent stays as it is. With no noise and an
    infinite clip it is the exchange itself, bit by bit, where clients count alike and all come.

    Raises InputError for an exchange that is not reduced by one sum.
    """
    if sends_nothing(exchange):
        return exchange
    reduction, name = require_sum(exchange, "--privacy=client", _ADVICE), exchange.label

    @functools.wraps(exchange.client)
    def client(ctx, received, state, data):
        state, upload, metrics = exchange.client(ctx, received, state, data)
        return state, upload._replace(tree=_Sent(upload.tree, Known(received.shared))), metrics

    def partial(ctx, sent, weight):
        part = reduction.partial(ctx, sent.tree, (weight > 0).astype(jnp.float32))
        if isinstance(part, Averaged):
            center = _center(part.value, sent.received.tree)
            return part._replace(value=clipped(part.value, center, ctx.hparams["clip"], name))
        return clipped(part, jax.tree.map(jnp.zeros_like, part), ctx.hparams["clip"], name)

    def finish(ctx, total):
        deviation = noise_deviation(ctx)
        if not isinstance(total, Averaged):
            return _Summary(reduction.finish(ctx, _held(noised(ctx, total, deviation), deviation)))
        mean = Averaged(noised(ctx, total.value, deviation), jnp.float32(number))
        return _Summary(reduction.finish(ctx, mean), (number - total.weight) / number)

    @functools.wraps(exchange.server)
    def server(ctx, server, summary):
        tree, absent = summary
        if absent is not None:
            center = _center(tree, exchange.broadcast(ctx.at("center"), server).shared)
            tree = jax.tree.map(lambda x, w: x + absent * w, tree, center)
        return exchange.server(ctx, server, tree)

    return exchange._replace(
        client=client, reduce=Reduction(partial, finish), server=server, releases=(GaussianRelease(),), name=name
    )


def locally_private(exchange: Exchange) -> Exchange:
    """`exchange` whose clients clip their uploads and add noise themselves: the server sees nothing else.

    Whatever the reduction, whose clients count alike: N(0, (z S)^2) is added to every upload, clipped as above. A mean
    of n uploads has the n-th part of that variance; a private sum would have the n-th part of this one. Every number is
    noised, so all of the arrays are sent and counted, also of a method that would have sent them coded or in part.
    """
    if sends_nothing(exchange):
        return exchange
    name = exchange.label

    @functools.wraps(exchange.client)
    def client(ctx, received, state, data):
        state, upload, metrics = exchange.client(ctx, received, state, data)
        center, deviation = _center(upload.tree, received.shared, received.own), noise_deviation(ctx)
        near = clipped(upload.tree, center, ctx.hparams["clip"], name)
        sent = _held(noised(ctx.at("own noise"), near, deviation), deviation)
        return state, upload._replace(tree=sent, bytes=None), metrics

    reduce = exchange.reduce
    alike = _alike(reduce) if isinstance(reduce, Reduction) else {label: _alike(r) for label, r in reduce.items()}
    return exchange._replace(client=client, reduce=alike, releases=(GaussianRelease(of_sum=False),), name=name)


def _alike(reduction: Reduction) -> Reduction:
    """The reduction of clients that count alike, for which the server need not know how much each holds."""

    def partial(ctx, upload, weight):
        return reduction.partial(ctx, upload, (weight > 0).astype(jnp.float32))

    def finish(ctx, combined):
        if isinstance(combined, Stack):
            combined = combined._replace(weight=(combined.weight > 0).astype(jnp.float32))
        return reduction.finish(ctx, combined)

    return reduction._replace(partial=partial, finish=finish)


def clipped(value: PyTree, center: PyTree, clip: Array, name: str = "exchange") -> PyTree:
    """c + min(1, S / |x - c|) (x - c) over all leaves as one vector: x itself, bit by bit, within S of c.

    Raises InputError for leaves that are no real numbers.
    """
    for leaf in jax.tree.leaves(value):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise InputError(
                f"--privacy clips real numbers, but exchange {name} sends {jnp.result_type(leaf)}; send float32, or "
                "use another method"
            )
    difference = jax.tree.map(jnp.subtract, value, center)
    norm = jnp.sqrt(sum((jnp.sum(jnp.square(d)) for d in jax.tree.leaves(difference)), start=jnp.float32(0)))
    scale = jnp.where(norm > clip, clip / jnp.where(norm > clip, norm, 1), 1)

    def near(x, c, d):
        return jnp.where(jnp.isfinite(norm), jnp.where(norm > clip, c + scale * d, x), c)

    return jax.tree.map(near, value, center, difference)


def noise_deviation(ctx: Context) -> jax.Array:
    """z S, and 0 for z = 0 also where nothing is clipped."""
    z, clip = ctx.hparams["noise_multiplier"], ctx.hparams["clip"]
    return jnp.where(z > 0, z * clip, 0)


def noised(ctx: Context, tree: PyTree, deviation: Array) -> PyTree:
    """The tree with N(0, deviation^2) added to every number of it, each leaf by a key of its own."""
    leaves, structure = jax.tree.flatten(tree)
    noise = [deviation * jax.random.normal(keys.stream(ctx.key, "noise", i), x.shape) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, [x + more.astype(x.dtype) for x, more in zip(leaves, noise, strict=True)])


def _center(value: PyTree, shared: PyTree, own: PyTree = ()) -> PyTree:
    """The params that were received in the form of `value`; entry by entry of a dict; zeros for what has none.

    `shared` is what all clients received, or has it as its entry `params`; so is `own`, which may be a tuple with it.
    """
    parts = [*own.values()] if isinstance(own, dict) else [*own] if isinstance(own, tuple) else []
    for received in (shared, shared.get("params") if isinstance(shared, dict) else None, own, *parts):
        if _same_params(value, received):
            return received
    if isinstance(value, dict):
        entries = shared if isinstance(shared, dict) else {}
        return {name: _center(leaves, entries.get(name, ())) for name, leaves in value.items()}
    return jax.tree.map(jnp.zeros_like, value)


def _same_params(value: PyTree, received: PyTree) -> bool:
    """Whether both are params of one net: trees alike. An array by itself is none, and neither are sums by label."""
    structure = jax.tree.structure(value)
    if jax.tree.structure(received) != structure or jax.tree_util.treedef_is_leaf(structure):
        return False
    return not any(map(_by_label, jax.tree.leaves(value, is_leaf=_by_label))) and all(
        jnp.shape(a) == jnp.shape(b) and jnp.result_type(a) == jnp.result_type(b)
        for a, b in zip(jax.tree.leaves(received), jax.tree.leaves(value), strict=True)
    )


def _by_label(node: PyTree) -> bool:
    return isinstance(node, ByLabel)


def _held(noisy: PyTree, deviation: Array) -> PyTree:
    """Sums by label without those of labels of which the noise may be all that was counted."""

    def sure(node):
        if not _by_label(node):
            return node
        return node._replace(count=jnp.where(node.count > SURE * deviation, node.count, 0))

    return jax.tree.map(sure, noisy, is_leaf=_by_label)
