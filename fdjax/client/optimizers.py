"""Optimisers that go on where they were: their states kept by each client, and by the server, over fits and rounds."""

import functools
from typing import NamedTuple

import jax.numpy as jnp

from fdjax.client.trained import on_trained
from fdjax.contract import ENSEMBLE, Algorithm, Context, Exchange
from fdjax.method import Task, Training
from fdjax.types import PyTree


class Kept(NamedTuple):
    """The state of a client or of the server, and the states of its optimisers by the name of their training."""

    state: PyTree
    optimizers: dict[str, PyTree]


def with_kept_optimizers(algorithm: Algorithm, task: Task) -> Algorithm:
    """The algorithm whose fits of a client's model, and of the central model at the server, keep their optimisers.

    A training has one state, which all fits by it share; trainings of one name share one too, as a digest and a revisit
    do that have the same optimiser. These states are not sent.
    """
    params_of = algorithm.params_of_client
    at_clients, at_server = (task.training, task.distilling), (task.distilling, task.serving)

    def init_server(ctx, params):
        return Kept(algorithm.init_server(ctx, params), _first_states(at_server, params))

    def init_client(ctx, params):
        return Kept(algorithm.init_client(ctx, params), _first_states(at_clients, params))

    def predictor(function):
        if function is None or function is ENSEMBLE:
            return function
        if function is algorithm.central:
            return functools.wraps(function)(lambda ctx, server, x: function(ctx, server.state, x))
        return functools.wraps(function)(lambda ctx, server, kept, x: function(ctx, server.state, kept.state, x))

    return algorithm._replace(
        init_server=init_server,
        init_client=init_client,
        round=tuple(map(_keeping, algorithm.round)),
        setup=tuple(map(_keeping, algorithm.setup)),
        central=predictor(algorithm.central),
        personal=predictor(algorithm.personal),
        model_of=None if params_of is None else lambda ctx, server, kept: params_of(ctx, server.state, kept.state),
    )


def _first_states(trainings: tuple[Training, ...], params: PyTree) -> dict[str, PyTree]:
    return {
        t.name: on_trained(t.optimizer(jnp.float32(0), jnp.int32(0)), params, t.trained).init(params) for t in trainings
    }


def _keeping(exchange: Exchange) -> Exchange:
    """The exchange with states of optimisers beside those of clients and server."""

    @functools.wraps(exchange.broadcast)
    def broadcast(ctx, server):
        return exchange.broadcast(ctx, server.state)

    @functools.wraps(exchange.client)
    def client(ctx, received, kept, data):
        ctx, optimizers = _with_states(ctx, kept)
        state, upload, metrics = exchange.client(ctx, received, kept.state, data)
        return Kept(state, optimizers), upload, metrics

    @functools.wraps(exchange.server)
    def server(ctx, kept, summary):
        ctx, optimizers = _with_states(ctx, kept)
        state, metrics = exchange.server(ctx, kept.state, summary)
        return Kept(state, optimizers), metrics

    return exchange._replace(broadcast=broadcast, client=client, server=server, name=exchange.label)


def _with_states(ctx: Context, kept: Kept) -> tuple[Context, dict[str, PyTree]]:
    """The context with a dict of states of its own, in which `fit` leaves the new ones while it is traced."""
    states = dict(kept.optimizers)
    return ctx._replace(optimizers=states), states
