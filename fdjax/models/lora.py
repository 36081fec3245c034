"""Low-rank adapters: a model whose kernels are W + (alpha / r) A B."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fdjax import keys
from fdjax.errors import InputError
from fdjax.models.precision import is_statistic
from fdjax.types import Model, PyTree


def with_lora(model: Model, rank: int, alpha: float | None = None) -> Model:
    """The model with adapters A `[F, r]` and B `[r, O]` on every kernel `[F, O]`; the net uses W + (alpha / r) A B.

    A convolution's kernel `[h, w, c, O]` counts as one of F = h w c rows. A starts normal of variance 1 / F (the paper
    says Gaussian and no more), B at zero, so that the net starts as `model` does; alpha is r if not given. Nothing is
    frozen here: train and exchange `lora/*` alone for that.

    Source: Hu et al. (2022), LoRA, section 4.1, whose A and B are the transposed B and A here.

    Args:
      model: any.
      rank: r, at least 1.
      alpha: scales the adapters.

    Returns:
      A model of params {"base": the model's, "lora": {path of the kernel: {"A": ..., "B": ...}}}.

    Raises:
      InputError: a rank below 1, or a model without a kernel.
    """
    if rank < 1:
        raise InputError(f"adapters have a rank of at least 1; got {rank}")
    scale = (rank if alpha is None else alpha) / rank
    base = jax.eval_shape(model.init, jax.random.key(0))
    kernels = {
        jax.tree_util.keystr(path, simple=True, separator="."): (leaf.size // leaf.shape[-1], leaf.shape[-1])
        for path, leaf in jax.tree.leaves_with_path(base)
        if leaf.ndim in (2, 4) and not is_statistic(path)
    }
    if not kernels:
        raise InputError(f"model {model.name!r} has no kernel (2 or 4 axes) that an adapter could go with")

    def init(key: jax.Array) -> PyTree:
        def adapter(name: str, rows: int, columns: int) -> dict[str, jax.Array]:
            drawn = jax.random.normal(keys.stream(key, f"lora {name}"), (rows, rank), jnp.float32)
            return {"A": drawn / rows**0.5, "B": jnp.zeros((rank, columns), jnp.float32)}

        return {"base": model.init(key), "lora": {name: adapter(name, *size) for name, size in kernels.items()}}

    def merged(params: PyTree) -> PyTree:
        def kernel(path: Any, leaf: jax.Array) -> jax.Array:
            adapter = params["lora"].get(jax.tree_util.keystr(path, simple=True, separator="."))
            return leaf if adapter is None else leaf + scale * (adapter["A"] @ adapter["B"]).reshape(leaf.shape)

        return jax.tree.map_with_path(kernel, params["base"])

    def adapted(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return lambda params, x, key=None: function(merged(params), x, key)

    return model._replace(init=init, apply=adapted(model.apply), blocks=tuple(map(adapted, model.blocks)))
