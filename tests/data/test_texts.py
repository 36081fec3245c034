"""Texts as sequences of tokens, and files of them."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from fdjax.data import own, own_test_part, partition
from fdjax.data.checked import checked
from fdjax.data.proxy import take_proxy
from fdjax.data.text_files import read_texts
from fdjax.data.texts import PADDING, UNKNOWN, from_texts
from fdjax.errors import DataWarning, InputError
from fdjax.types import Source

SPEECHES = Path(__file__).parents[1] / "own_files" / "speeches.json"
SHAKESPEARE = Path(__file__).parents[3] / "shared" / "data" / "shakespeare_8plays_roles.json.gz"


def decoded(source: Source, rows: np.ndarray) -> list[str]:
    return ["".join(source.vocabulary[token] for token in row) for row in rows]


def read(source: Source, part: str, owner: int) -> list[tuple[str, str]]:
    """(sequence, next token) of one owner."""
    x, y, owners = (getattr(source, f"{part}_{name}") for name in ("x", "y", "owner"))
    mine = owners == owner
    return list(zip(decoded(source, x[mine]), decoded(source, y[mine][:, None]), strict=True))


def test_windows_are_those_of_the_definition():
    texts = {"a": ["abcabcabca", "bcabc"], "b": "cccbbbaaac"}
    source = checked(from_texts(texts, length=3, stride=2, test_fraction=0.25))
    for owner, text in enumerate(("abcabcabca\nbcabc", "cccbbbaaac")):
        end = len(text) - round(len(text) / 4)
        for part, its in (("train", text[:end]), ("test", text[end:])):
            if len(its) < 4:
                continue
            expected = [(its[i : i + 3], its[i + 3]) for i in range(0, len(its) - 3, 2) if its[i + 3] != "\n"]
            assert read(source, part, owner)[-len(expected) :] == expected
    assert source.train_x.dtype == np.int32
    assert source.vocabulary[-2:] == (UNKNOWN, PADDING)


def test_training_and_test_share_no_token():
    letters = [chr(0x4E00 + i) for i in range(400)]  # each once, so that a place in the text is known by its token
    text = "".join(letters)
    source = from_texts([text], length=10, test_fraction=0.2, vocabulary=letters)
    train, test = ({*x.ravel(), *y} for x, y in ((source.train_x, source.train_y), (source.test_x, source.test_y)))
    assert train == {*range(320)}
    assert test == {*range(320, 400)}


def test_a_vocabulary_is_of_training_text_alone():
    with pytest.warns(DataWarning, match="an unknown token follows 1 of 2 sequences to test on, which are left out"):
        source = from_texts({"a": "xyxyxyxyxxzxzy"}, length=2, test_fraction=4 / 14)
    assert source.vocabulary == ("x", "y", UNKNOWN, PADDING)
    assert source.num_classes == 2
    assert read(source, "test", 0) == [("x" + UNKNOWN, "y")]
    with pytest.raises(InputError, match="no sequence is left to test on"):  # z is unknown, so nothing to predict
        from_texts({"a": "xyxyxyxyxxzz"}, length=2, test_fraction=2 / 12)


def test_unknown_tokens_are_read_and_not_predicted():
    with pytest.warns(DataWarning) as told:
        source = from_texts(["abcabcabcabc", "abcabc"], length=2, vocabulary=["a", "b"], test_fraction=0.3)
    text = "abcabcabcabc\nabcabc"
    after = {"train": text[2:13], "test": text[15:]}
    assert [str(each.message).partition(": ")[2].partition(" on,")[0] for each in told] == [
        f"an unknown token follows {sum(c not in 'ab' for c in its)} of {len(its)} sequences to {part}"
        for part, its in after.items()
    ]
    assert {*source.train_y} == {0, 1}
    assert 2 in source.train_x
    assert 3 not in source.train_x
    with pytest.warns(DataWarning, match="an unknown token follows"):
        by_number = from_texts(["aaabbc" * 4], length=2, vocabulary=2, test_fraction=0.3)
    assert by_number.vocabulary == ("a", "b", UNKNOWN, PADDING)


def test_a_short_text_has_padding_in_front():
    with pytest.warns(DataWarning, match="1 of 3 owners, such as 'c', have no sequence to train or test on and are"):
        source = from_texts({"a": "abab", "b": "ab" * 20, "c": "b"}, length=6, test_fraction=0.3)
    first = source.train_x[source.train_owner == 0]
    assert decoded(source, first) == [PADDING * 4 + "ab"]
    assert source.owners == ("a", "b")
    assert source.num_classes == 2


def test_owners_of_the_test_part_alone_are_in_the_test_set():
    """They come behind those that train, so that clients are numbered as before, as in LEAF's split by user."""
    text = "abcabcabcacb"
    tested = {"new": text, "short": text, "a": text}
    with pytest.warns(DataWarning, match="2 of 4 owners, such as 'short', have no sequence to train on; they are in"):
        source = from_texts({"b": text, "short": "a", "a": text}, length=3, test_texts=tested)
    assert source.owners == ("b", "a", "short", "new")
    assert ({*source.train_owner}, {*source.test_owner}) == ({0, 1}, {1, 2, 3})
    for owner in (1, 2, 3):
        assert read(source, "test", owner) == [(text[i : i + 3], text[i + 3]) for i in range(9)]
    holdings = partition("natural", source.train_y, None, 0, owner=source.train_owner, num_classes=3)
    own_part = own_test_part(
        source.train_y, holdings, source.test_y, 3, 0, train_owner=source.train_owner, test_owner=source.test_owner
    )
    assert len(own_part.count) == 2
    assert {*source.test_owner[own_part.order[own_part.start[1] :]]} == {1}
    with pytest.warns(DataWarning, match="1 of 2 owners, such as 'new'"):
        apart = from_texts({"a": text}, length=3, test_texts={"new": text})
    assert ({*apart.train_owner}, {*apart.test_owner}) == ({0}, {1})


