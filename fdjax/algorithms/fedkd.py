"""FedKD: a large private mentor and a small shared mentee teach one another; what is exchanged is of low rank.

Wu, Wu, Lyu, Huang, Xie, "Communication-Efficient Federated Learning via Knowledge Distillation" (Nature Communications
2022). Client k has a mentor t of any architecture, which stays, and a copy s of the common mentee. With p = softmax, h
the features and d = CE(t) + CE(s), of each example:

    client:  E epochs, both nets at once, of  L_t + L_s,  L_t = CE(t) + KL(p_s || p_t) / d + H / d,
             L_s = CE(s) + KL(p_t || p_s) / d + H / d,  H = mean (h_t - W h_s)^2, W the client's own
             sends what s has changed by, its matrices at the least rank of which the squared singular values make up
             more than T(r) of their sum; T(r) = start + (end - start) min(r / rounds, 1)
    server:  the mean of what is sent by n_k, at such a rank again, changes the mentee, and is sent to the clients

Sent, up and down: 4 r (m + n + 1) bytes of an [m, n] matrix of rank r (`exchange/low_rank.py`), or 4 m n where that is
less. A client that was away is sent the changes that it missed, or the whole mentee where that is less; so is one that
was dropped from the round before, as it keeps nothing of it. The mentee's first params are known to all.

In KL the other net's outputs are fixed, and so is d, which the code differentiates too: where soft losses are above d^2
it then raises CE. H moves both nets. Ours: d is of each example (the code's of a batch), and at least 0.1; the term of
attention maps, which these nets have not, is left out; one change of E epochs is sent, where the paper sends a gradient
of each batch; the optimiser is one for both nets, fresh in every round.

In `test_learning.py`, where clients have one or two labels, a mentee of 32 units has 0.275, 0.338, 0.313 after 15
rounds (with an energy of 1 0.325, 0.391, 0.449), clients alone 0.230, 0.249, 0.235, and FedAvg of that net 0.598,
0.641, 0.656 after 5: as d falls, the mentor of few labels comes to weigh ten times what the labels do. The paper's four
clients have like data. A 200 x 200 matrix takes 0.1 to 0.2 s of a core.
"""

import jax
import jax.numpy as jnp
from jax import lax

from fdjax import keys
from fdjax.client import losses
from fdjax.client.training import fit, local_work, of_several
from fdjax.contract import Algorithm, Broadcast, Exchange, Upload
from fdjax.exchange import low_rank, prototypes, reductions, traffic
from fdjax.method import LOCAL_TRAINING, HParam, Method, Task, epochs

_LEAST = 0.1  # of d


def fedkd(task: Task) -> Algorithm:
    """FedKD; the task's model is the mentee, the cohorts' are the mentors; hparams: see METHOD."""
    mentee, training = task.model, of_several(task.training)
    narrow = prototypes.features_of(mentee, task.inputs)

    def energy(ctx):
        start, end = ctx.hparams["energy_start"], ctx.hparams["energy_end"]
        return start + (end - start) * jnp.minimum(ctx.round / ctx.hparams["energy_rounds"], 1.0)

    def outputs(model, params, x, key):
        h = model.features(params, x, key)
        return prototypes.flat(h), model.head(params, h, key)

    def train(ctx, received, state, data):
        start, sent = received.known

        def loss(nets, x, y, key):
            h_t, t = outputs(ctx.model, nets["mentor"], x, keys.stream(key, "mentor"))
            h_s, s = outputs(mentee, nets["mentee"], x, keys.stream(key, "mentee"))
            hard_t, hard_s = (losses.cross_entropy(z, y, training.label_smoothing) for z in (t, s))
            alike = losses.mean_squared_error(h_t, h_s @ nets["bridge"])
            of_t, of_s = (losses.kl_divergence(lax.stop_gradient(q), z) for q, z in ((s, t), (t, s)))
            d = jnp.maximum(lax.stop_gradient(hard_t + hard_s), _LEAST)
            return hard_t + hard_s + (of_t + of_s + 2 * alike) / d

        nets = {"mentor": state["mentor"], "mentee": start, "bridge": state["bridge"]}
        nets, train_loss = fit(training, loss, nets, data, ctx, epochs=local_work(ctx), keeps=False)
        change, size = low_rank.truncated(jax.tree.map(jnp.subtract, nets["mentee"], start), energy(ctx))
        missed = jnp.minimum(4.0 * (sent - state["sent"]), traffic.size(start))
        new = {"mentor": nets["mentor"], "bridge": nets["bridge"], "sent": sent}
        return new, Upload(change, 4.0 * size, missed), {"train_loss": train_loss}

    def serve(ctx, server, mean):
        change, size = low_rank.truncated(mean, energy(ctx))
        params = jax.tree.map(jnp.add, server["params"], change)
        return {"params": params, "sent": server["sent"] + size}, {"energy": energy(ctx)}

    def init_client(ctx, params):
        wide = prototypes.features_of(ctx.model, task.inputs)
        bridge = jax.nn.initializers.lecun_normal()(ctx.at("bridge").key, (narrow, wide))
        return {"mentor": ctx.model.init(ctx.at("mentor").key), "bridge": bridge, "sent": jnp.int32(0)}

    return Algorithm(
        init_server=lambda ctx, params: {"params": params, "sent": jnp.int32(0)},
        init_client=init_client,
        round=(
            Exchange(
                broadcast=lambda ctx, server: Broadcast((), known=(server["params"], server["sent"])),
                client=train,
                reduce=reductions.weighted_mean(),
                server=serve,
            ),
        ),
        central=lambda ctx, server, x: mentee.apply(server["params"], x),
        personal=lambda ctx, server, state, x: ctx.model.apply(state["mentor"], x),
        model_of=lambda ctx, server, state: state["mentor"],
    )


_ENERGY = "share of a matrix's squared singular values that is sent, "
METHOD = Method(
    name="fedkd",
    summary="FedKD (Wu et al. 2022): a private mentor, and a small mentee whose changes are exchanged at low rank",
    build=fedkd,
    hparams={
        **LOCAL_TRAINING,
        "energy_start": HParam(0.95, high=1.0, help=_ENERGY + "at first"),
        "energy_end": HParam(0.98, high=1.0, help=_ENERGY + "in the end"),
        "energy_rounds": epochs(100, "rounds after which the end is reached"),
    },
    parts=True,
    keeps_optimizer=None,
)
