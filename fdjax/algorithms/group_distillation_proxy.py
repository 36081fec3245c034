"""Multi-level personalised group distillation between predictions: teachers, students and peers on proxy data.

The other form of `group_distillation.py`, with the same poster, losses, matching, weights and option `divergence` (D
below: the poster's KL(oneself || other), or the reverse). **All but the two losses is our concretisation.** Members of
a group exchange logits on N proxy examples: soft parts of the losses are means over proxy examples, hard ones over the
own. With p_i = softmax(z_i), T the teacher of i, j the peers, who have the same teacher, s the students of i:

    L_i = (1 - alpha) CE(p_i, y) + alpha [(1 - rho) D(p_i, p_T) + rho sum_j w_ij D(p_i, p_j)]           a student
    L_i = (1 - beta)  CE(p_i, y) + beta mean_s D(p_i, p_s)                                              a teacher

and the mean of both for who is both, as on a middle level; p_T, p_j, p_s are those of the round's start. The divergence
from one mixture has the same gradient (`exchange/influence.py`): the server makes it; 4NK bytes to whoever learns.

    1. ids of the proxy examples down (if not all), z_i [N, K] up
    2. mixture and weight down; client: local training by L_i, a batch of proxy examples, drawn, beside each batch

alpha and beta are as in `group_distillation.py`, with CE on the labels of the round's proxy examples, which the server
has. Peers by loss-based revenue (`peers` = revenue): each round a client gets the logits of one peer, drawn (4NK
bytes), and takes a trial step of SGD at `learning_rate` on D(p_i, p_j) for a batch of proxy examples. What that takes
off its CE on its first 256 own examples, at least 0, is the revenue, sent in 4 bytes and averaged (keeping `memory`) to
r_ij, which starts from 0, where the average of losses starts from the first; w_ij = softmax over peers of r_ij /
`revenue_temperature`. With `peers` = uniform w_ij are equal, and no trial. Where the teacher, or every peer, is absent,
the others have all of alpha: rho does not hold there.

Histograms of labels, 4K bytes, are sent once, models never. alpha_max = beta_max = 0 is training alone. Who takes no
part in a round does not teach in it. What we saw is in `group_distillation.py`; peers by revenue were not better ones.
"""

import jax
import jax.numpy as jnp

from fdjax import keys
from fdjax.client import losses
from fdjax.client.training import fit, local_work
from fdjax.contract import Algorithm, Broadcast, Exchange, Upload, own_model, predict_with_own_model
from fdjax.exchange import groups, influence, proxy, reductions, stacked
from fdjax.method import LOCAL_TRAINING, HParam, Method, Task, temperature


