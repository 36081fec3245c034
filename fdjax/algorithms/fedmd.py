"""FedMD.

Li, Wang, "FedMD: Heterogenous Federated Learning via Model Distillation" (2019), Algorithm 1, which has no numbered
equations; what it leaves open is taken from the authors' code. Client k has a model f_k of any architecture, whose
outputs here are logits: the last softmax is removed.

    transfer learning:  f_k learns the labelled public data to the end, then the private data D_k, by CE
    communicate:        f_k(x) for x in the round's public subset
    aggregate:          f(x) = (1 / m) sum_k f_k(x)
    distribute, digest: minimise the mean of |f_k(x) - f(x)|, over the K logits and the subset (the code's loss)
    revisit:            train f_k on D_k by CE for a few epochs

Transfer learning is the set-up; a round is two exchanges, `communicate` and `digest_and_revisit`. Sent: the ids of the
n examples down (4n bytes) and their logits up (4nK), then the consensus down (4nK). Models never leave a client.

Public and private data may have labels of their own, as in the paper's tasks: then a model has one output layer over
both, first the private ones, and tests choose among all of them. Of one label space they share its K outputs.

Options: `subset`, drawn uniformly or stratified by label, as the code does; `selection` is Selective-FD's and no part
of FedMD (`exchange/selection.py`, which has figures: it costs accuracy here). Transfer learning stops early, after 3
epochs (`pretrain_patience`) on the public data and 10 (`private_patience`) on the client's own without a lower loss.

Deviations:
- Early stopping watches the epoch's mean loss on what is trained on, which has to fall by 0.001; the code's watches the
  accuracy on the test set, with the same patience and least change.
- The mean counts participants alike; the authors weigh two weak models less. Labels of the public data serve transfer
  learning and strata alone. The batch size on public data is `distill_batch_size`; learning rate and optimiser are one
  for all stages but for `digest_learning_rate` and what `--distill_*` say. Optimisers' states are kept, as in the code.
"""

from fdjax.client import losses
from fdjax.client.data import whole
from fdjax.client.training import Amount, fit, local_work, supervised
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
        params, _ = fit(task.training, loss, params, data, ctx.at("private"), epochs=on_private)
        return params, Upload(()), {}

    def communicate(ctx, received, params, data):
        return params, Upload(proxy.predict(ctx, params, received.shared)), {}

    def digest_and_revisit(ctx, received, params, data):
        def distance(params, x, consensus, key):
            return losses.mean_absolute_error(consensus, ctx.model.apply(params, x, key))

        h, consensus = ctx.hparams, proxy.targets(ctx, received.known, received.shared)
        params, digest_loss = fit(
            task.distilling, distance, params, consensus, ctx.at("digest"), epochs=h["digest_epochs"],
            learning_rate=h["digest_learning_rate"],
        )  # fmt: skip
        params, train_loss = fit(
            task.training, supervised(ctx.model, task.training), params, data, ctx.at("revisit"), epochs=local_work(ctx)
        )
        return params, Upload(()), {"train_loss": train_loss, "digest_loss": digest_loss}

    algorithm = Algorithm(
        init_server=proxy.no_agreement(task),
        init_client=own_model,
        setup=(without_traffic(transfer_learning),),
        round=proxy.agree_and_learn(task, communicate, reductions.mean(), digest_and_revisit, "logits"),
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
