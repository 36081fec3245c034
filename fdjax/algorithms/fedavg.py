"""FedAvg.

McMahan, Moore, Ramage, Hampson, Aguera y Arcas, "Communication-Efficient Learning of Deep Networks from Decentralized
Data" (AISTATS 2017), Algorithm 1.

    client:  w_k <- w;  for E epochs, for each batch b:  w_k <- w_k - eta grad l(w_k; b)
    server:  w <- sum_k (n_k / n) w_k,  n = sum_k n_k, over the participants of the round

Sent: w down and w_k up, 4P bytes each way. A client keeps nothing between rounds: its local model is the central one.

Deviations: the client's step is any optax transformation (plain SGD by default); B = infinity is a batch size of 0 or
of at least the largest client.
"""

from fdjax.contract import Algorithm
from fdjax.exchange import averaging
from fdjax.method import LOCAL_TRAINING, Method, Task


def fedavg(task: Task) -> Algorithm:
    """FedAvg of the task's model; hparams: `learning_rate` (eta), `local_epochs` (E)."""
    return averaging.with_objective(task, averaging.cross_entropy(task))


METHOD = Method(
    name="fedavg",
    summary="FedAvg (McMahan et al. 2017): parameters, averaged",
    build=fedavg,
    hparams=LOCAL_TRAINING,
    one_architecture=True,
    averages=True,
    example_fits=1,
)
