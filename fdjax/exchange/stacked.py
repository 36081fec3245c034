"""What the server computes with the uploads of all participants, stacked along an axis [S, ...]."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fdjax.contract import Stack
from fdjax.types import PyTree


def apply_each(function: Callable[..., Any], stacked: PyTree, *inputs: Any) -> Any:
    """`function(x_k, *inputs)` for every x_k of `stacked` [S, ...], such as many heads on one batch: [S, ...]."""
    return jax.vmap(lambda each: function(each, *inputs))(stacked)


def present(stack: Stack) -> PyTree:
    """The partials of a stack with zeros for those that are to be ignored, which may be anything."""

    def cleared(leaf):
        return jnp.where((stack.weight > 0).reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, 0)

    return jax.tree.map(cleared, stack.partials)
