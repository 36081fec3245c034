"""Runs on a user's own data and partitions: by value, by file, from the command line, resumed and read back."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import programs
import pytest

import fdjax
from fdjax import own
from fdjax.data import own as own_data
from fdjax.data import own_partition
from fdjax.errors import DataWarning, InputError
from fdjax.run import loading, settings

RUN = {"model": "mclr", "rounds": 2, "devices": 1, "num_clients": 3, "progress": False}
ADULT = Path(__file__).resolve().parents[3] / "shared" / "data" / "adult.data.gz"


def arrays(rng, size=90):
    """Every row has its place as its first feature."""
    x = np.stack([np.arange(size), rng.normal(size=size)], axis=1)
    return x, np.arange(size) % 3


def chosen(**named):
    return settings.make(**{name: value for name, value in RUN.items() if name != "progress"} | named)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run on an npz in its folder, with a partition from a file, and one on a value."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("kept")
    x, y = arrays(rng)
    np.savez(folder / "mine.npz", x=x, y=y, x_test=x + 0.5, y_test=y)
    np.savez(folder / "mine_partition.npz", client=np.arange(90) % 3)
    source = fdjax.from_arrays(x, y, x + 0.5, y, name="mine")
    by = {"partition": folder / "mine_partition.npz"}
    by_file = fdjax.run(dataset=folder / "mine.npz", out=folder / "file", **by, **RUN)
    by_value = fdjax.run(dataset=source, out=folder / "value", partition=np.arange(90) % 3, **RUN)
    return folder, source, by_file, by_value


def test_by_file_and_by_value_are_the_same_numbers(kept):
    folder, _, by_file, by_value = kept
    assert by_file.evaluations == by_value.evaluations
    chosen = by_file.settings
    assert chosen.dataset_title == f"mine ({folder}/mine.npz)"
    assert chosen.partition_title == f"mine_partition ({folder}/mine_partition.npz)"
    assert chosen.files == {
        chosen.dataset: str(folder / "mine.npz"), chosen.partition: str(folder / "mine_partition.npz"),
    }  # fmt: skip
    assert chosen.check() == chosen
    assert json.loads(json.dumps(chosen.public())) == chosen.public()
    assert by_value.settings.dataset_title == "mine"
    assert by_value.settings.files == {}


@pytest.fixture
def elsewhere(monkeypatch):
    """As in a process that has met no data yet."""
    monkeypatch.setattr(own_data, "_OWN", own.Registry("data set"))
    monkeypatch.setattr(own_partition, "_OWN", own.Registry("partition"))


def test_a_run_on_a_file_is_read_back(kept, elsewhere):
    folder, _, by_file, _ = kept
    loaded = fdjax.load(folder / "file")
    assert loaded.evaluations == by_file.evaluations
    x = np.float32([[0, 0.5], [9, -1]])
    np.testing.assert_array_equal(loaded.central.predict(x), by_file.central.predict(x))


def test_a_run_on_a_value_needs_it_again(kept, elsewhere):
    folder, source, _, by_value = kept
    with pytest.raises(InputError, match=r"--dataset=mine@\w+ was a value, or a file .* give it again: dataset="):
        fdjax.load(folder / "value")
    with pytest.raises(InputError, match=r"--partition=partition@\w+ was a value, .* give it again"):
        fdjax.load(folder / "value", dataset=source)
    again = fdjax.load(folder / "value", dataset=source, partition=np.arange(90) % 3)
    assert again.evaluations == by_value.evaluations
    with pytest.raises(InputError, match=r"was run with dataset=mine@\w+, not mine@\w+ \(mine has changed since\)"):
        fdjax.load(folder / "value", dataset=source._replace(train_y=source.train_y[::-1]), partition=np.arange(90) % 3)


def test_a_run_goes_on_from_a_moved_file_and_from_no_other(kept, tmp_path, elsewhere):
    folder, *_ = kept
    shutil.copytree(folder / "file", tmp_path / "file")
    shutil.copy(folder / "mine.npz", tmp_path / "moved.npz")
    given = {"partition": folder / "mine_partition.npz", "out": tmp_path / "file", "resume": True}
    more = RUN | {"rounds": 3}
    with pytest.raises(InputError, match=r"was run with dataset=mine@\w+, not moved@"):
        fdjax.run(dataset=tmp_path / "moved.npz", **given, **more)
    shutil.copy(folder / "mine.npz", tmp_path / "mine.npz")
    assert fdjax.run(dataset=tmp_path / "mine.npz", **given, **more).round == 3


def test_content_counts_and_not_the_place(rng, tmp_path):
    x, y = arrays(rng)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "mine.npz", x=x, y=y)
    first, second = (chosen(dataset=tmp_path / name / "mine.npz") for name in "ab")
    assert first == second
    shutil.rmtree(tmp_path / "a")
    assert len(loading.load(first).source.train_y) == 72  # it is read where it lies now
    np.savez(tmp_path / "b" / "mine.npz", x=x + 1, y=y)
    edited = chosen(dataset=tmp_path / "b" / "mine.npz")
    assert edited.dataset != first.dataset
    with pytest.raises(InputError, match=r"mine.npz has changed since it was named, or is gone; give it again"):
        loading.load(first)
    assert settings.contents([("dataset", str(tmp_path / "b" / "mine.npz"))]).popitem()[1] == edited.dataset


def test_a_value_is_what_it_was_when_it_was_given(rng):
    x, y = arrays(rng)
    source = fdjax.from_arrays(x.astype(np.float32), y, x + 0.5, y)
    first = chosen(dataset=source)
    source.train_x[:] = 0
    assert chosen(dataset=source).dataset != first.dataset
    assert loading.load(first).source.train_x.any()


def test_owners_are_the_clients(rng):
    x, y = arrays(rng)
    source = fdjax.from_arrays(x, y, owner=np.array(["n", "s", "e"])[np.arange(90) % 3])
    loaded = loading.load(chosen(dataset=source))
    held = [
        loaded.source.train_owner[loaded.holdings.order[s : s + n]] for s, n in zip(*loaded.holdings[1:], strict=True)
    ]
    assert [set(each) for each in held] == [{0}, {1}, {2}]
    assert chosen(dataset=source).partition_name == "natural"
    assert chosen(dataset=source, partition="iid").partition_name == "iid"
    with pytest.raises(InputError, match="num_clients=5, but the data set has 3 clients of its own"):
        loading.load(chosen(dataset=source, num_clients=5))


@pytest.mark.parametrize(
    "more",
    [
        {"train_fraction": 0.5},
        {"validation_fraction": 0.25},
        {"proxy": "held_out", "proxy_size": 20},
        {"labels": "2,0"},
        {"labels": "1,2", "train_fraction": 0.7, "validation_fraction": 0.25, "proxy": "held_out", "proxy_size": 9},
    ],
)
def test_an_own_partition_is_of_the_examples_as_loaded(rng, more):
    """Each client holds of its own examples exactly those that are left, whatever takes examples away."""
    x, y = arrays(rng)
    clients = [np.arange(0, 40), np.arange(60, 45, -1), np.zeros(0, int)]
    loaded = loading.load(chosen(dataset=fdjax.from_arrays(x, y, x + 0.5, y), partition=clients, **more))
    left = loaded.source.train_x[:, 0].astype(int)
    order, start, count = loaded.holdings
    held = [left[order[s : s + n]].tolist() for s, n in zip(start, count, strict=True)]
    assert held == [[i for i in part.tolist() if i in set(left)] for part in clients]
    assert 0 < sum(count) < 55


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"num_clients": 4}, "--num_clients=4, but --partition=partition has 3 clients; give as many, or none"),
        ({"alpha": 0.5}, "--alpha: --partition=partition is as it is; leave it out"),
        ({"partition": [[0, 90]], "num_clients": None}, "client 0 holds the index 90, but 90 examples are loaded"),
        ({"partition": [[0], [0]], "num_clients": None, "privacy": "example", "noise_multiplier": 1.0, "clip": 1.0},
         "1 again by another one; privacy of examples needs each to be held once"),
        ({"partition": None, "target": "y"}, "--target=y: --dataset=arrays has no such option, only a table or"),
        ({"partition": None, "test_fraction": 0.5}, "--test_fraction=0.5: --dataset=arrays has no such option, only"),
        ({"partition": None, "data_dir": "."}, "--data_dir=.: arrays is data of your own, which lie where they are"),
        ({"partition": None, "dataset": "mnist_sample", "owner": "who"},
         "--owner=who: --dataset=mnist_sample has no such option"),
        ({"partition": None, "proxy": "no.csv"}, "--proxy=no.csv: there is no such file or folder"),
        ({"partition": None, "proxy": "held_outt"}, "unknown proxy data 'held_outt' .did you mean 'held_out'"),
        ({"partition": None, "proxy": "held_out"}, r"--proxy_size=1000 \(the default\): expected 1 to 89 of"),
        ({"partition": None, "proxy": "held_out", "proxy_size": 90}, "--proxy_size=90: expected 1 to 89 of the 90 tr"),
        ({"partition": np.arange(91) % 3}, "the client of 91 examples, but 90 are loaded for training; of your own"),
        ({"partition": None, "labels": "0,9"}, "--labels=0,9: arrays has the labels 0 to 2; give some of these"),
        ({"partition": None, "test_by": "day"}, "unknown test_by 'day'; known: label, owner"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(rng, named, message):
    x, y = arrays(rng)
    given = {"dataset": fdjax.from_arrays(x, y, x + 0.5, y), "partition": np.arange(90) % 3}
    with pytest.raises(InputError, match=message) as told:
        loading.load(chosen(**given | named))
    assert "\n" not in str(told.value)


def test_labels_by_name(rng):
    x, y = arrays(rng)
    source = fdjax.from_arrays(x, np.array(["cat", "dog", "emu"])[y], x + 0.5, np.array(["cat", "dog", "emu"])[y])
    loaded = loading.load(chosen(dataset=source, labels="emu,cat")).source
    assert (loaded.classes, loaded.num_classes, loaded.label_space) == (("emu", "cat"), 2, "cat, dog, emu: emu, cat")
    np.testing.assert_array_equal(loaded.train_y, [1, 0] * 30)
    with pytest.raises(InputError, match=r"unknown label of arrays .*'cow'; known: cat, dog, emu"):
        loading.load(chosen(dataset=source, labels="cow,cat"))


def test_own_proxy_data(rng):
    """Labels count where they name the same; numbers of another data set do not."""
    x, y = arrays(rng)
    texts = np.array(["cat", "dog", "emu"])
    source, proxy = (fdjax.from_arrays(x + i, texts[y], test_fraction=0, name=f"s{i}") for i in range(2))
    numbers = fdjax.from_arrays(x, y, test_fraction=0, name="numbers")
    loaded = loading.load(chosen(dataset=source, proxy=proxy, proxy_size=90, algorithm="fedmd"))
    assert loaded.proxy.labelled
    np.testing.assert_array_equal(loaded.proxy.x, proxy.train_x)
    with pytest.raises(InputError, match="needs labelled proxy data, but --proxy=numbers has none of the 3 labels"):
        loading.load(chosen(dataset=source, proxy=numbers, proxy_size=9, algorithm="fedcad"))
    unlabelled = loading.load(chosen(dataset=source, proxy=numbers, proxy_size=9, algorithm="dsfl")).proxy
    assert not unlabelled.labelled


def test_codes_of_categories_need_a_net_that_embeds_them(rng):
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"a": ["u", "v", "w"] * 30, "b": rng.normal(size=90), "y": np.arange(90) % 2})
    source = fdjax.from_frame(frame, "y", categories="embedded")
    with pytest.raises(InputError, match="model 'mclr' would take the codes of categories for numbers"):
        fdjax.run(dataset=source, **RUN)


def test_codes_of_categories_are_no_numbers_for_a_method(rng):
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"a": ["u", "v", "w"] * 30, "b": rng.normal(size=90), "y": np.arange(90) % 2})
    for categories, refused in (("embedded", True), ("one_hot", False)):
        source = fdjax.from_frame(frame, "y", categories=categories)
        given = chosen(dataset=source, algorithm="fedftg")
        if refused:
            with pytest.raises(InputError, match=r"fedftg makes, .* but these are codes of categories; give"):
                loading.load(given)
        else:
            assert loading.load(given).source.train_x.shape == (72, 4)


TAKEN = [
    {"validation_fraction": 0.25},
    {"proxy": "held_out", "proxy_size": 20},
    {"train_fraction": 0.5},
    {"split_by_client": 0.75},
    {"labels": "2,0"},
]


@pytest.mark.parametrize("more", TAKEN)
def test_inputs_are_standardised_by_what_is_left_to_train_on(rng, more):
    x, y = arrays(rng)
    loaded = loading.load(chosen(dataset=fdjax.from_arrays(x, y, x + 0.5, y), **more)).source
    left = loaded.train_x.astype(float)
    assert len(left) != 90
    np.testing.assert_allclose(loaded.mean, left.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(loaded.std, left.std(axis=0), rtol=1e-5)
    pixels = rng.integers(0, 255, (90, 4, 4, 2)).astype(np.uint8)
    images = loading.load(chosen(dataset=fdjax.from_arrays(pixels, y, 255 - pixels, y), **more)).source
    np.testing.assert_allclose(images.mean, (images.train_x / 255).mean(axis=(0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(images.std, (images.train_x / 255).std(axis=(0, 1, 2)), rtol=1e-9)


def test_a_table_is_standardised_by_what_is_left_to_train_on(rng):
    """Numbers are; levels, and what is standardised by the user's own statistics or not at all, stay as they are."""
    pd = pytest.importorskip("pandas")
    gaps = np.where(np.arange(90) % 7 == 0, np.nan, rng.exponential(size=90))
    frame = pd.DataFrame({"a": ["u", "v", "w"] * 30, "b": gaps, "y": np.arange(90) % 2})
    source = fdjax.from_frame(frame, "y", missing="level", test=frame[:9].assign(b=0.0))
    loaded = loading.load(chosen(dataset=source, validation_fraction=0.5)).source
    b = loaded.train_x[:, 3].astype(float)
    np.testing.assert_allclose(loaded.mean, [0, 0, 0, b.mean(), 0], atol=1e-7)
    np.testing.assert_allclose(loaded.std, [1, 1, 1, b.std(), 1], rtol=1e-6)
    plain = loading.load(chosen(dataset=source, validation_fraction=0.5, standardize=False)).source
    assert (plain.mean, plain.std) == ((0.0,), (1.0,))
    ours = source._replace(mean=(0.5,), std=(2.0,), fitted=False)
    kept = loading.load(chosen(dataset=ours, validation_fraction=0.5)).source
    assert (kept.mean, kept.std) == ((0.5,), (2.0,))


