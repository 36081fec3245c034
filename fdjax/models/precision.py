"""Models that compute in another floating-point type than that of their parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fdjax.types import STATISTICS, Model, PyTree


def in_precision(model: Model, dtype: str) -> Model:
    """The model with the arithmetic of `apply` and of the blocks in `dtype`, such as bfloat16.

    Parameters and inputs are cast on the way in, results on the way out: parameters, gradients, logits, what lies
    between blocks and BatchNorm's statistics stay float32.

    How far that is from float32: gradients of a batch by 1 to 6 % for the nets of the zoo, most of it from ReLUs whose
    inputs round to the other sign. FedAvg's weights by 0.1 % (mclr) and 1 % (2nn) of the way moved in five rounds on
    synthetic data, within 0.3 % and 5 % in the tests; by 8 % (2nn) and 37 % (niid_cnn, whose loss was still falling
    steeply) in three rounds on MNIST at learning rate 0.1, with accuracies within 0.013 of float32's.
    """

    def cast(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def inner(params: PyTree, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
            params = jax.tree.map_with_path(lambda path, leaf: leaf if is_statistic(path) else _to(leaf, dtype), params)
            return jax.tree.map(lambda y: _to(y, "float32"), function(params, _to(x, dtype), key))

        return inner

    return model._replace(apply=cast(model.apply), blocks=tuple(map(cast, model.blocks)))


def is_statistic(path: Any) -> bool:
    """Whether a leaf of params at this path of JAX's is one of BatchNorm's running statistics."""
    return any(getattr(key, "key", None) == STATISTICS for key in path)


def _to(x: Any, dtype: str) -> Any:
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
