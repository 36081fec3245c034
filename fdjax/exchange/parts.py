"""Parts of params: what stays with the client (personal layers, statistics of BatchNorm, a frozen net), and heads."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fdjax.client.trained import Paths, is_statistic, path_of, paths_read
from fdjax.contract import Algorithm, Broadcast, Context, Exchange, Received
from fdjax.types import Model, PyTree

Leaves = dict[str, jax.Array]  # by path


class Server(NamedTuple):
    """The server's state of the exchanged params, and what never changes of the others."""

    state: PyTree
    frozen: Leaves


class Client(NamedTuple):
    """The client's state of the method, and the params that it keeps for itself."""

    state: PyTree
    own: Leaves


class _Parts(NamedTuple):
    """The paths of a model's params, and which of them are exchanged, kept by each client, or never change."""

    order: list[str]
    structure: Any  # the treedef of whole params
    sent: set[str]
    own: set[str]
    frozen: set[str]

    def whole(self, *parts: Leaves) -> PyTree:
        """The params that these parts make together."""
        leaves = {path: leaf for part in parts for path, leaf in part.items()}
        return jax.tree.unflatten(self.structure, [leaves[path] for path in self.order])


def _parts(model: Model, exchanged: Paths, trained: Paths | None) -> _Parts:
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    order = [path_of(keys) for keys, _ in jax.tree.leaves_with_path(shapes)]
    sent = {path for path in order if exchanged(path)}
    frozen = {path for path in order if trained is not None and not trained(path) and not is_statistic(path)} - sent
    return _Parts(order, jax.tree.structure(shapes), sent, {*order} - sent - frozen, frozen)


def only(params: PyTree, wanted: set[str]) -> Leaves:
    """The leaves at `wanted` paths."""
    return {path_of(keys): leaf for keys, leaf in jax.tree.leaves_with_path(params) if path_of(keys) in wanted}


def with_zeros(leaves: Leaves, like: PyTree) -> PyTree:
    """Params in the form of `like` (shapes do): these leaves, and zeros where there is none."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: leaves.get(path_of(keys), jnp.zeros(leaf.shape, leaf.dtype)), like
    )


class Head:
    """The head of a net as a list of leaves, which nets of other names for their layers may have too.

    Leaves are in the order of the net's params, and of the shapes in `shapes`.
    """

    def __init__(self, model: Model, inputs: tuple[int, ...]):
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        self._features = jax.eval_shape(model.features, shapes, model.example(inputs))
        read = paths_read(model.head, shapes, self._features)
        order = [path_of(keys) for keys, _ in jax.tree.leaves_with_path(shapes)]
        self._paths, self._params, self._model = [path for path in order if path in read], shapes, model
        self.shapes = [leaf.shape for leaf in self.of(shapes)]

    def of(self, params: PyTree) -> list[jax.Array]:
        """The leaves of the head in a net's params."""
        return [*only(params, {*self._paths}).values()]

    def put(self, params: PyTree, leaves: list[jax.Array]) -> PyTree:
        """The net's params with this head in the place of theirs."""
        new = dict(zip(self._paths, leaves, strict=True))
        return jax.tree_util.tree_map_with_path(lambda keys, leaf: new.get(path_of(keys), leaf), params)

    def apply(self, leaves: list[jax.Array], h: jax.Array) -> jax.Array:
        """Logits [B, K] of features [B, d]."""
        params = with_zeros(dict(zip(self._paths, leaves, strict=True)), self._params)
        return self._model.head(params, h.reshape(-1, *self._features.shape[1:]))


def _params_in(tree: PyTree) -> PyTree:
    """The params in what a method sends: all of it, or what a dict has as "params"."""
    return tree["params"] if isinstance(tree, dict) and "params" in tree else tree


def _with_params(tree: PyTree, params: PyTree) -> PyTree:
    """The same with other params."""
    return {**tree, "params": params} if _params_in(tree) is not tree else params


def exchanging(algorithm: Algorithm, model: Model, exchanged: Paths, trained: Paths | None = None) -> Algorithm:
    """The algorithm that exchanges the params at paths `exchanged` alone, of a method whose `Method.averages` is set.

    Where it sends more than params, these are the entry "params" of a dict, both ways, and the rest is sent as it is.
    The other params start from the same first ones. Those that are trained become each client's own (LG-FedAvg, FedPer,
    FedBN), and then there is no central model to test. Those that are not trained are known from the start, which is
    not counted (LoRA adapters on a frozen net). Bytes, averages and optimisers' states at the server follow.

    Sources: Liang et al. (2020), LG-FedAvg; Arivazhagan et al. (2019), FedPer; Li et al. (2021), FedBN.
    """
    parts = _parts(model, exchanged, trained)
    wrapped = functools.partial(_exchanging, parts=parts)

    def params_of(ctx: Context, server: Server, own: Leaves) -> PyTree:
        sent = _params_in(algorithm.round[0].broadcast(ctx, server.state).shared)
        return parts.whole(sent, own, server.frozen)

    def central(ctx, server, x):
        return ctx.model.apply(params_of(ctx, server, {}), x)

    def personal(ctx, server, client, x):
        return ctx.model.apply(params_of(ctx, server, client.own), x)

    return algorithm._replace(
        init_server=lambda ctx, params: Server(
            algorithm.init_server(ctx, only(params, parts.sent)), only(params, parts.frozen)
        ),
        init_client=lambda ctx, params: Client(algorithm.init_client(ctx, params), only(params, parts.own)),
        round=tuple(map(wrapped, algorithm.round)),
        setup=tuple(map(wrapped, algorithm.setup)),
        central=None if parts.own else central,
        personal=personal if parts.own else None,
        model_of=lambda ctx, server, client: params_of(ctx, server, client.own),
    )


def _exchanging(exchange: Exchange, parts: _Parts) -> Exchange:
    """The exchange whose client works with all params, and sends some."""

    @functools.wraps(exchange.broadcast)
    def broadcast(ctx, server):
        inner = exchange.broadcast(ctx, server.state)
        return Broadcast(inner.shared, inner.own, known=(inner.known, server.frozen))

    @functools.wraps(exchange.client)
    def client(ctx, received, client, data):
        known, frozen = received.known
        params = parts.whole(_params_in(received.shared), client.own, frozen)
        whole = Received(_with_params(received.shared, params), received.own, known)
        state, upload, metrics = exchange.client(ctx, whole, client.state, data)
        trained = _params_in(upload.tree)
        sent = _with_params(upload.tree, only(trained, parts.sent))
        return Client(state, only(trained, parts.own)), upload._replace(tree=sent), metrics

    @functools.wraps(exchange.server)
    def server(ctx, server, summary):
        state, metrics = exchange.server(ctx, server.state, summary)
        return server._replace(state=state), metrics

    return exchange._replace(broadcast=broadcast, client=client, server=server, name=exchange.label, shares="")
