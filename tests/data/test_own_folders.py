"""Folders of images by class, and data sets that Hugging Face's `datasets` saved."""

import numpy as np
import pytest
from PIL import Image

from fdjax import data
from fdjax.errors import DataWarning, InputError


def draw(folder, names, mode="L", size=(6, 5), suffix=".png"):
    """Images of one colour each, which is 10 times their number."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        colour = 10 * i + len(name) if mode == "L" else (10 * i + len(name),) * 3
        Image.new(mode, size, colour).save(folder / f"{name}{suffix}")


def two_classes(folder, **more):
    draw(folder / "cat", ["a", "bb", "ccc", "dddd"], **more)
    draw(folder / "dog", ["eeeee", "ffffff"], **more)


def test_a_folder_by_class(tmp_path):
    two_classes(tmp_path / "pets")
    draw(tmp_path / "pets" / ".hidden", ["x"])
    (tmp_path / "pets" / "cat" / ".DS_Store").write_text("")
    found = data.load(tmp_path / "pets", test_fraction=0.5)
    assert (found.name, found.classes, found.label_space) == ("pets", ("cat", "dog"), "cat, dog")
    assert (found.train_x.shape, found.test_x.shape) == ((3, 5, 6, 1), (3, 5, 6, 1))
    assert sorted(np.concatenate([found.train_x, found.test_x])[:, 0, 0, 0]) == [1, 5, 12, 16, 23, 34]
    np.testing.assert_array_equal(np.bincount(found.train_y), [2, 1])


def test_folders_train_and_test(tmp_path):
    two_classes(tmp_path / "pets" / "train")
    draw(tmp_path / "pets" / "test" / "dog", ["123456789"])
    found = data.load(tmp_path / "pets")
    assert (len(found.train_x), found.test_x[0, 0, 0, 0], found.test_y.tolist()) == (6, 9, [1])
    other = tmp_path / "more"
    draw(other / "cat", ["1234567"])
    two_classes(tmp_path / "plain")
    assert data.load(tmp_path / "plain", test_data=other).test_x[0, 0, 0, 0] == 7


def test_colours_and_sizes(tmp_path):
    two_classes(tmp_path / "pets")
    draw(tmp_path / "pets" / "dog", ["z"], mode="RGB", size=(9, 9), suffix=".bmp")
    with pytest.raises(InputError, match=r"images of 2 sizes: 6 x 5 \(6\), 9 x 9 \(1\); give --image_size"):
        data.load(tmp_path / "pets")
    found = data.load(tmp_path / "pets", image_size=4)
    assert found.train_x.shape[1:] == (4, 4, 3)
    assert {image.max() for image in np.concatenate([found.train_x, found.test_x])} == {1, 5, 12, 16, 23, 34}


def test_files_that_are_no_images_are_told(tmp_path):
    two_classes(tmp_path / "pets")
    (tmp_path / "pets" / "dog" / "notes.txt").write_text("")
    with pytest.warns(DataWarning, match=r"pets: 1 files are no images \(notes.txt\); left out"):
        data.load(tmp_path / "pets")


@pytest.mark.parametrize("called", ["val", "Valid", "validation"])
def test_a_validation_folder_is_tested_on_where_there_is_no_test(tmp_path, called):
    two_classes(tmp_path / "train")
    draw(tmp_path / called / "dog", ["123456789"])
    with pytest.warns(DataWarning, match=f"has no folder test; its folder {called} is tested on"):
        found = data.load(tmp_path)
    assert (found.classes, len(found.train_x), found.test_x[0, 0, 0, 0]) == (("cat", "dog"), 6, 9)
    with pytest.raises(InputError, match=f"has a folder {called} already; leave --test_data out"):
        data.load(tmp_path, test_data=tmp_path / "train")
    draw(tmp_path / "test" / "cat", ["1234567"])
    with pytest.warns(DataWarning, match=f"{called} beside test is left out; --validation_fraction takes some"):
        found = data.load(tmp_path)
    assert (len(found.train_x), found.test_x[:, 0, 0, 0].tolist()) == (6, [7])


def test_test_data_beside_a_folder_train(tmp_path):
    two_classes(tmp_path / "pets" / "train")
    draw(tmp_path / "more" / "cat", ["1234567"])
    found = data.load(tmp_path / "pets", test_data=tmp_path / "more")
    assert (len(found.train_x), found.test_x[:, 0, 0, 0].tolist()) == (6, [7])


FOLDERS = {
    "classes of folders": (("a/cat/x.png", "a/dog/x.png", "b/cat/x.png"), "a is a class with folders in it .cat, dog."),
    "a folder of programs": (("assets/x.png", "src/main.py"), "src has no images"),
    "no images": (("src/main.py", "docs/more/x.txt"), "of no kind that can be read; expected a data folder"),
    "pictures without a class": (("x.png", "y.jpg"), "it holds 2 pictures, but no folder for each class: move the"),
    "one picture": (("x.png", "more/notes.txt"), "of no kind that can be read; expected a data folder"),
    "training pictures without a class": (("train/x.png", "test/a/x.png"), "train is no folder .* it holds a picture,"),
    "nothing": ((), "it is empty: give the folder that has the data"),
    "hidden files alone": ((".DS_Store",), "it is empty: give the folder that has the data"),
    "of tensorflow-datasets": (("mnist/3.0.1/features.json",), "prepared it: give a data set's name, and --data_dir="),
    "a version of these": (("features.json", "dataset_info.json"), "give a data set's name, and --data_dir="),
    "three parts of no images": (("train/a/x.png", "val/a/x.txt"), "a has no images"),
}


@pytest.mark.parametrize(("files", "message"), FOLDERS.values(), ids=FOLDERS)
def test_folders_whose_form_is_refused(tmp_path, monkeypatch, files, message):
    """From the names of files alone: no content is read, which may be that of everything below a home."""
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"")
    monkeypatch.setattr(data.own, "_content", None)
    with pytest.raises(InputError, match=message) as told:
        data.own.resolve(tmp_path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("broken", ["text", "cut", "deep", "empty class"])
def test_folders_that_are_refused(tmp_path, broken):
    folder = tmp_path / "pets"
    two_classes(folder)
    file = folder / "cat" / "a.png"
    if broken == "text":
        file.write_text("no image")
    elif broken == "cut":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64)).astype(np.uint8)).save(file)
        file.write_bytes(file.read_bytes()[:2000])
    elif broken == "deep":
        Image.fromarray(np.full((5, 6), 40_000, np.uint16)).save(file)
    else:
        (folder / "bird").mkdir()
    message = {
        "text": "a.png cannot be read as an image",
        "cut": "a.png cannot be read as an image",
        "deep": "a.png has more than 8 bits a pixel",
        "empty class": "bird has no images",
    }[broken]
    with pytest.raises(InputError, match=message) as told:
        data.load(folder, image_size=8)
    assert "\n" not in str(told.value)


# Hugging Face.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of three data sets: images, a table, and arrays."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    folder, rng = tmp_path_factory.mktemp("saved"), np.random.default_rng(0)
    labels = datasets.ClassLabel(names=["cat", "dog"])
    pictures = [Image.fromarray(rng.integers(0, 255, (5, 6)).astype(np.uint8)) for _ in range(12)]
    features = datasets.Features({"image": datasets.Image(), "label": labels})
    images = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1] * 6}, features)
    split = datasets.DatasetDict(train=images.select(range(8)), test=images.select(range(8, 12)))
    split.save_to_disk(folder / "images")
    table = {
        "age": rng.normal(size=20),
        "job": ["a", "b"] * 10,
        "site": ["n", "s", "e", "w"] * 5,
        "label": [0, 0, 1, 1] * 5,
    }
    datasets.Dataset.from_dict(table).cast_column("label", labels).save_to_disk(folder / "table")
    arrays = {"x": rng.normal(size=(20, 3, 2)).tolist(), "y": [0, 1] * 10, "text": ["t"] * 20}
    datasets.Dataset.from_dict(arrays).save_to_disk(folder / "arrays")
    validated = datasets.DatasetDict(
        train=datasets.Dataset.from_dict(arrays), validation=datasets.Dataset.from_dict(arrays)
    )
    validated.save_to_disk(folder / "validated")
    datasets.DatasetDict(test=images).save_to_disk(folder / "untrained")
    whole = datasets.Dataset.from_dict(table | {"grade": [0, 1, -1, 1] * 5})
    whole = whole.cast_column("label", labels).cast_column("grade", datasets.ClassLabel(names=["low", "high"]))
    parts = {"train": whole, "test": whole.select(range(8)), "validation": whole.select(range(4))}
    datasets.DatasetDict(parts).save_to_disk(folder / "three")
    return folder, pictures, table, arrays


def test_saved_images(saved):
    folder, pictures, *_ = saved
    found = data.load(folder / "images")
    assert (found.classes, found.train_x.shape, found.test_x.shape) == (("cat", "dog"), (8, 5, 6, 1), (4, 5, 6, 1))
    np.testing.assert_array_equal(found.test_x[..., 0], [np.asarray(picture) for picture in pictures[8:]])
    np.testing.assert_array_equal(found.train_y, [0, 1] * 4)


def test_a_saved_table(saved):
    folder = saved[0]
    pytest.importorskip("pandas")
    found = data.load(folder / "table", owner="site", test_fraction=0.2)
    assert found.encoding.names == ("age", "job=a", "job=b")
    assert (found.classes, found.owners) == (("cat", "dog"), ("e", "n", "s", "w"))
    assert len(found.train_y) == 16


def test_a_saved_table_of_three_parts(saved):
    """All class labels are levels by name, -1 is missing, and what is not used is told."""
    pytest.importorskip("pandas")
    with pytest.warns(DataWarning) as told:
        found = data.load(saved[0] / "three", target="label", ignore="site", missing="level")
    assert any("three: the splits validation are left out" in str(each.message) for each in told)
    assert found.encoding.names == ("age", "job=a", "job=b", "grade=high", "grade=low", "grade=missing")
    np.testing.assert_array_equal(found.train_x[:4, 3:], [[0, 1, 0], [1, 0, 0], [0, 0, 1], [1, 0, 0]])
    assert len(found.test_y) == 8


@pytest.mark.filterwarnings("ignore::fdjax.errors.DataWarning")
def test_a_saved_table_as_proxy_data_has_the_encoding_of_the_data(saved):
    pytest.importorskip("pandas")
    like = data.load(saved[0] / "three", target="label", ignore="site", missing="drop", standardize=False)
    _, proxy = data.take_proxy(like, data.own.resolve(saved[0] / "three", "proxy"), 15, 0)
    assert proxy.labelled
    np.testing.assert_array_equal(proxy.x, like.train_x)  # without the rows of missing values, as these
    arrays = data.load(saved[0] / "arrays", target="y", ignore="text")
    with pytest.raises(InputError, match="--proxy=table is a table, but arrays is none"):
        data.take_proxy(arrays, data.own.resolve(saved[0] / "table", "proxy"), 5, 0)
    with pytest.raises(InputError, match="no column grade, which the training rows have"):
        data.take_proxy(like, data.own.resolve(saved[0] / "table", "proxy"), 5, 0)


def test_every_kind_of_folder_finds_its_reader(saved, tmp_path):
    two_classes(tmp_path / "pets")
    for part in ("train", "test"):
        draw(tmp_path / "clients" / part / "cat", ["a"])  # a folder of images but for the clients' files
        (tmp_path / "clients" / part / "0.npz").write_bytes(b"")
    draw(tmp_path / "saved" / "images" / "cat", ["a"])
    (tmp_path / "saved" / "dataset_info.json").write_text("{}")
    paths = {"images": tmp_path / "pets", "pfllib": tmp_path / "clients", "hugging_face": tmp_path / "saved"}
    for kind, path in paths.items():
        assert data.own.reader_of(path) is data.own.READERS[kind]
    assert data.own.reader_of(saved[0] / "table") is data.own.READERS["hugging_face"]


def test_saved_arrays(saved):
    folder, _, _, arrays = saved
    found = data.load(folder / "arrays", target="y", ignore="text", test_fraction=0.5)
    both = np.concatenate([found.train_x, found.test_x])
    np.testing.assert_allclose(np.sort(both.ravel()), np.sort(np.ravel(arrays["x"])), rtol=1e-6)
    assert found.train_x.shape == (10, 3, 2)
    with pytest.warns(DataWarning) as told:
        data.load(folder / "validated", target="y", ignore="text")
    assert any("has no split test; its split validation is tested on" in str(each.message) for each in told)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("arrays", {}, "arrays has 0 ClassLabel features among x, y, text; name its labels"),
        ("arrays", {"target": "z"}, "unknown column of arrays 'z'"),
        ("arrays", {"target": "y", "owner": "z"}, "unknown column of arrays 'z'"),
        ("images", {"test_fraction": 0.5}, "test_fraction=0.5, but images has a test split"),
        ("untrained", {}, "untrained has the splits test; expected train"),
    ],
)
def test_saved_sets_that_are_refused(saved, name, options, message):
    with pytest.raises(InputError, match=message):
        data.load(saved[0] / name, **options)


def test_a_damaged_saved_set(saved, tmp_path):
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as a saved data set") as told:
        data.load(tmp_path)
    assert "\n" not in str(told.value)
