"""DS-FL, distillation-based semi-supervised federated learning.

Itahara, Nishio, Koda, Morikura, Yamamoto, "Distillation-Based Semi-Supervised Federated Learning for Communication-
Efficient Collaborative Training with Non-IID Private Data" (2021). We had its abstract and its laboratory's later code
(BlazeFL, SCARLET), so equation numbers are missing here. Client k has a model w_k of any architecture, the server has a
model w; o_t is the subset of the unlabelled open data that round t uses.

    client, round t:  distil:   minimise CE(target(x), softmax(w_k(x))) over x in o_{t-1}
                      update:   train w_k on the private data by CE
                      predict:  p_k(x) = softmax(w_k(x)) for x in o_t
    server:           p(x) = (1 / m) sum_k p_k(x)
                      target(x) = softmax(p(x) / T), of probabilities and not of logits        ERA
                      target(x) = p(x)                                                         SA
                      distil w on {(x, target(x)) : x in o_t}, as the clients do

The server's model is the central one; it learns targets in the round that makes them, clients in the next. T sharpens
only what is not sharp already: see `reductions.era`. CE has the gradient of the KL divergence; there is no T^2.

Sent: see `exchange`; probabilities up, targets and ids down. Models stay where they are.

Choices, `aggregation`:
- era: the paper's, T = `era_temperature` = 0.1
- sa: simple aggregation, the paper's comparison
- enhanced_era: p_c^beta / sum_c p_c^beta, SCARLET's, beta = `era_beta` = 2
- era_logits: clients send logits z_k and target(x) = softmax(mean_k z_k(x) / T), which some re-implementations call ERA

Deviations: the first round distils nothing; every model starts from an initialisation of its own; a client that holds
no example distils nothing. Epochs, batch size and learning rate of the laboratory's code are not our defaults but for
`distill_epochs` = 5.
"""

from typing import NamedTuple

import jax

from fdjax import keys
from fdjax.client import local, losses
from fdjax.exchange import proxy as exchange
from fdjax.exchange import reductions
from fdjax.types import Algorithm, PyTree

HPARAMS: dict[str, float | str] = {
    "learning_rate": 0.01,
    "local_epochs": 1,
    "distill_learning_rate": "learning_rate",
    "distill_epochs": 5,
    "era_temperature": 0.1,
    "era_beta": 2.0,
}
OPTIONS = {"aggregation": ("era", "sa", "enhanced_era", "era_logits")}


class _Server(NamedTuple):
    params: PyTree
    exchange: exchange.Exchange


def dsfl(task: local.Task) -> Algorithm:
    """DS-FL.

    hparams: `learning_rate`, `local_epochs`, `distill_learning_rate`, `distill_epochs` (of clients and server),
    `era_temperature` (T), `era_beta`; the options' `aggregation` uses one of the last two, or none.
    """
    aggregation = task.options["aggregation"]

    def sharpen(mean, hparams):
        if aggregation == "sa":
            return mean
        if aggregation == "enhanced_era":
            return reductions.enhanced_era(mean, hparams["era_beta"])
        return reductions.era(mean, hparams["era_temperature"])

    def distil(model, params, received, proxy, hparams, key, epochs):
        def loss(params, x, target):
            return losses.soft_cross_entropy(target, model.apply(params, x))

        rate = {"learning_rate": hparams["distill_learning_rate"]}
        return local.fit(
            task.distilling,
            loss,
            params,
            received.data(proxy),
            hparams | rate,
            keys.stream(key, "distil"),
            epochs=epochs,
        )

    def client(model, received, params, data, proxy, hparams, key):
        def loss(params, x, y):
            return losses.cross_entropy(model.apply(params, x), y)

        epochs = exchange.epochs(hparams["distill_epochs"], received, data)
        params, distill_loss = distil(model, params, received, proxy, hparams, key, epochs)
        params, train_loss = local.fit(
            task.training, loss, params, data, hparams, keys.stream(key, "update"), epochs=hparams["local_epochs"]
        )
        logits = exchange.predict(model, params, proxy, received)
        upload = logits if aggregation == "era_logits" else jax.nn.softmax(logits)
        return params, upload, {"train_loss": train_loss, "distill_loss": distill_loss}

    def server(state, mean, proxy, hparams, key):
        targets = sharpen(mean, hparams)
        following = exchange.following(task, state.exchange, targets, keys.stream(key, "subset"))
        params, loss = distil(task.model, state.params, following, proxy, hparams, key, hparams["distill_epochs"])
        entropy = losses.entropy(targets).mean()
        return _Server(params, following), {"server_loss": loss, "target_entropy": entropy}

    def init_server(key):
        return _Server(task.model.init(key), exchange.first(task, keys.stream(key, "subset")))

    return Algorithm(
        name="dsfl",
        hparams=HPARAMS,
        init_server=init_server,
        init_client=lambda model, key: model.init(key),
        broadcast=lambda state, cohort: state.exchange,
        client=client,
        reduction=reductions.mean(),
        server=server,
        central=(task.model, lambda state: state.params),
        personal=lambda params: params,
    )
