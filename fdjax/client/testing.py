"""Tests of a model, and its predictions, over many examples in batches."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fdjax.client import losses
from fdjax.client.data import ClientData, batches, whole
from fdjax.client.metric import Metric, finished, measured
from fdjax.types import Examples, PyTree


class Score(NamedTuple):
    """Sums over examples, which add; `count` may be 0."""

    correct: jax.Array
    loss: jax.Array
    count: jax.Array
    metrics: dict[str, PyTree] = {}  # noqa: RUF012  sums of metrics by name; values when they are finished

    def finished(self, metrics: Sequence[Metric], held: jax.Array | None = None) -> "Score":
        """The same with the values of metrics; `held` [K] are the training examples of each label."""
        return self._replace(metrics=finished(metrics, self.metrics, self.count, held)) if self.metrics else self

    def mean(self) -> tuple[jax.Array, jax.Array]:
        """Accuracy in [0, 1] and mean cross-entropy, NaN where there was nothing to test."""
        count = jnp.where(self.count > 0, self.count, jnp.nan)
        return self.correct / count, self.loss / count


def test(
    model: Callable[[jax.Array], jax.Array],
    data: ClientData,
    batch_size: int,
    metrics: Sequence[Metric] = (),  # noqa: PT028  this is no test of pytest's
) -> Score:
    """Sums of a model, x -> logits, over all of `data`, in batches: its correct predictions, cross-entropy, metrics."""

    def of_batch(index):
        position = index * batch_size + jnp.arange(batch_size)
        weight = (position < data.count).astype(jnp.float32)
        x, y = data.take(jnp.minimum(position, data.count - 1))
        return score(model(x), y, weight, metrics)

    def step(index, total):
        return jax.tree.map(jnp.add, total, of_batch(index))

    zero = jnp.float32(0)
    nothing = Score(zero, zero, zero)
    if metrics:
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_batch, jnp.int32(0)))
    return lax.fori_loop(0, batches(data.count, batch_size), step, nothing)


def score(logits: jax.Array, y: jax.Array, weight: jax.Array, metrics: Sequence[Metric] = ()) -> Score:
    """The score of `logits` [M, K] for labels `y` [M], each as often as its `weight` [M] says."""
    return Score(
        jnp.sum(weight * losses.correct(logits, y)),
        jnp.sum(weight * losses.cross_entropy(logits, y)),
        jnp.sum(weight),
        measured(metrics, logits, y, weight),
    )


def predict(model: Callable[[jax.Array], jax.Array], examples: Examples, batch_size: int) -> jax.Array:
    """Logits [M, K] of a model, x -> logits, on all of `examples` [M, ...], in batches."""
    size = len(examples.y)
    batch_size = min(batch_size, size)
    positions = jnp.arange(-(-size // batch_size) * batch_size).reshape(-1, batch_size)
    data = whole(examples)
    _, logits = lax.scan(lambda _, position: ((), model(data.take(jnp.minimum(position, size - 1))[0])), (), positions)
    return logits.reshape(-1, logits.shape[-1])[:size]


def predict_first(model: Callable[[jax.Array], jax.Array], data: ClientData, size: int, batch_size: int) -> jax.Array:
    """Logits [size, K] of a model, x -> logits, on `data`, whose `count` is at most `size`; zeros beyond it."""
    batch_size = min(batch_size, size)

    def logits_of(index):
        position = index * batch_size + jnp.arange(batch_size)
        return model(data.take(jnp.minimum(position, data.count - 1))[0])

    shape = jax.eval_shape(logits_of, jnp.int32(0))
    room = jnp.zeros((-(-size // batch_size) * batch_size, *shape.shape[1:]), shape.dtype)

    def step(index, logits):
        return lax.dynamic_update_slice_in_dim(logits, logits_of(index), index * batch_size, 0)

    logits = lax.fori_loop(0, batches(data.count, batch_size), step, room)[:size]
    return jnp.where((jnp.arange(size) < data.count)[:, None], logits, 0)
