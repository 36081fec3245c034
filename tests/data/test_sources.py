"""The embedded sample, and sets that tfds prepared: tiny ones, prepared here without TensorFlow."""

import io
import os
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest

from fdjax.data import SOURCES, load
from fdjax.data.make_sample import stratified
from fdjax.errors import InputError


def prepare(root, name, version, x, y, num_classes, config=None):
    """Prepares arrays of train and test as tfds does, PNG images in array_record files."""
    import tensorflow_datasets as tfds
    from PIL import Image

    def examples(split):
        for i, (image, label) in enumerate(zip(x[split], y[split], strict=True)):
            png = io.BytesIO()
            Image.fromarray(image.squeeze()).save(png, "PNG")
            png.seek(0)
            yield i, {"image": png, "label": int(label)}

    with tfds.core.registered.skip_registration():

        class ImageSet(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version(version)
            BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

            def _info(self):
                features = {
                    "image": tfds.features.Image(shape=x["train"].shape[1:]),
                    "label": tfds.features.ClassLabel(num_classes=num_classes),
                }
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
                )

            def _split_generators(self, dl_manager):
                return {split: examples(split) for split in x}

            def _generate_examples(self):
                raise NotImplementedError

    ImageSet.name = name
    tfds.disable_progress_bar()
    with mock.patch("tempfile.tempdir", str(root)):  # tfds leaves an empty temporary folder behind
        ImageSet(data_dir=root, config=config, file_format="array_record").download_and_prepare()


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    x = {split: rng.integers(0, 256, (n, 28, 28, 1), dtype=np.uint8) for split, n in (("train", 30), ("test", 10))}
    return x, {split: np.arange(len(x[split])) % 10 for split in x}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, arrays):
    root = tmp_path_factory.mktemp("tfds")
    x, y = arrays
    prepare(root, "mnist", "3.0.1", x, y, 10)
    prepare(root, "emnist", "3.1.0", x, {split: y[split] + 1 for split in y}, 37, "letters")
    colour = {split: np.repeat(x[split], 3, axis=-1)[:, ::-1] for split in x}
    prepare(root, "cifar10", "3.0.2", colour, y, 10)
    return root


@pytest.fixture
def own_copy(prepared, tmp_path):
    """A copy of the prepared mnist that a test may damage."""
    folder = tmp_path / "tfds" / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    for path in (prepared / "mnist" / "3.0.1").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def assert_same(one, two):
    assert one.name == two.name
    for first, second in zip(one[1:], two[1:], strict=True):
        np.testing.assert_array_equal(first, second)


def test_sample_is_stratified_and_has_writers():
    source = load("mnist_sample")
    assert (source.train_x.shape, source.test_x.shape) == ((6000, 28, 28, 1), (1000, 28, 28, 1))
    assert (source.train_x.dtype, source.train_y.dtype, source.train_owner.dtype) == (np.uint8, np.int32, np.int32)
    assert source.train_owner.shape == (6000,)
    assert source.test_owner.shape == (1000,)
    # The sizes of MNIST's classes, a tenth of them.
    np.testing.assert_array_equal(np.bincount(source.train_y), [592, 674, 596, 613, 584, 542, 592, 627, 585, 595])
    assert np.abs(np.bincount(source.test_y) - [98, 113.5, 103.2, 101, 98.2, 89.2, 95.8, 102.8, 97.4, 100.9]).max() < 1
    assert not set(source.train_owner) & set(source.test_owner), "MNIST's test writers wrote no training image"
    assert source.mean == pytest.approx([0.1307], abs=2e-3)
    assert source.std == pytest.approx([0.3081], abs=2e-3)


def test_sample_images_look_like_digits():
    source = load("mnist_sample")
    x = source.train_x[..., 0] / 255
    centres = np.stack([x[source.train_y == c].mean(axis=0) for c in range(10)])
    test = source.test_x[..., 0] / 255
    nearest = ((test[:, None] - centres) ** 2).sum(axis=(2, 3)).argmin(axis=1)
    assert (nearest == source.test_y).mean() > 0.78


