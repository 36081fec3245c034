"""FedAvg.

McMahan, Moore, Ramage, Hampson, Aguera y Arcas, "Communication-Efficient Learning of Deep Networks from Decentralized
Data" (AISTATS 2017), Algorithm 1.

    client:  w_k <- w;  for E epochs, for each batch b:  w_k <- w_k - eta grad l(w_k; b)
    server:  w <- sum_k (n_k / n) w_k,  n = sum_k n_k, over the participants of the round

Sent: w down and w_k up, 4P bytes each way. A client keeps nothing between rounds: its local model is the central one.

Deviations: the client's step is any optax transformation (plain SGD by default); B = infinity is a batch size of 0 or
of at least the largest client.
"""

from collections.abc import Callable

import jax

from fdjax.client import losses
from fdjax.client.training import fit
from fdjax.contract import Algorithm, Broadcast, ClientWork, Context, Exchange, Upload, params_of_server
from fdjax.exchange import reductions
from fdjax.method import LOCAL_TRAINING, Method, Task
from fdjax.types import PyTree

Objective = Callable[[Context, PyTree, PyTree, jax.Array, jax.Array], jax.Array]
# (ctx, w, w_k, x [B, ...], y [B]) -> losses [B]; w is what the client received


def averaging(client: ClientWork) -> Exchange:
    """The server's params down, the clients' params up, whose mean weighted by n_k the server takes."""
    return Exchange(
        broadcast=lambda ctx, params: Broadcast(params),
        client=client,
        reduce=reductions.weighted_mean(),
        server=lambda ctx, params, mean: (mean, {}),
    )


def with_objective(task: Task, objective: Objective) -> Algorithm:
    """FedAvg whose clients minimise another loss: w_k <- w_k - eta grad (mean over b of `objective`).

    The metric `train_loss` is the mean of the objective over the last epoch's batches.
    """

    def train(ctx, received, state, data):
        w = received.shared
        params, loss = fit(
            task.training, lambda params, x, y: objective(ctx, w, params, x, y), w, data, ctx,
            epochs=ctx.hparams["local_epochs"],
        )  # fmt: skip
        return state, Upload(params), {"train_loss": loss}

    return Algorithm(
        init_server=lambda ctx, params: params,
        init_client=lambda ctx: (),
        round=(averaging(train),),
        central=lambda ctx, params, x: ctx.model.apply(params, x),
        model_of=params_of_server,
    )


def fedavg(task: Task) -> Algorithm:
    """FedAvg of the task's model; hparams: `learning_rate` (eta), `local_epochs` (E)."""

    def objective(ctx, start, params, x, y):
        return losses.cross_entropy(ctx.model.apply(params, x), y)

    return with_objective(task, objective)


METHOD = Method(
    name="fedavg",
    summary="FedAvg (McMahan et al. 2017): parameters, averaged",
    build=fedavg,
    hparams=LOCAL_TRAINING,
    one_architecture=True,
)
