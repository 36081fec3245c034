"""FedDistill+: FedAvg and FD in one, parameters and mean outputs by label.

A baseline of Zhu, Hong, Zhou (ICML 2021), FedGen's paper and released code, which is what we had: FD (Jeong et al.
2018, `fd.py`; "FedDistill" there) that averages parameters too. Equation numbers are missing here. z are logits.

    client:  w_k <- w;  E epochs of  CE(softmax(z), y) + gamma KL(softmax(F[y]) || softmax(z));
             F_k[l] = mean of z over the examples of label l that it trained on, as predicted then
    server:  w <- sum_k (n_k / n) w_k;  F[l] = mean of F_k[l] over the participants that hold l

Other than FD: F are means of logits, not of probabilities, and the own F_k is part of F. gamma = 1 as in the code.
With gamma = 0 it is FedAvg. Sent: w, F and which labels F knows down, 4 (P + K^2) + K bytes; w_k, sums of z by label
and their numbers up, 4 (P + K^2 + K).

Ours: F_k is of this round alone (the code's counters begin at 1 and go on for ever); where no participant holds l the
older F[l] stays, and there is no such term before there is one (the code distils from rows of zeros).

It is no better than FedAvg, as in most rows of FedGen's Table 1. Three seeds: 0.702, 0.714, 0.686 where few take part
(`test_local_distillation_learning.py`; FedAvg 0.765, 0.764, 0.696), with gamma = 0.1 level with it (0.761, 0.765,
0.708); 0.596, 0.536, 0.627 where all do (`test_learning.py`; FedAvg 0.672, 0.697, 0.702; alone 0.230 to 0.249).
"""

import jax.numpy as jnp

from fdjax.client import losses
from fdjax.client.training import fit_observing, local_work
from fdjax.contract import Algorithm, Broadcast, Exchange, Upload
from fdjax.exchange import reductions
from fdjax.method import LOCAL_TRAINING, HParam, Method, Task


def feddistill_plus(task: Task) -> Algorithm:
    """FedDistill+ of the task's model; hparams: `learning_rate`, `local_epochs`, `gamma`."""
    K = task.classes

    def train(ctx, received, state, data):
        outputs, known = received.shared["outputs"], received.shared["known"]

        def loss(params, x, y, key):
            z = ctx.model.apply(params, x, key)
            hard = losses.cross_entropy(z, y, task.training.label_smoothing)
            return hard + ctx.hparams["gamma"] * known[y] * losses.kl_divergence(outputs[y], z), z

        params, train_loss, seen = fit_observing(
            task.training, loss, lambda z, y, weight: reductions.sum_by_label(z, y, K, weight),
            reductions.nothing_by_label(K, K), received.shared["params"], data, ctx,
            epochs=local_work(ctx),
        )  # fmt: skip
        return state, Upload({"params": params, "outputs": seen}), {"train_loss": train_loss}

    def serve(ctx, server, summary):
        mean, count = summary["outputs"]
        outputs = jnp.where(count[:, None] > 0, mean, server["outputs"])
        return {"params": summary["params"], "outputs": outputs, "known": server["known"] | (count > 0)}, {}

    exchange = Exchange(
        broadcast=lambda ctx, server: Broadcast(server),
        client=train,
        reduce={
            "params": reductions.weighted_mean(lambda sent: sent["params"]),
            "outputs": reductions.label_mean(each=lambda sent: sent["outputs"]),
        },
        server=serve,
    )
    return Algorithm(
        init_server=lambda ctx, params: {"params": params, "outputs": jnp.zeros((K, K)), "known": jnp.zeros(K, bool)},
        init_client=lambda ctx, params: (),
        round=(exchange,),
        central=lambda ctx, server, x: ctx.model.apply(server["params"], x),
        model_of=lambda ctx, server, state: server["params"],
    )


METHOD = Method(
    name="feddistill_plus",
    summary="FedDistill+ (in Zhu et al. 2021): FedAvg and FD, parameters and mean outputs by label",
    build=feddistill_plus,
    hparams=LOCAL_TRAINING | {"gamma": HParam(1.0, help="weight of the divergence from the label's mean outputs")},
    one_architecture=True,
    averages=True,
)
