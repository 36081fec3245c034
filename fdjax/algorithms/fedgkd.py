"""FedGKD and FedGKD-VOTE: distillation from past global models.

Yao, Pan, Dai, Wan, Ding, Jin, Xu, Sun, "Local-Global Knowledge Distillation in Heterogeneous Federated Learning with
Non-IID Data" (2021). We had its abstract and its released code, not its text, so equation numbers are missing here.
The server has the last M global models that it averaged, g_1 the newest, which is w. z are logits.

    client:  w_k <- w;  E epochs of  CE(softmax(z), y) + (gamma / 2) sum_m v_m D(z_m, z),
             D(z_m, z) = T^2 KL(softmax(z_m / T) || softmax(z / T)), or mean_c (z_mc - z_c)^2 (`distance` = mse)
    server:  w <- sum_k (n_k / n) w_k, or their plain mean, the code's (`weighting` = uniform)
    FedGKD:       one teacher, the mean of the params of g_1 .. g_M (`buffer` = M = 5), v = 1
    FedGKD-VOTE:  g_1 .. g_M each, v = softmax over m of -(validation loss of g_m) / `vote_temperature`

Before M rounds there are fewer models, and in the first round none: it is FedAvg's, as is gamma = 0.

Sent: w_k up, 4P bytes. Down, `history` = sent: w and the mean, 8P (4P while that is w itself), or of VOTE all M models,
4PM, and v, 4M. `history` = cached: clients keep the models that they received, and are sent the others of the last M
alone. This is 4P for one that takes part in every round; one that comes every tenth round lacks all five of them, and
20P is more than 8P. Both histories teach the same; the client's is counted and not stored M times.

Ours: losses of VOTE are on labelled proxy data that stay at the server (the code has a validation set there, whose
losses it sends), taken once of each model, all of it or a fresh subset (`--proxy_per_round`); `vote_temperature` = 0.1;
v are sent and not losses. gamma = 0.2 and T = 1 are the code's. The released VOTE teaches nothing (its loss has no
gradient), so there is none to compare to.

Accuracy for three seeds of `test_local_distillation_learning.py`: 0.779, 0.778, 0.736, VOTE 0.782, 0.783, 0.740 (FedAvg
0.765, 0.764, 0.696).
"""

from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fdjax.client import losses
from fdjax.contract import Algorithm, Broadcast, Exchange
from fdjax.exchange import averaging, proxy, reductions, traffic
from fdjax.exchange.stacked import apply_each
from fdjax.method import LOCAL_TRAINING, HParam, Method, Task, temperature


class _History(NamedTuple):
    """The server's state. Places of `models` that are not filled as yet hold the first model."""

    params: Any  # w, the newest of them
    models: Any  # [M, ...]: the newest first
    made: jax.Array  # [] int32: how many were averaged so far
    losses: Any  # [M] of VOTE, on the server's labelled data; else ()


def _fedgkd(task: Task, vote: bool) -> Algorithm:
    M, cached = int(task.options["buffer"]), task.options["history"] == "cached"
    average = reductions.weighted_mean if task.options["weighting"] == "examples" else reductions.mean

    def broadcast(ctx, server):
        there = jnp.arange(M) < jnp.maximum(server.made, 1)
        if vote:
            logits = -server.losses / ctx.hparams["vote_temperature"]
            teachers, votes = server.models, jax.nn.softmax(jnp.where(there, logits, -jnp.inf))
        else:
            share = there / jnp.sum(there)
            teachers, votes = jax.tree.map(lambda g: jnp.tensordot(share, g, 1)[None], server.models), jnp.ones(1)
        votes = jnp.where(server.made > 0, votes, 0)
        return Broadcast({"params": server.params, "teachers": teachers, "votes": votes, "made": server.made})

    def objective(ctx, received, params, x, y, key):
        z = ctx.model.apply(params, x, key)
        z_m = apply_each(ctx.model.apply, received["teachers"], x)
        if task.options["distance"] == "mse":
            apart = losses.mean_squared_error(z_m, z[None])
        else:
            T = ctx.hparams["temperature"]
            apart = T**2 * losses.kl_divergence(z_m, z[None], T)
        hard = losses.cross_entropy(z, y, task.training.label_smoothing)
        return hard + ctx.hparams["gamma"] / 2 * (received["votes"] @ apart)

    learn = averaging.minimising(task, objective, start=itemgetter("params"))

    def train(ctx, received, seen, data):
        made = received.shared["made"]
        models = jnp.clip(made, 1, M) if vote or cached else jnp.clip(made, 1, min(M, 2))
        if cached:
            models, seen = jnp.minimum(models, made - seen), made
        _, upload, metrics = learn(ctx, received, (), data)
        votes = 4 * jnp.clip(made, 0, M) if vote else 0
        sent = traffic.size(received.shared["params"]) * models.astype(jnp.float32) + votes
        return seen, upload._replace(bytes_received=sent), metrics

    def serve(ctx, server, mean):
        def pushed(new, old):
            return jnp.concatenate([new[None], old[:-1]])

        models, tested = jax.tree.map(pushed, mean, server.models), server.losses
        if vote:
            ids = proxy.draw_ids(task, ctx.at("subset").key)
            labels = ctx.proxy.y[proxy.positions(ctx.proxy, ids)]
            tested = pushed(jnp.mean(losses.cross_entropy(proxy.predict(ctx, mean, ids), labels)), tested)
        return _History(mean, models, server.made + 1, tested), {}

    return Algorithm(
        init_server=lambda ctx, params: _History(
            params, jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (M, *leaf.shape)), params), jnp.int32(0),
            jnp.zeros(M) if vote else (),
        ),
        init_client=lambda ctx, params: jnp.int32(-1) if cached else (),
        round=(Exchange(broadcast, train, average(), serve, shares="params"),),
        central=lambda ctx, server, x: ctx.model.apply(server.params, x),
        model_of=lambda ctx, server, state: server.params,
    )  # fmt: skip


METHOD = Method(
    name="fedgkd",
    summary="FedGKD (Yao et al. 2021): FedAvg that distils from the mean of past global models",
    build=lambda task: _fedgkd(task, vote=False),
    hparams={
        **LOCAL_TRAINING,
        "gamma": HParam(0.2, help="twice the weight of the distillation loss"),
        "temperature": temperature(1.0, "softens all models in the distillation loss", only=("distance", "kl")),
    },
    options={
        "buffer": ("5", "1", "2", "3", "4", "7", "10"),
        "history": ("sent", "cached"),
        "distance": ("kl", "mse"),
        "weighting": ("examples", "uniform"),
    },
    looks_back="buffer",
    one_architecture=True,
    example_fits=1,
)
METHODS = (
    METHOD,
    METHOD._replace(
        name="fedgkd_vote",
        summary="FedGKD-VOTE (Yao et al. 2021): FedAvg that distils from past global models, the best most",
        build=lambda task: _fedgkd(task, vote=True),
        hparams={
            **METHOD.hparams, "vote_temperature": temperature(0.1, "softens the votes of past models by their losses")
        },
        proxy="labelled",
    ),
)  # fmt: skip
