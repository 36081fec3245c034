"""FedMD.

Li, Wang, "FedMD: Heterogenous Federated Learning via Model Distillation" (2019), Algorithm 1, and the authors' code.
Equations have no numbers there. Client k has a model f_k of any architecture, whose outputs here are logits.

    set-up:       transfer learning: f_k learns the labelled public data to the end, then its private data D_k, by CE
    communicate:  f_k(x) for x in the round's public subset, uniform or (`subset` = stratified, the code's) by label
    aggregate:    f(x) = (1 / m) sum_k f_k(x)
    digest:       minimise the mean of |f_k(x) - f(x)|, over the K logits and the subset (the code's loss)
    revisit:      train f_k on D_k by CE for a few epochs

Sent: n ids down (4n bytes, none if n is all), logits up (4nK); in `digest_and_revisit` the consensus down (4nK).

Public and private data may have labels of their own, as in the paper's tasks: then a model has one output layer over
both, first the private ones, and tests choose among all. `selection` is Selective-FD's (`exchange/selection.py`).

Deviations: early stopping of transfer learning watches an epoch's mean loss, the code's the test accuracy, with equal
patience and least change (0.001). Participants count alike; the authors weigh two weak models less. Stages have one
learning rate and optimiser, but for `digest_learning_rate` and `--distill_*`; its states are kept, as in the code.
"""

from fdjax.client.data import whole
from fdjax.client.training import Amount, fit, from_logits, of_stage, supervised, train_locally
from fdjax.contract import Algorithm, Upload, own_model, predict_with_own_model
from fdjax.exchange import proxy, reductions, selection
from fdjax.exchange.wrappers import without_traffic
from fdjax.method import LOCAL_TRAINING, Method, Task, epochs, learning_rate


def fedmd(task: Task) -> Algorithm:
    """FedMD; hparams: see METHOD."""

    def transfer_learning(ctx, received, params, data):
        h, loss = ctx.hparams, supervised(ctx.model, task.training)
        on_public = Amount(h["pretrain_epochs"], patience=h["pretrain_patience"])
        on_private = Amount(h["private_epochs"], patience=h["private_patience"])
        params, _ = fit(task.distilling, loss, params, whole(ctx.proxy), ctx.at("public"), epochs=on_public)
        params, _ = train_locally(task.training, params, data, ctx.at("private"), epochs=on_private)
        return params, Upload(()), {}

    def digest_and_revisit(ctx, received, params, data):
        loss, consensus = from_logits(ctx.model), proxy.targets(ctx, received.known, received.shared)
        params, digest_loss = fit(task.distilling, loss, params, consensus, ctx.at("digest"), **of_stage(ctx, "digest"))
        params, train_loss = train_locally(task.training, params, data, ctx.at("revisit"))
        return params, Upload(()), {"train_loss": train_loss, "digest_loss": digest_loss}

    algorithm = Algorithm(
        init_server=proxy.no_agreement(task),
        init_client=own_model,
        setup=(without_traffic(transfer_learning),),
        round=proxy.agree_and_learn(task, reductions.mean(), digest_and_revisit, "logits"),
        personal=predict_with_own_model,
    )
    return selection.selecting(task, algorithm, logits=True)


METHOD = Method(
    name="fedmd",
    summary="FedMD (Li & Wang 2019): mean logits on proxy data",
    build=fedmd,
    hparams={
        **LOCAL_TRAINING,
        "pretrain_epochs": epochs(20, "most epochs of transfer learning over the public data"),
        "pretrain_patience": epochs(3, "of these without a lower loss, after which it stops"),
        "private_epochs": epochs(25, "most epochs of transfer learning over a client's own data"),
        "private_patience": epochs(10, "of these without a lower loss, after which it stops"),
        "local_epochs": epochs(2, "epochs of the revisit in a round"),
        "digest_epochs": epochs(1, "epochs of the digest in a round"),
        "digest_learning_rate": learning_rate("learning_rate", "learning rate of the digest"),
        **selection.HPARAMS,
    },
    options={"subset": ("uniform", "stratified")} | selection.OPTION,
    proxy="labelled",
    joins_labels=True,
    keeps_optimizer=True,
    stages=("distill",),
    keeps_models=True,
    needs_numbers_for=selection.DISTANCES,
    distils=True,
)
