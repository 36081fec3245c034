"""FedProx.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, "Federated Optimization in Heterogeneous Networks" (MLSys 2020),
Algorithm 2.

    client:  w_k <- w;  for E epochs, for each batch b:  w_k <- w_k - eta grad h(w_k; b),
             h(w_k; b) = l(w_k; b) + (mu / 2) |w_k - w|^2                                                (equation 2)
    server:  w <- sum_k (n_k / n) w_k,  n = sum_k n_k, over the participants of the round

Sent: w down and w_k up, 4P bytes each way, as in FedAvg, which is mu = 0. A client keeps nothing between rounds.

Deviations: the paper's Algorithm 2 draws clients with probability n_k / n and averages uniformly; its experiments and
released code draw uniformly and weight by n_k, as here. Stragglers of partial work are not modelled (every participant
runs E epochs), and mu does not adapt. The client's step is any optax transformation (plain SGD by default).
"""

import optax

from fdjax.algorithms import fedavg
from fdjax.client import losses
from fdjax.contract import Algorithm
from fdjax.method import LOCAL_TRAINING, HParam, Method, Task


def fedprox(task: Task) -> Algorithm:
    """FedProx of the task's model; hparams: `learning_rate` (eta), `local_epochs` (E), `mu` >= 0.

    The metric `train_loss` is the mean of h over the last epoch's batches, proximal term and all.
    """

    def objective(ctx, start, params, x, y):
        distance = optax.tree.norm(optax.tree.sub(params, start), squared=True)
        return losses.cross_entropy(ctx.model.apply(params, x), y) + ctx.hparams["mu"] / 2 * distance

    return fedavg.with_objective(task, objective)


METHOD = Method(
    name="fedprox",
    summary="FedProx (Li et al. 2020): FedAvg near the start",
    build=fedprox,
    hparams=LOCAL_TRAINING | {"mu": HParam(0.1, help="weight of the proximal term")},
    one_architecture=True,
)
