"""FedGKT: group knowledge transfer, a large server net trained on the features of small clients.

He, Annavaram, Avestimehr, "Group Knowledge Transfer: Federated Learning of Large CNNs at the Edge" (NeurIPS 2020),
Algorithm 1 and equations 4 to 7. Client k has an extractor h_k and a small head c_k; the server a net s on features.

    client:  E epochs of  l_c = CE(z_k, y) + alpha T^2 KL(softmax(z_s / T) || softmax(z_k / T)),  z_k = c_k(h_k(x))
    server:  E_s epochs on all uploads of
             l_s = alpha CE(z_s, y) + T^2 KL(softmax(z_k / T) || softmax(z_s / T)),  z_s = s(h_k(x))

alpha is on l_s's CE as in the authors' code (FedML); a client that has no z_s yet, so everyone in the first round,
learns by CE alone. alpha is the hparam `weight`. What predicts is s(h_k(x)): local and own accuracy are its; there is
no central model, since the server has no extractor.

Sent: up h_k(x), z_k and y of each own example, 4 n_k (F + K + 1) bytes for F features; down z_s of each, 4 n_k K. The
arrays are as long as the largest client; the metrics `bytes_up` and `bytes_down` count the real n_k. Features and
labels leave the client: this is not private as other methods are.

What a client learns from the server is z_s on its own examples alone, and its extractor stays its own. Where clients
hold few labels, s(h_k(x)) for a label that k lacks rests on features that k never learned to tell apart: there it is
level with training alone. With dense nets we saw no lead under Dirichlet(1) either; the paper has ResNets.

Deviations and choices:
- Optimiser and batch size are the task's for both (the paper's script: Adam 1e-3 with amsgrad, batches of 256).
- z_s are those of the trained server; the code collects them while it trains, one update stale. Test features are not
  sent each round; an evaluation is not counted.
- T = 3 is ours. The code's 1e-7 on the teacher's softmax is not needed here.
- The server trains on the round's participants; it keeps the z_s of the others.
- Examples are known by their position, so clients may shuffle.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from fdjax import keys
from fdjax.client import local, losses
from fdjax.errors import InputError
from fdjax.types import Algorithm, Reduction

HPARAMS: dict[str, float | str] = {
    "learning_rate": 0.01,
    "local_epochs": 1,
    "server_learning_rate": "learning_rate",
    "server_epochs": 20,
    "temperature": 3.0,
    "weight": 1.0,
}


def fedgkt(task: local.Task) -> Algorithm:
    """FedGKT; the task's model is the server's, on features.

    hparams: `learning_rate`, `local_epochs` (E), `server_learning_rate`, `server_epochs` (E_s), `temperature` (T),
    `weight` (alpha).
    """
    if len({split.feature_shape for split in task.splits}) != 1:
        shapes = ", ".join(f"{split.model.name} {split.feature_shape}" for split in task.splits)
        raise InputError(f"fedgkt needs clients whose features have one shape, not {shapes}; use one model for all")
    split_of = {split.model.name: split for split in task.splits}
    (features,) = {split.feature_shape for split in task.splits}
    net, batch, largest, classes = task.model.apply, task.training.batch_size, task.largest, task.classes
    numbers = math.prod(features)
    padded = -(-largest // batch) * batch

    def distillation(logits, teacher, hparams):
        temperature = hparams["temperature"]
        return temperature**2 * losses.kl_divergence(teacher, logits, temperature)

    def client(model, received, params, data, proxy, hparams, key):
        (known, logits), split = received[1], split_of[model.name]

        def loss(params, x, target):
            y, teacher = target
            z = model.apply(params, x)
            return losses.cross_entropy(z, y) + known * hparams["weight"] * distillation(z, teacher, hparams)

        taught = local.Beside(data, logits)
        params, train_loss = local.fit(
            task.training, loss, params, taught, hparams, key, epochs=hparams["local_epochs"]
        )

        def step(i, upload):
            position = i * batch + jnp.arange(batch)
            x, y = data.take(jnp.minimum(position, data.count - 1))
            h = split.features(params, x)
            return jax.tree.map(
                lambda a, b: lax.dynamic_update_slice_in_dim(a, b, i * batch, 0), upload, (h, head(h), y)
            )

        def head(h):
            return split.head(params, h)

        empty = jnp.zeros((padded, *features)), jnp.zeros((padded, classes)), jnp.zeros(padded, jnp.int32)
        upload = lax.fori_loop(0, local.batches(data.count, batch), step, empty)
        upload = jax.tree.map(lambda a: a[:largest], upload)
        sent = {
            "bytes_up": 4.0 * data.count * (numbers + classes + 1),
            "bytes_down": 4.0 * data.count * classes * known,
        }
        return params, upload, {"train_loss": train_loss} | sent

    def server(state, gathered, proxy, hparams, key):
        (h, z, y), weights = gathered
        uploads = local.Ragged(h, (y, z), jnp.cumsum(weights.astype(jnp.int32)))

        def loss(params, x, target):
            labels, teacher = target
            logits = net(params, x)
            return hparams["weight"] * losses.cross_entropy(logits, labels) + distillation(logits, teacher, hparams)

        rate = hparams | {"learning_rate": hparams["server_learning_rate"]}
        params, train_loss = local.fit(
            task.training._replace(augment=None), loss, state["params"], uploads, rate, keys.stream(key, "train"),
            epochs=hparams["server_epochs"],
        )  # fmt: skip

        def step(i, logits):
            position = jnp.minimum(i * batch + jnp.arange(batch), uploads.count - 1)
            return logits.at[uploads.find(position)].set(net(params, uploads.take(position)[0]))

        logits = lax.fori_loop(0, local.batches(uploads.count, batch), step, state["logits"])
        known = jnp.maximum(state["known"], (weights > 0).astype(jnp.float32))
        return {"params": params, "logits": logits, "known": known}, {"server_loss": train_loss}

    def predict(cohort):
        return lambda server, params, x: net(server["params"], task.splits[cohort].features(params, x))

    return Algorithm(
        name="fedgkt",
        hparams=HPARAMS,
        init_server=lambda key: {
            "params": task.model.init(key),
            "logits": jnp.zeros((task.clients, largest, classes)),
            "known": jnp.zeros(task.clients),
        },
        init_client=lambda model, key: model.init(key),
        broadcast=lambda server, cohort: (),
        address=lambda server: (server["known"], server["logits"]),
        client=client,
        reduction=Reduction(lambda upload, weight: upload, lambda uploads, weights: (uploads, weights), gather=True),
        server=server,
        predict=predict,
    )
