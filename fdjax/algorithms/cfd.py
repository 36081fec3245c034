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

Sent: Y down, Y_k up, as the code of `coding.coded_bytes` (flags of change and new symbols, each adaptively and
arithmetically coded), which the metrics `bytes_up` and `bytes_down` count; o_t, 4 bytes an id, unless it is all proxy
data. The first round has no Y and sends o_1 alone.

Written from a summary of the paper, not from code (none was found); what that leaves open, and we chose:
- The code above, and which symbols it models. The paper also speaks of choosing proxy data: not here, o_t is random.
- The reference for the delta is, example by example, what that client last sent or received, so clients may be absent;
  both ends keep it (here in the client's state).
- Every client has a fixed w_0 of its own. The server's w goes on from where it was.
- A participant without examples neither receives nor sends.
"""

import jax
import jax.numpy as jnp

from fdjax import keys
from fdjax.client import local, losses
from fdjax.exchange import coding, reductions
from fdjax.exchange import proxy as exchange
from fdjax.types import Algorithm, Examples

HPARAMS: dict[str, float | str] = {
    "learning_rate": 0.01,
    "local_epochs": 1,
    "distill_learning_rate": "learning_rate",
    "distill_epochs": 1,
}
OPTIONS = {"bits_up": ("1", "2", "4"), "bits_down": ("1", "2", "4")}


def cfd(task: local.Task) -> Algorithm:
    """CFD; hparams: `learning_rate`, `local_epochs` (E), `distill_learning_rate`, `distill_epochs` (client and server).

    Options: `bits_up`, `bits_down`.
    """
    up, down = int(task.options["bits_up"]), int(task.options["bits_down"])
    size, number = task.proxy_size, task.proxy_per_round
    ids_bytes = 4.0 * number if number < size else 0.0

    def distil(apply, params, targets: local.Targets, hparams, key, epochs):
        def loss(params, x, target):
            return losses.soft_cross_entropy(target, apply(params, x))

        hparams = hparams | {"learning_rate": hparams["distill_learning_rate"]}
        return local.fit(task.distilling, loss, params, targets, hparams, key, epochs=epochs)

    def label(apply, params, proxy: Examples, ids, bits):
        chosen = proxy._replace(x=proxy.x[ids], y=proxy.y[ids])
        logits = local.predict(apply, params, chosen, task.distilling.batch_size)
        return coding.quantise(jax.nn.softmax(logits), bits).astype(jnp.uint8)

    def init_client(model, key):
        nothing = jnp.zeros((size, task.classes), jnp.uint8)
        return {"start": (start := model.init(key)), "params": start, "received": nothing, "sent": nothing}

    def client(model, received, state, data, proxy, hparams, key):
        ids, symbols = received["ids"], received["symbols"]
        there, told = data.count > 0, jnp.any(symbols > 0)

        def loss(params, x, y):
            return losses.cross_entropy(model.apply(params, x), y)

        params, distill_loss = distil(
            model.apply,
            state["start"],
            local.Targets(proxy, ids, symbols / coding.levels(down)),
            hparams,
            keys.stream(key, "distill"),
            jnp.where(there & told, hparams["distill_epochs"], 0),
        )
        params, train_loss = local.fit(
            task.training, loss, params, data, hparams, keys.stream(key, "train"), epochs=hparams["local_epochs"]
        )
        upload = label(model.apply, params, proxy, ids, up)
        new = {
            "start": state["start"],
            "params": params,
            "received": state["received"].at[ids].set(symbols),
            "sent": state["sent"].at[ids].set(upload),
        }
        bytes_up = coding.coded_bytes(upload, state["sent"][ids], up)
        bytes_down = jnp.where(told, coding.coded_bytes(symbols, state["received"][ids], down), 0) + ids_bytes
        metrics = {
            "train_loss": train_loss,
            "distill_loss": distill_loss,
            "bytes_up": jnp.where(there, bytes_up, 0),
            "bytes_down": jnp.where(there, bytes_down, 0),
        }
        return jax.tree.map(lambda x, y: jnp.where(there, x, y), new, state), upload, metrics

    def init_server(key):
        return {
            "params": task.model.init(keys.stream(key, "model")),
            "ids": exchange.subset(task, keys.stream(key, "subset")),
            "symbols": jnp.zeros((number, task.classes), jnp.uint8),
        }

    def server(state, mean, proxy, hparams, key):
        targets = local.Targets(proxy, state["ids"], mean)
        distill_key, apply = keys.stream(key, "distill"), task.model.apply
        params, loss = distil(apply, state["params"], targets, hparams, distill_key, hparams["distill_epochs"])
        ids = exchange.subset(task, keys.stream(key, "subset"))
        return {"params": params, "ids": ids, "symbols": label(apply, params, proxy, ids, down)}, {"server_loss": loss}

    return Algorithm(
        name="cfd",
        hparams=HPARAMS,
        init_server=init_server,
        init_client=init_client,
        broadcast=lambda state, cohort: {name: state[name] for name in ("ids", "symbols")},
        client=client,
        reduction=reductions.mean(lambda symbols: symbols / coding.levels(up)),
        server=server,
        central=(task.model, lambda state: state["params"]),
        personal=lambda state: state["params"],
    )
