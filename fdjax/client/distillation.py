"""What a distillation began and ended with, noted while it is traced, so that whoever asks can test both."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fdjax.client import testing
from fdjax.client.data import ClientData
from fdjax.contract import Context
from fdjax.types import Model, PyTree


class Distillation(NamedTuple):
    """The params of a model before and after it was distilled into."""

    model: Model
    before: PyTree
    after: PyTree


def note(ctx: Context, before: PyTree, after: PyTree) -> None:
    """Leaves the params of `ctx.model` before and after a distillation with the context, if that asks for them.

    `fit` does so by itself where its training is that of a distillation; a method's own loop calls this.
    """
    if ctx.distillations is not None:
        ctx.distillations.append(Distillation(ctx.model, before, after))


def accuracies(noted: list[Distillation], data: ClientData, batch_size: int) -> tuple[jax.Array, jax.Array]:
    """The mean accuracies on `data` before and after, over what was noted; NaN if there are no data."""

    def mean(params_of_each):
        scores = [
            testing.test(lambda x, model=model, params=params: model.apply(params, x), data, batch_size).mean()[0]
            for model, params in params_of_each
        ]
        return jnp.mean(jnp.stack(scores))

    return mean([(n.model, n.before) for n in noted]), mean([(n.model, n.after) for n in noted])
