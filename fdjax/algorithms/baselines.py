"""What a federated method has to beat, and what it cannot hope to.

- `local`: every client trains on its own examples and sends nothing. The usual "stand-alone" or "no federation".
- `ensemble`: the same clients; tested as the central model is the mean of their softmax outputs, over the clients that
  hold examples. It costs every client's parameters to have it in one place, or one pass through all clients a
  prediction, which is not counted. What one-shot distillation takes for its teacher.
- `centralized`: one client that holds everybody's examples, so the upper bound of a central model. Its traffic is none,
  since the examples' own is not a model's. Its own test part is one for all: per-client accuracies are not to be had.

Every client starts from an initialisation of its own and keeps its model; the optimiser starts afresh each round, as it
does for the federated methods, to which it is compared at equal epochs.
"""

from fdjax.client.training import fit, supervised
from fdjax.contract import (
    ENSEMBLE,
    Algorithm,
    Broadcast,
    Exchange,
    Upload,
    own_model,
    predict_with_own_model,
    unchanged,
)
from fdjax.exchange import reductions
from fdjax.method import LOCAL_TRAINING, Method, Task


def local(task: Task) -> Algorithm:
    """Training without exchange; hparams: `learning_rate`, `local_epochs`."""

    def train(ctx, received, params, data):
        params, loss = fit(task.training, supervised(ctx.model), params, data, ctx, epochs=ctx.hparams["local_epochs"])
        return params, Upload(()), {"train_loss": loss}

    exchange = Exchange(
        broadcast=lambda ctx, server: Broadcast(()),
        client=train,
        reduce=reductions.nothing(),
        server=unchanged,
    )
    return Algorithm(
        init_server=lambda ctx, params: (),
        init_client=own_model,
        round=(exchange,),
        personal=predict_with_own_model,
    )


def ensemble(task: Task) -> Algorithm:
    """The same, tested as an ensemble; with pooled data, an ensemble of the one client that is left."""
    return local(task)._replace(central=ENSEMBLE)


LOCAL = Method("local", "every client by itself", local, LOCAL_TRAINING)
METHODS = (
    LOCAL,
    LOCAL._replace(name="ensemble", summary="every client by itself, tested together", build=ensemble),
    LOCAL._replace(
        name="centralized", summary="one client that holds everything", build=ensemble, one_architecture=True,
        pooled=True,
    ),
)  # fmt: skip
