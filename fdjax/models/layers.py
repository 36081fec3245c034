"""Layers of the model zoo: convolutions and dense layers that stay fast in loops and under vmap, and 2x2 pooling."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from fdjax.errors import InputError, unknown
from fdjax.models.convolution import Padding, conv2d

__all__ = ["Block", "Conv", "Dense", "Net", "avg_pool", "conv2d", "flatten", "matmul", "max_pool", "norm", "rectified"]

Block = Callable[[jax.Array], jax.Array]
NORMS = ("group", "batch", "none")


class Net(nn.Module):
    """A module that is its `blocks` one after another; the last of them is the head."""

    def blocks(self, train: bool) -> list[Block]:
        """The blocks for training or for tests, each a function of what the one before it returns."""
        raise InputError(f"{type(self).__name__} is a Net without blocks; give it a method blocks(train)")

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for block in self.blocks(train):
            x = block(x)
        return x


def flatten(x: jax.Array) -> jax.Array:
    """`[B, ...]` -> `[B, F]`."""
    return x.reshape(x.shape[0], -1)


def rectified(*layers: Block) -> Block:
    """The layers one after another, then ReLU."""

    def block(x: jax.Array) -> jax.Array:
        for layer in layers:
            x = layer(x)
        return nn.relu(x)

    return block


def norm(kind: str, groups: int, train: bool) -> Block:
    """A normalisation of images: GroupNorm of `groups` groups, BatchNorm or none; made within a compact method.

    BatchNorm's running statistics move by a tenth of the way a batch, as PyTorch's do and the papers' code has it (but
    with the biased variance, which normalises the batch too). A step costs what it does with GroupNorm.
    """
    if kind not in NORMS:
        raise unknown("norm", kind, NORMS)
    if kind == "batch":
        return nn.BatchNorm(use_running_average=not train, momentum=0.9)
    return nn.GroupNorm(num_groups=groups) if kind == "group" else lambda x: x


class Conv(nn.Module):
    """`conv2d` with a bias: kernel `[h, w, c, features]` (lecun normal), bias `[features]` (zeros)."""

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    padding: Padding = "VALID"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return _add_bias(conv2d(x, kernel, self.strides, self.padding), bias)


@jax.custom_vjp
def _add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    return y + bias.reshape(1, 1, 1, -1)


def _add_bias_bwd(_, g):
    # A product with ones, because XLA:CPU sums over leading axes on one thread and element by element.
    rows = g.reshape(-1, g.shape[-1])
    return g, (jnp.ones((1, rows.shape[0]), g.dtype) @ rows)[0]


_add_bias.defvjp(lambda y, bias: (_add_bias(y, bias), None), _add_bias_bwd)


class Dense(nn.Module):
    """x @ kernel + bias on `[B, F]`: kernel `[F, features]` (lecun normal) and bias (zeros), as `nn.Dense` has them."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return matmul(x, kernel) + bias.reshape(1, -1)


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`[B, F] @ [F, O]`, with gradients that are fast on CPU."""
    return x @ kernel


def _matmul_bwd(saved, g):
    x, kernel = saved
    return lax.platform_dependent(g, kernel, cpu=_turned_product, default=lambda g, kernel: g @ kernel.T), x.T @ g


def _turned_product(g, kernel):
    """(kernel g')', up to 20 times as fast on XLA:CPU as g kernel'; the barrier keeps it from swapping back."""
    return lax.optimization_barrier(lax.dot_general(kernel, g, (((1,), (1,)), ((), ())))).T


matmul.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _matmul_bwd)


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """Largest of 2x2 windows, stride 2: `[B, H, W, c]` -> `[B, H // 2, W // 2, c]`, dropping an odd last row or column.

    Equal maxima of a window share its gradient equally, as they do in `jnp.max`. In other frameworks the first has it
    all, which costs 4 % of a small net's step and more; see benchmarks/README.md for how little the rule matters.

    Raises:
      InputError: the image is smaller than the window.
    """
    return functools.reduce(jnp.maximum, _corners(x))


def _max_pool_bwd(saved, g):
    x, top = saved
    # Counted corner by corner, because XLA:CPU is slow at reductions over an axis of two.
    ties = sum((corner == top).astype(g.dtype) for corner in _corners(x))
    share = g / ties
    windows = _windows(x)
    # A product and not a select: a window of NaN has no maximum, and must not pass for one without gradient.
    dx = (windows == top[:, :, None, :, None]).astype(g.dtype) * share[:, :, None, :, None]
    batch, rows, _, columns, _, channels = windows.shape
    dx = dx.reshape(batch, 2 * rows, 2 * columns, channels)
    odd = ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0))
    return (jnp.pad(dx, odd),)


def _max_pool_fwd(x):
    top = max_pool(x)
    return top, (x, top)


max_pool.defvjp(_max_pool_fwd, _max_pool_bwd)


def avg_pool(x: jax.Array) -> jax.Array:
    """Mean over 2x2 windows, stride 2: `[B, H, W, c]` -> `[B, H // 2, W // 2, c]`, dropping an odd last row or column.

    Raises:
      InputError: the image is smaller than the window.
    """
    return functools.reduce(jnp.add, _corners(x)) / 4


def _corners(x: jax.Array) -> list[jax.Array]:
    windows = _windows(x)
    return [windows[:, :, i, :, j] for i in range(2) for j in range(2)]


def _windows(x: jax.Array) -> jax.Array:
    """`[B, H, W, c]` -> `[B, H // 2, 2, W // 2, 2, c]`."""
    batch, height, width, channels = x.shape
    rows, columns = height // 2, width // 2
    if not rows or not columns:
        raise InputError(f"an image of {height}x{width} is smaller than the 2x2 pooling window; use larger images")
    return jnp.reshape(x[:, : 2 * rows, : 2 * columns], (batch, rows, 2, columns, 2, channels))
