"""What is measured of a model beside accuracy and loss: sums over examples, and what is made of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fdjax.types import Array, PyTree


class Metric(NamedTuple):
    """What an evaluation measures of every model that it tests, in the same compiled call; see `fdjax.run.metrics`.

    One of three forms, all of them functions of JAX arrays:

        per_example(logits [B, K], y [B]) -> [B]            their mean over the examples
        sums(logits [B, K], y [B], weight [B]) -> pytree    of numbers that add up over batches, and
        finish(sums) -> [] or [K]                           what becomes of their total
        across(accuracy [C], tested [C] bool) -> []         of the clients' accuracies on their own test parts

    A weight is 1, or 0 for an example that only fills up a batch and must not count. A model that was tested on nothing
    has NaN for a value, whatever `finish` says, and so may others: means over clients leave NaN out, and
    `<name>_undefined` beside them counts the tested clients for which there was none.
    """

    name: (
        str  # of the values: central_<name>, local_<name>, own_<name>, validation_<name>; of [K] central_<name>_<label>
    )
    per_example: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    sums: Callable[[jax.Array, jax.Array, jax.Array], PyTree] | None = None
    finish: Callable[..., jax.Array] | None = None
    across: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    holds: bool = False
    # whether it is finish(sums, held), held [K] float32 being how many training examples of each label the client has:
    # a value of each client on the common test set alone (local_<name>), of its own model or else of the central one
    unit: str = ""  # "%" for a fraction that tables show as a percentage
    better: str = "higher"  # or "lower"
    summary: str = ""  # one line for tables and --help; without it, the name


def measured(metrics: Sequence[Metric], logits: jax.Array, y: jax.Array, weight: jax.Array) -> dict[str, PyTree]:
    """The sums of each metric by name, of logits [M, K] for labels [M], each as often as its weight [M] says."""
    return {metric.name: _sums(metric, logits, y, weight) for metric in metrics if metric.across is None}


def finished(
    metrics: Sequence[Metric], sums: Mapping[str, PyTree], count: Array, held: jax.Array | None = None
) -> dict[str, jax.Array]:
    """The value of each metric by name, [] or [K] float32, for `count` [] examples: NaN if these are none.

    `held` [K]: training examples of each label, for metrics that want them.
    """
    values = {metric.name: _value(metric, sums[metric.name], held) for metric in metrics if metric.across is None}
    return {name: jnp.where(count > 0, value.astype(jnp.float32), jnp.nan) for name, value in values.items()}


def _sums(metric: Metric, logits: jax.Array, y: jax.Array, weight: jax.Array) -> PyTree:
    if metric.per_example is not None:
        values = jnp.asarray(metric.per_example(logits, y), jnp.float32)
        return jnp.sum(jnp.where(weight > 0, weight * values, 0)), jnp.sum(weight)
    assert metric.sums is not None
    return jax.tree.map(as_sum, metric.sums(logits, y, weight))


def as_sum(x: Any) -> jax.Array:
    """A number that adds up: whole ones as int32, others as float32."""
    x = jnp.asarray(x)
    whole = jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == jnp.bool_
    return x.astype(jnp.int32 if whole else jnp.float32)


def _value(metric: Metric, sums: PyTree, held: jax.Array | None) -> jax.Array:
    if metric.per_example is not None:
        total, count = sums
        return total / count
    assert metric.finish is not None
    return jnp.asarray(metric.finish(sums, held) if metric.holds else metric.finish(sums))


def flattened(values: Mapping[str, Any], dimensions: int) -> dict[str, Any]:
    """The same with values that have a dimension more, [..., K], as K values by the names <name>_0 to <name>_<K - 1>.

    `dimensions` are those of a value without classes: 0 for scalars, 1 for one of every client.
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if len(jnp.shape(value)) > dimensions:
            flat |= {f"{name}_{label}": value[..., label] for label in range(jnp.shape(value)[-1])}
        else:
            flat[name] = value
    return flat
