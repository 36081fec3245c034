"""DP-SGD: gradients clipped example by example, with Gaussian noise on their sum.

Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar, Zhang, "Deep Learning with Differential Privacy" (CCS 2016),
Algorithm 1: of a batch of b examples with gradients g_i, S = hparam `clip` and z = `noise_multiplier`,

    g = (1 / b) (sum_i min(1, S / |g_i|) g_i + N(0, (z S)^2))

A net of dense layers alone needs no g_i: that of a kernel is the outer product of what the layer was given, x_i, and of
the loss's slope by its outputs, d_i, so |g_i|^2 = sum over layers of (|x_i|^2 + 1) |d_i|^2, and the clipped sum is one
product, x' diag(s) d (Goodfellow 2015, "Efficient per-example gradient computations"; Bu et al. 2023). Any other net
has its gradients computed MICROBATCH examples at a time, which bounds the memory.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fdjax.client import losses
from fdjax.contract import Context
from fdjax.types import Array, PyTree

MICROBATCH = 8
Loss = Callable[[PyTree, jax.Array, PyTree], tuple[jax.Array, Any]]  # (params, x [B, ...], y) -> (losses [B], seen)
_DENSE = {"kernel", "bias"}


def gradient(
    loss: Loss, params: PyTree, x: jax.Array, y: PyTree, weight: jax.Array, ctx: Context, key: jax.Array
) -> tuple[tuple[jax.Array, Any], PyTree]:
    """((mean loss, seen), g); hparams `clip` and `noise_multiplier` of the context, the key is consumed."""
    z, clip = ctx.hparams["noise_multiplier"], ctx.hparams["clip"]
    values, seen, total = clipped_gradient(loss, params, x, y, weight, clip)
    deviation, number = jnp.where(z > 0, z * clip, 0), jnp.maximum(jnp.sum(weight), 1)
    noisy = jax.tree.map(lambda g, n: (g + deviation * n) / number, total, noise_like(key, params))
    return (losses.weighted_mean(values, weight), seen), noisy


def clipped_gradient(
    loss: Loss, params: PyTree, x: jax.Array, y: PyTree, weight: jax.Array, clip: Array
) -> tuple[jax.Array, Any, PyTree]:
    """(losses [B], seen, sum over i of min(1, S / |g_i|) g_i), of those examples whose `weight` [B] is above 0."""
    layers = _dense_layers(loss, params, x, y)
    if layers is not None:
        return _of_dense_layers(loss, layers, params, x, y, weight, clip)
    values, seen = loss(params, x, y)
    return values, seen, _by_microbatches(loss, params, x, y, weight, clip)


def _scale(square: jax.Array, weight: jax.Array, clip: Array) -> jax.Array:
    """min(1, S / |g_i|), 0 for what does not count or has no norm."""
    norm = jnp.sqrt(square)
    scale = jnp.where(norm > clip, clip / jnp.where(norm > clip, norm, 1), 1)
    return jnp.where((weight > 0) & jnp.isfinite(norm), scale, 0)


def _intercepting(around: Callable[[tuple[str, ...], jax.Array, jax.Array], jax.Array]):
    """A context in which what every dense layer returns is `around(path, given, returned)`."""

    def intercept(call, args, kwargs, context):
        out = call(*args, **kwargs)
        variables = context.module.variables.get("params", {})
        if context.method_name != "__call__" or set(variables) != _DENSE:
            return out
        return around(context.module.path, args[0], out)

    return nn.intercept_methods(intercept)


def _dense_layers(loss: Loss, params: PyTree, x: jax.Array, y: PyTree) -> dict[tuple[str, ...], Any] | None:
    """The outputs of each dense layer, as shapes; None if not all params are those of dense layers, applied once."""
    found: list[tuple[tuple[str, ...], Any, Any]] = []

    def see(path, given, out):
        found.append((path, jax.typeof(given), jax.typeof(out)))
        return out

    with _intercepting(see):
        jax.eval_shape(lambda *args: loss(*args), params, x, y)  # a function of its own: what is cached is not seen
    paths = {tuple(str(getattr(k, "key", k)) for k in keys) for keys, _ in jax.tree.leaves_with_path(params)}
    covered = [(*path, name) for path, *_ in found for name in sorted(_DENSE)]
    plain = all(g.ndim == 2 and o.ndim == 2 and g.dtype == o.dtype == jnp.float32 for _, g, o in found)
    return {path: out for path, _, out in found} if plain and sorted(covered) == sorted(paths) else None


def _of_dense_layers(loss, layers, params, x, y, weight, clip):
    def total(added):
        inputs = {}

        def add(path, given, out):
            inputs[path] = lax.stop_gradient(given)
            return out + added[path]

        with _intercepting(add):
            values, seen = loss(params, x, y)
        return jnp.sum(values), (values, seen, inputs)

    zeros = {path: jnp.zeros(out.shape, out.dtype) for path, out in layers.items()}
    (_, (values, seen, given)), slopes = jax.value_and_grad(total, has_aux=True)(zeros)
    square = sum((jnp.sum(given[p] ** 2, -1) + 1) * jnp.sum(slopes[p] ** 2, -1) for p in layers)
    scale = _scale(jnp.asarray(square), weight, clip)
    gradient: dict[str, Any] = {}
    for path in layers:
        slope = jnp.where(scale[:, None] > 0, scale[:, None] * slopes[path], 0)
        x_in = jnp.where(scale[:, None] > 0, given[path], 0)
        at = functools.reduce(lambda tree, name: tree.setdefault(name, {}), path, gradient)
        at |= {"kernel": x_in.T @ slope, "bias": jnp.sum(slope, 0)}
    leaves = jax.tree.leaves(gradient)
    return values, seen, jax.tree.unflatten(jax.tree.structure(params), leaves)


def _by_microbatches(loss, params, x, y, weight, clip):
    size = len(weight)
    parts = -(-size // MICROBATCH)

    def split(leaf):
        leaf = jnp.concatenate([leaf, jnp.broadcast_to(leaf[:1], (parts * MICROBATCH - size, *leaf.shape[1:]))])
        return leaf.reshape(parts, MICROBATCH, *leaf.shape[1:])

    def of_one(x, y):
        return jax.grad(lambda params: jnp.sum(loss(params, x[None], jax.tree.map(lambda t: t[None], y))[0]))(params)

    def add(total, part):
        x, y, weight = part
        gradients = jax.vmap(of_one)(x, y)
        square = sum(jnp.sum(g.reshape(MICROBATCH, -1) ** 2, -1) for g in jax.tree.leaves(gradients))
        scale = _scale(jnp.asarray(square), weight, clip)

        def scaled(g):
            rows = g.reshape(MICROBATCH, -1)
            return (scale @ jnp.where(scale[:, None] > 0, rows, 0)).reshape(g.shape[1:])

        return jax.tree.map(lambda t, g: t + scaled(g), total, gradients), ()

    weight = jnp.concatenate([weight, jnp.zeros(parts * MICROBATCH - size)]).reshape(parts, MICROBATCH)
    return lax.scan(add, jax.tree.map(jnp.zeros_like, params), (*jax.tree.map(split, (x, y)), weight))[0]


def noise_like(key: jax.Array, tree: PyTree) -> PyTree:
    """Draws of a standard normal in the form of a tree, at a fraction of what `jax.random.normal` costs on a CPU.

    Bits are those of a hash of the position, as `keys.shuffle` has them; the normal is the inverse of its distribution
    function at them (Giles 2012, "Approximating the erfinv function"), with a logarithm of our own that XLA vectorises.
    """
    leaves, structure = jax.tree.flatten(tree)
    sizes = [int(np.prod(leaf.shape)) for leaf in leaves]
    draws = _normal(key, sum(sizes))
    parts = [draws[end - size : end] for size, end in zip(sizes, np.cumsum(sizes), strict=True)]
    return jax.tree.unflatten(
        structure, [p.reshape(x.shape).astype(x.dtype) for p, x in zip(parts, leaves, strict=True)]
    )


_CENTER = (2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503,
           -0.00417768164, 0.246640727, 1.50140941)  # fmt: skip
_TAILS = (-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613,
          0.00943887047, 1.00167406, 2.83297682)  # fmt: skip


def _normal(key: jax.Array, size: int) -> jax.Array:
    seeds = jax.random.bits(key, (2,), jnp.uint32)
    x = (lax.iota(jnp.uint32, size) * jnp.uint32(0x9E3779B1) + seeds[0]) ^ seeds[1]
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    x = x ^ (x >> 16)
    u = ((x >> 8).astype(jnp.float32) + 0.5) * 2**-23 - 1  # in (-1, 1), never 0 or an end
    w = -_log((1 - u) * (1 + u))
    center, tails = w - 2.5, jnp.sqrt(jnp.maximum(w, 5)) - 3
    value = jnp.where(w < 5, _polynomial(_CENTER, center), _polynomial(_TAILS, tails))
    return value * u * np.float32(np.sqrt(2))


def _polynomial(coefficients, x):
    return functools.reduce(lambda value, c: value * x + np.float32(c), coefficients[1:], jnp.float32(coefficients[0]))


def _log(x: jax.Array) -> jax.Array:
    """log of normal floats: the exponent, and log2 of the mantissa m = 1 + f by 2 artanh(f / (f + 2))."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    exponent = (bits >> 23) - 127
    f = lax.bitcast_convert_type((bits & 0x7FFFFF) | 0x3F800000, jnp.float32) - 1
    s = f / (f + 2)
    t = s * s
    mantissa = 2 * s * (1 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9 + t / 11)))))
    return exponent.astype(jnp.float32) * np.float32(np.log(2)) + mantissa
