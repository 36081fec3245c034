"""Prototypes: the mean features of each label, shared by nets of any architectures whose features are of one length.

Also the client that follows them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fdjax.client import losses
from fdjax.client.data import batches
from fdjax.client.training import fit, local_work
from fdjax.contract import ClientWork, Context, Data, Stack, Upload
from fdjax.errors import InputError
from fdjax.exchange.reductions import ByLabel, nothing_by_label, sum_by_label
from fdjax.exchange.stacked import present
from fdjax.method import Task
from fdjax.types import Array, Model, PyTree

_BATCH = 256  # of examples whose features are looked at


def length(task: Task, method: str) -> int:
    """d, the numbers that every net of the task gives its head. Raises InputError if nets differ in it."""
    found = [features_of(model, task.inputs) for model in task.models]
    if len({*found}) > 1:
        listed = ", ".join(f"{model.name} {size}" for model, size in zip(task.models, found, strict=True))
        raise InputError(
            f"{method} compares the features of all clients' models, which must be as many, but they are: {listed}; "
            "choose models whose last hidden layers are of one size"
        )
    return found[0]


def features_of(model: Model, inputs: tuple[int, ...]) -> int:
    """How many numbers a net's head is given."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    shape = jax.eval_shape(model.features, params, model.example(inputs)).shape
    return math.prod(shape)


def flat(h: jax.Array) -> jax.Array:
    """Features [B, ...] as vectors [B, d]."""
    return h.reshape(len(h), -1)


def sums(features: Callable[[jax.Array], jax.Array], data: Data, classes: int, length: int) -> ByLabel:
    """sum_{i: y_i = l} f(x_i) [K, d] and the number of terms [K], over all of `data`, in batches."""

    def step(index: jax.Array, total: ByLabel) -> ByLabel:
        position = index * _BATCH + jnp.arange(_BATCH)
        x, y = data.take(position % jnp.maximum(data.count, 1))
        return jax.tree.map(jnp.add, total, sum_by_label(flat(features(x)), y, classes, position < data.count))

    return lax.fori_loop(0, batches(data.count, _BATCH), step, nothing_by_label(classes, length))


def upload(found: ByLabel, known: Array | None = None, *, counts: bool = False) -> Upload:
    """Sums by label as they are sent: a vector of each label that the client holds (and its count if need be).

    `known` [K] says of which labels it received a vector; without it what was received is counted as it is.
    """
    length = found.value.shape[-1]
    received = None if known is None else 4.0 * length * jnp.sum(known)
    return Upload(found, 4.0 * (length + (1 if counts else 0)) * jnp.sum(found.count > 0), received)


def train_towards(task: Task, length: int, *, counts: bool = False) -> ClientWork:
    """A client of FedProto, which receives prototypes C and sends its own, `ByLabel` [K, d] both, d = `length`.

        E epochs of CE(head(f(x)), y) + `weight` |f(x) - C[y]|^2,  |.|^2 the mean over d;  no second term without C[y]

    Its state is its own model. Up go sums of f(x) by label, as `upload` counts them; with `counts` their numbers.
    Source: Tan et al. (2022), FedProto, equations 3 and 7.
    """

    def train(ctx, received, params, data):
        known = received.shared.count > 0

        def loss(params, x, y, key):
            h = ctx.model.features(params, x, key)
            apart = losses.mean_squared_error(received.shared.value[y], flat(h))
            hard = losses.cross_entropy(ctx.model.head(params, h, key), y, task.training.label_smoothing)
            return hard + ctx.hparams["weight"] * known[y] * apart

        params, train_loss = fit(task.training, loss, params, data, ctx, epochs=local_work(ctx))
        found = sums(lambda x: ctx.model.features(params, x), data, task.classes, length)
        return params, upload(found, known, counts=counts), {"train_loss": train_loss}

    return train


class Pool(NamedTuple):
    """The prototypes of all participants as examples to train on: those that there are come first in `order`."""

    x: jax.Array  # [S K, d]
    y: jax.Array  # [S K] int32
    order: jax.Array  # [S K] int32
    count: jax.Array  # [] int32

    def take(self, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [B, d] and y [B] at `position` [B]."""
        return self.x[self.order[position]], self.y[self.order[position]]


def pooled(stack: Stack) -> tuple[Pool, ByLabel]:
    """The uploads of a stack, as means, and the mean of these by label."""
    sums, counts = present(stack)
    there = (counts > 0) & (stack.weight > 0)[:, None]
    means = sums / jnp.maximum(counts, 1)[..., None]
    holders = jnp.sum(there, 0)
    mean = jnp.sum(jnp.where(there[..., None], means, 0), 0) / jnp.maximum(holders, 1)[:, None]
    size, classes, length = means.shape
    labels = jnp.tile(jnp.arange(classes, dtype=jnp.int32), size)
    pool = Pool(means.reshape(-1, length), labels, jnp.argsort(~there.reshape(-1), stable=True), jnp.sum(holders))
    return pool, ByLabel(mean, holders.astype(jnp.float32))


def nearest(h: jax.Array, prototypes: ByLabel, logits: jax.Array) -> jax.Array:
    """Minus the squared distance of features [B, d] to each label's prototype [K, d]; `logits` if there is none yet.

    A label without a prototype is further than any that has one.
    """
    known = prototypes.count[None] > 0
    distance = jnp.sum(jnp.square(flat(h)[:, None] - prototypes.value[None]), -1)
    furthest = jnp.max(jnp.where(known, distance, 0), -1, keepdims=True)
    return jnp.where(jnp.any(known), -jnp.where(known, distance, furthest + 1), logits)


def predict_by_nearest(ctx: Context, shared: ByLabel, params: PyTree, x: jax.Array) -> jax.Array:
    """Logits [B, K] of a client's own net by its distance to the prototypes that are shared: a `personal`."""
    h = ctx.model.features(params, x)
    return nearest(h, shared, ctx.model.head(params, h))