def test_without_a_test_part_training_is_tested():
    source = from_texts(["abab" * 9], length=4, test_fraction=0)  # as proxy data are read
    np.testing.assert_array_equal(source.test_x, source.train_x)


def test_words():
    source = from_texts(["Don't stop, don't stop, stop! " * 4], unit="word", length=4, test_fraction=0.3)
    assert {*source.vocabulary} == {"Don't", "don't", "stop", ",", "!", UNKNOWN, PADDING}


def test_a_file_of_speeches():
    source = checked(read_texts(SPEECHES, SPEECHES.name, length=40, stride=3))
    content = json.loads(SPEECHES.read_text())["user_data"]
    assert source.name == "speeches.json"
    assert len({*source.train_owner}) == len(content)
    first, short = ("\n".join([*content.values()][k]) for k in (0, -1))
    assert read(source, "train", 0)[0] == (first[:40], first[40])
    end = len(short) - round(len(short) / 5)
    assert read(source, "train", len(content) - 1) == [(PADDING * (41 - end) + short[: end - 1], short[end - 1])]


def test_leaf_sequences_that_overlap_are_left_out_between_the_parts(tmp_path):
    text = "".join(chr(0x4E00 + i) for i in range(100)) * 3
    x = [text[i : i + 5] for i in range(0, 200, 2)]
    y = [text[i + 5] for i in range(0, 200, 2)]
    path = tmp_path / "leaf.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"users": ["u"], "user_data": {"u": {"x": x, "y": y}}}).encode()))
    source = checked(read_texts(path, "leaf", length=5, test_fraction=0.2))
    assert len(source.test_y) == 20
    assert len(source.train_y) == 80 - 2
    assert decoded(source, source.train_x[-1:])[0] + decoded(source, source.train_y[-1:, None])[0] == text[154:160]
    assert decoded(source, source.test_x[:1]) == [text[160:165]]


def test_a_plain_text(tmp_path):
    path = tmp_path / "it.txt"
    path.write_text("so long lives this, and this gives life to thee. " * 5)
    source = checked(read_texts(path, "it", unit="word", length=3))
    assert source.train_owner is None
    assert source.num_classes == 11


