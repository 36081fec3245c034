"""CFD: compressed federated distillation.

Sattler, Marban, Rischke, Samek, "CFD: Communication-Efficient Federated Distillation via Soft-Label Quantization and
Delta Coding" (IEEE TNSE 2022; arXiv 2012.00632). Soft labels are quantised to b bits, and of these the changes are
sent. The server has a model w, the central one, which learns from the clients and labels the proxy data anew for them:

    client:  w_k <- w_0 (fixed);  `distill_epochs` of CE(Y, softmax(w_k(x))) on o_t;  E epochs of CE on its own data;
             send Y_k = Q_bup(softmax(w_k(x))), x in o_t
    server:  `distill_epochs` of CE(mean_k Y_k, softmax(w(x))) on o_t;  next o;  Y = Q_bdown(softmax(w(x))), x in o
    Q_b(p) = argmin_q |q - p|, q in {0, 1/(2^b - 1), ..., 1}^K with sum 1;  b = 1: one-hot argmax

Sent: Y down, Y_k up, in the bytes of an adaptive arithmetic coder (`exchange/coding.py`); o_t, 4 bytes an id, unless it
is all proxy data. The first round has no Y. With 32 bits, up or down, labels are floats and all of them are sent.

Written from a summary of the paper, not from code (none was found). What that leaves open, and we chose: the coder; the
label that a change is of is what this client last sent or received of the example, so that clients may be absent (both
ends keep it, here in the client's state); o_t is random, where the paper also speaks of choosing proxy data; every
client has a fixed w_0 of its own, and the server's w goes on from where it was.
"""

import jax.numpy as jnp

from fdjax.client.training import train_locally
from fdjax.contract import Algorithm, Broadcast, Exchange, Upload
from fdjax.exchange import coding, proxy, reductions
from fdjax.exchange.wrappers import coded
from fdjax.method import LOCAL_TRAINING, Method, Task


def cfd(task: Task) -> Algorithm:
    """CFD; hparams: see METHOD; options: `bits_up`, `bits_down`."""
    up = coding.labels_in(task.options["bits_up"], "sent")
    down = coding.with_ids(coding.labels_in(task.options["bits_down"], "received"))

    def distil_train_predict(ctx, received, state, data):
        params, distill_loss = proxy.distil(task, ctx.at("distill"), state["start"], *received.shared)
        params, train_loss = train_locally(task.training, params, data, ctx.at("train"))
        upload = Upload(proxy.label(ctx, params, received.shared.ids))
        return state | {"params": params}, upload, {"train_loss": train_loss, "distill_loss": distill_loss}

    def distil_and_label(ctx, server, mean):
        params, loss = proxy.distil(task, ctx.at("distill"), server["params"], server["labels"].ids, mean)
        ids = proxy.draw_ids(task, ctx.at("subset").key)
        return {"params": params, "labels": proxy.label(ctx, params, ids)}, {"server_loss": loss}

    def init_server(ctx, params):
        labels = proxy.SoftLabels(proxy.draw_ids(task, ctx.key), proxy.no_labels(task), jnp.bool(False))
        return {"params": params, "labels": labels}

    def init_client(ctx, params):
        start, nothing = ctx.model.init(ctx.key), coding.nothing_sent(task.proxy_size, task.classes)
        return {"start": start, "params": start} | {codec.memory: nothing for codec in (up, down) if codec.memory}

    exchange = Exchange(
        broadcast=lambda ctx, server: Broadcast(server["labels"]),
        client=distil_train_predict,
        reduce=reductions.mean(lambda soft: soft.labels),
        server=distil_and_label,
    )
    return Algorithm(
        init_server=init_server,
        init_client=init_client,
        round=(coded(exchange, up=up, down=down),),
        central=lambda ctx, server, x: ctx.model.apply(server["params"], x),
        personal=lambda ctx, server, state, x: ctx.model.apply(state["params"], x),
        model_of=lambda ctx, server, state: state["params"],
    )


METHOD = Method(
    name="cfd",
    summary="CFD (Sattler et al. 2022): soft labels in few bits, delta-coded; the server labels for the clients",
    build=cfd,
    hparams=LOCAL_TRAINING | proxy.distillation(epochs=1),
    options={"bits_up": coding.BITS, "bits_down": coding.BITS},
    proxy="unlabelled",
    stages=("distill",),
    keeps_models=True,
    distils=True,
)
