"""FedGen: data-free distillation, a generator of features that the server learns from its clients' heads.

Zhu, Hong, Zhou, "Data-Free Knowledge Distillation for Heterogeneous Federated Learning" (ICML 2021), Algorithm 1 and
equations 4 and 5. A net is an extractor and a head h, its last block; G(e, y) gives features, from noise e and a label.

    client:  w_k <- w;  E epochs of CE(w_k(x), y) + a_t CE(h_k(G(e, y')), y') + b_t KL(h_k(G(e'', y)) || w_k(x)),
             y' of the labels that G knows; the KL's first is fixed, and this term the code's alone        (equation 5)
    server:  w <- mean of w_k;  `generator_steps` of Adam, 32 examples each, y of the labels of this round, on
             sum_k u_k(y) CE(h_k(G(e, y)), y)  +  exp(-mean_ij mean|G_i - G_j| mean (e_i - e_j)^2)         (equation 4)

u_k(y) = (1 + c_k(y)) / sum_j (1 + c_j(y)), c_k(y) the examples of label y that client k trained on in this round. Where
the released code and the text differ the code is our default, as it made the paper's tables. The text: `teachers` =
logits, CE of the mean logits and not the mean CE; `weighting` = uniform, of the w_k; `noise` = normal; b_t = 0.

a_t = `generated_weight` f^t and b_t = `latent_weight` f^t, none in round 0; the generator's rate is
`generator_learning_rate` f^t; f = `fade`. Its Adam goes on over rounds, with 0.01 of the params added to the gradient.
G has a hidden layer of 256 and BatchNorm (`exchange/generator.py`). With a_t = b_t = 0 it is FedAvg.

Sent: w, G and the labels that it knows down, w_k and c_k up: 4 (P + P_G) + K and 4 (P + K) bytes. Table 4, where the
last layer alone is shared, is `--exchanged=Dense_2/*`, say; the code's local BatchNorm is `--norm_statistics=local`.

Deviations: labels that nobody had so far are not drawn (the code knows all users'); a_t and b_t have no floor; the KL's
noise is its own; G's hidden layer has no bias. The code's E are 20 steps. In 10 rounds (not 200) of `test_learning.py`:
0.817, 0.781, 0.845 (a = 1, b = 0) and 0.837, 0.745, 0.792 (a = b = 1); FedAvg 0.813, 0.771, 0.844: level with it.
"""

import jax
import jax.numpy as jnp
from jax import lax

from fdjax import keys
from fdjax.client import losses
from fdjax.client.trained import paths_read
from fdjax.client.training import fit_observing, local_work
from fdjax.contract import Algorithm, Broadcast, Exchange, Upload
from fdjax.errors import InputError
from fdjax.exchange import generator, reductions
from fdjax.exchange.parts import only, with_zeros
from fdjax.exchange.stacked import apply_each, present
from fdjax.method import LOCAL_TRAINING, HParam, Method, Task, epochs, learning_rate

_BATCH, _DECAY = 32, 1e-2  # of the generator's training


