"""FedGKT: group knowledge transfer, a large server net trained on the features of small clients.

He, Annavaram, Avestimehr, "Group Knowledge Transfer: Federated Learning of Large CNNs at the Edge" (NeurIPS 2020),
Algorithm 1 and equations 4 to 7. Client k has an extractor h_k and a small head c_k; the server a net s on features.

    client:  E epochs of  l_c = CE(z_k, y) + alpha T^2 KL(softmax(z_s / T) || softmax(z_k / T)),  z_k = c_k(h_k(x))
    server:  E_s epochs on all uploads of
             l_s = alpha CE(z_s, y) + T^2 KL(softmax(z_k / T) || softmax(z_s / T)),  z_s = s(h_k(x))

alpha is on l_s's CE as in the authors' code (FedML); a client that has no z_s yet, so everyone in the first round,
learns by CE alone. alpha is the hparam `weight`. A client predicts with s(h_k(x)), which local and own accuracies
test; there is no central model, since the server has no extractor.

Sent: up h_k(x), z_k and y of each own example, 4 n_k (F + K + 1) bytes for F features; down z_s of each, 4 n_k K. The
arrays are as long as the largest client; the real n_k are counted. Features and labels leave the client: this is not
private as other methods are.

All clients start from one model, as the authors' do from one that they have pre-trained: features that were drawn apart
tell a common server nothing, and FedGKT is then level with training alone. Afterwards an extractor stays its client's.

Deviations and choices:
- Optimiser and batch size are the task's for both (the paper's script: Adam 1e-3 with amsgrad, batches of 256).
- z_s are those of the trained server; the code collects them while it trains, one update stale. Test features are not
  sent each round; an evaluation is not counted.
- The common start is not pre-trained. T = 3 is the code's default; its 1e-7 on the teacher's softmax is left out.
- The server trains on the round's participants; it keeps the z_s of the others.
- Examples are known by their position, so clients may shuffle.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from fdjax.client import losses
from fdjax.client.data import Paired, Ragged, batches
from fdjax.client.training import fit, local_work, of_stage
from fdjax.contract import Algorithm, Broadcast, Context, Exchange, Upload, common_model
from fdjax.exchange import reductions
from fdjax.method import LOCAL_TRAINING, HParam, Method, Task, epochs, learning_rate, temperature


def fedgkt(task: Task, refine: Callable[[Context, jax.Array], jax.Array] = lambda ctx, z: z) -> Algorithm:
    """FedGKT; the task's model is the server's, on features; `weight` is alpha; hparams: see METHOD.

    `refine` is what the server makes of the logits z_k [..., K] before it learns from them.
    """
    net, batch, largest, classes = task.model.apply, task.training.batch_size, task.largest, task.classes
    padded = -(-largest // batch) * batch

    def extract(ctx, params, x):
        return ctx.model.blocks[0](params, x)

    def distillation(ctx, logits, teacher):
        T = ctx.hparams["temperature"]
        return T**2 * losses.kl_divergence(teacher, logits, T)

    def broadcast(ctx, server):
        rows = task.ids(ctx.cohort)
        return Broadcast((), own=(server["known"][rows], server["logits"][rows]))

    def train_and_extract(ctx, received, params, data):
        known, logits = received.own

        def loss(params, x, target, key):
            y, teacher = target
            z = ctx.model.apply(params, x, key)
            return losses.cross_entropy(z, y, task.training.label_smoothing) + known * ctx.hparams[
                "weight"
            ] * distillation(ctx, z, teacher)

        params, train_loss = fit(task.training, loss, params, Paired(data, logits), ctx, epochs=local_work(ctx))

        def outputs(position):
            x, y = data.take(jnp.minimum(position, data.count - 1))
            h = z = extract(ctx, params, x)
            for block in ctx.model.blocks[1:]:
                z = block(params, z)
            return h, z, y

        def step(i, upload):
            new = outputs(i * batch + jnp.arange(batch))
            return jax.tree.map(lambda a, b: lax.dynamic_update_slice_in_dim(a, b, i * batch, 0), upload, new)

        like = jax.eval_shape(outputs, jnp.arange(batch))
        empty = jax.tree.map(lambda a: jnp.zeros((padded, *a.shape[1:]), a.dtype), like)
        arrays = lax.fori_loop(0, batches(data.count, batch), step, empty)
        upload = Upload(
            (*jax.tree.map(lambda a: a[:largest], arrays), jnp.asarray(data.count)),
            bytes=4.0 * data.count * (math.prod(like[0].shape[1:]) + classes + 1),
            bytes_received=4.0 * data.count * classes * known,
        )
        return params, upload, {"train_loss": train_loss}

    def train_on_features(ctx, server, stack):
        h, z, y, count = stack.partials
        uploads = Ragged(h, (y, refine(ctx, z)), jnp.cumsum(count))

        def loss(params, x, target, key):
            labels, teacher = target
            logits = net(params, x, key)
            hard = losses.cross_entropy(logits, labels, task.serving.label_smoothing)
            return ctx.hparams["weight"] * hard + distillation(ctx, logits, teacher)

        serving = of_stage(ctx, "server")
        params, train_loss = fit(task.serving, loss, server["params"], uploads, ctx.at("train"), **serving)

        def step(i, logits):
            position = jnp.minimum(i * batch + jnp.arange(batch), uploads.count - 1)
            row, column = uploads.find(position)
            return logits.at[stack.client[row], column].set(net(params, uploads.take(position)[0]))

        logits = lax.fori_loop(0, batches(uploads.count, batch), step, server["logits"])
        known = server["known"].at[stack.client].max((stack.weight > 0).astype(jnp.float32))
        return {"params": params, "logits": logits, "known": known}, {"server_loss": train_loss}

    def init_server(ctx, params):
        logits = jnp.zeros((task.clients, largest, classes))
        return {"params": params, "logits": logits, "known": jnp.zeros(task.clients)}

    return Algorithm(
        init_server=init_server,
        init_client=common_model,
        round=(Exchange(broadcast, train_and_extract, reductions.stack(), train_on_features),),
        personal=lambda ctx, server, params, x: net(server["params"], extract(ctx, params, x)),
    )


METHOD = Method(
    name="fedgkt",
    summary="FedGKT (He et al. 2020): features and logits up; --model is the server's, --models are the clients'",
    build=fedgkt,
    hparams={
        **LOCAL_TRAINING,
        "server_learning_rate": learning_rate("learning_rate", "learning rate of the server"),
        "server_epochs": epochs(20, "epochs of the server over all uploads"),
        "temperature": temperature(3.0, "softens teacher and student in the divergences"),
        "weight": HParam(1.0, help="alpha: of the divergence at the clients, of the labels at the server"),
    },
    split=True,
    keeps_optimizer=True,
    stages=("server",),
    keeps_models=True,
    distils=True,
)
