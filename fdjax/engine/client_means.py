"""Statistics over the clients of what each of them reached in an evaluation."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from fdjax.client import testing
from fdjax.client.metric import Metric
from fdjax.types import Array


def across_clients(own: testing.Score, tested: Array, examples: Array) -> dict[str, jax.Array]:
    """Statistics over the clients that have a test part; NaN if there are none.

    Three means, of each client alike, weighted by its training examples (n_k), and by its test examples (so of all test
    examples alike); the worst client, the 10 % quantile and the standard deviation.
    """
    accuracy, loss = own.mean()
    count = or_nan(jnp.sum(tested))
    mean = jnp.sum(jnp.where(tested, accuracy, 0)) / count
    weight = jnp.where(tested, examples, 0).astype(jnp.float32)
    masked = jnp.where(tested, accuracy, jnp.nan)
    return {
        "own_accuracy": mean,
        "own_accuracy_weighted": jnp.vdot(jnp.where(tested, accuracy, 0), weight) / or_nan(jnp.sum(weight)),
        "own_accuracy_by_test_size": jnp.vdot(own.correct, tested) / or_nan(jnp.vdot(own.count, tested)),
        "own_loss": jnp.sum(jnp.where(tested, loss, 0)) / count,
        "worst_client": jnp.nanmin(masked),
        "quantile_10": jnp.nanquantile(masked, 0.1),
        "client_std": jnp.sqrt(jnp.sum(jnp.where(tested, (accuracy - mean) ** 2, 0)) / count),
    }


def measured_means(kind: str, values: Mapping[str, jax.Array], counts: Array) -> dict[str, jax.Array]:
    """Of metrics of each client by name, [C] or [C, K]: the means over those that count and have a value.

    With them, for how many that count there is none, by the name <kind>_<metric>_undefined.
    """
    means: dict[str, jax.Array] = {}
    for name, of_clients in values.items():
        there = jnp.asarray(counts).reshape(-1, *(1,) * (of_clients.ndim - 1)) & ~jnp.isnan(of_clients)
        number = jnp.sum(there, 0)
        means[f"{kind}_{name}"] = jnp.sum(jnp.where(there, of_clients, 0), 0) / or_nan(number)
        means[f"{kind}_{name}_undefined"] = (jnp.sum(counts) - number).astype(jnp.float32)
    return means


def measured_across(metrics: Sequence[Metric], accuracy: jax.Array, tested: Array) -> dict[str, jax.Array]:
    """The metrics of all clients' accuracies on their own test parts; 0 in the place of one that was not tested."""
    known, tested = jnp.where(tested, accuracy, 0), jnp.asarray(tested)
    return {f"own_{m.name}": jnp.asarray(m.across(known, tested), jnp.float32) for m in metrics if m.across}


def or_nan(count: jax.Array) -> jax.Array:
    """What a mean divides by; NaN where it is of nothing."""
    return jnp.where(count > 0, count, jnp.nan)
