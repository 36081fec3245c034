"""FedDF: ensemble distillation for robust model fusion.

Lin, Kong, Stich, Jaggi, "Ensemble Distillation for Robust Model Fusion in Federated Learning" (NeurIPS 2020),
Algorithms 1 (one architecture) and 3 (prototypes p, an architecture each; a cohort is a prototype's clients).

    client:  x_k <- x_{t-1}^p;  E epochs of SGD on l(x_k)                                              (Alg. 1, line 5)
    server:  x_{t,0}^p = sum_{k in S_t^p} (n_k / n^p) x_k  for each prototype p                        (line 6)
             for j = 1..N, on a mini-batch d of unlabelled data:                                       (lines 7-9)
             x_{t,j}^p = x_{t,j-1}^p - eta dKL(softmax(1/|S_t| sum_{k in S_t} f(x_k, d)) || softmax(f(x_{t,j-1}^p, d)))

The mean is of logits, over the clients of all prototypes; no temperature, no T^2. eta: Adam from `server_learning_rate`
(1e-3), cosine to 0 over N = `server_steps`; the gradient is clipped at norm 5, as in the paper's code.

Sent: x^p down and x_k up, 4P(p) bytes each way. Proxy data stay on the server, which applies every x_k to them.

Clients of few examples teach less than their average knows: with 100 each, Dirichlet(0.1) and E = 20, FedDF is behind
FedAvg, with 550 each level, where the paper, of 2,500 each and larger nets, is ahead (measured in `test_learning.py`).

Options: `weighting` of line 6, by examples (the text) or uniform (its code). `drop_worst`: clients near or below a
random guess, here an accuracy of at most 1.1 / K on the (labelled) proxy data, count in no mean; if all are, all count.

The paper leaves open, or its data do not allow, and we chose:
- A tenth of the round's proxy data, drawn anew, validates: by the KL to the teachers, which needs no labels (the paper
  has labelled validation data). It is measured every floor(N / 100) steps, or every step; after ten of these without
  a new best training stops, and the best student wins, x_{t,0} among them ("revert to the average"). The paper has
  N = 10,000 at most; N = 1,000 is our default. Mini-batches are drawn with replacement.
- E and the sizes of batches are the flags'; the paper's are 20 to 80 (our default: 1), 64, and 128 on the server.
- A prototype none of whose participants holds examples starts from what it was.
- The central model is the first prototype; with several, a client's own is its prototype.
"""

import jax
import jax.numpy as jnp
import optax
from jax import lax

from fdjax.algorithms import fedavg
from fdjax.client import losses
from fdjax.client.data import Targets
from fdjax.client.trained import on_trained
from fdjax.contract import Algorithm, Broadcast, Reduction
from fdjax.exchange import proxy, reductions
from fdjax.exchange.wrappers import after
from fdjax.method import LOCAL_TRAINING, Method, Task, epochs, learning_rate

_VALIDATIONS, _PATIENCE, _CLIP, _GUESS = 100, 10, 5.0, 1.1


