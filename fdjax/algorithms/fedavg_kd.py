"""FedAvg+KD: FedAvg that distils from the received model, the baseline of FedMLB's tables.

Flower's baseline of Kim et al. (2022), "Multi-Level Branched Regularization for Federated Learning" (ICML 2022; see
`fedmlb.py`), whose code is what we had; equation numbers are missing here. p are softmax outputs, g the received
model, which is fixed; there is no temperature.

    client:  w_k <- w;  E epochs of  (1 - gamma) CE(p, y) + gamma KL(p_g || p)
    server:  w <- sum_k (n_k / n) w_k,  n = sum_k n_k, over the participants of the round

Sent: w down and w_k up, 4P bytes each way, as in FedAvg, which is gamma = 0. It is FedLSD with T = 1 and gamma = 0.2,
and FedGKD with a buffer of one model but for the scale of the loss, (1 - gamma) (CE + gamma / (1 - gamma) KL), and the
first round, in which FedGKD has none.

Accuracy for three seeds of `test_local_distillation_learning.py`: 0.783, 0.777, 0.765 (FedAvg 0.765, 0.764, 0.696).
"""

from fdjax.client import losses
from fdjax.contract import Algorithm
from fdjax.exchange import averaging
from fdjax.method import LOCAL_TRAINING, HParam, Method, Task


def fedavg_kd(task: Task) -> Algorithm:
    """FedAvg+KD of the task's model; hparams: `learning_rate`, `local_epochs`, `gamma` in [0, 1]."""

    def loss(ctx, w, hard, teacher, z, y):
        gamma = ctx.hparams["gamma"]
        return (1 - gamma) * hard + gamma * losses.kl_divergence(teacher, z)

    return averaging.with_objective(task, averaging.distilling(task, loss))


METHOD = Method(
    name="fedavg_kd",
    summary="FedAvg+KD (in Flower's FedMLB, 2022): FedAvg that distils from the received model",
    build=fedavg_kd,
    hparams=LOCAL_TRAINING
    | {"gamma": HParam(0.2, high=1.0, help="weight of the distillation loss; the rest is the labels'")},
    one_architecture=True,
    averages=True,
    example_fits=1,
)