def test_a_csv_from_the_command_line(rng, tmp_path):
    pd = pytest.importorskip("pandas")
    hours = rng.normal(40, 9, 300)
    frame = pd.DataFrame({"hours": hours, "job": rng.choice(["clerk", "smith"], 300), "site": ["n", "s", "e"] * 100})
    frame["income"] = np.where(hours + 8 * (frame.job == "smith") > 43, "high", "low")
    frame.iloc[:240].to_csv(tmp_path / "people.csv", index=False)
    frame.iloc[200:].to_csv(tmp_path / "later.csv", index=False)
    result = programs.run_here(
        "fdjax", f"--dataset={tmp_path}/people.csv", f"--test_data={tmp_path}/later.csv", "--target=income",
        "--owner=site", "--model=mclr", "--rounds=5", "--learning_rate=0.5", "--devices=1",
        f"--out={tmp_path}/out",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    told = "warning: people: 40 of 100 test examples have the inputs of a training example; what is tested on them was"
    assert told in result.stderr
    assert f"| fedavg, people ({tmp_path}/people.csv), natural" in result.stdout
    written = json.loads((tmp_path / "out" / "results.json").read_text())["result"]
    assert set(written["files"].values()) == {f"{tmp_path}/people.csv", f"{tmp_path}/later.csv"}
    assert written["holdings"]["n_k"] == [80, 80, 80]
    assert written["classes"] == ["high", "low"]
    assert written["final"]["central_accuracy"] > frame.income[200:].value_counts(normalize=True).max() + 0.1


@pytest.mark.skipif(not ADULT.exists(), reason="the Adult data set is not here")
def test_adult_beats_its_majority_class():
    """32,561 rows of the UCI repository as they are: no header, "?" for what is missing."""
    pytest.importorskip("pandas")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # rows that are alike
        result = fdjax.run(
            dataset=ADULT, header=False, target="14", missing="level", model="mclr", rounds=3, learning_rate=0.1,
            devices=1, progress=False,
        )  # fmt: skip
    majority = 24_720 / 32_561
    assert result.final["central_accuracy"] > majority + 0.06
