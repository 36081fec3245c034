"""One client's training, and the server's on proxy data: an optimiser's steps over shuffled batches."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import optax
from jax import lax

from fdjax import keys
from fdjax.client import losses, private
from fdjax.client.data import batches
from fdjax.client.distillation import note
from fdjax.client.trained import labels_of, on_trained
from fdjax.contract import Context, Data
from fdjax.method import Training
from fdjax.types import Array, Model, PyTree

Loss = Callable[[PyTree, jax.Array, Any, jax.Array], jax.Array]
# (params, x [B, ...], targets [B, ...], key) -> losses [B]; the key is for nets in training mode


_LEAST_GAIN = 1e-3  # of a mean loss that has become less


class Amount(NamedTuple):
    """How long to train: `steps` optimiser steps or, where they are 0, `epochs` passes.

    Early stopping: training ends after `patience` epochs in a row, if given, whose mean loss is not by 0.001 below the
    least before them.
    """

    epochs: Array
    steps: Array | int = 0
    patience: Array | None = None


def local_work(ctx: Context) -> Amount:
    """A client's training on its own examples in a round: hparams `local_epochs`, or `local_steps` in their place."""
    return Amount(ctx.hparams["local_epochs"], ctx.hparams.get("local_steps", 0))


class Stage(TypedDict):
    """How far a stage beside local training goes, as `fit` takes it."""

    epochs: Array
    learning_rate: Array


def of_stage(ctx: Context, name: str) -> Stage:
    """The stage of the hparams `<name>_epochs` and `<name>_learning_rate`: `fit(..., **of_stage(ctx, "server"))`."""
    return Stage(epochs=ctx.hparams[f"{name}_epochs"], learning_rate=ctx.hparams[f"{name}_learning_rate"])


def supervised(model: Model, training: Training) -> Loss:
    """Cross-entropy of the model's logits to labels [B], smoothed as `training` says."""
    return lambda params, x, y, key: losses.cross_entropy(model.apply(params, x, key), y, training.label_smoothing)


def from_probabilities(model: Model) -> Loss:
    """Cross-entropy of the model's logits to target probabilities [B, K]."""
    return lambda params, x, target, key: losses.soft_cross_entropy(target, model.apply(params, x, key))


def from_logits(model: Model) -> Loss:
    """Mean over the K logits of the absolute differences to target logits [B, K]: the digest of FedMD's code."""
    return lambda params, x, target, key: losses.mean_absolute_error(target, model.apply(params, x, key))


def of_several(training: Training) -> Training:
    """The training of a dict of nets in one fit: its patterns mean paths within each net; a leaf beside them learns."""
    chosen = training.trained
    if chosen is None:
        return training
    return training._replace(trained=lambda path: "/" not in path or chosen(path.partition("/")[2]))


def fit(
    training: Training,
    loss: Loss,
    params: PyTree,
    data: Data,
    ctx: Context,
    *,
    epochs: Array | Amount,
    learning_rate: Array | None = None,
    pull: Callable[[PyTree], PyTree] | None = None,
    keeps: bool = True,
) -> tuple[PyTree, jax.Array]:
    """Minimise the mean of `loss` over `data` for `epochs` epochs, reshuffled each.

    Steps are counted at run time: a client pays for its own examples, and a new `epochs` compiles nothing. A straggler
    (`ctx.work` < 1) does max(1, round(work epochs)) epochs, or such steps. Statistics of BatchNorm follow batches and
    see no optimiser; params that `training` does not train stay as they are.

    Args:
      training: batch size, optimiser, augmentation.
      loss: (params, x [B, ...], targets [B, ...], key) -> losses [B].
      params: where to start.
      data: the examples; none at all is fine, and trains nothing.
      ctx: its key is consumed (`ctx.at("student")` for one of several fits), its round goes to the optimiser.
      epochs: [] int32, or an `Amount`.
      learning_rate: [] float32; the hyperparameter `learning_rate` if not given.
      pull: params -> what is added to the gradient, such as mu (w_k - w) of a proximal term.
      keeps: whether a kept optimiser state (`ctx.optimizers`) is that of these params: False for a second net of a
        client, whose optimiser then starts fresh.

    Returns:
      The params, and the mean loss over the last epoch's batches (0 for a client without examples).
    """
    params, mean, _ = fit_observing(
        training, lambda *args: (loss(*args), ()), lambda *_: (), (), params, data, ctx,
        epochs=epochs, learning_rate=learning_rate, pull=pull, keeps=keeps,
    )  # fmt: skip
    return params, mean


