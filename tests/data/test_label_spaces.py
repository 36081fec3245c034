"""Which labels name the same: of a data set, of proxy data beside it, and of a part of a data set."""

import dataclasses
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from fdjax import data
from fdjax.errors import InputError
from fdjax.run import experiment, settings
from fdjax.run.runner import run

SIZE = 300


def idx(array):
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A folder of images of MNIST's shape with ten labels of their own, each a bright row."""
    folder, rng = tmp_path_factory.mktemp("letters"), np.random.default_rng(0)
    for stem, size in (("train", SIZE), ("t10k", 100)):
        y = (np.arange(size) % 10).astype(np.uint8)
        x = rng.integers(0, 100, (size, 28, 28), dtype=np.uint8)
        x[np.arange(size), 2 * y + 3] = 255
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(idx(x))
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(idx(y))
    return str(folder)


def made(letters, **fields):
    """Private letters, public digits."""
    usual = {
        "dataset": "idx", "data_dir": letters, "proxy": "mnist_sample", "proxy_size": 100, "num_clients": 4,
        "model": "mclr", "rounds": 1, "learning_rate": 0.05, "devices": 1, "chunk": 1,
    }  # fmt: skip
    return settings.make(**usual | fields)


def test_label_spaces(letters):
    digits, theirs = data.load("mnist_sample"), data.load("idx", data_dir=letters)
    assert (digits.label_space, theirs.label_space) == ("digits", f"idx:{Path(letters).resolve()}")
    assert digits.num_classes == theirs.num_classes == 10
    own = theirs._replace(name="an array of my own", labels="digits")  # a user's source can say what it labels
    assert data.take_proxy(own, "mnist_sample", 5, 0)[1].labelled


def test_labels_of_another_space_do_not_count_for_being_as_many(letters):
    digits, theirs = data.load("mnist_sample"), data.load("idx", data_dir=letters)
    _, proxy = data.take_proxy(digits, "idx", 50, 0, data_dir=letters)
    assert not proxy.labelled
    assert (proxy.y == -1).all()
    _, same = data.take_proxy(digits, "mnist_sample", 50, 0)
    assert same.labelled
    assert same.more_labels == 0
    _, joined = data.take_proxy(digits, "idx", 50, 0, data_dir=letters, join_labels=True)
    assert (joined.labelled, joined.more_labels) == (True, 10)
    np.testing.assert_array_equal(joined.x, proxy.x)
    place = {image.tobytes(): int(label) for image, label in zip(theirs.train_x, theirs.train_y, strict=True)}
    assert joined.y.tolist() == [10 + place[image.tobytes()] for image in joined.x]


def test_idx_folders_of_one_name_are_two(letters, tmp_path):
    """As torchvision's MNIST/raw and FashionMNIST/raw are: their labels counted as the same."""
    folders = [str(shutil.copytree(letters, tmp_path / name / "raw")) for name in ("one", "other")]
    source = data.load("idx", data_dir=folders[0])
    assert data.take_proxy(source, "idx", 50, 0, data_dir=folders[0])[1].labelled
    assert not data.take_proxy(source, "idx", 50, 0, data_dir=folders[1])[1].labelled


def test_proxy_data_of_the_whole_serve_a_part_of_its_labels():
    """The digit 7 was label 0 of the part and, joined, label 3 + 7 of the proxy data."""
    some = data.of_labels(data.load("mnist_sample"), "7,1,3")
    _, proxy = data.take_proxy(some, "mnist_sample", 50, 0, labels="7,1,3", join_labels=True)
    assert (proxy.labelled, proxy.more_labels) == (True, 0)
    label = {image.tobytes(): y for image, y in zip(some.train_x, some.train_y, strict=True)}
    assert [label[image.tobytes()] for image in proxy.x] == proxy.y.tolist()


@pytest.mark.parametrize(("name", "options"), [("fedgems", {}), ("feddf", {"model_selection": "accuracy"})])
def test_methods_of_one_label_space_refuse_them(letters, name, options):
    with pytest.raises(
        InputError, match=rf"^{name}.* needs labelled proxy data, but --proxy=mnist_sample has none of"
    ) as e:
        experiment.build(made(letters, algorithm=name, options=options))
    assert "\n" not in str(e.value)
    assert "give --proxy=held_out, or a data set of the same labels" in str(e.value)


def test_what_needs_no_labels_takes_them_without(letters):
    built = experiment.build(made(letters, algorithm="feddf"))
    assert (np.asarray(built.federation.proxy.y) == -1).all()
    assert built.shapes.classes == 10