def fedgen(task: Task) -> Algorithm:
    """FedGen of the task's model; hparams and options: see METHOD."""
    model, K = task.model, task.classes
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    space = jax.eval_shape(model.features, shapes, model.example(task.inputs))
    of_head = paths_read(model.head, shapes, space)
    by_logits = task.options["teachers"] == "logits"
    noise_of = jax.random.uniform if task.options["noise"] == "uniform" else jax.random.normal
    average = reductions.weighted_mean if task.options["weighting"] == "examples" else reductions.mean

    def generate(params, noise, y, statistics=None):
        h, of_batch = generator.apply(params, noise, y, statistics)
        return h.reshape(-1, *space.shape[1:]), of_batch

    def train(ctx, received, state, data):
        start, known, labels = (received.shared[name] for name in ("params", "generator", "labels"))
        fading = jnp.where((ctx.round > 0) & jnp.any(labels), ctx.hparams["fade"] ** ctx.round, 0.0)

        def objective(params, x, y, key):
            def of_generated(noise, y):
                return ctx.model.head(params, generate(known.params, noise, y, known.statistics)[0])

            noise, wanted = generator.draw(keys.stream(key, "generated"), labels, len(y), noise_of)
            again, _ = generator.draw(keys.stream(key, "latent"), labels, len(y), noise_of)
            z = ctx.model.apply(params, x, keys.stream(key, "net"))
            generated = losses.cross_entropy(of_generated(noise, wanted), wanted)
            latent = losses.kl_divergence(lax.stop_gradient(of_generated(again, y)), z)
            more = ctx.hparams["generated_weight"] * generated + ctx.hparams["latent_weight"] * latent
            return losses.cross_entropy(z, y, task.training.label_smoothing) + fading * more, ()

        params, loss, counts = fit_observing(
            task.training, objective, lambda seen, y, weight: weight @ jax.nn.one_hot(y, K), jnp.zeros(K), start, data,
            ctx, epochs=local_work(ctx),
        )  # fmt: skip
        return state, Upload({"params": params, "counts": counts}), {"train_loss": loss}

    def head(leaves, h):
        """Logits [B, K] of a head that was sent, whatever the extractor."""
        return model.head(with_zeros(leaves, shapes), h)

    def serve(ctx, server, summary):
        heads, counts = present(summary["heads"])
        seen = jnp.any(counts > 0, 0)
        share = (summary["heads"].weight > 0)[:, None] + (0 * counts if by_logits else counts)
        share = share / jnp.sum(share, 0, keepdims=True)
        rate = ctx.hparams["generator_learning_rate"] * ctx.hparams["fade"] ** ctx.round

        def loss(params, noise, y):
            h, of_batch = generate(params, noise, y)
            z, u = apply_each(head, heads, h), share[:, y]
            z, u = (jnp.sum(u[..., None] * z, 0, keepdims=True), jnp.ones((1, len(y)))) if by_logits else (z, u)
            taught = jnp.sum(u * losses.cross_entropy(z, jnp.broadcast_to(y, u.shape)), 0)
            alike = generator.likeness(h.reshape(len(h), -1), noise)
            return jnp.mean(taught) + ctx.hparams["diversity_weight"] * alike, of_batch

        new, adam, last = generator.train(
            server["generator"], generator.adam(rate, _DECAY), server["adam"], loss,
            lambda key: generator.draw(key, seen, _BATCH, noise_of), ctx.hparams["generator_steps"], ctx.key,
        )  # fmt: skip
        new = {"params": summary["params"], "generator": new, "adam": adam, "labels": server["labels"] | seen}
        return new, {"generator_loss": last}

    def init_server(ctx, params):
        if missing := of_head - only(params, of_head).keys():
            raise InputError(f"--exchanged: fedgen teaches by whole heads, but {min(missing)} is not sent; send it too")
        first = generator.init(ctx.at("generator").key, K, space.size)
        adam = generator.adam(0.0, _DECAY).init(first.params)
        return {"params": params, "generator": first, "adam": adam, "labels": jnp.zeros(K, bool)}

    exchange = Exchange(
        broadcast=lambda ctx, server: Broadcast({name: server[name] for name in ("params", "generator", "labels")}),
        client=train,
        reduce={
            "params": average(lambda sent: sent["params"]),
            "heads": reductions.stack(lambda sent: (only(sent["params"], of_head), sent["counts"])),
        },
        server=serve,
    )
    return Algorithm(
        init_server=init_server,
        init_client=lambda ctx, params: (),
        round=(exchange,),
        central=lambda ctx, server, x: ctx.model.apply(server["params"], x),
        model_of=lambda ctx, server, state: server["params"],
    )


METHOD = Method(
    name="fedgen",
    summary="FedGen (Zhu et al. 2021): parameters, and a generator of features that the server learns from their heads",
    build=fedgen,
    hparams={
        **LOCAL_TRAINING,
        "generated_weight": HParam(10.0, help="weight of the loss on generated features, at first"),
        "latent_weight": HParam(10.0, help="weight of the divergence from generated features, at first"),
        "fade": HParam(0.98, high=1.0, help="factor of both weights and of the generator's learning rate, a round"),
        "generator_learning_rate": learning_rate(3e-4, "learning rate of the generator"),
        "generator_steps": epochs(50, "steps of the generator in a round"),
        "diversity_weight": HParam(1.0, help="weight of the term that keeps generated features apart"),
    },
    options={"teachers": ("losses", "logits"), "weighting": ("examples", "uniform"), "noise": ("uniform", "normal")},
    one_architecture=True,
    parts=True,
    averages=True,
)
