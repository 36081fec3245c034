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

Where devices hold a few examples of some labels, the paper's scarce ones, FD is ahead of training alone: by 0.8 to 2.5
points, with a quarter less test loss (`test_learning.py`). F tells a device about the labels that it holds, never about
others: where labels are lacking altogether it teaches no new one, and the paper has FAug to fill them up.

The paper leaves open, and we chose:
- gamma = 1, traced; the paper's value is not published.
- F^(k)[l] is a mean over those of the others that hold l. Where none does, in the first round, and for a participant
  that is alone, the row is zero and so is the regulariser.
- The others are the participants of the last round, whether or not k was one of them.

Deviations: a period is `local_epochs` epochs, not 250 batches of 64 whatever the device holds. The server keeps every
client's F_k: 4CK^2 bytes for C clients. There is no central model. FAug, the paper's generator, is `faug.py`.
--privacy=means noises F_k, which is ours: see `exchange/private_means.py`, also for what that does not hide.
"""

import jax
import jax.numpy as jnp

from fdjax.client import losses
from fdjax.client.training import fit_observing, local_work
from fdjax.contract import Algorithm, Broadcast, Exchange, Upload, own_model, predict_with_own_model
from fdjax.exchange import private_means, reductions
from fdjax.method import LOCAL_TRAINING, HParam, Method, Task


def means_of_others(table: jax.Array) -> jax.Array:
    """F^(k)[l] for every k: `[C, K, K]` of F_k, zeros for labels not held, to the means over all but k."""
    holds = jnp.any(table != 0, axis=-1, keepdims=True).astype(table.dtype)
    holders = jnp.sum(holds, axis=0, keepdims=True) - holds
    total = jnp.sum(table, axis=0, keepdims=True) - table
    return jnp.where(holders > 0, total / jnp.maximum(holders, 1), 0)


def fd(task: Task) -> Algorithm:
    """FD; hparams: `learning_rate` (eta), `local_epochs`, `gamma`."""
    K = task.classes

    def broadcast(ctx, table):
        means = means_of_others(table)
        means = private_means.as_probabilities(means) if task.private_means else means
        return Broadcast((), own=means[task.ids(ctx.cohort)])

    def train(ctx, received, params, data):
        def loss(params, x, y, key):
            logits = ctx.model.apply(params, x, key)
            regulariser = losses.soft_cross_entropy(received.own[y], logits)
            hard = losses.cross_entropy(logits, y, task.training.label_smoothing)
            return hard + ctx.hparams["gamma"] * regulariser, jax.nn.softmax(logits)

        def observe(probabilities, y, weight):
            shown = private_means.clipped_outputs(ctx, probabilities) if task.private_means else probabilities
            return reductions.sum_by_label(shown, y, K, weight)

        nothing = reductions.ByLabel(jnp.zeros((K, K)), jnp.zeros(K))
        params, train_loss, seen = fit_observing(
            task.training, loss, observe, nothing, params, data, ctx, epochs=local_work(ctx)
        )
        if task.private_means:
            means = private_means.noised_means(ctx.at("means"), seen)
        else:
            means = seen.value / jnp.maximum(seen.count, 1)[:, None]
        return params, Upload(means), {"train_loss": train_loss}

    def server(ctx, table, stack):
        return jnp.zeros_like(table).at[stack.client].set(stack.partials), {}

    return Algorithm(
        init_server=lambda ctx, params: jnp.zeros((task.clients, K, K)),
        init_client=own_model,
        round=(Exchange(broadcast, train, reductions.stack(), server),),
        personal=predict_with_own_model,
    )


METHOD = Method(
    name="fd",
    summary="FD (Jeong et al. 2018): mean outputs by label",
    build=fd,
    hparams=LOCAL_TRAINING | {"gamma": HParam(1.0, help="weight of the regulariser towards the others' mean outputs")},
    keeps_models=True,
    label_means=True,
)
