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

Clients of one architecture start alike (ours): features that were drawn apart have no common mean. Accuracy on the
whole test set in `test_learning.py`, of three seeds: 0.322, 0.291, 0.335; drawn apart 0.285, 0.258, 0.278; alone 0.230,
0.249, 0.235. On their own labels clients are level with training alone there (0.92, 0.91, 0.96 and 0.92, 0.94, 0.93),
and ahead with 15 images each by Dirichlet(0.5) (0.826, 0.828, 0.830 and 0.804, 0.828, 0.823). The paper's gain there is
3 points.
"""

import jax.numpy as jnp

from fdjax.contract import Algorithm, Broadcast, Exchange, common_model, params_of_state, predict_with_own_model
from fdjax.exchange import prototypes, reductions
from fdjax.method import LOCAL_TRAINING, HParam, Method, Task


def fedproto(task: Task) -> Algorithm:
    """FedProto; `weight` is lambda; hparams and options: see METHOD."""
    d, by_example = prototypes.length(task, "fedproto"), task.options["weighting"] == "examples"

    def server(ctx, before, now):
        held = now.count > 0
        value = jnp.where(held[:, None], now.value, before.value)
        return reductions.ByLabel(value, jnp.where(held, now.count, before.count)), {}

    exchange = Exchange(
        broadcast=lambda ctx, shared: Broadcast(shared),
        client=prototypes.train_towards(task, d, counts=by_example),
        reduce=reductions.label_mean(by_example),
        server=server,
    )
    return Algorithm(
        init_server=lambda ctx, params: reductions.nothing_by_label(task.classes, d),
        init_client=common_model,
        round=(exchange,),
        personal=prototypes.predict_by_nearest if task.options["inference"] == "prototypes" else predict_with_own_model,
        model_of=params_of_state,
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