@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason="the plays are not here")
def test_shakespeare_by_role():
    source = checked(read_texts(SHAKESPEARE, "plays", stride=40))
    assert len({*source.train_owner}) > 280
    assert source.train_x.shape[1] == 80
    assert 55 < source.num_classes < 70
    assert len(source.test_y) < 0.3 * len(source.train_y)


def test_texts_in_arrays_and_series_are_lists_of_them():
    pd = pytest.importorskip("pandas")
    texts = ["abcabd" * 4, "bcdbca" * 4]
    expected = from_texts(texts, length=4).train_x
    for given in (np.array(texts), np.array(texts, object), pd.Series(texts, index=[7, 7])):
        np.testing.assert_array_equal(from_texts(given, length=4).train_x, expected)
    owned = from_texts({"a": pd.Series(texts)}, length=4)
    assert (owned.owners, owned.train_x.tolist()) == (("a",), expected.tolist())


def test_proxy_noise_is_uniform_over_tokens():
    source = from_texts(["ab" * 50], length=4)
    _, proxy = take_proxy(source, "noise", 2000, 0)
    counts = np.bincount(proxy.x.ravel(), minlength=4)
    assert proxy.x.dtype == np.int32
    assert len(counts) == 4
    assert not proxy.labelled
    assert np.all(np.abs(counts / proxy.x.size - 0.25) < 0.02)
    kept, held = take_proxy(source, "held_out", 20, 0)
    assert held.labelled
    assert held.x.dtype == np.int32
    assert len(kept.train_y) + 20 == len(source.train_y)


def test_a_file_as_proxy_data_is_read_with_the_vocabulary_of_the_data_set(tmp_path):
    path = tmp_path / "public.txt"
    path.write_text("Fair Helena, they say: quite Xenial!")
    source = read_texts(SPEECHES, "speeches", length=8, stride=4)
    with pytest.warns(DataWarning, match="an unknown token follows 1 of 28 sequences to train on"):  # the X, once
        kept, proxy = take_proxy(source, own.resolve(str(path), "proxy"), 10, 0)
    assert kept is source
    assert proxy.labelled
    assert proxy.x.shape == (10, 8)
    assert all(text in path.read_text() for text in decoded(source, proxy.x) if UNKNOWN not in text)
    images = Source("images", np.zeros((2, 8), np.float32), np.zeros(2, int), *[np.zeros((2, 8))] * 2, 2)
    with pytest.raises(InputError, match="has texts, but --dataset=images has to be read alike"):
        take_proxy(images, own.resolve(str(path), "proxy"), 1, 0)


_TEXT = ["to be or not to be, that is the question", "whether tis nobler in the mind"]
_USER = {"x": ["abc", "bcd"], "y": ["d", "e"]}


