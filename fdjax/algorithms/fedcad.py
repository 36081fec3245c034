"""FedCAD: self-distillation as far as the global model knows the class.

He et al., "Class-Wise Adaptive Self Distillation for Federated Learning on Non-IID Data" (2022; ICASSP, and a student
abstract of AAAI). We had what a survey says of it, that the weight of the distillation follows the global model's
accuracy on the class, measured on auxiliary data: what follows is **our concretisation**. The proxy data stay at the
server, with labels: its auxiliary set. z are logits, g the received model, which is fixed.

    server:  w <- sum_k (n_k / n) w_k;  a_c = the share of the auxiliary examples of class c that w gets right
    client:  w_k <- w;  E epochs of  CE(softmax(z), y) + lambda a_y T^2 KL(softmax(z_g / T) || softmax(z / T))

Sent: w and a down, 4 (P + K) bytes, and w_k up, 4P. lambda = `distill_weight` = 0 is FedAvg.

Ours too: lambda = 1 and T = 1; a is measured on the model that is about to be sent, the first one too, on all auxiliary
data or a fresh subset (`--proxy_per_round`); a class without auxiliary examples has a = 0.

Accuracy for three seeds of `test_local_distillation_learning.py`: 0.814, 0.794, 0.819 (FedAvg 0.765, 0.764, 0.696).
"""

from operator import itemgetter

import jax.numpy as jnp

from fdjax.client import losses
from fdjax.contract import Algorithm, Broadcast
from fdjax.exchange import averaging, proxy
from fdjax.method import LOCAL_TRAINING, HParam, Method, Task, temperature


def fedcad(task: Task) -> Algorithm:
    """FedCAD of the task's model; hparams: `learning_rate`, `local_epochs`, `distill_weight`, `temperature` (T)."""

    def broadcast(ctx, params):
        return Broadcast({"params": params, "accuracy": jnp.diagonal(proxy.confusion(task, ctx, params))})

    def loss(ctx, received, hard, teacher, z, y):
        T = ctx.hparams["temperature"]
        soft = T**2 * losses.kl_divergence(teacher, z, T)
        return hard + ctx.hparams["distill_weight"] * received["accuracy"][y] * soft

    params_of = itemgetter("params")
    learn = averaging.minimising(task, averaging.distilling(task, loss, params_of), start=params_of)
    return averaging.of_one_model(averaging.exchange(learn, broadcast))


METHOD = Method(
    name="fedcad",
    summary="FedCAD (He et al. 2022, from surveys): FedAvg that distils from the global model as it knows the class",
    build=fedcad,
    hparams={
        **LOCAL_TRAINING,
        "distill_weight": HParam(1.0, help="weight of the distillation loss, times the class's accuracy"),
        "temperature": temperature(1.0, "softens both models in the distillation loss"),
    },
    proxy="labelled",
    one_architecture=True,
    example_fits=1,
)
