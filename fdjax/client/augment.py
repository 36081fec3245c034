"""Augmentation on the device, batch by batch."""

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

MAX_ANGLE = jnp.pi / 12
MAX_SHIFT = 4


def rotate_crop(key: jax.Array, x: jax.Array) -> jax.Array:
    """Rotate each image by U(-15, 15) degrees and crop it, shifted by U{-4..4} pixels each way, out of zeros.

    x is `[B, height, width, channels]`; the key is consumed. Bilinear; zero is the mean of standardised data.

    Jiang et al. (2020), section IV.A, rotate and crop CIFAR-10 without saying how far: the amounts are ours.
    """
    angle_key, shift_key = jax.random.split(key)
    angle = jax.random.uniform(angle_key, x.shape[:1], minval=-MAX_ANGLE, maxval=MAX_ANGLE)
    shift = jax.random.randint(shift_key, (x.shape[0], 2), -MAX_SHIFT, MAX_SHIFT + 1)
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


AUGMENTATIONS = {"none": None, "rotate_crop": rotate_crop}
