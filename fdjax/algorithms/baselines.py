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

from fdjax.client import local, losses
from fdjax.exchange import reductions
from fdjax.types import Algorithm

HPARAMS: dict[str, float | str] = {"learning_rate": 0.01, "local_epochs": 1}


def alone(task: local.Task) -> Algorithm:
    """Training without exchange; hparams: `learning_rate`, `local_epochs`."""

    def client(model, received, params, data, proxy, hparams, key):
        def loss(params, x, y):
            return losses.cross_entropy(model.apply(params, x), y)

        params, train_loss = local.fit(task.training, loss, params, data, hparams, key, epochs=hparams["local_epochs"])
        return params, (), {"train_loss": train_loss}

    return Algorithm(
        name="local",
        hparams=HPARAMS,
        init_server=lambda key: (),
        init_client=lambda model, key: model.init(key),
        broadcast=lambda nothing, cohort: (),
        client=client,
        reduction=reductions.mean(),
        server=lambda nothing, summary, proxy, hparams, key: ((), {}),
        personal=lambda params: params,
    )


def ensemble(task: local.Task) -> Algorithm:
    """The same, tested as an ensemble."""
    return alone(task)._replace(name="ensemble", ensemble=True)


def centralized(task: local.Task) -> Algorithm:
    """The same of the one client that is left when all data are pooled: an ensemble of one."""
    return ensemble(task)._replace(name="centralized", cohorts=1)
