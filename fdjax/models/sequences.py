"""Networks on sequences of tokens: inputs int32 `[B, L]`, outputs logits `[B, K]` of what comes after them.

Kernels start lecun normal and biases zero, as those of all nets here, but for the forget gates, whose bias is 1.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from fdjax.errors import InputError
from fdjax.models.layers import Block, Dense, Net, matmul

_ONE_HOT = 1024  # rows of a table up to which its gradient is a product, and not additions row by row


class Embedding(nn.Module):
    """The row of a table `[V, D]` for each token: int32 `[B, ...]` -> `[B, ..., D]`; the rows start normal, 1 / D."""

    tokens: int
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = nn.initializers.normal(self.features**-0.5)
        table = self.param("embedding", scale, (self.tokens, self.features), jnp.float32)
        return rows_of(table, x)


@jax.custom_vjp
def rows_of(table: jax.Array, index: jax.Array) -> jax.Array:
    """`table[index]`; the gradient of a small table is a product, because additions by row are slow in loops."""
    return table[index]


def _rows_of_bwd(saved, g):
    table, index = saved
    flat, g = index.reshape(-1), g.reshape(-1, g.shape[-1])
    if len(table) > _ONE_HOT:
        return jnp.zeros_like(table).at[flat].add(g.astype(table.dtype)), None
    return (jax.nn.one_hot(flat, len(table), axis=0, dtype=g.dtype) @ g).astype(table.dtype), None


rows_of.defvjp(lambda table, index: (table[index], (table, index)), _rows_of_bwd)


@jax.custom_vjp
def recurrence(given: jax.Array, kernel: jax.Array) -> jax.Array:
    """Hidden states h of an LSTM (Hochreiter and Schmidhuber 1997, with forget gates), from zeros.

        (i, f, g, o) = given_t + h_{t-1} kernel,   c_t = s(f) c_{t-1} + s(i) tanh(g),   h_t = s(o) tanh(c_t)

    Args:
      given: what the gates are given by the inputs, biases too, `[L, B, 4 H]`.
      kernel: `[H, 4 H]`.

    Returns:
      h `[L, B, H]`. The kernel's gradient is one product of all steps, where a loop would add one at every step.
    """
    return _forward(given, kernel)[0]


def _forward(given, kernel):
    width = kernel.shape[0]
    scale, offset = _gates(width)

    def step(carry, now):
        h, c = carry
        gates = jnp.tanh((now + h @ kernel) * scale) * scale + offset
        i, f, g, o = jnp.split(gates, 4, -1)
        c = f * c + i * g
        h = o * jnp.tanh(c)
        return (h, c), (h, c, gates)

    nothing = jnp.zeros((given.shape[1], width), given.dtype)
    h, c, gates = lax.scan(step, (nothing, nothing), given)[1]
    return h, (h, c, gates, kernel)


def _gates(width: int) -> tuple[jax.Array, jax.Array]:
    """tanh(scale z) scale + offset is what the gates make of z: s(z) = tanh(z / 2) / 2 + 1 / 2, and tanh(z) of g."""
    is_update = jnp.repeat(jnp.arange(4) == 2, width)[None]
    return jnp.where(is_update, 1.0, 0.5), jnp.where(is_update, 0.0, 0.5)


def _backward(saved, slope):
    h, c, gates, kernel = saved
    scale, offset = _gates(kernel.shape[0])
    turned = lax.optimization_barrier(kernel.T)  # turned once, and not at every step

    def step(carry, now):
        dh, dc = carry
        slope, before, c, gates = now
        i, f, g, o = jnp.split(gates, 4, -1)
        dh, t = dh + slope, jnp.tanh(c)
        dc = dc + dh * o * (1 - t * t)
        dz = jnp.concatenate([dc * g, dc * before, dc * i, dh * t], -1)
        dz = dz * (scale * scale - jnp.square(gates - offset))
        return (dz @ turned, dc * f), dz

    nothing = jnp.zeros_like(h[0])
    shifted = [jnp.concatenate([nothing[None], each[:-1]]) for each in (h, c)]
    dz = lax.scan(step, (nothing, nothing), (slope, shifted[1], c, gates), reverse=True)[1]
    rows, slopes = (each.reshape(-1, each.shape[-1]) for each in (shifted[0], dz))
    return dz, rows.T @ slopes


recurrence.defvjp(_forward, _backward)


class LSTMLayer(nn.Module):
    """`recurrence` of `[B, L, D]`: the hidden states `[B, L, H]`, or the last alone `[B, H]`."""

    width: int
    last: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, size = x.shape
        lecun, wide = nn.initializers.lecun_normal(), 4 * self.width
        of_input = self.param("input", lecun, (size, wide), jnp.float32)
        kernel = self.param("kernel", lecun, (self.width, wide), jnp.float32)
        bias = self.param("bias", _forget, (wide,), jnp.float32)
        given = matmul(x.swapaxes(0, 1).reshape(-1, size), of_input) + bias.reshape(1, -1)
        h = recurrence(given.reshape(length, batch, wide), kernel)
        return h[-1] if self.last else h.swapaxes(0, 1)


def _forget(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    width = shape[0] // 4
    return jnp.zeros(shape, dtype).at[width : 2 * width].set(1)


class LSTM(Net):
    """An embedding of 8, two LSTM layers of 256 and the logits after the last token (LEAF's; Li et al. 2020, FedProx).

    Caldas et al. (2018), LEAF, for Shakespeare: next character after 80.
    """

    num_classes: int
    tokens: int
    width: int = 256
    layers: int = 2
    embedding: int = 8

    @nn.compact
    def blocks(self, train: bool) -> list[Block]:
        if min(self.width, self.layers, self.embedding) < 1:
            raise InputError(
                f"an LSTM has width, layers and embedding of at least 1; got {self.width}, {self.layers} and "
                f"{self.embedding}"
            )
        layers = [LSTMLayer(self.width, i == self.layers - 1) for i in range(self.layers)]
        return [Embedding(self.tokens, self.embedding), *layers, Dense(self.num_classes)]


class _Attending(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), on `[B, L, D]`; if `last` the norm of the last alone, `[B, D]`."""

    heads: int
    dropout: float
    last: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        batch, length, width = x.shape
        each = width // self.heads

        def drop(h):
            return nn.Dropout(self.dropout, deterministic=not train)(h)

        def on_rows(h, layer):
            return layer(h.reshape(-1, h.shape[-1])).reshape(*h.shape[:-1], -1)

        h = nn.LayerNorm()(x)
        x, asking = (x[:, -1:], h[:, -1:]) if self.last else (x, h)
        query = on_rows(asking, Dense(width)).reshape(batch, -1, self.heads, each)
        key, value = jnp.split(on_rows(h, Dense(2 * width)).reshape(batch, length, self.heads, 2 * each), 2, -1)
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(each), -1)
        read = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(*x.shape)
        x = x + drop(on_rows(read, Dense(width)))
        hidden = nn.gelu(on_rows(nn.LayerNorm()(x), Dense(4 * width)))
        x = x + drop(on_rows(hidden, Dense(width)))
        return nn.LayerNorm()(x[:, 0]) if self.last else x


