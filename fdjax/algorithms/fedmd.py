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

Deviations:
- The subset is drawn uniformly; the code's is stratified by label.
- Transfer learning runs `pretrain_epochs` and `private_epochs` to the end: no early stopping, whose patience is 3 and
  10 epochs in the code and so these numbers are its upper limits.
- Public and private data share one set of K labels, while the paper's models have an output for the labels of both.
- The mean counts participants alike; the authors weigh two weak models less. Labels of the public data serve transfer
  learning alone. The batch size on public data is `distill_batch_size`; learning rate and optimiser are one for all
  stages but for `digest_learning_rate` and what `--distill_*` say. States of optimisers are kept, as in the code.
"""

from fdjax.client import losses
from fdjax.client.data import whole
from fdjax.client.training import fit, local_work, supervised
from fdjax.contract import Algorithm, Upload, own_model, predict_with_own_model
from fdjax.exchange import proxy, reductions
from fdjax.exchange.wrappers import without_traffic
from fdjax.method import LOCAL_TRAINING, Method, Task, epochs, learning_rate


def fedmd(task: Task) -> Algorithm:
    """FedMD; hparams: see METHOD."""

    def transfer_learning(ctx, received, params, data):
        h, loss = ctx.hparams, supervised(ctx.model, task.training)
        public = whole(ctx.proxy)
        params, _ = fit(task.distilling, loss, params, public, ctx.at("public"), epochs=h["pretrain_epochs"])
        params, _ = fit(task.training, loss, params, data, ctx.at("private"), epochs=h["private_epochs"])
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

    return Algorithm(
        init_server=proxy.no_agreement(task),
        init_client=own_model,
        setup=(without_traffic(transfer_learning),),
        round=proxy.agree_and_learn(task, communicate, reductions.mean(), digest_and_revisit),
        personal=predict_with_own_model,
    )


METHOD = Method(
    name="fedmd",
    summary="FedMD (Li & Wang 2019): mean logits on proxy data",
    build=fedmd,
    hparams={
        **LOCAL_TRAINING,
        "pretrain_epochs": epochs(20, "epochs of transfer learning over the public data"),
        "private_epochs": epochs(25, "epochs of transfer learning over a client's own data"),
        "local_epochs": epochs(2, "epochs of the revisit in a round"),
        "digest_epochs": epochs(1, "epochs of the digest in a round"),
        "digest_learning_rate": learning_rate("learning_rate", "learning rate of the digest"),
    },
    proxy="labelled",
    keeps_optimizer=True,
    stages=("distill",),
    keeps_models=True,
)
