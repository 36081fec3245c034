"""CFD: compressed federated distillation.

Sattler, Marban, Rischke, Samek, "CFD: Communication-Efficient Federated Distillation via Soft-Label Quantization and
Delta Coding" (IEEE TNSE 2022; arXiv 2012.00632). Its three measures on top of federated distillation, for b bits:

    quantisation  Q_b(p) = argmin_q ||q - p||, q in {0, 1/(2^b - 1), ..., 1}^K with sum 1; b = 1: one-hot argmax
    delta coding  what is sent of an example is the change of its quantised label since it was last sent
    dual distillation  the server's model distils, and labels the proxy data anew for the clients

    client:  w_k <- w_0 (fixed);  distil Y on o_t (`distill_epochs`);  E epochs of CE on its own data;
             send Y_k = Q_bup(softmax(w_k(x))), x in o_t
    server:  w distils the mean over k of Y_k on o_t;  next o;  Y = Q_bdown(softmax(w(x))), x in o

Loss of distillation: CE(Y, softmax(w(x))), no temperature. The server's model is the central one.

Sent: Y down, Y_k up, by the codec `coding.quantised_labels` (flags of change and new symbols, each adaptively and
arithmetically coded), whose bytes are counted; o_t, 4 bytes an id, unless it is all proxy data. The first round has no
Y and sends o_1 alone. With 32 bits, up or down, labels are floats of 4 bytes, neither quantised nor delta-coded.

Written from a summary of the paper, not from code (none was found); what that leaves open, and we chose:
- The code above, and which symbols it models. The paper also speaks of choosing proxy data: not here, o_t is random.
- The reference for the delta is, example by example, what that client last sent or received, so clients may be absent;
  both ends keep it (here in the client's state).
- Every client has a fixed w_0 of its own. The server's w goes on from where it was.
"""

import jax
import jax.numpy as jnp

from fdjax.client.training import fit, from_probabilities, local_work, supervised
from fdjax.contract import Algorithm, Broadcast, Exchange, Upload
from fdjax.exchange import coding, proxy, reductions, traffic
from fdjax.exchange.wrappers import Codec, coded
from fdjax.method import LOCAL_TRAINING, Method, Task, epochs, learning_rate

_FULL = "32"


def cfd(task: Task) -> Algorithm:
    """CFD; hparams: see METHOD; options: `bits_up`, `bits_down`."""
    up, down = _codec(task.options["bits_up"], "sent"), _announcing(_codec(task.options["bits_down"], "received"))

    def learn_labels(ctx, params, soft, epochs):
        return fit(
            task.distilling, from_probabilities(ctx.model), params, proxy.targets(ctx, soft.ids, soft.labels),
            ctx.at("distill"), epochs=epochs, learning_rate=ctx.hparams["distill_learning_rate"],
        )  # fmt: skip

    def label(ctx, params, ids):
        return proxy.SoftLabels(ids, jax.nn.softmax(proxy.predict(ctx, params, ids)), jnp.bool(True))

    def distil_train_predict(ctx, received, state, data):
        epochs = jnp.where(received.shared.given, ctx.hparams["distill_epochs"], 0)
        params, distill_loss = learn_labels(ctx, state["start"], received.shared, epochs)
        params, train_loss = fit(
            task.training, supervised(ctx.model, task.training), params, data, ctx.at("train"), epochs=local_work(ctx)
        )
        upload = Upload(label(ctx, params, received.shared.ids))
        return state | {"params": params}, upload, {"train_loss": train_loss, "distill_loss": distill_loss}

    def distil_and_label(ctx, server, mean):
        soft = proxy.SoftLabels(server["labels"].ids, mean)
        params, loss = learn_labels(ctx, server["params"], soft, ctx.hparams["distill_epochs"])
        ids = proxy.draw_ids(task, ctx.at("subset").key)
        return {"params": params, "labels": label(ctx, params, ids)}, {"server_loss": loss}

    def init_server(ctx, params):
        nothing = jnp.zeros((task.proxy_per_round, task.classes))
        return {"params": params, "labels": proxy.SoftLabels(proxy.draw_ids(task, ctx.key), nothing, jnp.bool(False))}

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


def _codec(bits: str, memory: str) -> Codec:
    return coding.labels_as_they_are() if bits == _FULL else coding.quantised_labels(int(bits), memory)


def _announcing(codec: Codec) -> Codec:
    """The codec with the ids counted too, which is all that is sent before the server has labels to give."""

    def count(ctx, code, known):
        number, after = codec.count(ctx, code, known)
        return number + traffic.size(code.ids), after

    return codec._replace(count=count)


METHOD = Method(
    name="cfd",
    summary="CFD (Sattler et al. 2022): soft labels in few bits, delta-coded; the server labels for the clients",
    build=cfd,
    hparams={
        **LOCAL_TRAINING,
        "distill_learning_rate": learning_rate("learning_rate", "learning rate of the distillation"),
        "distill_epochs": epochs(1, "epochs of the distillation, of clients and server"),
    },
    options={"bits_up": ("1", "2", "4", _FULL), "bits_down": ("1", "2", "4", _FULL)},
    proxy="unlabelled",
    stages=("distill",),
    keeps_models=True,
    distils=True,
)