@pytest.mark.parametrize(
    ("given", "options", "error"),
    [
        ("a text", {}, r"this is a str; expected \{owner"),
        (7, {}, "this is an int; expected"),
        ({}, {}, "there are no texts; expected"),
        ([], {}, "training texts have no token; expected"),
        ({"a": [1, 2]}, {}, "'a' has an int at 0; expected"),
        ({"a": None}, {}, "'a' has None; expected"),
        ({"a": [None, "abc"]}, {}, "texts: 'a' has None at 0; expected"),
        (["abc", None], {"name": "talks"}, "talks: the list has None at 1; expected"),
        (np.array([["abc", "abd"]]), {}, "this is an ndarray; expected"),
        (_TEXT, {"test_texts": ["abc", 3]}, "texts, to test on: the list has an int at 1; expected"),
        (["aaaaaaaaaa"], {"length": 2}, "the training texts have 'a' alone; expected two"),
        (_TEXT, {"unit": "letter"}, "unknown unit of texts 'letter'"),
        (_TEXT, {"length": 0}, "length=0: expected a whole number of at least 1"),
        (_TEXT, {"stride": 0.5}, "stride=0.5: expected a whole number"),
        (_TEXT, {"test_fraction": 1.0}, "test_fraction=1.0: expected a number from 0 to below 1"),
        (_TEXT, {"test_fraction": "a fifth"}, "test_fraction='a fifth': expected"),
        (_TEXT, {"vocabulary": 1}, "vocabulary=1: expected a whole number of at least 2"),
        (_TEXT, {"vocabulary": ["a"]}, r"vocabulary=\['a'\]: expected a number, or a list"),
        (_TEXT, {"vocabulary": ["a", "b", "a"]}, "'a' is there twice"),
        (_TEXT, {"vocabulary": ["a", PADDING]}, "'<padding>' is there twice"),
        (_TEXT, {"vocabulary": ["Q", "Z"]}, "no sequence is left to train on"),
        (["ab" * 1_000_000], {"length": 10_000}, "need 64.0 GB; give a larger stride"),
    ],
)
def test_bad_texts_are_one_line(given, options, error):
    with pytest.raises(InputError, match=error) as caught:
        from_texts(given, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "options", "error"),
    [
        ("a.json", "{", {}, "is no JSON"),
        ("a.json", "[1, 2]", {}, "has no users with data; expected"),
        ("a.json", '{"user_data": {}}', {}, "has no users with data"),
        ("a.json", '{"user_data": {"a": [null, "abc"]}}', {}, "a.json: 'a' has None at 0; expected"),
        ("a.json", '{"user_data": {"u": 3}}', {}, "has users of another form"),
        ("a.json", json.dumps({"user_data": {"u": {"x": ["ab"], "y": []}}}), {}, "not as many x as y, both lists"),
        ("a.json", json.dumps({"user_data": {"u": {"x": ["ab"], "y": ["cd"]}}}), {}, "other x and y than texts"),
        ("a.json", json.dumps({"user_data": {"u": {"x": [[1.0]], "y": [3]}}}), {}, "other x and y than texts"),
        (
            "a.json",
            json.dumps({"user_data": {"u": {"x": ["ab", "a"], "y": ["c", "b"]}}}),
            {"length": 2},
            "has an x of 1 char",
        ),
        ("a.json", json.dumps({"user_data": {"u": _USER}}), {"stride": 8}, "stride=8 means nothing; leave it out"),
        ("a.json", json.dumps({"user_data": {"u": _USER}}), {"length": 3}, "left to test on"),
        ("a.txt", b"\xff\xfe\x00", {}, r"is not UTF-8 \(at byte 0\)"),
        ("a.txt.gz", b"no gzip", {}, "cannot be read"),
        ("a.txt", "", {}, "a.txt: the training texts have no token"),
    ],
)
def test_bad_files_are_one_line(tmp_path, name, content, options, error):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=error) as caught:
        read_texts(path, path.name, **options)
    assert "\n" not in str(caught.value)


def test_a_missing_file():
    with pytest.raises(InputError, match="cannot be read"):
        read_texts(Path("nowhere.txt"), "nowhere")


_SOURCE = from_texts(["ab" * 20], length=4)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"vocabulary": ()}, "int32, as sequences of tokens are, but the source has no vocabulary"),
        ({"train_x": _SOURCE.train_x + 3}, "tokens reach from 3 to 4, first in example 0; expected 0 to 3"),
        ({"train_x": _SOURCE.train_x - 1}, "tokens reach from -1 to 0"),
        ({"test_x": _SOURCE.test_x.astype(np.float32)}, r"float32 \(4, 4\), but the source has a vocabulary of 4"),
        ({"train_x": _SOURCE.train_x.astype(np.int64)}, "int64 .* expected int32"),
    ],
)
def test_tokens_that_are_none(change, error):
    with pytest.raises(InputError, match=error):
        checked(_SOURCE._replace(**change))


def test_generated_proxy_data_are_refused():
    with pytest.raises(InputError, match="makes images, but texts has tokens"):
        take_proxy(_SOURCE, "generated", 10, 0)
