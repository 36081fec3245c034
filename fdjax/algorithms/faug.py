"""FAug, federated augmentation, with federated distillation (FD + FAug) or averaging (FL + FAug) after it.

Jeong, Oh, Kim, Park, Bennis, Kim, "Communication-Efficient On-Device Machine Learning: Federated Distillation and
Augmentation under Non-IID Private Data" (2018), which does not number its equations. Once, before round 1:

    device:  L_t, its target labels, which its data lack, and L_r, redundant ones, as cover;
             seeds of the labels of both that it holds go up
    server:  trains a conditional GAN on all seeds; its generator G goes down to everyone
    device:  every label of L_t is filled up with examples of G, until the set is IID; then FD, or FedAvg, of these sets

Two leakages, means over the devices: to the server |L_t| / (|L_t| + |L_r|), metric `device_server_leakage`, and to
other devices |L_t| / |union over devices of L_t and L_r|, `inter_device_leakage`; both of the labels that went up.

Sent, beside FD's or FedAvg's: seeds up, a byte a pixel; G down, 4 P_G. By Table 1, 16 rounds of FD + FAug, 15 seeds of
784 pixels and a G of 1,493,520 numbers are 47,989,120 bits; so are ours. As there, the seeds' labels are not counted.

The paper leaves open, and we chose:
- A label is a target if the device has less than `scarcity` times as many of it as of its most frequent one, and is
  filled up to these. A device sends at most five seeds of a label, its first ones, and `redundant_labels` random other
  labels. A label of which nobody sent seeds cannot be filled: G then has a row of zeros, which costs no bytes.
- G's layers (`exchange/gan.py`) follow from the published size. Its label is 10 of its 100 inputs, so the size stays.
- `generator_steps` of Adam. The paper's server oversamples the seeds by image search; ours draws them again and again.

Deviations: generated examples are drawn anew each round, on the device, and are the same in all epochs of it: a set of
its own would be a copy of the data for each device. FedAvg weighs a device by its own examples, without these.
Float inputs, which have no bounds, have a G without the last tanh, and seeds of 4 bytes a number.

With ten devices of FD's setting (`test_learning.py`, 10 rounds of a 2nn) FD + FAug has 74.8, 73.2, 73.8 %, FD 71.7,
70.7, 74.3 and training alone 71.9, 72.6, 72.2; with five devices, so half the seeds, nothing is gained. The paper's 11
to 16 points may rest on its oversampling, which a few seeds do not replace. FL + FAug is level with FedAvg: both have
91.2 %, of one seed.
"""

import math

import jax
import jax.numpy as jnp

from fdjax.algorithms import fd, fedavg
from fdjax.contract import Algorithm, Broadcast, Exchange, Upload, unchanged
from fdjax.errors import InputError
from fdjax.exchange import gan, reductions
from fdjax.exchange.filling import Filled, first_of_each_label
from fdjax.exchange.stacked import present
from fdjax.method import LOCAL_TRAINING, HParam, Method, Task, epochs, learning_rate

_SEEDS = 5  # of a label, at most