class _Placed(nn.Module):
    """Embedded tokens with a learned vector of their position added: int32 `[B, L]` -> `[B, L, D]`."""

    tokens: int
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        positions = self.param("positions", nn.initializers.normal(self.width**-0.5), (x.shape[1], self.width))
        return Embedding(self.tokens, self.width)(x) + positions[None]


class Transformer(Net):
    """A pre-norm transformer that reads the sequence at its last position (Vaswani et al. 2017; Xiong et al. 2020).

    The token to come is in no input, so nothing is masked. MLPs have 4 `width` units (GELU).
    """

    num_classes: int
    tokens: int
    width: int = 64
    layers: int = 2
    heads: int = 4
    dropout: float = 0.0

    @nn.compact
    def blocks(self, train: bool) -> list[Block]:
        if min(self.width, self.layers, self.heads) < 1 or self.width % self.heads:
            raise InputError(
                f"a transformer of width {self.width} with {self.layers} layers and {self.heads} heads: expected a "
                "width that the heads divide, and 1 or more of each"
            )
        blocks = [_Attending(self.heads, self.dropout, i == self.layers - 1) for i in range(self.layers)]
        within = [functools.partial(block, train=train) for block in blocks]
        return [_Placed(self.tokens, self.width), *within, Dense(self.num_classes)]
