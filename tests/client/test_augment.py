"""Rotation and cropping on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdjax
from fdjax import keys
from fdjax.client import augment
from fdjax.client.augment import MAX_ANGLE, MAX_SHIFT, augmentation, rotate_crop
from fdjax.errors import InputError
from fdjax.models import build
from fdjax.run import experiment, settings


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
    chosen = augmentation("rotate_crop")
    assert chosen is not None
    together = jax.jit(jax.vmap(chosen))(many, jnp.stack([images, images]))
    for key, out in zip(many, together, strict=True):
        np.testing.assert_allclose(rotate_crop(key, images), out, atol=1e-4)
    assert augmentation("none") is None


def numpy_shifted(image, shift):
    out = np.zeros_like(image)
    for i in range(image.shape[0]):
        for j in range(image.shape[1]):
            y, z = i + shift[0], j + shift[1]
            if 0 <= y < image.shape[0] and 0 <= z < image.shape[1]:
                out[i, j] = image[y, z]
    return out


def numpy_turned(image, angle):
    """Bilinear, pixel by pixel; a corner beyond the image is zero."""
    height, width = image.shape[:2]
    out = np.zeros_like(image)
    for i in range(height):
        for j in range(width):
            y, z = i - (height - 1) / 2, j - (width - 1) / 2
            row = np.cos(angle) * y - np.sin(angle) * z + (height - 1) / 2
            column = np.sin(angle) * y + np.cos(angle) * z + (width - 1) / 2
            for a in (int(np.floor(row)), int(np.floor(row)) + 1):
                for b in (int(np.floor(column)), int(np.floor(column)) + 1):
                    if 0 <= a < height and 0 <= b < width:
                        out[i, j] += (1 - abs(row - a)) * (1 - abs(column - b)) * image[a, b]
    return out


def test_each_is_its_definition_for_given_draws(rng, images):
    x = np.asarray(images, np.float64)
    shift = rng.integers(-MAX_SHIFT, MAX_SHIFT + 1, (6, 2))
    shift[0], shift[1] = MAX_SHIFT, -MAX_SHIFT
    expected = [numpy_shifted(image, by) for image, by in zip(x, shift, strict=True)]
    np.testing.assert_allclose(augment.shifted(images, jnp.asarray(shift)), expected, rtol=1e-6)
    angle = rng.uniform(-MAX_ANGLE, MAX_ANGLE, 6)
    expected = [numpy_turned(image, by) for image, by in zip(x, angle, strict=True)]
    found = augment.moved(images, jnp.asarray(angle, jnp.float32), jnp.zeros((6, 2)))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    which = np.array([True, False, True, True, False, False])
    expected = [image[:, ::-1] if mirror else image for image, mirror in zip(x, which, strict=True)]
    np.testing.assert_allclose(augment.flipped(images, jnp.asarray(which)), expected, rtol=1e-6)
    centre = np.array([[0, 0], [11, 9], [5, 5], [0, 9], [6, 1], [11, 0]])
    expected = x.copy()
    for image, (row, column) in zip(expected, centre, strict=True):
        image[max(0, row - 3) : row + 3, max(0, column - 3) : column + 3] = 0
    np.testing.assert_allclose(augment.cut_out(images, jnp.asarray(centre), 6), expected, rtol=1e-6)
    expected = [(image - image.mean()) / image.std() for image in x]
    np.testing.assert_allclose(augment.normalised(images), expected, atol=1e-5)


def test_draws_are_of_each_image_and_of_the_whole_range():
    x = jnp.ones((400, 8, 8, 1)) * jnp.arange(1, 9)[None, None, :, None]
    mirrored = np.asarray(augment.flip(jax.random.key(0), x))[:, 0, 0, 0] == 8
    assert 0.4 < mirrored.mean() < 0.6
    holes = np.asarray(augment.cutout(jax.random.key(0), x))[..., 0] == 0
    rows, columns = holes.any(2).sum(1), holes.any(1).sum(1)
    assert {*rows} == {*columns} == {2, 3, 4}  # a square of 4 from the centre - 2, cut off at the borders
    np.testing.assert_array_equal(holes.sum((1, 2)), rows * columns)
    assert np.abs(holes.any(2).mean(0)[2:6] - 0.5).max() < 0.1
    crops = np.asarray(augment.crop(jax.random.key(0), x))[..., 0]
    first = np.where(crops[:, 4, 4] > 0, crops[:, 4, 4] - 5, 0)
    assert {*first.astype(int)} == {*range(-4, 4)}


def test_an_image_of_one_value_is_normalised_to_zeros():
    np.testing.assert_array_equal(augment.normalised(jnp.full((2, 4, 4, 1), 7.0)), 0)


def test_several_follow_each_other_with_keys_of_their_own(images):
    both = augmentation("crop,flip")
    assert both is not None
    other = augmentation("flip,crop")
    assert other is not None
    out = both(jax.random.key(5), images)
    by_hand = augment.flip(
        keys.stream(jax.random.key(5), "flip"),
        augment.crop(keys.stream(jax.random.key(5), "crop"), images),
    )
    np.testing.assert_array_equal(out, by_hand)
    assert not np.array_equal(out, other(jax.random.key(5), images))


def test_normalise_is_of_the_net_in_tests_too(images):
    plain = build("2nn", (12, 10, 3), 4, width=5)
    model, params = augment.with_normalised_inputs(plain), plain.init(jax.random.key(0))
    expected = plain.apply(params, augment.normalised(images))
    np.testing.assert_array_equal(model.apply(params, images), expected)
    np.testing.assert_allclose(model.head(params, model.features(params, images)), expected, rtol=1e-6)
    np.testing.assert_allclose(model.apply(params, 3 * images + 1), expected, atol=1e-4)


def test_a_run_with_several():
    result = fdjax.run(
        model="mclr", num_clients=3, rounds=3, train_fraction=0.1, augment="crop,flip,rotate,cutout,normalise"
    )
    losses = result.evaluations["central_loss"]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ("crops", r"unknown augment 'crops' \(did you mean 'crop'\?\)"),
        ("crop,", "unknown augment ''"),
        ("crop,flip,crop", "each augmentation once, such as crop,flip"),
        ("none,flip", "or none alone"),
        ("normalise,flip", "normalise is of what a net is given, so the last"),
        (3, "expected text"),
    ],
)
def test_bad_lists_are_one_line(given, error):
    with pytest.raises(InputError, match=error) as caught:
        settings.make(augment=given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["crop", "flip", "rotate", "cutout", "normalise", "rotate_crop"])
def test_features_are_no_images(name):
    with pytest.raises(InputError, match=f"--augment={name} needs images, but examples have shape"):
        experiment.build(settings.make(dataset="synthetic", num_clients=4, model="mclr", augment=name))
