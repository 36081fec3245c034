"""FedGH: one head for clients of different extractors, which the server trains on their prototypes.

Yi, Wang, Liu, Shi, Yu, "FedGH: Heterogeneous Federated Learning with Generalized Global Header" (ACM MM 2023), by the
code of HtFLlib: we had no equation numbers. Client k has an extractor f_k of any architecture, whose features are of
one length d, and a head h.

    client:  h_k <- h;  E epochs of CE on (f_k, h_k);  the mean of f_k(x) over its examples of each label
    server:  `server_epochs` of SGD on CE(h(mean), label) of all the clients' means, one by one
    tests:   h(f_k(x)), with the server's h

Sent: h down, d numbers of each label that the client holds up. Extractors stay where they are; h_k is not kept.

Ours: the server's head is that of the run's central model, and starts as it does; clients of one architecture start
alike. Batches are as large as the clients'. Accuracy on the whole test set in `test_learning.py`: 0.315, 0.292, 0.303;
alone 0.230, 0.249, 0.235; on own labels 0.940, 0.933, 0.944 and 0.922, 0.937, 0.928.
"""

from fdjax.client import losses
from fdjax.client.training import fit, of_stage, train_locally
from fdjax.contract import Algorithm, Broadcast, Exchange, common_model
from fdjax.errors import InputError
from fdjax.exchange import prototypes, reductions
from fdjax.exchange.parts import Head
from fdjax.method import LOCAL_TRAINING, Method, Task, epochs, learning_rate


def fedgh(task: Task) -> Algorithm:
    """FedGH; the server's head is the task's model's; hparams: see METHOD."""
    K, d = task.classes, prototypes.length(task, "fedgh")
    common, heads = Head(task.model, task.inputs), [Head(model, task.inputs) for model in task.models]
    for model, head in zip(task.models, heads, strict=True):
        if head.shapes != common.shapes:
            raise InputError(
                f"fedgh shares one head, but that of {model.name} has {head.shapes} and that of the central model "
                f"{task.model.name} has {common.shapes}; choose models whose heads are alike (--model, --models)"
            )
    training = task.serving._replace(trained=None)

    def train(ctx, received, params, data):
        params, loss = train_locally(task.training, heads[ctx.cohort].put(params, received.shared), data, ctx)
        found = prototypes.sums(lambda x: ctx.model.features(params, x), data, K, d)
        return params, prototypes.upload(found), {"train_loss": loss}

    def of_mean(leaves, h, y, key):
        return losses.cross_entropy(common.apply(leaves, h), y, training.label_smoothing)

    def serve(ctx, head, stack):
        pool, _ = prototypes.pooled(stack)
        head, loss = fit(training, of_mean, head, pool, ctx, keeps=False, **of_stage(ctx, "server"))
        return head, {"server_loss": loss}

    def model_of(ctx, head, params):
        return heads[ctx.cohort].put(params, head)

    return Algorithm(
        init_server=lambda ctx, params: common.of(params),
        init_client=common_model,
        round=(Exchange(lambda ctx, head: Broadcast(head), train, reductions.stack(), serve),),
        personal=lambda ctx, head, params, x: ctx.model.apply(model_of(ctx, head, params), x),
        model_of=model_of,
    )


METHOD = Method(
    name="fedgh",
    summary="FedGH (Yi et al. 2023): one head, which the server trains on mean features by label",
    build=fedgh,
    hparams={
        **LOCAL_TRAINING,
        "server_learning_rate": learning_rate("learning_rate", "learning rate of the head at the server"),
        "server_epochs": epochs(100, "epochs of the server over the clients' prototypes"),
    },
    parts=True,
    stages=("server",),
    keeps_models=True,
)
