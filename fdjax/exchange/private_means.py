"""Means by label, plain or private by example: then outputs are clipped one by one, their sums and counts noised.

Of a client that sees each of its examples in every one of E epochs, i the example, l its label, p_ie what its model
says of it then; c = hparam `clip`, z_s = `noise_multiplier`, z_n = `count_noise_multiplier`:

    S[l] = sum_{i of l, e} min(1, c / |p_ie|) p_ie + N(0, (E z_s c)^2), each of its K numbers
    N[l] = the number of these terms               + N(0, (E z_n)^2)
    F[l] = S[l] / N[l], sent

An example is in one row, E times, so one more or less changes (S / E c, N / E) by (1, 1) at most, and both together are
one Gaussian of multiplier (z_s^-2 + z_n^-2)^(-1/2): once in a round, for every client by itself. A straggler, which
does fewer epochs, has the noise of all E.

That holds **given the models alone**. The client's model was trained on the same examples, so without one of them all
its outputs would be others, and not just one term missing; nothing here hides that. A guarantee in full needs models
that are private by example themselves (DP-SGD, `client/private.py`), composed with this.

What follows costs nothing, as it sees S and N alone, and is ours: a label of which N[l] is no more than twice the
deviation of its noise is sent as one that the client does not hold; and the server makes probabilities of the means
over clients, whose noise is less than that of each. Without noise and clip F is the plain mean, bit by bit.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fdjax.contract import Context
from fdjax.exchange.privacy import SURE, noise_deviation, noised
from fdjax.exchange.reductions import ByLabel
from fdjax.method import Task
from fdjax.types import Array

_MOST = 1.001  # sum of what are probabilities but for rounding


def clipped_outputs(ctx: Context, outputs: jax.Array) -> jax.Array:
    """min(1, c / |p|) p of each row of `outputs` [B, K]; zeros for one that is not finite."""
    clip, norm = ctx.hparams["clip"], jnp.linalg.norm(outputs, axis=-1, keepdims=True)
    near = jnp.where(norm > clip, outputs * (clip / jnp.where(norm > clip, norm, 1)), outputs)
    return jnp.where(jnp.isfinite(norm), near, 0)


def noised_means(ctx: Context, total: ByLabel) -> jax.Array:
    """F [K, D] of sums of clipped outputs and of counts over `local_epochs` epochs. The context's key is consumed."""
    seen = ctx.hparams["local_epochs"].astype(jnp.float32)
    deviation = seen * ctx.hparams["count_noise_multiplier"]
    value = noised(ctx.at("sums"), total.value, seen * noise_deviation(ctx))
    count = noised(ctx.at("counts"), total.count, deviation)
    held = count > SURE * deviation
    return jnp.where(held[:, None], value / jnp.maximum(count, 1)[:, None], 0)


def as_probabilities(means: jax.Array) -> jax.Array:
    """Means [..., K] cut to [0, 1], and scaled down where they add up to more than 1, beyond rounding."""
    positive = jnp.clip(means, 0, 1)
    total = jnp.sum(positive, axis=-1, keepdims=True)
    return jnp.where(total > _MOST, positive / jnp.maximum(total, 1), positive)


class LabelMeans(NamedTuple):
    """How a method makes means by label, so that it need not know whether they are private."""

    shown: Callable[[Context, jax.Array], Array]  # (ctx, outputs [B, K]) -> what of them is added up
    of_sums: Callable[[Context, ByLabel], Array]  # (ctx, their sums and counts) -> F [K, D], as a client sends it
    of_clients: Callable[[jax.Array], Array]  # means over clients [..., K] -> as the server sends them


def label_means(task: Task) -> LabelMeans:
    """Private ones, as above, if the task says so; otherwise plain ones."""
    if task.private_means:
        return LabelMeans(clipped_outputs, noised_means, as_probabilities)
    return LabelMeans(
        shown=lambda ctx, outputs: outputs,
        of_sums=lambda ctx, total: total.value / jnp.maximum(total.count, 1)[:, None],
        of_clients=lambda means: means,
    )
