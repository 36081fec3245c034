"""FD, federated distillation, the first of the name.

Jeong, Oh, Kim, Park, Bennis, Kim, "Communication-Efficient On-Device Machine Learning: Federated Distillation and
Augmentation under Non-IID Private Data" (2018), Algorithm 1. The paper does not number its equations. Of M devices,
device k has a model w_k of any architecture, p = softmax(w_k(x)), and never sends it.

    client:  for each batch:  w_k <- w_k - eta grad [CE(p, y) + gamma CE(p, F^(k)[y])]
             F_k[l] = mean of p over the examples of label l that it trained on, as predicted then
    server:  F^(k)[l] = (1 / (M - 1)) sum_{j != k} F_j[l]

CE(p, F) = -sum_c F_c log p_c. Sent: F_k up and F^(k) down, K x K floats each, so 4K^2 bytes each way: over 16 rounds
with K = 10 the paper's 102,400 bits. A label that nobody has seen is a row of zeros, which no mean of softmaxes is, so
it takes no bytes to say so.

F tells a device about the labels that it holds, never about others. So where devices lack labels altogether FD teaches
them no new one, and on the whole test set it is level with training alone; the paper's devices hold five of a scarce
label, and FAug to fill them up.

The paper leaves open, and we chose:
- gamma = 1, traced; the paper's value is not published.
- F^(k)[l] is a mean over those of the others that hold l. Where none does, in the first round, and for a participant
  who is alone, the row is zero and so is the regulariser.
- The others are the participants of the last round, whether or not k was one of them.

Deviations: a period is `local_epochs` epochs, not 250 batches of 64 whatever the device holds. The server keeps every
client's F_k: 4CK^2 bytes for C clients. There is no central model. FAug, the paper's generator, is not here.
"""

import jax
import jax.numpy as jnp

from fdjax.client import local, losses
from fdjax.exchange import reductions
from fdjax.types import Algorithm, Reduction

HPARAMS: dict[str, float | str] = {"learning_rate": 0.01, "local_epochs": 1, "gamma": 1.0}


def others(rows: jax.Array) -> jax.Array:
    """F^(k)[l] for every k: `[C, K, K]` of F_k, zeros for labels not held, to the means over all but k."""
    held = (jnp.sum(rows, axis=-1, keepdims=True) > 0).astype(rows.dtype)
    holders = jnp.sum(held, axis=0, keepdims=True) - held
    total = jnp.sum(rows, axis=0, keepdims=True) - rows
    return jnp.where(holders > 0, total / jnp.maximum(holders, 1), 0)


def fd(task: local.Task) -> Algorithm:
    """FD; hparams: `learning_rate` (eta), `local_epochs`, `gamma`."""
    K, training = task.classes, task.training

    def observe(probabilities, y, weight):
        return reductions.sum_by_label(probabilities, y, K, weight)

    def client(model, received, params, data, proxy, hparams, key):
        _, table = received

        def loss(params, x, y):
            logits = model.apply(params, x)
            regulariser = losses.soft_cross_entropy(table[y], logits)
            return losses.cross_entropy(logits, y) + hparams["gamma"] * regulariser, jax.nn.softmax(logits)

        nothing = reductions.ByLabel(jnp.zeros((K, K)), jnp.zeros(K))
        params, train_loss, seen = local.fit_observing(
            training, loss, observe, nothing, params, data, hparams, key, epochs=hparams["local_epochs"]
        )
        upload = seen.value / jnp.maximum(seen.count, 1)[:, None]
        return params, upload, {"train_loss": train_loss}

    def gather(uploads, weights):
        return jnp.where(weights[:, None, None] > 0, uploads, 0)

    def server(rows, uploads, proxy, hparams, key):
        return uploads, {}

    return Algorithm(
        name="fd",
        hparams=HPARAMS,
        init_server=lambda key: jnp.zeros((task.clients, K, K)),
        init_client=lambda model, key: model.init(key),
        broadcast=lambda rows, cohort: (),
        address=others,
        client=client,
        reduction=Reduction(lambda upload, weight: upload, gather, gather=True),
        server=server,
        personal=lambda params: params,
    )
