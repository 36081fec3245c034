"""SCARLET's cache of soft labels: what was agreed on lately is neither asked for nor sent again.

Azuma, Nishio, Kitagawa, Nakano, Tanimura, "Soft-Label Caching and Sharpening for Communication-Efficient Federated
Distillation" (2025), SCARLET, of the laboratory of DS-FL; we had its code and not the paper. The server
keeps a table of labels and of the round t(x) in which each was made. In round t, of the examples o_t:

    asked for:  x without a label, or with t - t(x) > D, D = hparam `cache_rounds`
    agreed on:  the mean of what clients say of x if it was asked for, else the one in the table; then both learn these
    told:       x with a label, as always, unless that client has just this one from before

D = 0 asks for everything, and is the method without a cache. Shapes are static: all that a client would say is computed
and masked, so bytes fall and time does not.

Sent down: the ids and a bit for each, whether it is asked for; up: 4K for each that is. Then down: 4K for each label
that the client does not have, and a bit for each, whether it is there. The server knows what it sent to whom, so this
needs no words; clients who were away are sent what they missed, when it is used.

Deviations from the code: it asks again at an age of D, where ours is above D; at an age of D exactly its server learns
a new label and its clients the old one; and the label that replaces an expired one is not kept, so that an example has
to be asked for twice. A client who was away fails there. What we keep is the mean before it is sharpened.

DS-FL on a quarter of the embedded MNIST, Dirichlet(0.1), 10 clients, 250 of 500 proxy examples a round, 20 rounds,
three seeds: the central model has 66.7, 59.8, 70.0 % without a cache; 67.0, 59.1, 70.1 with D = 2 and 0.52 of the
bytes up (0.57 down); 64.3, 60.6, 66.1 with D = 5, 0.31 (0.38); 42.7, 43.9, 42.5 with D = 50, 0.10 (0.19): then
everything is labelled in the first rounds, by models that knew little, and never again. So the default, the code's for
hundreds of rounds, is too long for a short run.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fdjax.contract import Algorithm, Broadcast, Exchange
from fdjax.exchange import proxy, traffic
from fdjax.method import HParam, Task
from fdjax.types import Array, PyTree

OPTION = {"soft_label_cache": ("off", "on")}
HPARAM = {
    "cache_rounds": HParam(
        50, high=2**30, integer=True, help="rounds for which a soft label is kept", only=("soft_label_cache", "on")
    )
}
_NEVER = -1


class Cache(NamedTuple):
    """Labels of proxy examples, and the rounds in which they were made."""

    labels: jax.Array  # [M, K]
    made: jax.Array  # [M] int32, -1 for none


class Server(NamedTuple):
    """The server's state of the method, and its cache."""

    state: PyTree
    cache: Cache


class Client(NamedTuple):
    """A client's state of the method, and of which round the label is that it has of each example."""

    state: PyTree
    held: jax.Array  # [M] int32, -1 for none; the labels themselves are the server's of that round


def fresh(made: Array, now: Array, rounds: Array) -> jax.Array:
    """Whether labels that were `made` [n] are at most so many rounds old."""
    return (made != _NEVER) & (now - made <= rounds)


def cached(task: Task, algorithm: Algorithm) -> Algorithm:
    """The algorithm with a cache.

    Its rounds have two exchanges: ids down and values [n, K] up, reduced to values [n, K]; what came of them down, with
    the ids as what is known.
    """
    ask, tell = algorithm.round
    central, personal = algorithm.central, algorithm.personal
    empty = Cache(jnp.zeros((task.proxy_size, task.classes)), jnp.full(task.proxy_size, _NEVER, jnp.int32))
    params_of = algorithm.params_of_client
    return algorithm._replace(
        init_server=lambda ctx, params: Server(algorithm.init_server(ctx, params), empty),
        init_client=lambda ctx, params: Client(algorithm.init_client(ctx, params), empty.made),
        round=(_asking(ask), _telling(tell)),
        central=(lambda ctx, server, x: central(ctx, server.state, x)) if callable(central) else central,
        personal=None if personal is None else lambda ctx, server, own, x: personal(ctx, server.state, own.state, x),
        model_of=None if params_of is None else lambda ctx, server, own: params_of(ctx, server.state, own.state),
    )


def _asking(exchange: Exchange) -> Exchange:
    def still_good(ctx, server, ids):
        return fresh(server.cache.made[proxy.positions(ctx.proxy, ids)], ctx.round, ctx.hparams["cache_rounds"])

    @functools.wraps(exchange.broadcast)
    def broadcast(ctx, server):
        inner = exchange.broadcast(ctx, server.state)
        return inner._replace(shared=(inner.shared, still_good(ctx, server, inner.shared)))

    @functools.wraps(exchange.client)
    def client(ctx, received, own, data):
        ids, good = received.shared
        state, upload, metrics = exchange.client(ctx, received._replace(shared=ids), own.state, data)
        asked = jnp.sum(~good)
        size = asked * (traffic.size(upload.tree) / len(good))
        counted = upload._replace(bytes=size, bytes_received=float(traffic.size(ids) + traffic.flags(len(good))))
        return own._replace(state=state), counted, metrics | {"labels_asked": asked / len(good)}

    @functools.wraps(exchange.server)
    def server(ctx, server, mean):
        ids = exchange.broadcast(ctx.at("ids"), server.state).shared
        at, good = proxy.positions(ctx.proxy, ids), still_good(ctx, server, ids)
        labels = jnp.where(good[:, None], server.cache.labels[at], mean)
        made = jnp.where(good, server.cache.made[at], ctx.round)
        cache = Cache(server.cache.labels.at[at].set(labels), server.cache.made.at[at].set(made))
        state, metrics = exchange.server(ctx, server.state, labels)
        return Server(state, cache), metrics

    return exchange._replace(broadcast=broadcast, client=client, server=server, name=exchange.label, shares="")


def _telling(exchange: Exchange) -> Exchange:
    @functools.wraps(exchange.broadcast)
    def broadcast(ctx, server):
        inner = exchange.broadcast(ctx, server.state)
        return Broadcast(inner.shared, inner.own, (inner.known, server.cache.made))

    @functools.wraps(exchange.client)
    def client(ctx, received, own, data):
        ids, made = received.known
        state, upload, metrics = exchange.client(ctx, received._replace(known=ids), own.state, data)
        at = proxy.positions(ctx.proxy, ids)
        missed = own.held[at] != made[at]
        size = jnp.sum(missed) * (traffic.size(received.shared) / len(at)) + traffic.flags(len(at))
        return Client(state, own.held.at[at].set(made[at])), upload._replace(bytes_received=size), metrics

    @functools.wraps(exchange.server)
    def server(ctx, server, summary):
        state, metrics = exchange.server(ctx, server.state, summary)
        return server._replace(state=state), metrics

    return exchange._replace(broadcast=broadcast, client=client, server=server, name=exchange.label)
