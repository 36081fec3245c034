"""Augmentation on the device, batch by batch: (key, x [B, height, width, channels]) -> x; each key is consumed.

What is drawn and what is done with it are functions of their own. What lies beyond an image is zero, the mean of
standardised data.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.ndimage import map_coordinates

from fdjax import keys
from fdjax.errors import InputError, unknown
from fdjax.types import Array, Model

MAX_ANGLE = jnp.pi / 12
MAX_SHIFT = 4

Augmentation = Callable[[jax.Array, jax.Array], jax.Array]


def rotate_crop(key: jax.Array, x: jax.Array) -> jax.Array:
    """Rotate each image by U(-15, 15) degrees and crop it, shifted by U{-4..4} pixels each way, out of zeros.

    Jiang et al. (2020), section IV.A, rotate and crop CIFAR-10 without saying how far: the amounts are ours.
    """
    angle_key, shift_key = jax.random.split(key)
    return moved(x, _angles(angle_key, x), _shifts(shift_key, x))


def crop(key: jax.Array, x: jax.Array) -> jax.Array:
    """Shift each image by U{-4..4} pixels each way: a crop out of four zeros on every side (He et al. 2016)."""
    return shifted(x, _shifts(key, x))


def rotate(key: jax.Array, x: jax.Array) -> jax.Array:
    """Rotate each image by U(-15, 15) degrees about its centre, bilinearly."""
    return moved(x, _angles(key, x), jnp.zeros((len(x), 2), jnp.int32))


def flip(key: jax.Array, x: jax.Array) -> jax.Array:
    """Mirror each image, left for right, with probability 1/2."""
    return flipped(x, jax.random.bernoulli(key, 0.5, x.shape[:1]))


def cutout(key: jax.Array, x: jax.Array) -> jax.Array:
    """Zero a square of half the height of each image, around a uniform pixel (DeVries and Taylor 2017).

    So at the borders it is cut off, as theirs is. Their side is 16 pixels on CIFAR-10, which is half of 32.
    """
    centre = jax.random.randint(key, (len(x), 2), 0, jnp.array([x.shape[1:3]]))
    return cut_out(x, centre, max(1, x.shape[1] // 2))


def _angles(key: jax.Array, x: jax.Array) -> jax.Array:
    return jax.random.uniform(key, x.shape[:1], minval=-MAX_ANGLE, maxval=MAX_ANGLE)


def _shifts(key: jax.Array, x: jax.Array) -> jax.Array:
    return jax.random.randint(key, (x.shape[0], 2), -MAX_SHIFT, MAX_SHIFT + 1)


def moved(x: jax.Array, angle: Array, shift: Array) -> jax.Array:
    """Images turned by `angle` [B] about their centres, then shifted by `shift` [B, 2] pixels, down and right < 0."""
    height, width = x.shape[1:3]
    row, column = jnp.meshgrid(
        jnp.arange(height) - (height - 1) / 2, jnp.arange(width) - (width - 1) / 2, indexing="ij"
    )

    def transform(image, angle, shift):
        y, z = row + shift[0], column + shift[1]
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        source = [cos * y - sin * z + (height - 1) / 2, sin * y + cos * z + (width - 1) / 2]
        return jnp.stack([map_coordinates(c, source, order=1) for c in jnp.moveaxis(image, -1, 0)], axis=-1)

    return jax.vmap(transform)(x, angle, shift)


def shifted(x: jax.Array, shift: Array) -> jax.Array:
    """Images whose pixel (i, j) is that at (i, j) + `shift` [B, 2], none of them beyond `MAX_SHIFT`."""
    edge = (MAX_SHIFT, MAX_SHIFT)
    padded = jnp.pad(x, ((0, 0), edge, edge, (0, 0)))

    def cut(image, shift):
        return lax.dynamic_slice(image, (MAX_SHIFT + shift[0], MAX_SHIFT + shift[1], 0), x.shape[1:])

    return jax.vmap(cut)(padded, shift)


def flipped(x: jax.Array, which: Array) -> jax.Array:
    """Images of which those in `which` [B] are mirrored, left for right."""
    return jnp.where(which[:, None, None, None], x[:, :, ::-1], x)


def cut_out(x: jax.Array, centre: Array, side: int) -> jax.Array:
    """Images without the pixels of a square: rows and columns from centre - side // 2, [B, 2], `side` of them."""
    begin = centre - side // 2

    def inside(axis):
        position = jnp.arange(x.shape[axis + 1])[None]
        first = begin[:, axis, None]
        return (position >= first) & (position < first + side)

    return jnp.where((inside(0)[:, :, None] & inside(1)[:, None, :])[..., None], 0, x)


def normalised(x: jax.Array) -> jax.Array:
    """Each image less its mean, over its standard deviation, or over 1 / sqrt(its numbers) where that is more."""
    axes = tuple(range(1, x.ndim))
    mean, deviation = jnp.mean(x, axes, keepdims=True), jnp.std(x, axes, keepdims=True)
    return (x - mean) / jnp.maximum(deviation, (x.size // len(x)) ** -0.5)


def with_normalised_inputs(model: Model) -> Model:
    """The model of inputs each of which is `normalised` first, in training as in tests."""

    def first(function: Callable) -> Callable:
        return lambda params, x, key=None: function(params, normalised(x), key)

    blocks = (first(model.blocks[0]), *model.blocks[1:]) if model.blocks else ()
    return model._replace(apply=first(model.apply), blocks=blocks)


NORMALISE = "normalise"
AUGMENTATIONS: Mapping[str, str] = {
    "none": "none",
    "rotate_crop": "rotate by up to 15 degrees and shift by up to 4 pixels, at once",
    "crop": "shift by up to 4 pixels",
    "flip": "mirror left for right, every other image",
    "rotate": "rotate by up to 15 degrees",
    "cutout": "zero a square of half the height",
    NORMALISE: "make each image's mean 0 and std 1, in tests too; the last",
}
_FUNCTIONS: Mapping[str, Augmentation] = {
    "rotate_crop": rotate_crop, "crop": crop, "flip": flip, "rotate": rotate, "cutout": cutout
}  # fmt: skip


def names_of(given: str) -> tuple[str, ...]:
    """The augmentations that a list with commas names; () for none.

    Raises InputError for a name that none has, one that is there twice, and for others after `normalise`.
    """
    names = [name.strip() for name in given.split(",")]
    for name in names:
        if name not in AUGMENTATIONS:
            raise unknown("augment", name, AUGMENTATIONS)
    if len({*names}) < len(names) or ("none" in names and len(names) > 1):
        raise InputError(f"--augment={given}: expected each augmentation once, such as crop,flip; or none alone")
    if NORMALISE in names[:-1]:
        raise InputError(f"--augment={given}: {NORMALISE} is of what a net is given, so the last; put it at the end")
    return tuple(name for name in names if name != "none")


def augmentation(given: str) -> Augmentation | None:
    """Those that a list names, one after another, each with a key of its own; None if training has none."""
    functions = [(name, _FUNCTIONS[name]) for name in names_of(given) if name != NORMALISE]
    if len(functions) < 2:
        return functions[0][1] if functions else None

    def all_of_them(key: jax.Array, x: jax.Array) -> jax.Array:
        for name, function in functions:
            x = function(keys.stream(key, name), x)
        return x

    return all_of_them