def train_locally(
    training: Training,
    params: PyTree,
    data: Data,
    ctx: Context,
    *,
    epochs: Array | Amount | None = None,
    learning_rate: Array | None = None,
    pull: Callable[[PyTree], PyTree] | None = None,
) -> tuple[PyTree, jax.Array]:
    """A client's training on its own examples by cross-entropy: `fit` of `supervised`, for `local_work` if not told.

    Returns params and mean loss, as `fit` does, and goes on from a kept optimiser; the context's key is consumed.
    """
    return fit(
        training, supervised(ctx.model, training), params, data, ctx,
        epochs=local_work(ctx) if epochs is None else epochs, learning_rate=learning_rate, pull=pull,
    )  # fmt: skip


def fit_observing(
    training: Training,
    loss: Callable[[PyTree, jax.Array, Any, jax.Array], tuple[jax.Array, PyTree]],
    observe: Callable[[Any, Any, jax.Array], PyTree],
    account: PyTree,
    params: PyTree,
    data: Data,
    ctx: Context,
    *,
    epochs: Array | Amount,
    learning_rate: Array | None = None,
    pull: Callable[[PyTree], PyTree] | None = None,
    keeps: bool = True,
) -> tuple[PyTree, jax.Array, PyTree]:
    """`fit` that also keeps an account of what is seen on the way, such as predictions.

    `loss` returns (losses [B], seen); `observe(seen, targets, weight [B])`, of weight 0 where a short batch is filled
    up, is added to `account` at every step of every epoch, and what that comes to is returned last.
    """
    rate = ctx.hparams["learning_rate"] if learning_rate is None else learning_rate
    optimizer = on_trained(training.optimizer(rate, ctx.round), params, training.trained)
    kept = ctx.optimizers if keeps and ctx.optimizers is not None and training.name in ctx.optimizers else {}
    steps = _steps_of_an_epoch(training, data)
    total_steps = _total_steps(epochs, steps, ctx.work)
    whole_epochs = (total_steps + steps - 1) // jnp.maximum(steps, 1)

    def epoch(number, carry):
        epoch_key = jax.random.fold_in(ctx.key, number)
        shuffle = keys.shuffle(keys.stream(epoch_key, "shuffle"), data.count)

        def step(index, carry):
            params, optimizer_state, total, account = carry
            x, y, weight = _batch(training, data, index, shuffle, keys.stream(epoch_key, "sample", index))
            if training.augment is not None:
                x = training.augment(keys.stream(epoch_key, "augment", index), x)

            def of(params, x, y):
                return loss(params, x, y, keys.stream(epoch_key, "loss", index))

            own = keys.stream(epoch_key, "noise", index)
            (value, seen), gradient = _gradient(training.private, of, params, x, y, weight, ctx, own)
            account = jax.tree.map(jnp.add, account, observe(seen, y, weight))
            gradient = _pulled(gradient, pull, params, training)
            update, optimizer_state = optimizer.update(gradient, optimizer_state, params)
            return optax.apply_updates(params, update), optimizer_state, total + value, account

        params, optimizer_state, _, account = carry
        stop = jnp.minimum(steps, total_steps - number * steps)
        return lax.fori_loop(0, stop, step, (params, optimizer_state, jnp.float32(0), account))

    carry = params, kept.get(training.name, optimizer.init(params)), jnp.float32(0), account
    carry, whole_epochs = _repeat(epoch, carry, whole_epochs, steps, getattr(epochs, "patience", None))
    start, (params, optimizer_state, total, account) = params, carry
    if training.distils:
        note(ctx, start, params)
    if kept:
        kept[training.name] = optimizer_state
    in_last_epoch = jnp.minimum(steps, total_steps - (whole_epochs - 1) * steps)
    return params, total / jnp.maximum(in_last_epoch, 1), account


