"""FedGEMS: a large server model that learns selectively from its clients and from itself, and teaches them.

Cheng, Wu, Xiao, Liu, "FedGEMS: Federated Learning of Larger Server Models via Selective Knowledge Fusion" (2021,
arXiv 2110.11027). The proxy data have labels; z are logits on them, s the server, k a client, e = 1 - `weight`. KL here
is the mean over the K classes of p_c log(p_c / q_c), 1 / K of the usual sum.

    client:  distil:  e CE(z_k, y) + (1 - e) KL(softmax(z_s) || softmax(z_k)) over the proxy data;
             then E epochs of CE on its own data;  send z_k on the proxy data
    server:  for each x of these, by what the server says of it before it trains:
             right            CE(z_s, y);  remember m(x) <- z_s(x)
             wrong, known     e CE(z_s, y) + (1 - e) KL(softmax(m(x)) || softmax(z_s)):  it was right about x once
             wrong, unknown   the same with sum_k a_k z_k(x) in m's place,  a = softmax over k of c_k / H(softmax(z_k))
                              with H the entropy and c_k = 1 where z_k is right, else 0
             send z_s

The server's model is the central one; clients have their own, of any architecture.

Sent: z_s down (not in the first round, when the server has learned nothing yet) and z_k up, 4 n K bytes each way for n
proxy examples a round, and 4 n of their ids down, none where n = M. The server knows which examples an upload is about:
their ids are not counted again. Labels are public, as the proxy data are.

Written from a summary of the paper and the behaviour of a third party's code (AIJack), not from the authors' (none was
found). What these leave open, or we chose:
- Right or wrong is seen once a round, not at each batch while the server trains. The first round has no z_s to distil.
- KL is from the teacher to the student; the third party's has them the other way round.
- `weight` = 1/4 and the mean over classes are the third party's (its library's default), so that a summed divergence
  weighs 1/(4K), beside 3/4 of the labels' cross-entropy. Rates and epochs are ours.
- 1 / H is at most 16, so that e^(1/H) can be summed.
"""

import jax
import jax.numpy as jnp

from fdjax.client import losses
from fdjax.client.training import fit, train_locally
from fdjax.contract import Algorithm, Broadcast, Exchange, Upload, own_model, predict_with_own_model
from fdjax.exchange import proxy, reductions, traffic
from fdjax.exchange.wrappers import after
from fdjax.method import LOCAL_TRAINING, HParam, Method, Task, epochs, learning_rate

_CERTAINTY = 16.0


def fedgems(task: Task) -> Algorithm:
    """FedGEMS; `weight` is 1 - e; hparams: see METHOD."""
    size, number, classes = task.proxy_size, task.proxy_per_round, task.classes

    def learn(ctx, params, ids, teacher, weight, epochs, rate):
        """(1 - weight) CE + weight KL / K to `teacher` [n, K], with a `weight` [n] for each of `ids`."""

        def loss(params, x, target, key):
            y, teacher, weight = target
            z = ctx.model.apply(params, x, key)
            hard = losses.cross_entropy(z, y, task.distilling.label_smoothing)
            return (1 - weight) * hard + weight / classes * losses.kl_divergence(teacher, z)

        y = ctx.proxy.y[proxy.positions(ctx.proxy, ids)]
        targets = proxy.targets(ctx, ids, (y, teacher, weight))
        return fit(task.distilling, loss, params, targets, ctx, epochs=epochs, learning_rate=rate)

    def distil_train_predict(ctx, received, params, data):
        h, ids, teacher, learned = ctx.hparams, received.shared["ids"], received.shared["logits"], received.known
        params, distill_loss = learn(
            ctx.at("distill"), params, ids, teacher, jnp.full(number, h["weight"]),
            jnp.where(learned, h["distill_epochs"], 0), h["distill_learning_rate"],
        )  # fmt: skip
        params, train_loss = train_locally(task.training, params, data, ctx.at("train"))
        z = proxy.predict(ctx, params, ids)
        logits_received = jnp.where(learned, float(traffic.size(teacher)), 0)
        upload = Upload({"ids": ids, "logits": z}, float(traffic.size(z)), logits_received + traffic.size(ids))
        return params, upload, {"train_loss": train_loss, "distill_loss": distill_loss}

    def weigh(ctx, upload):
        """z_k(x) with the weight e^(c_k / H)."""
        z, y = upload["logits"], ctx.proxy.y[proxy.positions(ctx.proxy, upload["ids"])]
        entropy = losses.entropy(jax.nn.softmax(z))
        return reductions.Weighted(z, jnp.exp(losses.correct(z, y) / jnp.maximum(entropy, 1 / _CERTAINTY))[:, None])

    def fuse(ctx, server, ensemble):
        h, at = ctx.hparams, proxy.positions(ctx.proxy, server["ids"])
        z = proxy.predict(ctx, server["params"], server["ids"])
        right = losses.correct(z, ctx.proxy.y[at])
        known = jnp.maximum(server["known"][at], right)
        remembered = jnp.where(right[:, None] > 0, z, server["memory"][at])
        teacher = jnp.where(known[:, None] > 0, remembered, ensemble)
        params, loss = learn(
            ctx.at("train"), server["params"], server["ids"], teacher, h["weight"] * (1 - right), h["server_epochs"],
            h["server_learning_rate"],
        )  # fmt: skip
        ids = proxy.draw_ids(task, ctx.at("subset").key)
        new = {
            "params": params,
            "ids": ids,
            "logits": proxy.predict(ctx, params, ids),
            "memory": server["memory"].at[at].set(remembered),
            "known": server["known"].at[at].set(known),
            "learned": jnp.bool(True),
        }
        return new, {"server_loss": loss, "server_right": jnp.mean(right), "server_known": jnp.mean(known)}

    def init_server(ctx, params):
        return {
            "params": params,
            "ids": proxy.draw_ids(task, ctx.key),
            "logits": jnp.zeros((number, classes)),
            "memory": jnp.zeros((size, classes)),
            "known": jnp.zeros(size),
            "learned": jnp.bool(False),
        }

    exchange = Exchange(
        broadcast=lambda ctx, server: Broadcast(
            {"ids": server["ids"], "logits": server["logits"]}, known=server["learned"]
        ),
        client=distil_train_predict,
        reduce=after(weigh, reductions.elementwise_mean()),
        server=fuse,
    )
    return Algorithm(
        init_server=init_server,
        init_client=own_model,
        round=(exchange,),
        central=lambda ctx, server, x: ctx.model.apply(server["params"], x),
        personal=predict_with_own_model,
    )


METHOD = Method(
    name="fedgems",
    summary="FedGEMS (Cheng et al. 2021): the server learns from clients where it never knew better, and teaches them",
    build=fedgems,
    hparams={
        **LOCAL_TRAINING,
        "distill_learning_rate": learning_rate("learning_rate", "learning rate of the clients' distillation"),
        "distill_epochs": epochs(1, "epochs of the clients' distillation"),
        "server_learning_rate": learning_rate("learning_rate", "learning rate of the server"),
        "server_epochs": epochs(1, "epochs of the server"),
        "weight": HParam(0.25, high=1.0, help="weight of the divergences, means over classes; the rest is the labels'"),
    },
    proxy="labelled",
    stages=("distill",),
    keeps_models=True,
    distils=True,
)
