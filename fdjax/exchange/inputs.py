"""A generator of inputs for nets, where there are no data: a server trains it against what clients' nets say.

Noise and a one-hot label, if there are labels; dense layers of 256 and 512 units, each with BatchNorm (in the place of
a bias) and LeakyReLU(0.2); one to the input, the hyperbolic tangent, and BatchNorm of channels (of numbers, where an
input is a vector) without scale and shift, so that inputs have mean 0 and variance 1, as those of nets do. All
normalise by the batch: there is no running statistic.
"""

import itertools
import math

import jax
import jax.numpy as jnp

from fdjax import keys
from fdjax.types import Array, PyTree

NOISE, _WIDTHS, _LEAK, _EPSILON = 100, (256, 512), 0.2, 1e-5


def init(key: jax.Array, classes: int, shape: tuple[int, ...]) -> PyTree:
    """A generator of inputs of a `shape`, of noise and one of `classes` labels (0: of noise alone)."""
    lecun = jax.nn.initializers.lecun_normal()
    layers = []
    for i, pair in enumerate(itertools.pairwise((NOISE + classes, *_WIDTHS, math.prod(shape)))):
        hidden = {"scale": jnp.ones((1, pair[1])), "shift": jnp.zeros((1, pair[1]))}
        layer = {"kernel": lecun(keys.stream(key, "layer", i), pair)}
        layer |= hidden if i < len(_WIDTHS) else {"bias": jnp.zeros((1, pair[1]))}
        layers.append(layer)
    return layers


def draw(key: jax.Array, size: int) -> jax.Array:
    """Noise [size, N]."""
    return jax.random.normal(key, (size, NOISE))


def generate(params: PyTree, noise: Array, y: Array | None, shape: tuple[int, ...]) -> jax.Array:
    """Inputs [B, *shape] of noise [B, N] and labels [B] (None: of noise alone)."""
    h = noise
    if y is not None:
        h = jnp.concatenate([h, jax.nn.one_hot(y, params[0]["kernel"].shape[0] - noise.shape[1])], 1)
    for layer in params[:-1]:
        h = _standardised(h @ layer["kernel"]) * layer["scale"] + layer["shift"]
        h = jax.nn.leaky_relu(h, _LEAK)
    h = jnp.tanh(h @ params[-1]["kernel"] + params[-1]["bias"])
    return _standardised(h.reshape(-1, *shape))


def _standardised(h: jax.Array) -> jax.Array:
    axes = tuple(range(h.ndim - 1))
    mean, var = jnp.mean(h, axes, keepdims=True), jnp.var(h, axes, keepdims=True)
    return (h - mean) * jax.lax.rsqrt(var + _EPSILON)
