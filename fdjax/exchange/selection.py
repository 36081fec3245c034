"""Selective-FD's two selectors: a client labels what is like its own data, and the server drops what is ambiguous.

Shao, Wu, Zhang, "Selective Knowledge Sharing for Privacy-Preserving Federated Distillation without a Good Teacher"
(Nature Communications 2024). We had its abstract and its released demo, which has the first selector alone, and the
implementation in SCARLET's repository, which has both. For methods whose clients upload values [n, K] of proxy
examples that are averaged; x is a proxy example, q = `selection_quantile`:

    clients:  once, in the set-up, client k estimates the density ratio r_k of its own examples to uniform noise
              (`density_ratio.py`), and labels x if r_k(x) >= the q-quantile of r_k on own examples held out of it
    server:   the mean over the clients that label x, if there is any; it is used if it is not ambiguous:
              |p(x) - e_y|_1 <= `selection_ambiguity`, y = argmax p(x), which is 2 (1 - max_c p_c(x))

The paper calls high entropy ambiguous; the distance to the hard label is how SCARLET's repository measures it. It is at
most 2 (1 - 1/K), so that 2 drops nothing. Of averaged logits p is the softmax.

Whoever learns from labels learns from the examples that have one. Sent: 4K for each labelled example and a bit for
each, whether it is labelled; the same way down. Nothing is sent in the set-up.

Ours: the kernel's width is `selection_width` times the root mean square distance of the client's own examples, because
the demo's 5 is about 0.2 times that of MNIST's, and means nothing elsewhere. At most 512 own examples are used, half of
them to estimate and half held out (the demo's: 270 and 5,130), with 250 uniform ones and lambda = 250^-0.5 as there.
The demo multiplies by the matrix that the paper inverts; that changes nothing, because noise is so far from pictures
that r is a kernel density estimate. A client with a single example labels nothing.

Ten clients of one class each, a quarter of the embedded MNIST, 500 proxy examples, a 2nn, 5 rounds; mean accuracy of
clients, three seeds, %, and bytes up in kB:

    DS-FL, ERA          off 52.8, 50.0, 52.6 (1,000)    clients 78.0, 78.2, 74.7 (183)
    DS-FL, SA           off 50.4, 47.8, 47.0            clients 73.2, 73.0, 70.6
      server's          at 1.7 it drops all, at 1.79 it has 53.4, 52.2, 53.9
      both, 1.0, 1.5    67.6, 63.6, 67.3; 66.1, 68.9, 68.9
    MHAT                off 42.3, 40.0, 37.4            clients 75.5, 67.9, 65.3
    FedMD               off 79.7, 78.1, 76.5            clients 74.9, 71.6, 71.7

By Dirichlet(0.1) clients' selection takes DS-FL, ERA, from 60.0, 53.9, 52.2 to 77.4, 72.9, 74.1, while the server's at
1.6 takes SA from 61.6, 54.8, 53.6 to 56.5, 54.2, 49.9. So the clients' selector is worth 14 points and more, and the
server's hardly more than the bytes that it saves. FedMD's clients know all classes from the labelled proxy data, so
that the selector takes teachers away; and who is the only one to label an example learns its own logits, where an
absolute error has no slope: FedMD's steps there have the sign of what rounding left.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fdjax import keys
from fdjax.client import testing
from fdjax.contract import Algorithm, Broadcast, Context, Exchange, Upload, unchanged
from fdjax.errors import InputError
from fdjax.exchange import density_ratio, proxy, reductions, traffic
from fdjax.exchange.proxy import Labelled
from fdjax.exchange.wrappers import require_sum
from fdjax.method import HParam, Task
from fdjax.types import Array, PyTree

OPTION = {"selection": ("off", "clients", "server", "both")}
_CLIENTS, _SERVER = ("selection", "clients", "both"), ("selection", "server", "both")
HPARAMS = {
    "selection_quantile": HParam(
        0.25, high=1.0, help="share of its own examples that a client would not label", only=_CLIENTS
    ),
    "selection_width": HParam(
        0.17, above=True, help="width of the kernel, in distances of a client's own examples", only=_CLIENTS
    ),
    "selection_ambiguity": HParam(1.5, high=2.0, help="largest distance of a mean to its hard label", only=_SERVER),
}
DISTANCES = tuple((_CLIENTS[0], value) for value in _CLIENTS[1:])  # options with which distances of inputs matter
_KNOWN, _AUXILIARY, _BATCH = 256, 250, 256


class Selecting(NamedTuple):
    """A client's state of the method, and which proxy examples it labels."""

    state: PyTree
    labels: jax.Array  # [M] bool


def selecting(task: Task, algorithm: Algorithm, logits: bool = False) -> Algorithm:
    """The algorithm with the selectors that its option `selection` names.

    In the first exchange of its rounds clients upload values [n, K] of the proxy examples whose ids they received, and
    these are averaged; `logits` says that they are no probabilities. The server's function of that exchange is given
    `Labelled` values, and any exchange may broadcast such.

    Raises InputError where what clients label would tell about their examples that are to be private.
    """
    which = task.options.get("selection", "off")
    if which == "off":
        return algorithm
    by_clients, by_server = which != "server", which != "clients"
    if by_clients and task.training.private:
        raise InputError(
            f"--selection={which}: which proxy examples a client labels depends on each of its own, which "
            "--privacy=example does not hide; give --selection=server"
        )
    labelling, *others = (_receiving(exchange, by_clients) for exchange in algorithm.round)
    kept = _kept_by_server(by_clients, by_server, logits)
    round = (_labelling(labelling, by_clients, kept), *others)
    if not by_clients:
        return algorithm._replace(round=round)
    personal, params_of, everything = algorithm.personal, algorithm.params_of_client, jnp.ones(task.proxy_size, bool)
    return algorithm._replace(
        init_client=lambda ctx, params: Selecting(algorithm.init_client(ctx, params), everything),
        setup=(*(_receiving(exchange, True) for exchange in algorithm.setup), _estimating(task)),
        round=round,
        personal=None if personal is None else lambda ctx, server, own, x: personal(ctx, server, own.state, x),
        model_of=None if params_of is None else lambda ctx, server, own: params_of(ctx, server, own.state),
    )


