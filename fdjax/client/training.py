"""One client's training, and the server's on proxy data: an optimiser's steps over shuffled batches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from fdjax import keys
from fdjax.client import losses
from fdjax.client.data import batches
from fdjax.contract import Context, Data
from fdjax.method import Training
from fdjax.types import Array, Model, PyTree

Loss = Callable[[PyTree, jax.Array, Any], jax.Array]  # (params, x [B, ...], targets [B, ...]) -> losses [B]


def supervised(model: Model) -> Loss:
    """Cross-entropy of the model's logits to labels [B]."""
    return lambda params, x, y: losses.cross_entropy(model.apply(params, x), y)


def from_probabilities(model: Model) -> Loss:
    """Cross-entropy of the model's logits to target probabilities [B, K]."""
    return lambda params, x, target: losses.soft_cross_entropy(target, model.apply(params, x))


def fit(
    training: Training,
    loss: Loss,
    params: PyTree,
    data: Data,
    ctx: Context,
    *,
    epochs: Array,
    learning_rate: Array | None = None,
) -> tuple[PyTree, jax.Array]:
    """Minimise the mean of `loss` over `data` for `epochs` epochs, reshuffled each; the optimiser starts fresh.

    Steps are counted at run time: a client pays for its own examples, and a new `epochs` compiles nothing.

    Args:
      training: batch size, optimiser, augmentation.
      loss: (params, x [B, ...], targets [B, ...]) -> losses [B].
      params: where to start.
      data: the examples; none at all is fine, and trains nothing.
      ctx: its key is consumed (`ctx.at("student")` for one of several fits), its round goes to the optimiser.
      epochs: [] int32.
      learning_rate: [] float32; the hyperparameter `learning_rate` if not given.

    Returns:
      The params, and the mean loss over the last epoch's batches (0 for a client without examples).
    """
    params, mean, _ = fit_observing(
        training, lambda p, x, y: (loss(p, x, y), ()), lambda *_: (), (), params, data, ctx,
        epochs=epochs, learning_rate=learning_rate,
    )  # fmt: skip
    return params, mean


def fit_observing(
    training: Training,
    loss: Callable[[PyTree, jax.Array, Any], tuple[jax.Array, PyTree]],
    observe: Callable[[Any, Any, jax.Array], PyTree],
    account: PyTree,
    params: PyTree,
    data: Data,
    ctx: Context,
    *,
    epochs: Array,
    learning_rate: Array | None = None,
) -> tuple[PyTree, jax.Array, PyTree]:
    """`fit` that also keeps an account of what is seen on the way, such as predictions.

    `loss` returns (losses [B], seen); `observe(seen, targets, weight [B])`, of weight 0 where a short batch is filled
    up, is added to `account` at every step of every epoch, and what that comes to is returned last.
    """
    rate = ctx.hparams["learning_rate"] if learning_rate is None else learning_rate
    optimizer = training.optimizer(rate, ctx.round)
    steps = batches(data.count, training.batch_size)

    def epoch(number, carry):
        epoch_key = jax.random.fold_in(ctx.key, number)
        shuffle = keys.shuffle(keys.stream(epoch_key, "shuffle"), data.count)

        def step(index, carry):
            params, optimizer_state, total, account = carry
            position = index * training.batch_size + jnp.arange(training.batch_size)
            weight = (position < data.count).astype(jnp.float32)
            x, y = data.take(shuffle(jnp.minimum(position, data.count - 1)))
            if training.augment is not None:
                x = training.augment(keys.stream(epoch_key, "augment", index), x)

            def mean(params):
                values, seen = loss(params, x, y)
                return losses.weighted_mean(values, weight), seen

            (value, seen), gradient = jax.value_and_grad(mean, has_aux=True)(params)
            account = jax.tree.map(jnp.add, account, observe(seen, y, weight))
            update, optimizer_state = optimizer.update(gradient, optimizer_state, params)
            return optax.apply_updates(params, update), optimizer_state, total + value, account

        params, optimizer_state, _, account = carry
        return lax.fori_loop(0, steps, step, (params, optimizer_state, jnp.float32(0), account))

    carry = params, optimizer.init(params), jnp.float32(0), account
    params, _, total, account = lax.fori_loop(0, epochs, epoch, carry)
    return params, total / jnp.maximum(steps, 1), account