def faug(task: Task) -> Algorithm:
    """FAug before the option `base`, FD or FedAvg; hparams: see METHOD."""
    K, largest = task.classes, task.largest
    if gan.noise_size(K) < 1:
        raise InputError(f"faug's generator has {gan.INPUTS} inputs for noise and label, but there are {K} classes")
    by_fd = task.options["base"] == "fd"
    if not by_fd and any(model is not task.model for model in task.models):
        raise InputError("--base=fl averages the params of one architecture; leave --models out, or give --base=fd")
    base = (fd.fd if by_fd else fedavg.fedavg)(task)

    def targets(ctx, counts):
        return counts < ctx.hparams["scarcity"] * jnp.max(counts)

    def send_seeds(ctx, received, state, data):
        counts, at = first_of_each_label(data, K, largest, _SEEDS)
        wanted = targets(ctx, counts) & (counts > 0)
        chance = jnp.where((counts > 0) & ~wanted, jax.random.uniform(ctx.at("cover").key, (K,)), -1.0)
        rank = jnp.sum(chance[None] > chance[:, None], 1)
        cover = (chance >= 0) & (rank < ctx.hparams["redundant_labels"])
        sent = jnp.where(wanted | cover, jnp.minimum(counts, _SEEDS), 0)
        raw = data.examples.x[data.order[data.start + at]]
        size = jnp.sum(sent) * (raw.size // (K * _SEEDS) * raw.dtype.itemsize)
        leaked = jnp.sum(wanted) / jnp.maximum(jnp.sum(wanted | cover), 1)
        upload = Upload({"x": raw, "sent": sent}, bytes=size.astype(jnp.float32))
        return state | {"counts": counts}, upload, {"device_server_leakage": leaked}

    def train_generator(ctx, server, stack):
        seeds = present(stack)
        x, bounded = seeds["x"].astype(jnp.float32), seeds["x"].dtype == jnp.uint8
        y = jnp.broadcast_to(jnp.arange(K)[None, :, None], x.shape[:3])
        there = jnp.arange(_SEEDS)[None, None] < seeds["sent"][..., None]
        made, loss, critic_loss = gan.train(
            server["generator"], (x / 127.5 - 1 if bounded else x).reshape(y.size, -1), y.reshape(-1),
            there.reshape(-1), classes=K, bounded=bounded, steps=ctx.hparams["generator_steps"],
            rate=ctx.hparams["generator_learning_rate"], key=ctx.key,
        )  # fmt: skip
        return server | {"generator": made}, {"generator_loss": loss, "critic_loss": critic_loss}

    def receive_generator(ctx, received, state, data):
        wanted = targets(ctx, state["counts"]) & (state["counts"] > 0)
        known = gan.known_labels(received.shared, K)
        return state, Upload(()), {"inter_device_leakage": jnp.sum(wanted) / jnp.maximum(jnp.sum(known), 1)}

    def on_filled(exchange):
        def broadcast(ctx, server):
            sent = exchange.broadcast(ctx, server["base"])
            return sent._replace(known=(sent.known, server["generator"]))

        def client(ctx, received, state, data):
            known, generator = received.known
            counts = state["counts"]
            fills = targets(ctx, counts) & gan.known_labels(generator, K)
            noise = jax.random.normal(ctx.at("generated").key, (largest, gan.noise_size(K)))
            filled = Filled(data, jnp.where(fills, jnp.max(counts) - counts, 0), generator, noise)
            new, upload, metrics = exchange.client(ctx, received._replace(known=known), state["base"], filled)
            return state | {"base": new}, upload, metrics | {"filled": jnp.sum(filled.lacking).astype(jnp.float32)}

        def server(ctx, server, summary):
            new, metrics = exchange.server(ctx, server["base"], summary)
            return server | {"base": new}, metrics

        return exchange._replace(broadcast=broadcast, client=client, server=server, name=exchange.label)

    return Algorithm(
        init_server=lambda ctx, params: {
            "base": base.init_server(ctx, params),
            "generator": gan.init(ctx.at("generator").key, math.prod(task.inputs)),
        },
        init_client=lambda ctx, params: {"base": base.init_client(ctx, params), "counts": jnp.zeros(K, jnp.int32)},
        setup=(
            Exchange(lambda ctx, server: Broadcast(()), send_seeds, reductions.stack(), train_generator),
            Exchange(
                lambda ctx, server: Broadcast(server["generator"]), receive_generator, reductions.nothing(), unchanged
            ),
        ),
        round=tuple(map(on_filled, base.round)),
        central=None if by_fd else lambda ctx, server, x: ctx.model.apply(server["base"], x),
        personal=(lambda ctx, server, state, x: ctx.model.apply(state["base"], x)) if by_fd else None,
        model_of=lambda ctx, server, state: state["base"] if by_fd else server["base"],
    )


METHOD = Method(
    name="faug",
    summary="FAug (Jeong et al. 2018): seeds up, a generator down that fills up scarce labels; then FD, or FedAvg",
    build=faug,
    hparams={
        **LOCAL_TRAINING,
        "gamma": fd.METHOD.hparams["gamma"]._replace(only=("base", "fd")),
        "scarcity": HParam(
            0.5, high=1.0, help="a label with less than this share of the most frequent one is filled up"
        ),
        "redundant_labels": HParam(0, integer=True, help="labels of which a device sends seeds as cover"),
        "generator_learning_rate": learning_rate(1e-3, "learning rate of generator and discriminator"),
        "generator_steps": epochs(500, "steps of the generator's training"),
    },
    options={"base": ("fd", "fl")},
    needs_numbers=True,
)