@pytest.mark.exhaustive
def test_fedmd_has_one_output_layer_over_both(letters):
    """Before, digits were taken for letters: labels 0 to 9 for both, and ten outputs."""
    chosen = made(letters, algorithm="fedmd", pretrain_epochs=3, private_epochs=10, options={"subset": "stratified"},
                  proxy_per_round=40)  # fmt: skip
    built = experiment.build(chosen)
    assert built.shapes.classes == 20
    assert np.unique(built.federation.proxy.y).tolist() == [*range(10, 20)]
    assert np.unique(built.federation.train.y).tolist() == [*range(10)]
    assert built.layout.central.apply(
        built.layout.central.init(np.zeros(2, np.uint32)), np.zeros((1, 28, 28, 1), np.float32)
    ).shape == (1, 20)
    traffic = built.simulation.traffic(built.federation, built.hparams)
    assert traffic.per_participant("up") == (4 * 40 * 20,)
    result = run(chosen)
    assert result.evaluations["local_accuracy"][-1] > 0.5


def test_a_part_of_a_data_set():
    digits = data.load("mnist_sample")
    some = data.of_labels(digits, "7, 1,3")
    assert (some.num_classes, some.label_space) == (3, "digits: 7, 1, 3")
    for x, y, whole_x, whole_y, owner, whole_owner in (
        (some.train_x, some.train_y, digits.train_x, digits.train_y, some.train_owner, digits.train_owner),
        (some.test_x, some.test_y, digits.test_x, digits.test_y, some.test_owner, digits.test_owner),
    ):
        keep = np.isin(whole_y, (7, 1, 3))
        np.testing.assert_array_equal(x, whole_x[keep])
        np.testing.assert_array_equal(owner, whole_owner[keep])
        assert [(7, 1, 3)[label] for label in y] == whole_y[keep].tolist()
    assert not data.take_proxy(some, "mnist_sample", 5, 0)[1].labelled  # 0 is a 7 here


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("0,x", "--labels=0,x: expected two or more different labels, such as 0,2,20"),
        ("3", "--labels=3: expected two or more different labels, such as 0,2,20"),
        ("1,1", "--labels=1,1: expected two or more different labels, such as 0,2,20"),
        ("", "--labels=: expected two or more different labels, such as 0,2,20"),
        ("-1,2", "--labels=-1,2: expected two or more different labels, such as 0,2,20"),
        ("1,10", "--labels=1,10: mnist_sample has the labels 0 to 9; give some of these"),
    ],
)
def test_parts_that_cannot_be(labels, message):
    with pytest.raises(InputError) as error:
        experiment.build(settings.make(labels=labels, model="mclr"))
    assert str(error.value) == message


def test_proxy_data_have_a_folder_of_their_own(letters, tmp_path):
    chosen = made(letters, dataset="mnist_sample", data_dir=None, proxy="idx", proxy_dir=letters, algorithm="fedmd")
    assert experiment.build(chosen).shapes.classes == 20
    with pytest.raises(InputError, match="no train-images-idx3-ubyte"):
        experiment.build(dataclasses.replace(chosen, proxy_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "--proxy_dir=x: there are no proxy data; give --proxy too, or leave it out"),
        ({"proxy": "held_out", "algorithm": "fedmd"}, "--proxy_dir=x: --proxy=held_out reads no files; leave it out"),
        (
            {"proxy": "idx", "algorithm": "fedmd", "data_dir": "y"},
            "--data_dir=y: --dataset=mnist_sample reads no files",
        ),
    ],
)
def test_folders_that_nothing_reads(fields, message):
    with pytest.raises(InputError) as error:
        settings.make(proxy_dir="x", **fields)
    assert str(error.value).startswith(message)


DISTILL = [  # given, and the batches on proxy data with at most 20 examples a client
    ({"algorithm": "feddf"}, 128),
    ({"algorithm": "feddf", "distill_batch_size": 16}, 16),
    ({"algorithm": "fedgems", "batch_size": 50}, 50),
    ({"algorithm": "dsfl", "batch_size": 8}, 8),
    ({"algorithm": "dsfl", "batch_size": 0}, 60),
    ({"algorithm": "cfd", "distill_batch_size": 200}, 200),
]


@pytest.mark.parametrize(("fields", "size"), DISTILL)
def test_the_default_distillation_batch(fields, size):
    """Before, FedDF took the client's batch, and every method no more than the largest client has."""
    chosen = settings.make(dataset="mnist_sample", model="mclr", proxy="held_out", proxy_size=60, **fields)
    assert chosen.distill_batch == size
    static = chosen.static(20)
    assert (static.distill_batch_size, static.batch_size) == (size, min(chosen.batch_size or 20, 20))
    _, on_proxy, _ = experiment.trainings(static, None)
    assert on_proxy.batch_size == size
