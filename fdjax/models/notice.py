"""A notice for models whose convolutions are slow on CPU."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import logging
from jax.extend import core

from fdjax.types import Model


def notice_plain_conv(model: Model, input_shape: Sequence[int]) -> bool:
    """Log one line if `model` convolves by XLA's own convolution on CPU; returns whether it did.

    A log and not a Python warning: such a model is right, and only slow.
    """
    if jax.default_backend() != "cpu":
        return False
    params = jax.eval_shape(model.init, jax.random.key(0))
    x = model.example(input_shape, 2)
    if not _plain_conv(jax.make_jaxpr(model.apply)(params, x).jaxpr):
        return False
    logging.warning(
        "model %r uses plain convolutions, whose gradients are several times slower on CPU inside training loops; "
        "fdjax.models.layers.Conv computes the same at full speed",
        model.name,
    )
    return True


def _plain_conv(jaxpr: core.Jaxpr) -> bool:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            return True
        # A function with a vmap rule of its own, as conv2d is, has had its forms chosen.
        if eqn.primitive.name != "custom_vmap_call" and any(map(_plain_conv, _inner(eqn.params.values()))):
            return True
    return False


def _inner(params: Any) -> Iterator[core.Jaxpr]:
    for leaf in jax.tree.leaves(list(params)):
        if isinstance(leaf, core.ClosedJaxpr):
            yield leaf.jaxpr
        elif isinstance(leaf, core.Jaxpr):
            yield leaf
