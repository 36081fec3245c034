"""Behaviour that many methods share, as functions that take an exchange or a reduction and return another one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fdjax.contract import Broadcast, ClientWork, Context, Exchange, Reduction, Upload, unchanged
from fdjax.errors import InputError
from fdjax.exchange import reductions, traffic
from fdjax.types import PyTree


def without_traffic(client: ClientWork) -> Exchange:
    """An exchange in which clients work by themselves: nothing is sent either way, and the server stays as it is."""
    return Exchange(lambda ctx, server: Broadcast(()), client, reductions.nothing(), unchanged)


def after(function: Callable[[Context, PyTree], PyTree], reduction: Reduction) -> Reduction:
    """`reduction` of `function(ctx, upload)` in the upload's place: work of the server, on each upload by itself.

    It is lifted with the clients, so no two uploads need to be in one place, and what it returns is not counted.
    """

    def partial(ctx, upload, weight):
        return reduction.partial(ctx, function(ctx, upload), weight)

    return reduction._replace(partial=partial)


def require_sum(exchange: Exchange, purpose: str, advice: str = "") -> Reduction:
    """The exchange's only reduction.

    Raises InputError, with `purpose`, and `advice` if there is a better one, unless it is one sum over all clients.
    """
    reduction, name = exchange.reduce, exchange.label
    if not isinstance(reduction, Reduction):
        them, advice = ", ".join(reduction), advice or "make them one sum"
        raise InputError(f"{purpose} needs one reduction, but exchange {name} has {them}; {advice}")
    if reduction.combine != "sum" or reduction.per_cohort:
        what = f"{reduction.combine} of each cohort" if reduction.per_cohort else reduction.combine
        advice = advice or "use a mean, say"
        raise InputError(f"{purpose} needs a sum over all clients, but exchange {name} reduces by {what}; {advice}")
    return reduction


class Codec(NamedTuple):
    """How a pytree is sent in fewer bytes.

    `memory` names an entry of the client's state, a dict, that holds what was last sent or received: both ends know it,
    so a codec may send changes alone.
    """

    encode: Callable[[Context, PyTree], PyTree]  # (ctx, tree) -> code; its key is of this call alone
    decode: Callable[[Context, PyTree], PyTree]  # (ctx, code) -> tree, as the receiver has it
    count: Callable[[Context, PyTree, PyTree], tuple[jax.Array, PyTree]]
    # (ctx, code, memory) -> (bytes [] float32, the memory after it); memory is () for codecs without
    memory: str = ""


def coded(exchange: Exchange, up: Codec | None = None, down: Codec | None = None) -> Exchange:
    """`exchange` with its uploads, and what it broadcasts to all (`shared`), coded; the coded bytes are counted.

    Raises InputError if both codecs would keep what was sent under one name.
    """
    if up is not None and down is not None and up.memory and up.memory == down.memory:
        raise InputError(f"both codecs of exchange {exchange.label} keep {up.memory!r}; give each a name of its own")

    def broadcast(ctx, server):
        sent = exchange.broadcast(ctx, server)
        return sent if down is None else sent._replace(shared=down.encode(ctx.at("encode"), sent.shared))

    def client(ctx, received, state, data):
        remembered: dict[str, Any] = {}
        bytes_received = None
        if down is not None:
            bytes_received, memory = down.count(ctx, received.shared, _memory(exchange, down, state))
            bytes_received = bytes_received + traffic.size(received.own)
            remembered |= {down.memory: memory} if down.memory else {}
            received = received._replace(shared=down.decode(ctx.at("decode"), received.shared))
        new, upload, metrics = exchange.client(ctx, received, state, data)
        if up is not None:
            code = up.encode(ctx.at("encode"), upload.tree)
            count, memory = up.count(ctx, code, _memory(exchange, up, state))
            remembered |= {up.memory: memory} if up.memory else {}
            upload = Upload(up.decode(ctx.at("decode upload"), code), count, upload.bytes_received)
        if bytes_received is not None:
            upload = upload._replace(bytes_received=bytes_received)
        return {**new, **remembered} if remembered else new, upload, metrics

    return exchange._replace(broadcast=broadcast, client=client, name=exchange.label)


def _memory(exchange: Exchange, codec: Codec, state: PyTree) -> PyTree:
    if not codec.memory:
        return ()
    if not isinstance(state, dict) or codec.memory not in state:
        found = f"dict of {', '.join(state)}" if isinstance(state, dict) else type(state).__name__
        raise InputError(
            f"a codec of exchange {exchange.label} keeps what was sent as {codec.memory!r} of a client's state, which "
            f"must be a dict with that entry; it is a {found}: add it in init_client"
        )
    return state[codec.memory]
