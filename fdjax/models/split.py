"""A network in two parts, for methods that exchange or share what lies between: FedGKT's features, embeddings."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fdjax.errors import InputError
from fdjax.models import from_linen, make_module
from fdjax.types import PyTree, Split


def build_split(name: str, input_shape: Sequence[int], num_classes: int, **options: Any) -> Split:
    """As `models.build`, of a model that has two parts (`gkt_edge`); raises `InputError` for one that has not."""
    return split(make_module(name, num_classes, **options), input_shape, name)


def split(module: nn.Module, input_shape: Sequence[int], name: str | None = None) -> Split:
    """Wrap a linen module with the methods `features(x)` and `head(features)`, whose call is one after the other.

    Raises:
      InputError: what `from_linen` refuses, or a module without these methods.
    """
    label = name or type(module).__name__
    for method in ("features", "head"):
        if not callable(getattr(type(module), method, None)):
            raise InputError(f"model {label!r} has no method {method!r}, so it cannot be split; gkt_edge can")
    model = from_linen(module, input_shape, name)

    def features(params: PyTree, x: jax.Array) -> jax.Array:
        out = module.apply({"params": params}, x, method="features")
        return out  # pyright: ignore[reportReturnType]

    def head(params: PyTree, h: jax.Array) -> jax.Array:
        out = module.apply({"params": params}, h, method="head")
        return out  # pyright: ignore[reportReturnType]

    params = jax.eval_shape(model.init, jax.random.key(0))
    shape = jax.eval_shape(features, params, jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)).shape[1:]
    return Split(model, features, head, shape)
