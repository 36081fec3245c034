"""Networks on tables whose columns are numbers and categories: inputs float32 `[B, F]`, outputs logits `[B, K]`."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fdjax.errors import InputError
from fdjax.models.layers import Block, Net
from fdjax.models.nets import dense
from fdjax.models.sequences import Embedding

_WIDEST = 50  # numbers of an embedded category, at most


class _Columns(nn.Module):
    """Numbers as they are, then for each column of c codes a learned vector of min(50, (c + 1) // 2) numbers.

    That size is a rule of thumb; a column holds codes 0 to c - 1, of which 0, a level that no training row has, is the
    vector 0.
    """

    categories: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        numbers = [j for j, size in enumerate(self.categories) if not size]
        parts = [x[:, jnp.asarray(numbers)]] if numbers else []
        for j, size in enumerate(self.categories):
            if size:
                table = Embedding(size, min(_WIDEST, (size + 1) // 2), name=f"column_{j}")
                code = jnp.clip(x[:, j], 0, size - 1).astype(jnp.int32)
                parts.append(jnp.where(code[:, None] > 0, table(code), 0.0))
        return jnp.concatenate(parts, -1)


class EmbeddedMLP(Net):
    """Embedded categories beside numbers, then hidden layers of ReLU units (Guo and Berkhahn 2016).

    Without `categories` all columns are numbers.
    """

    num_classes: int
    categories: tuple[int, ...] = ()
    width: int = 64
    layers: int = 2
    dropout: float = 0.0

    @nn.compact
    def blocks(self, train: bool) -> list[Block]:
        hidden = dense((self.width,) * self.layers, self.num_classes)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        first = _Columns(self.categories)

        def columns(x: jax.Array) -> jax.Array:
            if x.ndim != 2 or (self.categories and len(self.categories) != x.shape[1]):
                raise InputError(
                    f"embedded_mlp takes [B, F] with a number of categories for each of F columns; got {x.shape} and "
                    f"{len(self.categories)} columns"
                )
            return drop(first(x) if self.categories else x)

        return [columns, *hidden]
