"""FD, federated distillation, the first of the name.

Jeong, Oh, Kim, Park, Bennis, Kim, "Communication-Efficient On-Device Machine Learning: Federated Distillation and
Augmentation under Non-IID Private Data" (2018), Algorithm 1. The paper does not number its equations. Of M devices,
device k has a model w_k of any architecture, p = softmax(w_k(x)), and never sends it; there is no central one.

    client:  for each batch:  w_k <- w_k - eta grad [CE(p, y) + gamma CE(p, F^(k)[y])]
             F_k[l] = mean of p over the examples of label l that it trained on, as predicted then
    server:  F^(k)[l] = (1 / (M - 1)) sum_{j != k} F_j[l]

CE(p, F) = -sum_c F_c log p_c. Sent: F_k up and F^(k) down, K x K floats or 4K^2 bytes each; a row of zeros, which no
mean of softmaxes is, says that nobody has seen the label.

Where devices hold few examples of some labels FD is ahead of training alone, by 0.8 to 2.5 points (`test_learning.py`).
Labels that a device lacks it teaches none of, for F[l] is used with examples of l: FAug (`faug.py`) is there for that.

Ours: gamma = 1 (the paper's is not published); F^(k)[l] is a mean over the last round's participants other than k that
hold l (k need not be one of them), zero without any, and so is the regulariser then; a period is `local_epochs` epochs,
not 250 batches of 64 whatever the device holds; --privacy=means noises F_k (`exchange/private_means.py`).
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
    K, by_label = task.classes, private_means.label_means(task)

    def broadcast(ctx, table):
        return Broadcast((), own=by_label.of_clients(means_of_others(table))[task.ids(ctx.cohort)])

    def train(ctx, received, params, data):
        def loss(params, x, y, key):
            logits = ctx.model.apply(params, x, key)
            hard = losses.cross_entropy(logits, y, task.training.label_smoothing)
            soft = losses.soft_cross_entropy(received.own[y], logits)
            return hard + ctx.hparams["gamma"] * soft, jax.nn.softmax(logits)

        def observe(probabilities, y, weight):
            return reductions.sum_by_label(by_label.shown(ctx, probabilities), y, K, weight)

        params, train_loss, seen = fit_observing(
            task.training, loss, observe, reductions.nothing_by_label(K, K), params, data, ctx, epochs=local_work(ctx)
        )
        return params, Upload(by_label.of_sums(ctx.at("means"), seen)), {"train_loss": train_loss}

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
