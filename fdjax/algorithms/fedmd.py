"""FedMD.

Li, Wang, "FedMD: Heterogenous Federated Learning via Model Distillation" (2019), Algorithm 1, which has no numbered
equations; what it leaves open is taken from the authors' code. Client k has a model f_k of any architecture, whose
outputs here are logits: the last softmax is removed.

    transfer learning:  f_k learns the labelled public data to the end, then the private data D_k, by CE
    communicate:        f_k(x) for x in the round's public subset
    aggregate:          f(x) = (1 / m) sum_k f_k(x)
    digest:             minimise the mean of |f_k(x) - f(x)|, over the K logits and the subset (the code's loss)
    revisit:            train f_k on D_k by CE for a few epochs

Sent: see `exchange`; logits of the n examples of the subset up, consensus and ids down. Models never leave a client.

Deviations:
- The subset is drawn uniformly; the code's is stratified by label.
- Transfer learning runs `pretrain_epochs` and `private_epochs` to the end: no early stopping, whose patience is 3 and
  10 epochs in the code and so these numbers are its upper limits.
- Public and private data share one set of K labels, while the paper's models have an output for the labels of both.
- A round digests the last one's consensus, revisits and then communicates; the first only revisits and communicates.
  Transfer learning, digest and communication pass over a client that holds no private example.
- The mean counts participants alike; the authors weigh two weak models less. Labels of the public data serve transfer
  learning alone. The batch size on public data is `distill_batch_size`; learning rate and optimiser are one for all
  stages but for `digest_learning_rate`.
"""

import jax.numpy as jnp

from fdjax import keys
from fdjax.client import local, losses
from fdjax.exchange import proxy as exchange
from fdjax.exchange import reductions
from fdjax.types import Algorithm

HPARAMS: dict[str, float | str] = {
    "learning_rate": 0.01,
    "pretrain_epochs": 20,
    "private_epochs": 25,
    "local_epochs": 2,
    "digest_epochs": 1,
    "digest_learning_rate": "learning_rate",
}


def fedmd(task: local.Task) -> Algorithm:
    """FedMD.

    hparams: `learning_rate`, `pretrain_epochs` (public) and `private_epochs` of transfer learning, `local_epochs`
    (revisit), `digest_epochs`, `digest_learning_rate`.
    """

    def classify(model):
        return lambda params, x, y: losses.cross_entropy(model.apply(params, x), y)

    def setup(model, params, data, proxy, hparams, key):
        public = local.everything(proxy)
        public_epochs = jnp.where(jnp.asarray(data.count) > 0, hparams["pretrain_epochs"], 0)
        params, _ = local.fit(
            task.distilling, classify(model), params, public, hparams, keys.stream(key, "public"), epochs=public_epochs
        )
        params, _ = local.fit(
            task.training, classify(model), params, data, hparams, keys.stream(key, "private"),
            epochs=hparams["private_epochs"],
        )  # fmt: skip
        return params

    def client(model, received, params, data, proxy, hparams, key):
        def digest(params, x, consensus):
            return losses.mean_absolute_error(consensus, model.apply(params, x))

        params, digest_loss = local.fit(
            task.distilling, digest, params, received.data(proxy),
            hparams | {"learning_rate": hparams["digest_learning_rate"]}, keys.stream(key, "digest"),
            epochs=exchange.epochs(hparams["digest_epochs"], received, data),
        )  # fmt: skip
        params, train_loss = local.fit(
            task.training, classify(model), params, data, hparams, keys.stream(key, "revisit"),
            epochs=hparams["local_epochs"],
        )  # fmt: skip
        upload = exchange.predict(model, params, proxy, received)
        return params, upload, {"train_loss": train_loss, "digest_loss": digest_loss}

    def server(state, consensus, proxy, hparams, key):
        return exchange.following(task, state, consensus, key), {}

    return Algorithm(
        name="fedmd",
        hparams=HPARAMS,
        init_server=lambda key: exchange.first(task, key),
        init_client=lambda model, key: model.init(key),
        broadcast=lambda state, cohort: state,
        client=client,
        reduction=reductions.mean(),
        server=server,
        personal=lambda params: params,
        setup=setup,
    )
