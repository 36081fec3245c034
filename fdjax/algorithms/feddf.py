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
It is ahead of FedAvg where clients drift, in long local training on unlike data (`benchmarks.feddf_drift`).

Options: `weighting` of line 6, by examples (the text) or uniform (its code). `model_selection` of the best student, by
its accuracy on validation data (the paper) or by its KL to the teachers, which needs no labels; auto: by accuracy where
proxy data have labels. `drop_worst`: clients near or below a random guess, here an accuracy of at most 1.1 / K on the
(labelled) proxy data, count in no mean; if all are, all count.

The paper leaves open, and we chose:
- A tenth of the round's proxy data, drawn anew, validates, every floor(N / 100) steps, or every step. Training stops
  `server_patience` steps (the paper's 1,000) after the best student, which wins, x_{t,0} among them ("revert to the
  average"). The paper's N is 10,000 at most; ours is 1,000, which that patience never cuts.
- Mini-batches of 128 (the paper's) are drawn with replacement. The paper's E is 20 to 80 (our default: 1), its B 64.
- A prototype none of whose participants holds examples starts from what it was.
- The central model is the first prototype; with several, a client's own is its prototype.
"""

import jax
import jax.numpy as jnp
import optax

from fdjax.algorithms import fedavg
from fdjax.client import losses
from fdjax.client.data import Targets
from fdjax.client.distillation import note
from fdjax.client.early_stopping import train_to_best
from fdjax.client.trained import on_trained
from fdjax.contract import Algorithm, Broadcast, Reduction
from fdjax.exchange import proxy, reductions
from fdjax.exchange.wrappers import after
from fdjax.method import LOCAL_TRAINING, Method, Task, epochs, learning_rate

_VALIDATIONS, _CLIP, _GUESS = 100, 5.0, 1.1


def feddf(task: Task) -> Algorithm:
    """FedDF; `local_epochs` is E, `server_learning_rate` eta, `server_steps` N; hparams: see METHOD."""
    drops, selection = task.options["drop_worst"] == "on", task.options["model_selection"]
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
        """The best student on the first tenth of `ids`."""
        steps, rate, held = ctx.hparams["server_steps"], ctx.hparams["server_learning_rate"], max(1, len(ids) // 10)
        training = ids[held:] if len(ids) > held else ids
        adam = optax.adam(lambda i: rate * 0.5 * (1 + jnp.cos(jnp.pi * i / steps)))
        optimizer = on_trained(optax.chain(optax.clip_by_global_norm(_CLIP), adam), start, task.distilling.trained)
        by_accuracy = jnp.all(ctx.proxy.y >= 0) if selection == "auto" else selection == "accuracy"

        def kl(params, x, target, key=None):
            return jnp.mean(losses.kl_divergence(target, ctx.model.apply(params, x, key)))

        def validate(params):
            x, (target, y) = Targets(ctx.proxy, ids, (teacher[ids], ctx.proxy.y[ids])).take(jnp.arange(held))
            divergence = kl(params, x, target)
            accuracy = jnp.mean(losses.correct(ctx.model.apply(params, x), y))
            return jnp.where(by_accuracy, accuracy, -divergence), divergence

        def step(i, carry):
            params, optimizer_state = carry
            batch = jax.random.randint(ctx.at("batch", i).key, (task.distilling.batch_size,), 0, len(training))
            x, target = Targets(ctx.proxy, training, teacher[training]).take(batch)
            gradient = jax.grad(kl)(params, x, target, ctx.at("loss", i).key)
            update, optimizer_state = optimizer.update(gradient, optimizer_state, params)
            return optax.apply_updates(params, update), optimizer_state

        return train_to_best(
            step, validate, start, optimizer.init(start), steps=steps, every=jnp.maximum(steps // _VALIDATIONS, 1),
            patience=ctx.hparams["server_patience"],
        )  # fmt: skip

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
            note(ctx._replace(model=model), start, fused[-1].params)
        found = [(best.seen, best.at, best.taken) for best in fused]
        means = [jnp.mean(jnp.stack(values) * 1.0) for values in zip(*found, strict=True)]
        metrics = dict(zip(("distill_loss", "best_step", "server_steps"), means, strict=True))
        return tuple(best.params for best in fused), metrics

    def init_server(ctx, params):
        drawn = [model.init(ctx.at("prototype", j).key) for j, model in enumerate(task.models)]
        alike = jax.tree.map(jnp.shape, drawn[0]) == jax.tree.map(jnp.shape, params)
        return params if alike else drawn[0], *drawn[1:]

    reduction = after(look_at, Reduction(partial, lambda ctx, totals: totals, per_cohort=True))
    (train,) = fedavg.fedavg(task).round
    return Algorithm(
        init_server=init_server,
        init_client=lambda ctx, params: (),
        round=(train._replace(broadcast=lambda ctx, ps: Broadcast(ps[ctx.cohort]), reduce=reduction, server=server),),
        central=lambda ctx, prototypes, x: task.models[0].apply(prototypes[0], x),
        personal=(lambda ctx, ps, state, x: ctx.model.apply(ps[ctx.cohort], x)) if len(task.models) > 1 else None,
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
        "server_patience": epochs(1000, "steps without a better student after which it stops"),
    },
    options={"weighting": ("examples", "uniform"), "drop_worst": ("off", "on")}
    | {"model_selection": ("auto", "accuracy", "kl")},
    proxy="unlabelled",
    labels_for=(("drop_worst", "on"), ("model_selection", "accuracy")),
    distill_batch_size=128,
    distils=True,
)
