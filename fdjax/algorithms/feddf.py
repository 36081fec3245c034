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
FedAvg, with 550 each level, where the paper, of 2,500 each and larger nets, is ahead (`tests/test_server_learning.py`).

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

from fdjax import keys
from fdjax.client import local, losses
from fdjax.exchange import reductions
from fdjax.types import Algorithm, Reduction

HPARAMS: dict[str, float | str] = {
    "learning_rate": 0.1,
    "local_epochs": 1,
    "server_learning_rate": 1e-3,
    "server_steps": 1000,
}
OPTIONS = {"weighting": ("examples", "uniform"), "drop_worst": ("off", "on")}
_VALIDATIONS, _PATIENCE, _CLIP, _GUESS = 100, 10, 5.0, 1.1


def feddf(task: local.Task) -> Algorithm:
    """FedDF; hparams: `learning_rate`, `local_epochs` (E), `server_learning_rate` (eta), `server_steps` (N)."""
    picky = task.options["drop_worst"] == "on"
    average = reductions.weighted_mean if task.options["weighting"] == "examples" else reductions.mean

    def client(model, params, state, data, proxy, hparams, key):
        def loss(params, x, y):
            return losses.cross_entropy(model.apply(params, x), y)

        params, train_loss = local.fit(task.training, loss, params, data, hparams, key, epochs=hparams["local_epochs"])
        return state, params, {"train_loss": train_loss}

    def examine(model, params, proxy, hparams):
        logits = local.predict(model.apply, params, proxy, task.distilling.batch_size)
        passes = jnp.mean(losses.correct(logits, proxy.y)) > _GUESS / task.classes
        return params, logits, passes if picky else jnp.bool(True)

    def chosen(reduction: Reduction) -> Reduction:
        """(mean, weight) over the clients that pass, or over all if none does."""

        def partial(upload, weight):
            everyone = reduction.partial(upload, weight)
            return (reduction.partial(upload, jnp.where(upload[2], weight, 0)), everyone) if picky else (everyone,)

        def finish(totals):
            some = totals[0][1] > 0
            total = jax.tree.map(lambda x, y: jnp.where(some, x, y), totals[0], totals[-1])
            return reduction.finish(total), total[1]

        return Reduction(partial, finish)

    def fuse(model, start, teacher, proxy, ids, hparams, key):
        """The best student by its KL on the first tenth of `ids`, and that KL."""
        steps = hparams["server_steps"]
        every, held = jnp.maximum(steps // _VALIDATIONS, 1), max(1, len(ids) // 10)
        training = ids[held:] if len(ids) > held else ids
        optimizer = optax.chain(
            optax.clip_by_global_norm(_CLIP),
            optax.adam(lambda i: hparams["server_learning_rate"] * 0.5 * (1 + jnp.cos(jnp.pi * i / steps))),
        )

        def kl(params, batch):
            x, target = local.Targets(proxy, ids, teacher[ids]).take(batch)
            return jnp.mean(losses.kl_divergence(target, model.apply(params, x)))

        def step(i, carry):
            params, optimizer_state = carry
            batch = jax.random.randint(keys.stream(key, "batch", i), (task.distilling.batch_size,), 0, len(training))
            gradient = jax.grad(kl)(params, batch + (len(ids) - len(training)))
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

    def server(prototypes, summary, proxy, hparams, key):
        (teacher, _), averages = summary
        ids = jax.random.permutation(keys.stream(key, "subset"), task.proxy_size)[: task.proxy_per_round]
        fused, metrics = [], []
        for j, (model, before, (mean, weight)) in enumerate(zip(task.models, prototypes, averages, strict=True)):
            start = jax.tree.map(lambda new, old, w=weight: jnp.where(w > 0, new, old), mean, before)
            best, kl, steps = fuse(model, start, teacher, proxy, ids, hparams, keys.stream(key, "prototype", j))
            fused.append(best)
            metrics.append((kl, steps.astype(jnp.float32)))
        kl, steps = (jnp.mean(jnp.stack(values)) for values in zip(*metrics, strict=True))
        return tuple(fused), {"distill_loss": kl, "server_steps": steps}

    def own(cohort):
        return lambda prototypes, state, x: task.models[cohort].apply(prototypes[cohort], x)

    return Algorithm(
        name="feddf",
        hparams=HPARAMS,
        init_server=lambda key: tuple(m.init(keys.stream(key, "prototype", j)) for j, m in enumerate(task.models)),
        init_client=lambda model, key: (),
        broadcast=lambda prototypes, cohort: prototypes[cohort],
        client=client,
        examine=examine,
        reduction=chosen(reductions.mean(lambda upload: upload[1])),
        within=chosen(average(lambda upload: upload[0])),
        server=server,
        central=(task.models[0], lambda prototypes: prototypes[0]),
        predict=own if len(task.models) > 1 else None,
    )
