"""Where a model looks: class activation maps of its last features with positions."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fdjax.types import Model, PyTree


class Attentive:
    """A model cut at its last features with positions, or before its head where there are none."""

    def __init__(self, model: Model, inputs: Sequence[int]):
        params = jax.eval_shape(model.init, jax.random.key(0))
        h, shapes = model.example(inputs), []
        for block in model.blocks[:-1]:
            h = jax.eval_shape(block, params, h)
            shapes.append(h.shape)
        spatial = [i for i, shape in enumerate(shapes, 1) if len(shape) == 4]
        cut = spatial[-1] if spatial else len(shapes)
        self._below, self._above = model.blocks[:cut], model.blocks[cut:]
        self.size = shapes[cut - 1][1:3] if spatial else (1, 1)

    def features(self, params: PyTree, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """h [B, ...] of x [B, ...]."""
        for block in self._below:
            x = block(params, x, key)
        return x

    def logits(self, params: PyTree, h: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """z [B, K] of h."""
        for block in self._above:
            h = block(params, h, key)
        return h

    def maps(self, params: PyTree, h: jax.Array, size: Sequence[int]) -> jax.Array:
        """A [B, K, *size] of h: what it says for each class, where; the largest of an example is 1."""
        slope = jax.jacrev(lambda h: jnp.sum(self.logits(params, h), 0))(h)  # examples do not see each other
        shape = (len(h), *self.size, h.size // len(h) // (self.size[0] * self.size[1]))
        alpha = jnp.mean(slope.reshape(len(slope), *shape), (2, 3))
        cam = jax.nn.relu(jnp.einsum("kbd,bijd->bkij", alpha, h.reshape(shape)))
        cam = jax.image.resize(cam, (*cam.shape[:2], *size), "linear")
        top = jnp.max(cam, (1, 2, 3), keepdims=True)
        return jnp.where(top > 0, cam / jnp.where(top > 0, top, 1), 0)
