"""The contract of a method: what its author writes, as functions of one client and of the server.

    broadcast -> client -> reduce -> server                                                             one Exchange
    setup: exchanges of all clients, once;  round: exchanges of the round's participants               an Algorithm

The author writes nothing about many clients: the engine runs `client` for every participant and combines their
partials. Every function receives a `Context` first and must be traceable by `jax.jit`. What the functions return is
checked where the engine calls them; an error names the method, the exchange, the function and its file.

Shape letters are those of `fdjax.types`; C_j is the number of clients of cohort j.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax

from fdjax import keys
from fdjax.types import Array, Examples, Model, PyTree

HParams = Mapping[str, Any]
Metrics = dict[str, jax.Array]


class Context(NamedTuple):
    """The read-only surroundings of a call, under the same names in every function of every method."""

    model: Model  # of this client's cohort; at the server the central model
    cohort: int  # number of the cohort; at the server 0, or the one that a broadcast or a reduction is for
    client: Array  # [] int32: id of the client, -1 at the server
    hparams: HParams  # traced hyperparameters by name, [] float32 or int32
    round: Array  # [] int32: rounds done before this one
    key: jax.Array  # [] key of this call alone: use it once, or split it by name with `at`
    proxy: Examples | None  # the proxy (public) data, if the run has any
    work: Array | float = 1.0  # [] float32: the share of its epochs that this client does, less than 1 for a straggler
    optimizers: dict[str, PyTree] | None = None  # states that `fit` goes on from and leaves behind, where they are kept
    distillations: list[Any] | None = None  # where `client.distillation.note` leaves params, if a run asks for them

    def at(self, purpose: str, *numbers: Array | int) -> "Context":
        """The same surroundings with a key for `purpose`, and for `numbers` below it."""
        return self._replace(key=keys.stream(self.key, purpose, *numbers))


class Broadcast(NamedTuple):
    """What the server sends to the participants of one cohort."""

    shared: PyTree  # to each of them the same
    own: PyTree = ()  # [C_j, ...], in order of client ids: each participant receives its own row
    known: PyTree = ()  # what the participants have already, from an exchange before: delivered, but not counted


class Received(NamedTuple):
    """What one client receives of a `Broadcast`: `own` is the client's row."""

    shared: PyTree
    own: PyTree
    known: PyTree


class Upload(NamedTuple):
    """What one client sends. Its arrays are counted, and so are those that it received, unless bytes are given."""

    tree: PyTree
    bytes: Array | float | None = None  # [] float32: bytes sent, where these are not the arrays' (coded or ragged)
    bytes_received: Array | float | None = None  # [] float32: the same of what it received


class Stack(NamedTuple):
    """The partials of every participant: what `finish` gets from a reduction that combines by "stack"."""

    partials: PyTree  # [S, ...]
    client: jax.Array  # [S] int32 ids
    weight: jax.Array  # [S] float32: of each upload, as `Partial` gets it; 0 says that the client is to be ignored


class Data(Protocol):
    """Examples that a client trains on, taken by position."""

    @property
    def count(self) -> Array:
        """Number of examples, [] int32."""
        ...

    def take(self, position: jax.Array) -> tuple[jax.Array, PyTree]:
        """x [B, ...] and targets [B, ...] at `position` [B]."""
        ...


class SendBroadcast(Protocol):
    """The server's side of a broadcast, called once for each cohort (`ctx.cohort`)."""

    def __call__(self, ctx: Context, server: PyTree, /) -> Broadcast: ...


class ClientWork(Protocol):
    """One client's part of an exchange: its new state, its upload, and metrics by name ([] float32)."""

    def __call__(
        self, ctx: Context, received: Received, state: PyTree, data: Any, /
    ) -> tuple[PyTree, Upload, Metrics]: ...


class Partial(Protocol):
    """What one upload of `weight` ([] float32) adds to the summary: work of the server.

    The weight is n_k, or where clients are drawn by their examples the number of times that this one was drawn.
    """

    def __call__(self, ctx: Context, upload: PyTree, weight: jax.Array, /) -> PyTree: ...


class Finish(Protocol):
    """The summary of combined partials (of a stack: a `Stack`). It has a key of its own, so noise can be drawn here."""

    def __call__(self, ctx: Context, combined: Any, /) -> PyTree: ...


class ServerUpdate(Protocol):
    """The server's new state, and its metrics by name ([] float32)."""

    def __call__(self, ctx: Context, server: PyTree, summary: Any, /) -> tuple[PyTree, Metrics]: ...


class InitServer(Protocol):
    """The server's first state. `params` are the central model's first parameters, the same for every method."""

    def __call__(self, ctx: Context, params: PyTree, /) -> PyTree: ...


