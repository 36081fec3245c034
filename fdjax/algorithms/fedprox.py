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
from fdjax.client import local, losses
from fdjax.types import Algorithm

HPARAMS: dict[str, float | str] = {"learning_rate": 0.01, "local_epochs": 1, "mu": 0.1}


def fedprox(task: local.Task) -> Algorithm:
    """FedProx of the task's model; hparams: `learning_rate` (eta), `local_epochs` (E), `mu` >= 0.

    The metric `train_loss` is the mean of h over the last epoch's batches, proximal term and all.
    """

    def client(model, received, state, data, proxy, hparams, key):
        def loss(params, x, y):
            apart = optax.tree.norm(optax.tree.sub(params, received), squared=True)
            return losses.cross_entropy(model.apply(params, x), y) + hparams["mu"] / 2 * apart

        params, train_loss = local.fit(
            task.training, loss, received, data, hparams, key, epochs=hparams["local_epochs"]
        )
        return state, params, {"train_loss": train_loss}

    return fedavg.fedavg(task)._replace(name="fedprox", hparams=HPARAMS, client=client)
