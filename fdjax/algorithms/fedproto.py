"""FedProto: prototypes, the mean features of each label, in place of parameters.

Tan, Long, Liu, Zhou, Lu, Jiang, Zhang, "FedProto: Federated Prototype Learning across Heterogeneous Clients" (AAAI
2022), Algorithm 1. Client i has a net of any architecture, f_i up to its head, and D_ij, its examples of label j.

    client:  E epochs of CE + lambda |f_i(x) - C^(y)|^2, C those that it received;                    (equation 7)
             C_i^(j) = mean over D_ij of f_i(x)                                                       (equation 3)
    server:  C^(j) = mean over the clients that hold j of C_i^(j)                                     (equation 6)
    tests:   argmin_j |f_i(x) - C^(j)|, or the client's own head (`inference`)                        (section 4)

|.|^2 is the mean over the d numbers of a feature, as in the authors' code: its lambda of 1 is 1/d of a sum's. A label
without C has no such term. The server's mean is of clients as in that code; `weighting` = examples is the text's, by
|D_ij| (the text divides once more by the number of holders, which can not be meant).

Sent: d numbers of each label, those that the client holds up and those that anybody had down: 4 d each; by examples
their number too. Nets never leave their clients, and must have features of one length.

Ours: C_i^(j) is of the trained net, by a further forward pass, as equation 3 has it (the code adds up features while
it trains, in the last epoch); a label that no participant of a round holds keeps the prototype that it had; before
there are prototypes a client predicts by its head.
"""

import jax.numpy as jnp

from fdjax.client import losses
from fdjax.client.training import fit, local_work
from fdjax.contract import Algorithm, Broadcast, Exchange, own_model, predict_with_own_model
from fdjax.exchange import prototypes, reductions
from fdjax.method import LOCAL_TRAINING, HParam, Method, Task


def fedproto(task: Task) -> Algorithm:
    """FedProto; `weight` is lambda; hparams and options: see METHOD."""
    K, d = task.classes, prototypes.length(task, "fedproto")
    by_example, nearest = task.options["weighting"] == "examples", task.options["inference"] == "prototypes"

    def train(ctx, received, params, data):
        known = received.shared.count > 0

        def loss(params, x, y, key):
            h = ctx.model.features(params, x, key)
            apart = losses.mean_squared_error(received.shared.value[y], prototypes.flat(h))
            hard = losses.cross_entropy(ctx.model.head(params, h, key), y, task.training.label_smoothing)
            return hard + ctx.hparams["weight"] * known[y] * apart

        params, train_loss = fit(task.training, loss, params, data, ctx, epochs=local_work(ctx))
        found = prototypes.sums(lambda x: ctx.model.features(params, x), data, K, d)
        return params, prototypes.upload(found, known, counts=by_example), {"train_loss": train_loss}

    def server(ctx, before, now):
        held = now.count > 0
        value = jnp.where(held[:, None], now.value, before.value)
        return reductions.ByLabel(value, jnp.where(held, now.count, before.count)), {}

    def predict(ctx, server, params, x):
        h = ctx.model.features(params, x)
        return prototypes.nearest(h, server, ctx.model.head(params, h))

    exchange = Exchange(lambda ctx, server: Broadcast(server), train, reductions.label_mean(by_example), server)
    return Algorithm(
        init_server=lambda ctx, params: reductions.ByLabel(jnp.zeros((K, d)), jnp.zeros(K)),
        init_client=own_model,
        round=(exchange,),
        personal=predict if nearest else predict_with_own_model,
        model_of=lambda ctx, server, params: params,
    )


METHOD = Method(
    name="fedproto",
    summary="FedProto (Tan et al. 2022): mean features by label, for clients of any architectures",
    build=fedproto,
    hparams=LOCAL_TRAINING | {"weight": HParam(1.0, help="weight of the distance to the prototypes (lambda)")},
    options={"inference": ("prototypes", "classifier"), "weighting": ("clients", "examples")},
    parts=True,
    keeps_models=True,
)
