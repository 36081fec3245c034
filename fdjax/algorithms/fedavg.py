"""FedAvg.

McMahan, Moore, Ramage, Hampson, Aguera y Arcas, "Communication-Efficient Learning of Deep Networks from Decentralized
Data" (AISTATS 2017), Algorithm 1.

    client:  w_k <- w;  for E epochs, for each batch b:  w_k <- w_k - eta grad l(w_k; b)
    server:  w <- sum_k (n_k / n) w_k,  n = sum_k n_k, over the participants of the round

Sent: w down and w_k up, 4P bytes each way. A client keeps nothing between rounds: its local model is the central one.

Deviations: the client's step is any optax transformation (plain SGD by default); B = infinity is a batch size of 0 or
of at least the largest client.
"""

from fdjax.client import local, losses
from fdjax.exchange import reductions
from fdjax.types import Algorithm

HPARAMS: dict[str, float | str] = {"learning_rate": 0.01, "local_epochs": 1}


def fedavg(task: local.Task) -> Algorithm:
    """FedAvg of the task's model; hparams: `learning_rate` (eta), `local_epochs` (E)."""
    model, training = task.model, task.training

    def loss(params, x, y):
        return losses.cross_entropy(model.apply(params, x), y)

    def client(model, params, state, data, proxy, hparams, key):
        params, train_loss = local.fit(training, loss, params, data, hparams, key, epochs=hparams["local_epochs"])
        return state, params, {"train_loss": train_loss}

    def server(params, mean, proxy, hparams, key):
        return mean, {}

    return Algorithm(
        name="fedavg",
        hparams=HPARAMS,
        init_server=model.init,
        init_client=lambda model, key: (),
        broadcast=lambda params, cohort: params,
        client=client,
        reduction=reductions.weighted_mean(),
        server=server,
        central=(model, lambda params: params),
        cohorts=1,
    )
