"""FedGEMS: a large server model that learns selectively from its clients and from itself, and teaches them.

Cheng, Wu, Xiao, Liu, "FedGEMS: Federated Learning of Larger Server Models via Selective Knowledge Fusion" (2021,
arXiv 2110.11027). The proxy data have labels; z are logits on them, s the server, k a client, e = 1 - `weight`.

    client:  distil:  e CE(z_k, y) + (1 - e) KL(softmax(z_s) || softmax(z_k)) over the proxy data;
             then E epochs of CE on its own data;  send z_k on the proxy data
    server:  for each x of these, by what the server says of it before it trains:
             right            CE(z_s, y);  remember m(x) <- z_s(x)
             wrong, known     e CE(z_s, y) + (1 - e) KL(softmax(m(x)) || softmax(z_s)):  it was right about x once
             wrong, unknown   the same with sum_k a_k z_k(x) in m's place,  a = softmax over k of c_k / H(softmax(z_k))
                              with H the entropy and c_k = 1 where z_k is right, else 0
             send z_s

The server's model is the central one; clients have their own, of any architecture.

Sent: z_s down and z_k up, 4 n K bytes each way for n proxy examples a round, and 4 n of their ids down. The server
knows which examples an upload is about: `bytes_up` leaves their ids out. Labels are public, as the proxy data are.

Written from a summary of the paper and the behaviour of a third party's code (AIJack), not from the authors' (none was
found). What these leave open, or we chose:
- Right or wrong is seen once a round, not at each batch while the server trains. The first round has no z_s to distil.
- KL is from the teacher to the student; the third party's has them the other way round.
- 1 / H is at most 16, so that e^(1/H) can be summed. `weight` = 1/4 is the third party's; rates and epochs are ours.
"""

import jax
import jax.numpy as jnp

from fdjax import keys
from fdjax.client import local, losses
from fdjax.exchange import proxy as exchange
from fdjax.exchange import reductions
from fdjax.types import Algorithm

HPARAMS: dict[str, float | str] = {
    "learning_rate": 0.01,
    "local_epochs": 1,
    "distill_learning_rate": "learning_rate",
    "distill_epochs": 1,
    "server_learning_rate": "learning_rate",
    "server_epochs": 1,
    "weight": 0.25,
}
_CERTAINTY = 16.0


def fedgems(task: local.Task) -> Algorithm:
    """FedGEMS.

    hparams: `learning_rate`, `local_epochs` (E), `distill_learning_rate`, `distill_epochs` (client),
    `server_learning_rate`, `server_epochs`, `weight` (1 - e, of the divergences, in [0, 1]).
    """
    size, number, classes = task.proxy_size, task.proxy_per_round, task.classes

    def label(apply, params, proxy, ids):
        chosen = proxy._replace(x=proxy.x[ids], y=proxy.y[ids])
        return local.predict(apply, params, chosen, task.distilling.batch_size)

    def learn(apply, params, proxy, ids, teacher, weight, hparams, rate, key, epochs):
        """(1 - weight) CE + weight KL to `teacher` [n, K], with a `weight` [n] for each of `ids`."""

        def loss(params, x, target):
            y, teacher, weight = target
            z = apply(params, x)
            return (1 - weight) * losses.cross_entropy(z, y) + weight * losses.kl_divergence(teacher, z)

        targets = local.Targets(proxy, ids, (proxy.y[ids], teacher, weight))
        hparams = hparams | {"learning_rate": hparams[rate]}
        return local.fit(task.distilling, loss, params, targets, hparams, key, epochs=epochs)

    def client(model, received, params, data, proxy, hparams, key):
        ids, teacher = received["ids"], received["logits"]

        def loss(params, x, y):
            return losses.cross_entropy(model.apply(params, x), y)

        epochs = jnp.where((data.count > 0) & jnp.any(teacher != 0), hparams["distill_epochs"], 0)
        weight, distill_key = jnp.full(number, hparams["weight"]), keys.stream(key, "distill")
        params, distill_loss = learn(
            model.apply, params, proxy, ids, teacher, weight, hparams, "distill_learning_rate", distill_key, epochs
        )
        params, train_loss = local.fit(
            task.training, loss, params, data, hparams, keys.stream(key, "train"), epochs=hparams["local_epochs"]
        )
        upload = {"ids": ids, "logits": label(model.apply, params, proxy, ids)}
        sent = {"bytes_up": jnp.where(data.count > 0, 4.0 * number * classes, 0)}
        return params, upload, {"train_loss": train_loss, "distill_loss": distill_loss} | sent

    def examine(model, upload, proxy, hparams):
        z = upload["logits"]
        entropy = losses.entropy(jax.nn.softmax(z))
        right = losses.correct(z, proxy.y[upload["ids"]])
        return reductions.Weighted(z, jnp.exp(right / jnp.maximum(entropy, 1 / _CERTAINTY))[:, None])

    def init_server(key):
        return {
            "params": task.model.init(keys.stream(key, "model")),
            "ids": exchange.subset(task, keys.stream(key, "subset")),
            "logits": jnp.zeros((number, classes)),
            "memory": jnp.zeros((size, classes)),
            "known": jnp.zeros(size),
        }

    def server(state, ensemble, proxy, hparams, key):
        apply, ids = task.model.apply, state["ids"]
        z = label(apply, state["params"], proxy, ids)
        right = losses.correct(z, proxy.y[ids])
        known = jnp.maximum(state["known"][ids], right)
        mine = jnp.where(right[:, None] > 0, z, state["memory"][ids])
        teacher = jnp.where(known[:, None] > 0, mine, ensemble)
        params, loss = learn(
            apply, state["params"], proxy, ids, teacher, hparams["weight"] * (1 - right), hparams,
            "server_learning_rate", keys.stream(key, "train"), hparams["server_epochs"],
        )  # fmt: skip
        following = exchange.subset(task, keys.stream(key, "subset"))
        new = {
            "params": params,
            "ids": following,
            "logits": label(apply, params, proxy, following),
            "memory": state["memory"].at[ids].set(mine),
            "known": state["known"].at[ids].set(known),
        }
        return new, {"server_loss": loss, "server_right": jnp.mean(right), "server_known": jnp.mean(known)}

    def broadcast(state, cohort):
        return {"ids": state["ids"], "logits": state["logits"]}

    return Algorithm(
        name="fedgems",
        hparams=HPARAMS,
        init_server=init_server,
        init_client=lambda model, key: model.init(key),
        broadcast=broadcast,
        client=client,
        examine=examine,
        reduction=reductions.elementwise_mean(),
        server=server,
        central=(task.model, lambda state: state["params"]),
        personal=lambda params: params,
    )
