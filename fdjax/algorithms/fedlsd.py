"""FedLSD: local self-distillation, of all logits, from the received global model.

A forerunner of FedNTD (Lee et al. 2022, `fedntd.py`) and a baseline in its released code, which is what we had;
equation numbers are missing here. z are logits, g the received model, which is fixed.

    client:  w_k <- w;  E epochs of  (1 - beta) CE(softmax(z), y) + beta T^2 KL(softmax(z_g / T) || softmax(z / T))
    server:  w <- sum_k (n_k / n) w_k,  n = sum_k n_k, over the participants of the round

Sent: w down and w_k up, 4P bytes each way, as in FedAvg, which is beta = `weight` = 0. With beta = 1 labels are not
learned: w is its own teacher, and stays what it is under plain SGD (without decay, dropout and BatchNorm). Ours: beta =
0.3 and T = 1 by default.

Accuracy for three seeds of `test_local_distillation_learning.py`: 0.775, 0.774, 0.753 (FedAvg 0.765, 0.764, 0.696).
"""

from fdjax.client import losses
from fdjax.contract import Algorithm
from fdjax.exchange import averaging
from fdjax.method import LOCAL_TRAINING, HParam, Method, Task, temperature


def fedlsd(task: Task) -> Algorithm:
    """FedLSD of the task's model; hparams: `learning_rate`, `local_epochs`, `weight` (beta), `temperature` (T)."""

    def loss(ctx, w, hard, teacher, z, y):
        beta, T = ctx.hparams["weight"], ctx.hparams["temperature"]
        return (1 - beta) * hard + beta * T**2 * losses.kl_divergence(teacher, z, T)

    return averaging.with_objective(task, averaging.distilling(task, loss))


METHOD = Method(
    name="fedlsd",
    summary="FedLSD (in FedNTD's code, 2022): FedAvg with self-distillation from the received model",
    build=fedlsd,
    hparams={
        **LOCAL_TRAINING,
        "weight": HParam(0.3, high=1.0, help="weight of the distillation loss; the rest is the labels'"),
        "temperature": temperature(1.0, "softens both models in the distillation loss"),
    },
    one_architecture=True,
    averages=True,
    example_fits=1,
)
