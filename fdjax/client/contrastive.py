"""Self-supervised training of a feature extractor: SimCLR.

Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for Contrastive Learning of Visual Representations" (ICML 2020):
two views of each example, which are to be alike after a projection, and unlike those of all others.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax

from fdjax import keys
from fdjax.client.augment import rotate_crop
from fdjax.client.data import whole
from fdjax.client.trained import Paths, on_trained
from fdjax.types import Array, Examples, PyTree

_DROPPED, _PROJECTED = 0.2, 64  # share of the inputs that a view lacks; numbers of a projection


def nt_xent(views: Array, temperature: Array | float) -> jax.Array:
    """The normalised, temperature-scaled cross-entropy (equation 1) of views [2, B, F], a mean over all 2B of them.

    -log(exp(s_ij / T) / sum_{k != i} exp(s_ik / T)), s the cosine similarity, j the other view of the same example.
    """
    both = jnp.reshape(views, (-1, views.shape[-1]))
    size = jnp.sum(jnp.square(both), -1, keepdims=True)
    unit = both * lax.rsqrt(jnp.maximum(size, 1e-12))  # features that are all zero have a gradient of zero
    itself = jnp.eye(len(both), dtype=bool)
    log_p = jax.nn.log_softmax(jnp.where(itself, -jnp.inf, unit @ unit.T / temperature), -1)
    return -jnp.mean(jnp.take_along_axis(log_p, jnp.roll(jnp.arange(len(both)), views.shape[1])[:, None], -1))


def view(key: jax.Array, x: jax.Array) -> jax.Array:
    """A random view of each of x [B, ...]: images rotated and cropped, then a fifth of all inputs 0, their mean.

    The choice is ours, for small pictures and for features alike; SimCLR distorts colours and blurs in place of it.
    """
    if x.ndim == 4:
        x = rotate_crop(keys.stream(key, "crop"), x)
    return jnp.where(jax.random.bernoulli(keys.stream(key, "drop"), _DROPPED, x.shape), 0, x)


def pretrain(
    features: Callable[..., jax.Array], params: PyTree, examples: Examples, key: jax.Array, *, steps: Array,
    learning_rate: jax.Array | float, batch_size: int, temperature: float = 0.5, trained: Paths | None = None,
) -> tuple[PyTree, jax.Array]:  # fmt: skip
    """`steps` steps of Adam on `features` (params, x, key) -> [B, ...] and a projection of two layers, drawn anew.

    A batch holds no example twice. Returns the params, of which those that features do not read stay, and the last
    loss. `trained` are the paths that may change.
    """
    size, data = len(examples.y), whole(examples)
    batch_size = min(batch_size, size)
    width = jax.eval_shape(features, params, data.take(jnp.arange(1))[0], key).size
    lecun = jax.nn.initializers.lecun_normal()
    layers = [
        lecun(keys.stream(key, "projection", i), shape) for i, shape in enumerate([(width, width), (width, _PROJECTED)])
    ]
    both = {"net": params, "projection": layers}

    def may_change(path: str) -> bool:
        return trained is None or not path.startswith("net/") or trained(path.removeprefix("net/"))

    optimizer = on_trained(optax.adam(learning_rate), both, may_change)

    def loss(both, x, key):
        one, other = keys.stream(key, "one"), keys.stream(key, "other")
        x = jnp.concatenate([view(one, x), view(other, x)])
        h = features(both["net"], x, keys.stream(key, "net")).reshape(len(x), -1)
        projected = jax.nn.relu(h @ both["projection"][0]) @ both["projection"][1]
        return nt_xent(projected.reshape(2, -1, _PROJECTED), temperature)

    def step(i, carry):
        both, state, _ = carry
        now = keys.stream(key, "step", i)
        x, _ = data.take(jax.random.permutation(keys.stream(now, "batch"), size)[:batch_size])
        value, gradient = jax.value_and_grad(loss)(both, x, now)
        update, state = optimizer.update(gradient, state, both)
        return optax.apply_updates(both, update), state, value

    both, _, value = lax.fori_loop(0, steps, step, (both, optimizer.init(both), jnp.float32(0)))
    return both["net"], value