class InitClient(Protocol):
    """One client's first state: what it keeps between exchanges and rounds, () for nothing.

    `params` are first parameters of the client's architecture, the same for every client of it.
    """

    def __call__(self, ctx: Context, params: PyTree, /) -> PyTree: ...


class CentralPredictor(Protocol):
    """Logits [B, K] of the central model."""

    def __call__(self, ctx: Context, server: PyTree, x: jax.Array, /) -> jax.Array: ...


class PersonalPredictor(Protocol):
    """Logits [B, K] of one client's own model."""

    def __call__(self, ctx: Context, server: PyTree, state: PyTree, x: jax.Array, /) -> jax.Array: ...


class ModelOf(Protocol):
    """The params of `ctx.model` with which a client predicts."""

    def __call__(self, ctx: Context, server: PyTree, state: PyTree, /) -> PyTree: ...


COMBINES = ("sum", "min", "max", "stack")
SHARES = ("params", "logits", "probabilities")


class Reduction(NamedTuple):
    """What becomes of the uploads: `finish(ctx, combine over participants of partial(ctx, upload, weight))`.

    A client of weight 0 (it holds no example, was dropped, or its numbers are not finite and are to be left out) gives
    the identity of `combine`, whatever `partial` says; in a stack it has the weight 0.
    """

    partial: Partial
    finish: Finish
    combine: str = "sum"  # one of COMBINES; "stack" keeps every participant's partial, which costs memory for them
    per_cohort: bool = False  # a summary for each cohort by itself, as a tuple
    # Of a cohort in which nobody counts it is `finish` of the identity: let `partial` give the weight too, to see that.


class Exchange(NamedTuple):
    """Server broadcasts, clients work, uploads are reduced, server updates: once.

    `reduce` is a reduction, or a dict of reductions of the same upload; the summary has the same names. A client that
    holds no example stays as it was, receives nothing and sends nothing. If nobody counts, the server stays as it was.
    """

    broadcast: SendBroadcast
    client: ClientWork
    reduce: Reduction | Mapping[str, Reduction]
    server: ServerUpdate
    releases: tuple[Any, ...] = ()  # what a privacy accountant must know
    name: str = ""  # for errors and byte tables; if empty, the name of the function `client`
    shares: str = ""
    # one of SHARES: what all of an upload is, where the attack on membership (`engine.membership`) can read it; params
    # are the central model's or, where shapes differ, of the client's architecture, "logits" and "probabilities" [n, K]
    # of the proxy examples whose ids are all that the broadcast shares. Such an exchange is the first of a round

    @property
    def label(self) -> str:
        """The exchange's name in errors and tables."""
        return self.name or getattr(self.client, "__name__", "exchange")


class _Ensemble:
    """The value of `ENSEMBLE`."""


ENSEMBLE = _Ensemble()  # as `Algorithm.central`: the mean of the softmax outputs of all clients that hold examples


class Algorithm(NamedTuple):
    """A federated method. At least one of `central` and `personal` says what is tested."""

    init_server: InitServer
    init_client: InitClient
    round: tuple[Exchange, ...]
    setup: tuple[Exchange, ...] = ()  # of all clients, once, before the first round; counted like any other exchange
    central: CentralPredictor | _Ensemble | None = None
    personal: PersonalPredictor | None = None  # without it a client's own model is the central one
    name: str = "algorithm"  # for errors; `Method.algorithm` fills it in
    model_of: ModelOf | None = None  # with it a client that never trained can be fine-tuned

    @property
    def params_of_client(self) -> ModelOf | None:
        """The params of `ctx.model` with which a client predicts, where the method says what they are."""
        return self.model_of or (params_of_state if self.personal is predict_with_own_model else None)


def own_model(ctx: Context, params: PyTree) -> PyTree:
    """The usual `init_client` of a client with a model of its own, which starts from a draw of its own."""
    return ctx.model.init(ctx.key)


def common_model(ctx: Context, params: PyTree) -> PyTree:
    """The `init_client` of a client whose model starts where those of all clients of its architecture do."""
    return params


def predict_with_own_model(ctx: Context, server: PyTree, params: PyTree, x: jax.Array) -> jax.Array:
    """The usual `personal` of such a client."""
    return ctx.model.apply(params, x)


def params_of_server(ctx: Context, server: PyTree, state: PyTree) -> PyTree:
    """The `model_of` of a method whose server state is the model of all."""
    return server


def params_of_state(ctx: Context, server: PyTree, params: PyTree) -> PyTree:
    """The `model_of` of a method whose clients' states are their own models."""
    return params


def unchanged(ctx: Context, server: PyTree, summary: Any) -> tuple[PyTree, Metrics]:
    """The `server` of an exchange after which it stays as it was."""
    return server, {}
