"""A conditional generator of features, which a server trains and sends where there are no proxy data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from fdjax import keys
from fdjax.types import Array, PyTree

_MOMENTUM, _EPSILON = 0.1, 1e-5  # of BatchNorm

Draw = Callable[[jax.Array], tuple[jax.Array, jax.Array]]  # key -> noise [B, N] and labels [B]
Loss = Callable[[PyTree, jax.Array, jax.Array], tuple[jax.Array, PyTree]]
# (params, noise [B, N], y [B]) -> (loss [], the batch's statistics)


class Generator(NamedTuple):
    """A generator's params, which an optimiser trains, and the running mean and variance [1, H] of its BatchNorm."""

    params: PyTree
    statistics: tuple[jax.Array, jax.Array]


def init(key: jax.Array, classes: int, features: int, noise: int = 32, hidden: int = 256) -> Generator:
    """Lecun-normal kernels. The hidden layer has no bias, which BatchNorm would take away again.

    Noise and a one-hot label, `hidden` units, BatchNorm, ReLU, features: that of Zhu et al. (2021), FedGen.
    """
    lecun, zeros = jax.nn.initializers.lecun_normal(), jnp.zeros((1, hidden))
    params = {
        "hidden": {"kernel": lecun(keys.stream(key, "hidden"), (noise + classes, hidden))},
        "norm": {"scale": zeros + 1, "bias": zeros},
        "out": {"kernel": lecun(keys.stream(key, "out"), (hidden, features)), "bias": jnp.zeros((1, features))},
    }
    return Generator(params, (zeros, zeros + 1))


def apply(params: PyTree, noise: Array, y: Array, statistics: PyTree = None) -> tuple[jax.Array, PyTree]:
    """Features [B, F] of noise [B, N] and labels [B], and the batch's statistics: by these unless others are given."""
    classes = params["hidden"]["kernel"].shape[0] - noise.shape[1]
    a = jnp.concatenate([noise, jax.nn.one_hot(y, classes)], 1) @ params["hidden"]["kernel"]
    of_batch = jnp.mean(a, 0, keepdims=True), jnp.var(a, 0, keepdims=True)
    mean, var = of_batch if statistics is None else statistics
    a = (a - mean) / jnp.sqrt(var + _EPSILON) * params["norm"]["scale"] + params["norm"]["bias"]
    return jax.nn.relu(a) @ params["out"]["kernel"] + params["out"]["bias"], of_batch


def draw(key: jax.Array, labels: Array, size: int, distribution: Callable[..., Any], noise: int = 32) -> Any:
    """Noise [size, N], and labels [size] of those that are True in `labels` [K]."""
    y = jax.random.categorical(keys.stream(key, "labels"), jnp.where(labels, 0.0, -jnp.inf), shape=(size,))
    return distribution(keys.stream(key, "noise"), (size, noise)), y


def likeness(h: jax.Array, noise: jax.Array) -> jax.Array:
    """exp(-mean_ij mean_d |h_i - h_j| mean_d (e_i - e_j)^2): 1 if noise e makes no difference to features h [B, F]."""
    features = jnp.mean(jnp.abs(h[:, None] - h[None]), -1)
    return jnp.exp(-jnp.mean(features * jnp.mean(jnp.square(noise[:, None] - noise[None]), -1)))


def adam(rate: jax.Array | float, decay: float) -> optax.GradientTransformation:
    """Adam of the gradient with `decay` times the params added, as PyTorch has its weight decay."""
    return optax.chain(optax.add_decayed_weights(decay), optax.adam(rate))


def train(
    generator: Generator, optimizer: optax.GradientTransformation, state: PyTree, loss: Loss, batch: Draw,
    steps: Array, key: jax.Array,
) -> tuple[Generator, PyTree, jax.Array]:  # fmt: skip
    """`steps` steps, each on a batch of its own. Returns the generator, the optimiser's state and the last loss.

    Statistics come a tenth nearer to each batch's, whose variance is the biased one, as in the zoo.
    """

    def step(i, carry):
        (params, statistics), state, _ = carry
        noise, y = batch(keys.stream(key, "generate", i))
        (value, of_batch), gradient = jax.value_and_grad(loss, has_aux=True)(params, noise, y)
        update, state = optimizer.update(gradient, state, params)
        statistics = jax.tree.map(lambda a, b: a + _MOMENTUM * (b - a), statistics, of_batch)
        return Generator(optax.apply_updates(params, update), statistics), state, value

    return lax.fori_loop(0, steps, step, (generator, state, jnp.float32(0)))