def group_distillation_proxy(task: Task) -> Algorithm:
    """The method between predictions; hparams: see METHOD."""
    C, N, kind = task.clients, task.proxy_per_round, task.options["divergence"]
    divergence, trial = influence.DIVERGENCES[kind], task.options["peers"] == "revenue"
    size = min(task.training.batch_size, N)

    def predict(ctx, received, params, data):
        return params, Upload(proxy.predict(ctx, params, received.shared)), {}

    def collect(ctx, server, stack):
        logits, present = stacked.present(stack), groups.by_client(task, stack, stack.weight > 0)
        y, known = ctx.proxy.y[proxy.positions(ctx.proxy, server["ids"])], server["known"]
        ce = jnp.mean(losses.cross_entropy(logits, jnp.broadcast_to(y, logits.shape[:2])), -1)
        ce = influence.average(server["ce"], groups.by_client(task, stack, ce), known, ctx.hparams["memory"])
        peers = influence.is_peer(server["teacher"], present)
        tried = jax.random.categorical(ctx.key, jnp.where(peers, 0.0, -jnp.inf)).astype(jnp.int32)
        return server | {
            "logits": groups.by_client(task, stack, logits),
            "present": present,
            "ce": jnp.where(present, ce, server["ce"]),
            "known": known | present,
            "tried": jnp.where(jnp.any(peers, -1), tried, C),  # C: nobody
        }, {}

    def weights(ctx, server):
        h, teacher, present = ctx.hparams, server["teacher"], server["present"]
        alpha, beta = influence.soft_weights(h, teacher, server["ce"], server["known"])
        value = jnp.where(influence.is_peer(teacher, present), server["revenue"] / h["revenue_temperature"], -1e30)
        return influence.influence(teacher, present, influence.Weights(alpha, beta, h["rho"], jax.nn.softmax(value)))

    def send_mixture(ctx, server):
        rows = task.ids(ctx.cohort)
        mine, tried = weights(ctx, server)[rows], server["tried"][rows]
        own = {"mixture": influence.mixture(kind, mine, server["logits"]), "weight": jnp.sum(mine, -1)}
        peer = {"peer": server["logits"][tried], "tries": (tried < C).astype(jnp.float32)} if trial else {}
        return Broadcast((), own=own | peer, known=server["ids"])

    def distance(ctx, ids, target):
        """(params, key) -> the mean divergence from `target` on a batch of proxy examples."""
        examples = proxy.targets(ctx, ids, target)

        def mean(params, key):
            x, other = examples.take(jax.random.randint(key, (size,), 0, N))
            return jnp.mean(divergence(other, ctx.model.apply(params, x, keys.stream(key, "model"))))

        return mean

    def revenue(ctx, received, params, data):
        """What a trial step towards a peer takes off the loss on own examples."""
        position = jnp.arange(min(256, task.largest))
        x, y = data.take(jnp.minimum(position, data.count - 1))

        def loss(params):
            return losses.weighted_mean(losses.cross_entropy(ctx.model.apply(params, x), y), position < data.count)

        slope = jax.grad(distance(ctx, received.known, received.own["peer"]))(params, ctx.at("trial").key)
        stepped = jax.tree.map(lambda w, g: w - ctx.hparams["learning_rate"] * g, params, slope)
        return received.own["tries"] * jax.nn.relu(loss(params) - loss(stepped))

    def learn(ctx, received, params, data):
        weight, soft = received.own["weight"], distance(ctx, received.known, received.own["mixture"])
        gain = revenue(ctx, received, params, data) if trial else ()
        arrays = (weight > 0) + (received.own["tries"] if trial else 0.0)

        def loss(params, x, y, key):
            hard = losses.cross_entropy(ctx.model.apply(params, x, key), y, task.training.label_smoothing)
            return (1 - weight) * hard + weight * soft(params, keys.stream(key, "proxy"))

        params, train_loss = fit(task.training, loss, params, data, ctx.at("train"), epochs=local_work(ctx))
        upload = Upload(gain, bytes_received=4.0 * N * task.classes * arrays + 4.0)
        return params, upload, {"train_loss": train_loss, "soft_weight": weight}

    def account(ctx, server, stack):
        server = server | {"ids": proxy.draw_ids(task, ctx.key)}
        if not trial:
            return server, {}
        gain, sent = (groups.by_client(task, stack, v)[:, None] for v in (stacked.present(stack), stack.weight > 0))
        here, old = (server["tried"][:, None] == jnp.arange(C)[None]) & sent, server["revenue"]
        return server | {"revenue": jnp.where(here, old + (1 - ctx.hparams["memory"]) * (gain - old), old)}, {}

    def init_server(ctx, params):
        nobody, numbers = jnp.zeros(C, bool), jnp.zeros(C)
        return {
            "ids": proxy.draw_ids(task, ctx.key), "teacher": jnp.arange(C, dtype=jnp.int32), "present": nobody,
            "logits": jnp.zeros((C, N, task.classes)), "ce": numbers, "known": nobody,
            "tried": jnp.full(C, C, jnp.int32), "revenue": jnp.zeros((C, C)),
        }  # fmt: skip

    ask = Exchange(lambda ctx, server: Broadcast(server["ids"]), predict, reductions.stack(), collect)
    teach = Exchange(send_mixture, learn, reductions.stack() if trial else reductions.nothing(), account)
    return Algorithm(
        init_server, own_model, (ask, teach), setup=(groups.matching(task),), personal=predict_with_own_model
    )


METHOD = Method(
    name="group_distillation_proxy",
    summary="Group distillation (Glasgow poster): own models, and logits of teachers, students and peers on proxy data",
    build=group_distillation_proxy,
    hparams=LOCAL_TRAINING
    | groups.HPARAMS
    | influence.WEIGHTS
    | {
        "rho": HParam(0.5, high=1.0, help="the peers' part of a student's soft labels"),
        "revenue_temperature": temperature(0.01, "of the softmax of revenues that weighs peers", ("peers", "revenue")),
    },
    options={"divergence": ("reverse", "forward"), "peers": ("revenue", "uniform")} | groups.OPTIONS,
    proxy="labelled",
    keeps_models=True,
)
