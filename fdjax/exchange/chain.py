"""Nets that are plain chains of layers: whose hidden units can be taken out, moved and counted, with what they feed.

A layer has a kernel of shape [..., units] and at most a bias [units]. As weights {"kernel": [R, before, units], "bias":
[units]} it has R weights for each pair of a unit and one of the layer before: a convolution's window, or the pixels of
a channel that is flattened into a dense layer, whose inputs so move in blocks. Inputs of the first layer never move.

A mask [units] for every hidden layer says which of its units the net has; those that it does not have have no weights,
in or out, so that one net of static shapes stands for all narrower ones.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fdjax.client.trained import path_of, paths_read
from fdjax.errors import InputError
from fdjax.exchange.parts import only
from fdjax.types import Array, Model, PyTree

Weights = dict[str, jax.Array]
Masks = tuple[jax.Array, ...]  # of the hidden layers, [units] float32


class Layer(NamedTuple):
    """Where a layer's params are, and their numbers."""

    kernel: str  # path
    bias: str  # path; empty if it has none
    shape: tuple[int, ...]  # of the kernel
    before: int  # units of the layer before; of the first, inputs

    @property
    def units(self) -> int:
        """Its outputs."""
        return self.shape[-1]

    def of(self, params: PyTree) -> Weights:
        """Its weights, of a net's params."""
        found = only(params, {self.kernel, self.bias})
        weights = {"kernel": found[self.kernel].reshape(-1, self.before, self.units)}
        return weights | ({"bias": found[self.bias]} if self.bias else {})

    def put(self, params: PyTree, weights: Weights) -> PyTree:
        """The params with other weights of this layer."""
        new = {self.kernel: weights["kernel"].reshape(self.shape)}
        new |= {self.bias: weights["bias"]} if self.bias else {}
        return jax.tree_util.tree_map_with_path(lambda keys, leaf: new.get(path_of(keys), leaf), params)

    def vectors(self, weights: Weights) -> jax.Array:
        """A row for each unit, its incoming weights and its bias: [units, D]."""
        rows = weights["kernel"].reshape(-1, self.units).T
        return jnp.concatenate([rows, weights["bias"][:, None]], 1) if self.bias else rows

    def from_vectors(self, rows: jax.Array) -> Weights:
        """The weights of such rows."""
        kernel, bias = (rows[:, :-1], {"bias": rows[:, -1]}) if self.bias else (rows, {})
        return {"kernel": kernel.T.reshape(-1, self.before, self.units), **bias}


