"""A conditional generative adversarial network of dense layers, which a server trains on examples that it was sent.

Of noise and a label: dense layers of 256, 512 and 1,024 units, each with LeakyReLU(0.2) and BatchNorm, and one to the
example. The discriminator, of an example and a label: three layers of 512 units, dropout of 0.4 after the latter two,
and one to a number. Labels are one-hot inputs; noise and label are `INPUTS` numbers together.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax

from fdjax import keys
from fdjax.exchange import generator
from fdjax.types import Array, PyTree

INPUTS, _WIDTHS, _CRITIC = 100, (256, 512, 1024), (512, 512, 512)
_LEAK, _DROP, _MOMENTUM, _EPSILON = 0.2, 0.4, 0.8, 1e-3
_BATCH, _DECAY = 32, 0.5  # of the training; the decay of Adam's first moment


def init(key: jax.Array, size: int) -> PyTree:
    """A generator of examples [size]: of 784 it has 1,493,520 numbers, statistics of BatchNorm among them."""
    layers = _dense(key, (INPUTS, *_WIDTHS, size))
    for width, layer in zip(_WIDTHS, layers, strict=False):
        layer |= {"scale": jnp.ones(width), "shift": jnp.zeros(width), "mean": jnp.zeros(width), "var": jnp.ones(width)}
    return layers


def noise_size(classes: int) -> int:
    """Numbers of noise beside a label of so many classes."""
    return INPUTS - classes


def known_labels(params: PyTree, classes: int) -> jax.Array:
    """[K] bool: the labels that the generator was taught. Of others its first layer has rows of zeros (`forget`)."""
    return jnp.any(params[0]["kernel"][INPUTS - classes :] != 0, 1)


def forget(params: PyTree, labels: Array) -> PyTree:
    """The generator without those labels that are False in `labels` [K]: it says so itself, in no further bytes."""
    kernel = params[0]["kernel"]
    rows = jnp.concatenate([jnp.ones(INPUTS - len(labels)), jnp.asarray(labels, jnp.float32)])
    return [params[0] | {"kernel": kernel * rows[:, None]}, *params[1:]]


def generate(params: PyTree, noise: Array, y: Array, bounded: bool) -> jax.Array:
    """Examples [B, D] of noise [B, N] and labels [B]; by the hyperbolic tangent within -1 and 1 if `bounded`."""
    return _generate(params, noise, y, bounded, train=False)[0]


def _generate(params: PyTree, noise: Array, y: Array, bounded: bool, train: bool) -> tuple[jax.Array, PyTree]:
    """The same, and the params with statistics a fifth nearer to the batch's."""
    h, new = jnp.concatenate([noise, jax.nn.one_hot(y, INPUTS - noise.shape[1])], 1), []
    for layer in params[:-1]:
        h = jax.nn.leaky_relu(h @ layer["kernel"] + layer["bias"][None], _LEAK)
        mean, var = (jnp.mean(h, 0), jnp.var(h, 0)) if train else (layer["mean"], layer["var"])
        h = (h - mean[None]) * lax.rsqrt(var + _EPSILON)[None] * layer["scale"][None] + layer["shift"][None]
        ours = {name: _MOMENTUM * layer[name] + (1 - _MOMENTUM) * v for name, v in (("mean", mean), ("var", var))}
        new.append(layer | ours)
    h = h @ params[-1]["kernel"] + params[-1]["bias"][None]
    return jnp.tanh(h) if bounded else h, [*new, params[-1]]


def train(
    params: PyTree, x: Array, y: Array, weight: Array, *, classes: int, bounded: bool, steps: Array,
    rate: jax.Array | float, key: jax.Array,
) -> tuple[PyTree, jax.Array, jax.Array]:  # fmt: skip
    """The generator after `steps` steps of Adam, of the discriminator and then its own, and both last losses.

    x [N, D] and y [N] are real examples where `weight` [N] is above 0. Batches have 32, of every label alike.
    """
    of_label = jax.nn.one_hot(y, classes) * (weight > 0)[:, None]
    counts = jnp.sum(of_label, 0)
    odds = jnp.log(of_label @ (1 / jnp.maximum(counts, 1)))
    optimizer = optax.adam(rate, b1=_DECAY)
    critic = _dense(keys.stream(key, "critic"), (x.shape[1] + classes, *_CRITIC, 1))

    def step(i, carry):
        params, critic, of_params, of_critic, _ = carry
        now: Callable[[str], jax.Array] = lambda purpose: keys.stream(key, purpose, i)  # noqa: E731
        real = jax.random.categorical(now("real"), odds, shape=(_BATCH,))
        noise, labels = generator.draw(now("fake"), counts > 0, _BATCH, jax.random.normal, noise_size(classes))

        def critic_loss(critic):
            fake = _generate(params, noise, labels, bounded, train=True)[0]
            of_real = _judge(critic, x[real], y[real], classes, now("drop real"))
            of_fake = _judge(critic, fake, labels, classes, now("drop fake"))
            return jnp.mean(jax.nn.softplus(-of_real) + jax.nn.softplus(of_fake)) / 2

        of_real, slope = jax.value_and_grad(critic_loss)(critic)
        update, of_critic = optimizer.update(slope, of_critic, critic)
        critic = optax.apply_updates(critic, update)

        def loss(params):
            fake, moved = _generate(params, noise, labels, bounded, train=True)
            return jnp.mean(jax.nn.softplus(-_judge(critic, fake, labels, classes, now("drop")))), moved

        (value, moved), slope = jax.value_and_grad(loss, has_aux=True)(params)
        update, of_params = optimizer.update(slope, of_params, params)  # of statistics it is 0
        return optax.apply_updates(moved, update), critic, of_params, of_critic, (value, of_real)

    start = params, critic, optimizer.init(params), optimizer.init(critic), (jnp.float32(0), jnp.float32(0))
    params, *_, (loss, critic_loss) = lax.fori_loop(0, steps, step, start)
    return forget(params, counts > 0), loss, critic_loss


def _dense(key: jax.Array, widths: tuple[int, ...]) -> list[dict[str, jax.Array]]:
    lecun = jax.nn.initializers.lecun_normal()
    return [
        {"kernel": lecun(keys.stream(key, "layer", i), pair), "bias": jnp.zeros(pair[1])}
        for i, pair in enumerate(itertools.pairwise(widths))
    ]


def _judge(critic: PyTree, x: Array, y: Array, classes: int, key: jax.Array) -> jax.Array:
    """The discriminator's logit [B] for "real"."""
    h = jnp.concatenate([x, jax.nn.one_hot(y, classes)], 1)
    for i, layer in enumerate(critic[:-1]):
        h = jax.nn.leaky_relu(h @ layer["kernel"] + layer["bias"][None], _LEAK)
        if i:
            h = jnp.where(jax.random.bernoulli(keys.stream(key, "unit", i), 1 - _DROP, h.shape), h / (1 - _DROP), 0)
    return (h @ critic[-1]["kernel"] + critic[-1]["bias"][None])[:, 0]
