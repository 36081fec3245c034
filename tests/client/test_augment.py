"""Rotation and cropping on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdjax.client import augment
from fdjax.client.augment import AUGMENTATIONS, MAX_ANGLE, MAX_SHIFT, rotate_crop


@pytest.fixture
def images(rng):
    return jnp.asarray(rng.normal(size=(6, 12, 10, 3)), jnp.float32)


def blobs(count, size=28, radius=7.0):
    """Images of one Gaussian spot, `radius` to the right of the centre."""
    row, column = np.mgrid[:size, :size] - (size - 1) / 2
    return jnp.asarray(np.tile(np.exp(-(row**2 + (column - radius) ** 2) / 4)[None, :, :, None], (count, 1, 1, 1)))


def centroids(x):
    """Where the spots are, `[B, 2]` as (row, column) from the centre."""
    x = np.asarray(x, np.float64)[..., 0]
    grid = np.mgrid[: x.shape[1], : x.shape[2]] - (np.array(x.shape[1:]) - 1)[:, None, None] / 2
    return np.einsum("bij,dij->bd", x, grid) / x.sum((1, 2))[:, None]


@pytest.mark.parametrize("shape", [(5, 28, 28, 1), (2, 32, 32, 3), (1, 7, 9, 2)], ids=str)
def test_shape_and_dtype_stay(shape):
    out = rotate_crop(jax.random.key(0), jnp.ones(shape))
    assert (out.shape, out.dtype) == (shape, jnp.float32)
    assert jnp.isfinite(out).all()


def test_without_rotation_and_shift_nothing_changes(images, monkeypatch):
    monkeypatch.setattr(augment, "MAX_ANGLE", 0.0)
    monkeypatch.setattr(augment, "MAX_SHIFT", 0)
    np.testing.assert_array_equal(rotate_crop(jax.random.key(0), images), images)


def test_shifts_are_whole_pixels_out_of_zeros(images, monkeypatch):
    monkeypatch.setattr(augment, "MAX_ANGLE", 0.0)
    shifts, m = set(), MAX_SHIFT
    for seed in range(4):
        for before, after in zip(images, rotate_crop(jax.random.key(seed), images), strict=True):
            padded = np.pad(before, ((m, m), (m, m), (0, 0)))
            fits = [
                (i - m, j - m)
                for i in range(2 * m + 1)
                for j in range(2 * m + 1)
                if np.allclose(padded[i : i + 12, j : j + 10], after, atol=1e-6)
            ]
            assert len(fits) == 1
            shifts.update(fits)
    assert len(shifts) > 12, "images of a batch, and of other keys, are shifted each its own way"


def test_angles_are_within_their_range_and_spread_over_it(monkeypatch):
    monkeypatch.setattr(augment, "MAX_SHIFT", 0)
    where = centroids(rotate_crop(jax.random.key(1), blobs(64)))
    np.testing.assert_allclose(np.hypot(*where.T), 7, atol=0.05)  # turned about the centre
    angle = np.arctan2(where[:, 0], where[:, 1])
    assert np.abs(angle).max() <= MAX_ANGLE + 0.01
    np.testing.assert_allclose([angle.min(), angle.max()], [-MAX_ANGLE, MAX_ANGLE], atol=0.05)
    np.testing.assert_allclose(angle.std(), MAX_ANGLE / np.sqrt(3), rtol=0.2)  # of a uniform draw


def test_all_channels_move_together(images):
    same = jnp.repeat(images[..., :1], 3, axis=-1)
    out = rotate_crop(jax.random.key(2), same)
    np.testing.assert_array_equal(out[..., 0], out[..., 1])
    np.testing.assert_array_equal(out[..., 0], out[..., 2])


def test_every_image_and_every_key_draws_for_itself():
    x = blobs(8)
    first, again, other = (rotate_crop(jax.random.key(seed), x) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    where = np.concatenate([centroids(first), centroids(other)])
    apart = np.abs(where[:, None] - where).max(-1)
    assert apart[~np.eye(16, dtype=bool)].min() > 1e-3


def test_works_jitted_vmapped_and_under_its_name(images):
    many = jax.random.split(jax.random.key(0), 2)
    together = jax.jit(jax.vmap(AUGMENTATIONS["rotate_crop"]))(many, jnp.stack([images, images]))
    for key, out in zip(many, together, strict=True):
        np.testing.assert_allclose(rotate_crop(key, images), out, atol=1e-4)
    assert AUGMENTATIONS["none"] is None