def test_stratified_draws_each_class_its_share():
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    drawn = stratified(labels, 7, 0)
    assert len(np.unique(drawn)) == 7
    assert np.bincount(labels[drawn]).tolist() in ([4, 2, 1], [3, 2, 2])


def test_prepared_sets(prepared, arrays, tmp_path):
    x, y = arrays
    source = load("mnist", data_dir=prepared, cache_dir=tmp_path)
    for split, images, labels in (("train", source.train_x, source.train_y), ("test", source.test_x, source.test_y)):
        np.testing.assert_array_equal(images, x[split])
        np.testing.assert_array_equal(labels, y[split])
    assert (source.num_classes, source.train_y.dtype) == (10, np.int32)
    colour = load("cifar10", data_dir=prepared, cache_dir=tmp_path)
    np.testing.assert_array_equal(colour.train_x, np.repeat(x["train"], 3, axis=-1)[:, ::-1])
    np.testing.assert_allclose(colour.mean, (colour.train_x / 255).mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(colour.std, (colour.train_x / 255).std(axis=(0, 1, 2)))


def test_emnist_comes_upright_and_letters_from_zero(prepared, arrays, tmp_path):
    source = load("emnist/letters", data_dir=prepared, cache_dir=tmp_path)
    np.testing.assert_array_equal(source.train_x, arrays[0]["train"].swapaxes(1, 2))
    np.testing.assert_array_equal(source.train_y, arrays[1]["train"])
    assert source.num_classes == 26


def test_the_newest_version_is_read(own_copy, tmp_path):
    newer = own_copy.parent / "3.0.10"
    own_copy.rename(newer)
    (own_copy.parent / "3.0.9").mkdir()
    info = newer / "dataset_info.json"
    info.write_text(info.read_text().replace("3.0.1", "3.0.10"))
    assert len(load("mnist", data_dir=tmp_path / "tfds", cache_dir=tmp_path / "cache").train_y) == 30
    assert next((tmp_path / "cache").iterdir()).name.startswith("mnist-3.0.10-")


def test_reading_needs_no_tensorflow_and_says_nothing(prepared, tmp_path):
    code = f"""
import sys
from fdjax.data import load
load("mnist", data_dir={str(prepared)!r}, cache_dir={str(tmp_path)!r})
assert "tensorflow" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_writers(prepared, tmp_path):
    path = tmp_path / "writers.npz"
    np.savez(path, train_writer=np.arange(30) // 3, test_writer=np.arange(10))
    source = load("mnist", data_dir=prepared, cache_dir=tmp_path, writers=path)
    assert source.train_owner.tolist() == (np.arange(30) // 3).tolist()
    np.savez(path, train_writer=np.arange(29), test_writer=np.arange(10))
    with pytest.raises(InputError, match=r"shapes \(29,\) and \(10,\); give an npz with train_writer \[30\]"):
        load("mnist", data_dir=prepared, cache_dir=tmp_path, writers=path)
    np.savez(path, train=np.arange(30))
    for bad in (path, tmp_path / "none.npz"):
        with pytest.raises(InputError, match="give an npz with train_writer"):
            load("mnist", data_dir=prepared, cache_dir=tmp_path, writers=bad)
    path.write_bytes(b"no archive")
    with pytest.raises(InputError, match="give an npz with train_writer"):
        load("mnist", data_dir=prepared, cache_dir=tmp_path, writers=path)


def test_cache_is_used_and_rebuilt_when_damaged(prepared, tmp_path, monkeypatch):
    fresh = load("mnist", data_dir=prepared, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()

    def fail(*_):
        raise AssertionError("decoded again")

    with monkeypatch.context() as patch:
        patch.setattr("fdjax.data.prepared.read", fail)
        assert_same(fresh, load("mnist", data_dir=prepared, cache_dir=tmp_path))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (whole[: len(whole) // 2], b"", bytes(flipped)):
        path.write_bytes(damaged)
        assert_same(fresh, load("mnist", data_dir=prepared, cache_dir=tmp_path))
        assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path], "a temporary file is left"


def test_cache_notices_other_data(own_copy, tmp_path, arrays):
    root, cache = tmp_path / "tfds", tmp_path / "cache"
    load("mnist", data_dir=root, cache_dir=cache)
    for path in own_copy.iterdir():
        path.unlink()
    own_copy.rmdir()
    x, y = arrays
    prepare(root, "mnist", "3.0.1", {split: 255 - x[split] for split in x}, y, 10)
    np.testing.assert_array_equal(load("mnist", data_dir=root, cache_dir=cache).train_x, 255 - x["train"])


def test_default_cache_folder(prepared, tmp_path, monkeypatch):
    monkeypatch.delenv("FDJAX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load("mnist", data_dir=prepared)
    assert list((tmp_path / "xdg" / "fdjax").iterdir())
    monkeypatch.setenv("FDJAX_CACHE", str(tmp_path / "own"))
    load("mnist", data_dir=prepared)
    assert list((tmp_path / "own").iterdir())


def test_unwritable_cache_is_a_warning_unless_it_was_asked_for(prepared, tmp_path, monkeypatch):
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("FDJAX_CACHE", str(blocker / "cache"))
    with pytest.warns(UserWarning, match="not cached") as caught:
        assert len(load("mnist", data_dir=prepared).train_y) == 30
    assert "\n" not in str(caught[0].message)
    with pytest.raises(InputError, match="give a folder that can be written to"):
        load("mnist", data_dir=prepared, cache_dir=blocker / "cache")


def test_nothing_prepared(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="is no folder; prepare it with `tfds build mnist --data_dir="):
        load("mnist", data_dir=tmp_path / "none")
    with pytest.raises(InputError, match=r"nothing prepared in .*; prepare it with `tfds build emnist/balanced"):
        load("emnist/balanced", data_dir=tmp_path)
    (tmp_path / "cifar100" / "incomplete.ABCDEF_3.0.2").mkdir(parents=True)
    with pytest.raises(InputError, match="an unfinished preparation"):
        load("cifar100", data_dir=tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "elsewhere"))
    with pytest.raises(InputError, match="elsewhere"):
        load("fashion_mnist")


def test_half_prepared(own_copy, tmp_path):
    root, cache = tmp_path / "tfds", tmp_path / "cache"
    shard = own_copy / "mnist-train.array_record-00000-of-00001"
    whole = shard.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:100] + bytes(200) + whole[300:]):
        shard.write_bytes(damaged)
        with pytest.raises(InputError, match=r"cannot read .* and prepare mnist again with `tfds build mnist") as error:
            load("mnist", data_dir=root, cache_dir=cache)
        assert "\n" not in str(error.value)
    shard.unlink()
    with pytest.raises(InputError, match=r"'mnist-train[^ ]*' is missing"):
        load("mnist", data_dir=root, cache_dir=cache)
    info = own_copy / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(InputError, match="holds tfrecord files, expected array_record"):
        load("mnist", data_dir=root, cache_dir=cache)
    info.write_text("{")
    with pytest.raises(InputError, match="cannot read"):
        load("mnist", data_dir=root, cache_dir=cache)
    assert not cache.exists() or not os.listdir(cache)


def test_unknown_names_and_options():
    with pytest.raises(InputError, match=r"unknown data set 'mnits' \(did you mean 'mnist'\?\); known: cifar10, "):
        load("mnits")
    with pytest.raises(InputError, match="'mnist_sample' takes no options, but 'alpha' was given"):
        load("mnist_sample", alpha=1)
    with pytest.raises(InputError, match="'cifar10' takes no options, but 'writers' was given"):
        load("cifar10", writers="x.npz")
    assert all("\n" not in text for text in SOURCES.values())