def feddf(task: Task) -> Algorithm:
    """FedDF; hparams: `learning_rate`, `local_epochs` (E), `server_learning_rate` (eta), `server_steps` (N)."""
    drops = task.options["drop_worst"] == "on"
    average = reductions.weighted_mean if task.options["weighting"] == "examples" else reductions.mean
    of_params, of_logits = average(lambda seen: seen[0]), reductions.mean(lambda seen: seen[1])

    def look_at(ctx, params):
        """What the server makes of an upload: its logits [M, K], and whether it counts."""
        logits = proxy.predict(ctx, params, ())
        better = jnp.mean(losses.correct(logits, ctx.proxy.y)) > _GUESS / task.classes
        return params, logits, better if drops else jnp.bool(True)

    def partial(ctx, seen, weight):
        """Sums of params and of logits, over all clients and, where some may be dropped, over those that count."""
        weights = (weight, jnp.where(seen[2], weight, 0)) if drops else (weight,)
        return [tuple(r.partial(ctx, seen, w) for w in weights) for r in (of_params, of_logits)]

    def chosen(totals):
        """The total of the clients that count, or of all if none does."""
        return jax.tree.map(lambda x, y: jnp.where(totals[-1][1] > 0, y, x), totals[0], totals[-1])

    def fuse(ctx, start, teacher, ids):
        """The best student by its KL on the first tenth of `ids`, that KL, and the steps taken."""
        steps, rate = ctx.hparams["server_steps"], ctx.hparams["server_learning_rate"]
        every, held = jnp.maximum(steps // _VALIDATIONS, 1), max(1, len(ids) // 10)
        training = ids[held:] if len(ids) > held else ids
        adam = optax.adam(lambda i: rate * 0.5 * (1 + jnp.cos(jnp.pi * i / steps)))
        optimizer = optax.chain(optax.clip_by_global_norm(_CLIP), adam)
        optimizer = on_trained(optimizer, start, task.distilling.trained)

        def kl(params, batch, key=None):
            x, target = Targets(ctx.proxy, ids, teacher[ids]).take(batch)
            return jnp.mean(losses.kl_divergence(target, ctx.model.apply(params, x, key)))

        def step(i, carry):
            params, optimizer_state = carry
            batch = jax.random.randint(ctx.at("batch", i).key, (task.distilling.batch_size,), 0, len(training))
            gradient = jax.grad(kl)(params, batch + (len(ids) - len(training)), ctx.at("loss", i).key)
            update, optimizer_state = optimizer.update(gradient, optimizer_state, params)
            return optax.apply_updates(params, update), optimizer_state

        def section(carry):
            i, student, best, best_kl, flat = carry
            end = jnp.minimum(i + every, steps)
            student = lax.fori_loop(i, end, step, student)
            now = kl(student[0], jnp.arange(held))
            better = now < best_kl
            best = jax.tree.map(lambda new, old: jnp.where(better, new, old), student[0], best)
            return end, student, best, jnp.where(better, now, best_kl), jnp.where(better, 0, flat + 1)

        student = start, optimizer.init(start)
        carry = jnp.int32(0), student, start, kl(start, jnp.arange(held)), jnp.int32(0)
        i, _, best, best_kl, _ = lax.while_loop(lambda c: (c[0] < steps) & (c[4] < _PATIENCE), section, carry)
        return best, best_kl, i

    def server(ctx, prototypes, sums):
        logits = jax.tree.map(lambda *x: sum(x[1:], x[0]), *(of_cohort[1] for of_cohort in sums))
        teacher = of_logits.finish(ctx, chosen(logits))
        ids = jax.random.permutation(ctx.at("subset").key, task.proxy_size)[: task.proxy_per_round]
        fused = []
        for j, (model, before, (params, _)) in enumerate(zip(task.models, prototypes, sums, strict=True)):
            total = chosen(params)
            mean = of_params.finish(ctx, total)
            start = jax.tree.map(lambda new, old, weight=total[1]: jnp.where(weight > 0, new, old), mean, before)
            fused.append(fuse(ctx.at("prototype", j)._replace(model=model), start, teacher, ids))
        best, kl, steps = zip(*fused, strict=True)
        return best, {"distill_loss": jnp.mean(jnp.stack(kl)), "server_steps": jnp.mean(jnp.stack(steps) * 1.0)}

    def init_server(ctx, params):
        drawn = [model.init(ctx.at("prototype", j).key) for j, model in enumerate(task.models)]
        alike = jax.tree.map(jnp.shape, drawn[0]) == jax.tree.map(jnp.shape, params)
        return params if alike else drawn[0], *drawn[1:]

    def own_prototype(ctx, prototypes, state, x):
        return ctx.model.apply(prototypes[ctx.cohort], x)

    reduction = after(look_at, Reduction(partial, lambda ctx, totals: totals, per_cohort=True))
    (train,) = fedavg.fedavg(task).round
    return Algorithm(
        init_server=init_server,
        init_client=lambda ctx, params: (),
        round=(train._replace(broadcast=lambda ctx, ps: Broadcast(ps[ctx.cohort]), reduce=reduction, server=server),),
        central=lambda ctx, prototypes, x: task.models[0].apply(prototypes[0], x),
        personal=own_prototype if len(task.models) > 1 else None,
        model_of=lambda ctx, prototypes, state: prototypes[ctx.cohort],
    )


METHOD = Method(
    name="feddf",
    summary="FedDF (Lin et al. 2020): parameters, averaged, then distilled from the clients' mean logits on proxy data",
    build=feddf,
    hparams={
        **LOCAL_TRAINING,
        "learning_rate": learning_rate(0.1),
        "server_learning_rate": learning_rate(1e-3, "learning rate of the server's distillation"),
        "server_steps": epochs(1000, "most steps of the server's distillation"),
    },
    options={"weighting": ("examples", "uniform"), "drop_worst": ("off", "on")},
    proxy="unlabelled",
    labels_for=("drop_worst", "on"),
)
