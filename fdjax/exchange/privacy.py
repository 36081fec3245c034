"""Differential privacy of clients: what each of them adds to a sum is clipped, and the sum gets Gaussian noise.

McMahan, Ramage, Talwar, Zhang, "Learning Differentially Private Recurrent Language Models" (ICLR 2018), for any
exchange that is reduced by a sum. With S = hparam `clip`, z = `noise_multiplier`, w what was broadcast, and x_k what
client k adds to the sum, all leaves of it taken as one vector:

    clipped:  c(x_k) = w + min(1, S / |x_k - w|) (x_k - w)           w = 0 where nothing of that form was broadcast
    noised:   sum_k (c(x_k) - w) + N(0, (z S)^2)
    mean:     w + (noised sum) / N                                   N a number that is public, `number`

- Clients count alike: a weight n_k is private itself.
- A mean is divided by the number of clients that is expected, and not by how many came. That number is private where
  each client comes by itself with probability q (Poisson), and what one client changes would not be bounded by S / N
  any more; with N = q C the mean is unbiased (the paper's first estimator). Where the number is fixed both are the
  same, but for clients without examples, which count as ones that upload w.
- Any other sum is clipped around 0 and noised whole, its counts with it; `finish` sees nothing else.
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
from fdjax.exchange.reductions import Averaged, sends_nothing
from fdjax.exchange.traffic import Known
from fdjax.exchange.wrappers import require_sum
from fdjax.types import Array, PyTree

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
            center = _center(sent.received.tree, part.value)
            return part._replace(value=clipped(part.value, center, ctx.hparams["clip"], name))
        return clipped(part, jax.tree.map(jnp.zeros_like, part), ctx.hparams["clip"], name)

    def finish(ctx, total):
        deviation = noise_deviation(ctx)
        if not isinstance(total, Averaged):
            return _Summary(reduction.finish(ctx, noised(ctx, total, deviation)))
        mean = Averaged(noised(ctx, total.value, deviation), jnp.float32(number))
        return _Summary(reduction.finish(ctx, mean), (number - total.weight) / number)

    @functools.wraps(exchange.server)
    def server(ctx, server, summary):
        tree, absent = summary
        if absent is not None:
            center = _center(exchange.broadcast(ctx.at("center"), server).shared, tree)
            tree = jax.tree.map(lambda x, w: x + absent * w, tree, center)
        return exchange.server(ctx, server, tree)

    return exchange._replace(
        client=client, reduce=Reduction(partial, finish), server=server, releases=(GaussianRelease(),), name=name
    )


def locally_private(exchange: Exchange) -> Exchange:
    """`exchange` whose clients clip their uploads and add noise themselves: the server sees nothing else.

    Whatever the reduction, whose clients count alike: N(0, (z S)^2) is added to every upload, clipped as above. A mean
    of n uploads has the n-th part of that variance; a private sum would have the n-th part of this one.
    """
    if sends_nothing(exchange):
        return exchange
    name = exchange.label

    @functools.wraps(exchange.client)
    def client(ctx, received, state, data):
        state, upload, metrics = exchange.client(ctx, received, state, data)
        near = clipped(upload.tree, _center(received.shared, upload.tree), ctx.hparams["clip"], name)
        sent = noised(ctx.at("own noise"), near, noise_deviation(ctx))
        return state, upload._replace(tree=sent), metrics

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


def _center(received: PyTree, value: PyTree) -> PyTree:
    """What was received in the form of `value`; entry by entry of a dict; zeros for what nothing was received for."""
    if isinstance(received, dict) and isinstance(value, dict) and received.keys() != value.keys():
        return {name: _center(received.get(name, ()), leaves) for name, leaves in value.items()}
    alike = jax.tree.structure(received) == jax.tree.structure(value) and all(
        jnp.shape(a) == jnp.shape(b) and jnp.result_type(a) == jnp.result_type(b)
        for a, b in zip(jax.tree.leaves(received), jax.tree.leaves(value), strict=True)
    )
    return received if alike else jax.tree.map(jnp.zeros_like, value)