class Chain(NamedTuple):
    """The layers of a net, one after another; the last gives the logits."""

    layers: tuple[Layer, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Units of the hidden layers."""
        return tuple(layer.units for layer in self.layers[:-1])

    def narrowed(self, share: Array | float) -> Masks:
        """Masks of the first units of each hidden layer: a `share` of them, rounded, and one at least."""
        return tuple(
            jnp.float32(jnp.arange(width) < jnp.maximum(jnp.round(jnp.asarray(share) * width), 1))
            for width in self.widths
        )

    def bounds(self, masks: Sequence[Array]) -> list[tuple[Array, Array]]:
        """Masks of each layer's inputs and of its units."""
        inputs, outputs = jnp.ones(self.layers[0].before), jnp.ones(self.layers[-1].units)
        return list(zip((inputs, *masks), (*masks, outputs), strict=True))

    def masked(self, params: PyTree, masks: Sequence[Array], scaled: bool = False) -> PyTree:
        """The net without the units that are masked; `scaled` makes up for inputs that first weights no longer have."""
        for layer, (before, units) in zip(self.layers, self.bounds(masks), strict=True):
            weights = layer.of(params)
            scale = jnp.sqrt(layer.before / jnp.maximum(jnp.sum(before), 1)) if scaled else 1.0
            new = {"kernel": weights["kernel"] * (before[:, None] * units[None])[None] * scale}
            params = layer.put(params, new | {name: weights[name] * units for name in weights if name == "bias"})
        return params

    def chosen(self, params: PyTree, places: Sequence[jax.Array]) -> PyTree:
        """The net whose unit l is what is at place[l], for `places` [units] of the hidden layers."""
        befores, afters = (None, *places), (*places, None)
        for layer, before, units in zip(self.layers, befores, afters, strict=True):
            weights = layer.of(params)
            weights = weights if before is None else {**weights, "kernel": weights["kernel"][:, before]}
            weights = weights if units is None else {name: leaf[..., units] for name, leaf in weights.items()}
            params = layer.put(params, weights)
        return params

    def size(self, masks: Sequence[Array]) -> jax.Array:
        """Bytes of the net without the units that are masked."""
        return jnp.sum(jnp.stack([self.layer_size(number, masks) for number in range(len(self.layers))]))

    def layer_size(self, number: int, masks: Sequence[Array]) -> jax.Array:
        """The same of one layer, [] float32: 4 bytes for each weight and bias."""
        layer, (before, units) = self.layers[number], self.bounds(masks)[number]
        each = math.prod(layer.shape) // (layer.before * layer.units)
        return 4.0 * (jnp.sum(before) * each + bool(layer.bias)) * jnp.sum(units)


def inputs_moved(weights: Weights, place: jax.Array) -> Weights:
    """The weights of a layer once unit l of the layer before it is at place[l], [before]."""
    return {**weights, "kernel": weights["kernel"][:, jnp.argsort(place)]}


def chain_of(model: Model, inputs: Sequence[int], user: str) -> Chain:
    """The model as a chain. Raises InputError, which names the `user` (a method), for any other net."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    shapes = {path_of(keys): leaf.shape for keys, leaf in jax.tree.leaves_with_path(params)}
    layers: list[Layer] = []
    h = model.example(inputs, 2)
    for number, block in enumerate(model.parts(user)):
        read = sorted(paths_read(block, params, h))
        if read:
            layers.append(_layer(model, number, {path: shapes[path] for path in read}, layers, user))
        h = jax.eval_shape(block, params, h)
    chain = Chain(tuple(layers))
    if missing := {*shapes} - {path for layer in layers for path in (layer.kernel, layer.bias)}:
        raise InputError(f"{user} needs a plain chain of layers, but no block of {model.name!r} reads {min(missing)}")
    _check_that_units_can_move(model, chain, inputs, user)
    return chain


def _layer(model: Model, number: int, shapes: dict[str, tuple[int, ...]], before: list[Layer], user: str) -> Layer:
    kernels = [path for path, shape in shapes.items() if len(shape) > 1]
    biases = [path for path, shape in shapes.items() if len(shape) == 1]
    units = shapes[kernels[0]][-1] if kernels else 0
    fits = len(kernels) == 1 and len(biases) <= 1 and all(shapes[path] == (units,) for path in biases)
    sources = math.prod(shapes[kernels[0]][:-1]) if kernels else 0
    inputs = before[-1].units if before else sources
    if not fits or sources % inputs:
        raise InputError(
            f"{user} needs a plain chain of layers without normalisation, a kernel and a bias each, but block {number} "
            f"of {model.name!r} has {', '.join(shapes)}; use 2nn or niid_cnn, or --norm=none"
        )
    return Layer(kernels[0], biases[0] if biases else "", shapes[kernels[0]], inputs)


def _check_that_units_can_move(model: Model, chain: Chain, inputs: Sequence[int], user: str) -> None:
    """Raises InputError if it makes a difference where hidden units are, as in nets that add or group channels."""
    x = jax.random.normal(jax.random.key(0), (2, *inputs))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    leaves, structure = jax.tree.flatten(shapes)
    drawn = [jax.random.normal(jax.random.fold_in(jax.random.key(1), i), a.shape) for i, a in enumerate(leaves)]
    scale = [1 / math.sqrt(max(1, math.prod(leaf.shape[:-1]))) for leaf in leaves]
    params = jax.tree.unflatten(structure, [s * w for s, w in zip(scale, drawn, strict=True)])
    rng = np.random.default_rng(0)  # another order for each layer: sums of two would bear the same
    moved = chain.chosen(params, [jnp.asarray(rng.permutation(width)) for width in chain.widths])
    apply = jax.jit(lambda params: model.apply(params, x))
    before, after = (np.asarray(apply(each), np.float64) for each in (params, moved))
    if not np.allclose(before, after, atol=0.02 * np.abs(before).max()):
        raise InputError(
            f"{user} needs a plain chain of layers, but the order of hidden units matters to {model.name!r}, which adds"
            " or groups them; use 2nn or niid_cnn"
        )