def _batch(
    training: Training, data: Data, index: jax.Array, shuffle: keys.Shuffle, key: jax.Array
) -> tuple[jax.Array, PyTree, jax.Array]:
    """x, targets and weight [B] of batch `index` of an epoch; of DP-SGD, of a sample of its own by `key`."""
    position = index * training.batch_size + jnp.arange(training.batch_size)
    if training.private:
        position, shuffle = jnp.arange(training.batch_size), keys.shuffle(key, data.count)
    weight = (position < data.count).astype(jnp.float32)
    # A short batch is filled with the epoch's first examples, which count in BatchNorm's statistics alone.
    return *data.take(shuffle(position % jnp.maximum(data.count, 1))), weight


def _gradient(
    is_private: bool, loss: Callable, params: PyTree, x: jax.Array, y: PyTree, weight: jax.Array, ctx: Context,
    key: jax.Array,
) -> tuple[tuple[jax.Array, PyTree], PyTree]:  # fmt: skip
    """((mean loss, what else the loss returns), gradient of the mean), clipped and noised if it is to be private."""
    if is_private:
        return private.gradient(loss, params, x, y, weight, ctx, key)

    def mean(params):
        values, seen = loss(params, x, y)
        return losses.weighted_mean(values, weight), seen

    return jax.value_and_grad(mean, has_aux=True)(params)


def _repeat(
    epoch: Callable, carry: PyTree, epochs: Array, steps: Array, patience: Array | None
) -> tuple[PyTree, Array]:
    """`epochs` epochs of `steps` steps, fewer if there is a patience and the mean loss stops to fall; how many."""
    if patience is None:
        return lax.fori_loop(0, epochs, epoch, carry), epochs

    def one_more(running):
        number, carry, least, flat = running
        carry = epoch(number, carry)
        mean = carry[2] / jnp.maximum(steps, 1)
        better = mean < least - _LEAST_GAIN
        return number + 1, carry, jnp.where(better, mean, least), jnp.where(better, 0, flat + 1)

    first = jnp.int32(0), carry, jnp.float32(jnp.inf), jnp.int32(0)
    done, carry, *_ = lax.while_loop(lambda r: (r[0] < epochs) & (r[3] < patience), one_more, first)
    return carry, done


def _pulled(gradient: PyTree, pull: Callable[[PyTree], PyTree] | None, params: PyTree, training: Training) -> PyTree:
    """The gradient, with `pull(params)` added to that of the trained params."""
    if pull is None:
        return gradient
    labels = labels_of(params, training.trained)
    return jax.tree.map(lambda label, g, more: g + more if label == "trained" else g, labels, gradient, pull(params))


def _steps_of_an_epoch(training: Training, data: Data) -> jax.Array:
    """Batches of an epoch. Where a short last one is dropped, a client of less than a batch has it all the same."""
    if training.drop_last:
        return jnp.maximum(data.count // training.batch_size, jnp.minimum(data.count, 1))
    return batches(data.count, training.batch_size)


def _total_steps(epochs: Array | Amount, steps: jax.Array, work: Array | float) -> jax.Array:
    """Optimiser steps of a fit whose epochs have `steps` each."""
    amount = epochs if isinstance(epochs, Amount) else Amount(epochs)

    def share(number):
        number = jnp.asarray(number)
        part = jnp.maximum(1, jnp.round(work * number)).astype(number.dtype)
        return jnp.where(number > 0, part, number)

    whole, by_steps, _ = amount
    if _may_be_partial(work):
        whole, by_steps = share(whole), share(by_steps)
    return jnp.where(jnp.asarray(by_steps) > 0, jnp.where(steps > 0, by_steps, 0), whole * steps)


def _may_be_partial(work: Array | float) -> bool:
    return not (isinstance(work, float) and work == 1.0)
