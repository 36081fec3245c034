"""FedProx.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, "Federated Optimization in Heterogeneous Networks" (MLSys 2020),
Algorithm 2.

    client:  w_k <- w;  for E epochs, for each batch b:  w_k <- w_k - eta (grad l(w_k; b) + mu (w_k - w)),
             the gradient of h(w_k; b) = l(w_k; b) + (mu / 2) |w_k - w|^2                                (equation 2)
    server:  w <- sum_k (n_k / n) w_k,  n = sum_k n_k, over the participants of the round

Sent: w down and w_k up, 4P bytes each way, as in FedAvg, which is mu = 0. A client keeps nothing between rounds.

Deviations: the paper's Algorithm 2 draws clients with probability n_k / n and averages uniformly (`--sampling`); its
experiments and released code draw uniformly and weight by n_k, as here by default. Stragglers are the run's
(`--stragglers`, `--straggler_work`); mu does not adapt. The client's step is any optax transformation (SGD by default).
"""

import jax

from fdjax.contract import Algorithm
from fdjax.exchange import averaging
from fdjax.method import LOCAL_TRAINING, HParam, Method, Task


def fedprox(task: Task) -> Algorithm:
    """FedProx of the task's model; hparams: `learning_rate` (eta), `local_epochs` (E), `mu` >= 0.

    The metric `train_loss` is the mean of l over the last epoch's batches, without the proximal term.
    """

    def pull(ctx, start, params):
        return jax.tree.map(lambda w_k, w: ctx.hparams["mu"] * (w_k - w), params, start)

    return averaging.with_objective(task, averaging.cross_entropy(task), pull)


METHOD = Method(
    name="fedprox",
    summary="FedProx (Li et al. 2020): FedAvg near the start",
    build=fedprox,
    hparams=LOCAL_TRAINING | {"mu": HParam(0.1, help="weight of the proximal term")},
    one_architecture=True,
    averages=True,
    example_fits=1,
)
