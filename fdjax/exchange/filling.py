"""A client's data filled up with generated examples of scarce labels, and the ones that it shows to have them made."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fdjax.client.data import ClientData
from fdjax.exchange import gan
from fdjax.types import Array, Examples, PyTree


class Filled(NamedTuple):
    """A client's data and, behind them, generated examples: `lacking` [K] of each label."""

    data: ClientData
    lacking: Array  # [K] int32
    generator: PyTree
    noise: Array  # [n_max, N]: of the first, second ... example of any label

    @property
    def count(self) -> Array:
        """Of both together."""
        return self.data.count + jnp.sum(self.lacking)

    def take(self, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [B, ...] and y [B] at `position` [B]."""
        x, y = self.data.take(jnp.clip(position, 0, self.data.count - 1))
        at, ends = position - self.data.count, jnp.cumsum(self.lacking)
        label = jnp.minimum(jnp.searchsorted(ends, at, side="right"), len(ends) - 1).astype(jnp.int32)
        noise = self.noise[jnp.clip(at - (ends - self.lacking)[label], 0, len(self.noise) - 1)]
        examples, own = self.data.examples, at < 0
        made = gan.generate(self.generator, noise, label, is_image(examples)).reshape(x.shape)
        if is_image(examples):
            channels = (1,) * (x.ndim - 1) + (-1,)
            made = (made + 1) * 127.5 * examples.scale.reshape(channels) + examples.shift.reshape(channels)
        return jnp.where(own.reshape(-1, *(1,) * (x.ndim - 1)), x, made), jnp.where(own, y, label)


def is_image(examples: Examples) -> bool:
    """Whether inputs are bytes, 0 to 255, and so bounded."""
    return examples.x.dtype == jnp.uint8


def first_of_each_label(data: ClientData, classes: int, largest: int, size: int) -> tuple[jax.Array, jax.Array]:
    """How many examples of each label there are [K], at most `largest` in all, and where its first ones are [K, size].

    Places beyond the number of a label are 0.
    """
    position = jnp.arange(largest)
    y = jnp.where(position < data.count, data.take(jnp.minimum(position, data.count - 1))[1], classes)
    member = jax.nn.one_hot(y, classes, dtype=jnp.int32)
    place = jnp.sum(jnp.cumsum(member, 0) * member, 1) - 1  # first, second ... of its label
    return jnp.sum(member, 0), jnp.zeros((classes, size), jnp.int32).at[y, place].set(position, mode="drop")
