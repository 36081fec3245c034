"""What a federated method has to beat, and what it cannot hope to.

- `local`: every client trains on its own examples and sends nothing. The usual "stand-alone" or "no federation".
- `ensemble`: the same clients; tested as the central model is the mean of their softmax outputs, over the clients that
  hold examples. It costs every client's parameters to have it in one place, or one pass through all clients a
  prediction, which is not counted. What one-shot distillation takes for its teacher.
- `centralized`: the central model, trained by one client that holds everybody's examples: the upper bound of a central
  model. Nothing is counted as sent, since it needs no network. There is one own test part for all: accuracies of single
  clients cannot be had.

Clients of the first two start from initialisations of their own and keep their models. The optimiser starts afresh each
round, as it does for the federated methods, to which these are compared at equal epochs.
"""

from fdjax.algorithms import fedavg
from fdjax.client.training import train_locally
from fdjax.contract import ENSEMBLE, Algorithm, Broadcast, Upload, own_model, predict_with_own_model
from fdjax.exchange.wrappers import without_traffic
from fdjax.method import LOCAL_TRAINING, Method, Task


def local(task: Task) -> Algorithm:
    """Training without exchange; hparams: `learning_rate`, `local_epochs`."""

    def train(ctx, received, params, data):
        params, loss = train_locally(task.training, params, data, ctx)
        return params, Upload(()), {"train_loss": loss}

    return Algorithm(
        init_server=lambda ctx, params: (),
        init_client=own_model,
        round=(without_traffic(train),),
        personal=predict_with_own_model,
    )


def ensemble(task: Task) -> Algorithm:
    """The same, tested as an ensemble."""
    return local(task)._replace(central=ENSEMBLE)


def centralized(task: Task) -> Algorithm:
    """Training of the central model on pooled data, by the one client that is left, which has what the server has."""

    algorithm = fedavg.fedavg(task)
    (exchange,) = algorithm.round

    def train(ctx, received, state, data):
        state, upload, metrics = exchange.client(ctx, received._replace(shared=received.known), state, data)
        return state, upload._replace(bytes=0.0), metrics

    pooled = exchange._replace(broadcast=lambda ctx, params: Broadcast((), known=params), client=train, shares="")
    return algorithm._replace(round=(pooled,))


LOCAL = Method("local", "every client by itself", local, LOCAL_TRAINING, keeps_models=True)
METHODS = (
    LOCAL,
    LOCAL._replace(name="ensemble", summary="every client by itself, tested together", build=ensemble),
    LOCAL._replace(
        name="centralized", summary="one client that holds everything", build=centralized, one_architecture=True,
        pooled=True, keeps_models=False,
    ),
)  # fmt: skip
