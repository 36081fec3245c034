"""One algorithm that uses every feature of the engine, so that all liftings can be held equal on it alone.

Set-up: every client's own data are summed up for the server. Round, first exchange: rows of one's own, what is known
already, a codec with memory, sums weighted and not, least and largest numbers, a stack that the server trains on, a sum
of each cohort, noise in `finish`. Second exchange: what the first one made, a client's own model trained, nothing sent.
"""

import functools

import engine_cases as cases
import jax
import jax.numpy as jnp

from fdjax.client.training import fit, supervised
from fdjax.contract import Algorithm, Broadcast, Exchange, Reduction, Upload
from fdjax.exchange import reductions
from fdjax.exchange.traffic import size
from fdjax.exchange.wrappers import Codec, after, coded
from fdjax.method import HParam, Method, Task

COHORTS = (("mclr", 4), ("2nn", 3))
PARTICIPANTS = (3, 2)
HALVES = 2.0


def changes(memory):
    """Numbers in halves, and only those that changed are counted."""

    def count(ctx, code, known):
        changed = jnp.sum(code["mean"] != known) + 1
        return 4.0 * changed + size(code["params"]), code["mean"]

    def encode(ctx, tree):
        return tree | {"mean": jnp.round(tree["mean"] * HALVES)}

    return Codec(encode, lambda ctx, code: code | {"mean": code["mean"] / HALVES}, count, memory)


def noisy_mean():
    """A sum that is clipped in `partial` and noised in `finish`."""

    def partial(ctx, upload, weight):
        x = upload["mean"]
        norm = jnp.sqrt(jnp.sum(x**2))
        return x * jnp.minimum(1, ctx.hparams["clip"] / jnp.maximum(norm, 1e-6)), (weight > 0) * 1.0

    def finish(ctx, totals):
        total, number = totals
        noise = ctx.hparams["noise"] * ctx.hparams["clip"] * jax.random.normal(ctx.key, total.shape)
        return (total + noise) * (1 / jnp.maximum(number, 1))  # a quotient is not the same bits on any devices

    return Reduction(partial, finish)


def probe(task: Task) -> Algorithm:
    """The algorithm."""
    F, C = cases.FEATURES, task.clients

    def sum_up(ctx, received, state, data):
        x, y = data.take(jnp.arange(16) % jnp.maximum(data.count, 1))
        return state, Upload({"x": jnp.mean(x, axis=0), "count": jnp.asarray(data.count)}), {"first_label": y[0] * 1.0}

    def keep_sum(ctx, server, summary):
        return server | {"begun": summary["x"]}, {}

    def train(ctx, received, state, data):
        params, loss = fit(
            task.training, supervised(task.model, task.training), received.shared["params"], data, ctx.at("train"),
            epochs=ctx.hparams["local_epochs"],
        )  # fmt: skip
        x, _ = data.take(jnp.arange(8) % jnp.maximum(data.count, 1))
        mean = jnp.mean(x, axis=0) + 0.1 * received.own + 0.1 * received.known
        upload = {"params": params, "mean": mean + 0.01 * jax.random.normal(ctx.at("draw").key, mean.shape)}
        return state, Upload(upload), {"train_loss": loss}

    def gather(ctx, server, summary):
        stack = summary["all"]
        present = (stack.weight > 0)[:, None]
        table = server["table"].at[stack.client].set(stack.partials)

        def distance(point):  # a server that trains against every upload
            return jnp.sum(jnp.where(present, jnp.log1p((stack.partials - point[None]) ** 2), 0))

        point = jax.lax.fori_loop(0, 3, lambda _, p: p - 0.1 * jax.grad(distance)(p), server["point"])
        new = {
            "params": summary["params"],
            "table": table,
            "point": point,
            "range": jnp.stack([summary["least"], summary["most"]]),
            "cohorts": jnp.stack(summary["cohorts"]),
            "noisy": summary["noisy"],
            "squares": summary["squares"],
            "begun": server["begun"],
        }
        return new, {"spread": jnp.mean(summary["most"] - summary["least"])}

    def revisit(ctx, received, state, data):
        own, loss = fit(
            task.training, supervised(ctx.model, task.training), state["own"], data, ctx, epochs=1,
            learning_rate=ctx.hparams["learning_rate"] * 0.5,
        )  # fmt: skip
        shift = 0.01 * jnp.mean(received.shared)
        own = jax.tree.map(lambda p: p + shift, own)
        upload = Upload((), bytes=jnp.float32(3), bytes_received=jnp.asarray(data.count, jnp.float32))
        return state | {"own": own}, upload, {"own_loss": loss}

    def end(ctx, server, summary):
        return server | {"point": server["point"] + 0.01 * jax.random.normal(ctx.key, (F,))}, {"server_draw": 1.0}

    first = Exchange(
        broadcast=lambda ctx, s: Broadcast({"params": s["params"]}, s["table"][task.ids(ctx.cohort)], s["point"]),
        client=train,
        reduce={
            "params": reductions.weighted_mean(lambda u: u["params"]),
            "squares": after(lambda ctx, u: u["mean"] ** 2, reductions.mean()),
            "least": reductions.minimum(lambda u: u["mean"]),
            "most": reductions.maximum(lambda u: u["mean"]),
            "all": reductions.stack(lambda u: u["mean"]),
            "cohorts": reductions.mean(lambda u: u["mean"])._replace(per_cohort=True),
            "noisy": noisy_mean(),
        },
        server=gather,
    )
    zeros = jnp.zeros(F)
    return Algorithm(
        init_server=lambda ctx, params: {
            "params": params, "table": jnp.zeros((C, F)), "point": 0.1 * jax.random.normal(ctx.key, (F,)),
            "range": jnp.zeros((2, F)), "cohorts": jnp.zeros((len(task.models), F)), "noisy": zeros,
            "squares": zeros, "begun": zeros,
        },
        init_client=lambda ctx, params: {"own": ctx.model.init(ctx.key), "sent": zeros},
        setup=(Exchange(lambda ctx, server: Broadcast(server["point"]), sum_up, reductions.weighted_mean(), keep_sum),),
        round=(
            coded(first, up=changes("sent")),
            Exchange(lambda ctx, server: Broadcast(server["noisy"]), revisit, reductions.nothing(), end),
        ),
        central=lambda ctx, server, x: task.model.apply(server["params"], x),
        personal=lambda ctx, server, state, x: ctx.model.apply(state["own"], x + 0 * server["point"][None]),
    )  # fmt: skip


METHOD = Method(
    name="probe",
    summary="every feature of the engine",
    build=probe,
    hparams={
        "learning_rate": HParam(0.2), "local_epochs": HParam(2, 1, integer=True), "clip": HParam(1.0),
        "noise": HParam(0.5),
    },
)  # fmt: skip


@functools.cache
def bind(kind="shard_map", chunk=2, devices=1, cohorts=COHORTS, **more):
    """(simulation, federation, hparams) of the probe."""
    task = cases.task(cohorts=cohorts)
    simulation = cases.bind(METHOD.algorithm(task), task, PARTICIPANTS, chunk=chunk, devices=devices, kind=kind, **more)
    return simulation, cases.federation(devices=devices, cohort_sizes=task.sizes), METHOD.resolve({})