def ambiguity(probabilities: Array) -> jax.Array:
    """|p - e_y|_1 over the last axis, y = argmax p."""
    hard = jax.nn.one_hot(jnp.argmax(probabilities, -1), probabilities.shape[-1])
    return jnp.sum(jnp.abs(probabilities - hard), -1)


def _estimating(task: Task) -> Exchange:
    """What each client does once: it finds out which proxy examples are like its own."""
    half = min(_KNOWN, -(-task.largest // 2))

    def inputs(ctx: Context) -> jax.Array:
        assert ctx.proxy is not None
        return testing.predict(lambda x: x.reshape(len(x), -1), ctx.proxy, _BATCH)

    def send_noise(ctx, server):
        x = inputs(ctx)
        noise = jax.random.uniform(ctx.key, (_AUXILIARY, x.shape[1]), minval=jnp.min(x), maxval=jnp.max(x))
        return Broadcast((), known=(x, noise))  # noise of a seed that all know

    def estimate(ctx, received, own, data):
        public, noise = received.known
        among = keys.shuffle(ctx.key, data.count)(jnp.arange(2 * half) % jnp.maximum(data.count, 1))
        x = data.take(among)[0].reshape(2 * half, -1)
        used = jnp.minimum(data.count, 2 * half)
        known, held_out = (used + 1) // 2, used // 2
        width = jnp.maximum(ctx.hparams["selection_width"] * density_ratio.spread(x, used), 1e-6)
        points = jnp.concatenate([public, x[1::2]])
        ratios = density_ratio.ratios(x[::2], known, noise, points, width, _AUXILIARY**-0.5)
        least = density_ratio.quantile(ratios[len(public) :], held_out, ctx.hparams["selection_quantile"])
        labels = ratios[: len(public)] >= least
        return own._replace(labels=labels), Upload(()), {"labels_like_own": jnp.mean(labels)}

    return Exchange(send_noise, estimate, reductions.nothing(), unchanged)


def _receiving(exchange: Exchange, by_clients: bool) -> Exchange:
    """The exchange whose clients keep their selection, and count what they receive if not all of it is there."""

    @functools.wraps(exchange.client)
    def client(ctx, received, own, data):
        state, upload, metrics = exchange.client(ctx, received, own.state if by_clients else own, data)
        if isinstance(received.shared, Labelled):
            upload = upload._replace(bytes_received=_size(received.shared) + traffic.size(received.own))
        return own._replace(state=state) if by_clients else state, upload, metrics

    return exchange._replace(client=client, name=exchange.label)


def _labelling(exchange: Exchange, by_clients: bool, server) -> Exchange:
    """The exchange in which clients label, with what the server then makes of the mean."""
    mean = require_sum(exchange, "--selection", "use it with a method that averages what clients say of proxy data")

    @functools.wraps(exchange.client)
    def client(ctx, received, own, data):
        own, upload, metrics = exchange.client(ctx, received, own, data)
        said = Labelled(upload.tree, own.labels[proxy.positions(ctx.proxy, received.shared)])
        return own, upload._replace(tree=said, bytes=_size(said)), metrics | {"labelled": jnp.mean(said.there)}

    def partial(ctx, said, weight):
        part = mean.partial(ctx, said.values, weight)
        if not isinstance(part, reductions.Averaged):
            raise InputError(f"--selection needs a mean of what clients upload, and exchange {exchange.label} has none")
        there = said.there[:, None]
        return reductions.Weighted(jnp.where(there, part.value, 0), jnp.where(there, part.weight, 0))

    def finish(ctx, total):
        return Labelled(mean.finish(ctx, reductions.Averaged(*total)), total.weight[:, 0] > 0)

    @functools.wraps(exchange.server)
    def select(ctx, state, summary):
        labels = server(ctx, summary)
        state, metrics = exchange.server(ctx, state, labels)
        return state, metrics | {"labels_kept": jnp.mean(labels.there)}

    if not by_clients:
        return exchange._replace(server=select)
    reduce = mean._replace(partial=partial, finish=finish)
    return exchange._replace(client=client, reduce=reduce, server=select, shares="")


def _kept_by_server(by_clients: bool, by_server: bool, logits: bool):
    def kept(ctx, summary):
        labels = summary if by_clients else Labelled(summary, jnp.ones(len(summary), bool))
        if not by_server:
            return labels
        p = jax.nn.softmax(labels.values) if logits else labels.values
        return labels._replace(there=labels.there & (ambiguity(p) <= ctx.hparams["selection_ambiguity"]))

    return kept


def _size(labels: Labelled) -> jax.Array:
    a_label = traffic.size(labels.values) / len(labels.there)
    return jnp.sum(labels.there) * a_label + traffic.flags(len(labels.there))
