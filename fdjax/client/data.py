"""What a client trains and tests on: views of examples that are stored once, taken by position."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from fdjax.contract import Data
from fdjax.types import Array, Examples, PyTree


class ClientData(NamedTuple):
    """One client's view of the shared examples; of proxy data, `order` being the ids in use."""

    examples: Examples
    order: Array  # [L] int32
    start: Array  # [] int32
    count: Array  # [] int32

    def take(self, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The client's examples at `position` [B] (0 <= position < count): x [B, ...] and y [B] int32.

        x is float32, standardised; tokens stay the int32 that they are.
        """
        index = self.order[self.start + position]
        x = self.examples.x[index]
        if x.dtype == jnp.int32:
            return x, self.examples.y[index]
        x = x.astype(jnp.float32)
        channels = (1,) * (x.ndim - 1) + (-1,)
        return x * self.examples.scale.reshape(channels) + self.examples.shift.reshape(channels), self.examples.y[index]


class Targets(NamedTuple):
    """Proxy examples `ids` with a target each, such as a consensus, in place of labels."""

    examples: Examples
    ids: Array  # [n] int32
    targets: PyTree  # [n, ...]
    number: Array | None = None  # [] int32: only the first so many; None: all

    @property
    def count(self) -> Array:
        """How many there are, n or less."""
        return jnp.int32(len(self.ids)) if self.number is None else self.number

    def take(self, position: jax.Array) -> tuple[jax.Array, PyTree]:
        """x [B, ...] and targets [B, ...] at `position` [B]."""
        data = ClientData(self.examples, self.ids, jnp.int32(0), self.count)
        return data.take(position)[0], jax.tree.map(lambda t: t[position], self.targets)


class Paired(NamedTuple):
    """Data with a value for each example, by its position: its targets are pairs (y, value)."""

    data: Data
    values: PyTree  # [n_max, ...]

    @property
    def count(self) -> Array:
        """That of the data."""
        return self.data.count

    def take(self, position: jax.Array) -> tuple[jax.Array, PyTree]:
        """x [B, ...] and targets at `position` [B]."""
        x, y = self.data.take(position)
        return x, (y, jax.tree.map(lambda value: value[position], self.values))


class Union(NamedTuple):
    """A client's own examples and then those of a set with target probabilities, which the own labels become too."""

    own: Data
    public: Data
    smoothing: float = 0.0  # of the own labels

    @property
    def count(self) -> Array:
        """Of both together."""
        return self.own.count + self.public.count

    def take(self, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [B, ...] and target probabilities [B, K] at `position` [B]."""
        is_own = position < self.own.count
        x, y = self.own.take(jnp.where(is_own, position, 0))
        public_x, targets = self.public.take(jnp.where(is_own, 0, position - self.own.count))
        hard = optax.smooth_labels(jax.nn.one_hot(y, targets.shape[-1]), self.smoothing)
        x = jnp.where(is_own.reshape(-1, *(1,) * (x.ndim - 1)), x, public_x)
        return x, jnp.where(is_own[:, None], hard, targets)


class Ragged(NamedTuple):
    """Padded rows, such as clients' uploads, as one set of examples; of row k, those from `ends[k-1]` to `ends[k]`."""

    x: jax.Array  # [C, n_max, ...]
    targets: PyTree  # [C, n_max, ...]
    ends: jax.Array  # [C] int32, rising

    @property
    def count(self) -> Array:
        """Of all rows together."""
        return self.ends[-1]

    def find(self, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The row, and the column there, of `position` [B]."""
        row = jnp.searchsorted(self.ends, position, side="right")
        return row, position - jnp.where(row > 0, self.ends[row - 1], 0)

    def take(self, position: jax.Array) -> tuple[jax.Array, PyTree]:
        """x [B, ...] and targets [B, ...] at `position` [B]."""
        at = self.find(position)
        return self.x[at], jax.tree.map(lambda target: target[at], self.targets)


def whole(examples: Examples) -> ClientData:
    """All of `examples` as one client's data."""
    size = len(examples.y)
    return ClientData(examples, jnp.arange(size, dtype=jnp.int32), jnp.int32(0), jnp.int32(size))


def batches(count: Array, size: int) -> jax.Array:
    """ceil(count / size): the steps of one epoch; the last batch may be short and is weighted by what it holds."""
    return (jnp.asarray(count) + size - 1) // size


def label_counts(data: Data, classes: int) -> jax.Array:
    """n_y [K] float32: how many examples of each label there are."""
    size = 256

    def step(index: jax.Array, total: jax.Array) -> jax.Array:
        position = index * size + jnp.arange(size)
        _, y = data.take(jnp.minimum(position, jnp.maximum(data.count - 1, 0)))
        return total.at[y].add((position < data.count).astype(jnp.float32))

    return lax.fori_loop(0, batches(data.count, size), step, jnp.zeros(classes))
