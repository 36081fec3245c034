"""What is no data set of a user's own: each is told in one line that says what to do."""

import numpy as np
import pytest

import fdjax
from fdjax import data
from fdjax.errors import InputError
from fdjax.types import Source

X, Y = np.random.default_rng(0).normal(size=(30, 2)), np.arange(30) % 2
TEST = {"x_test": X + 1, "y_test": Y}
NAN, BIG = np.where(X > 2, np.nan, X), np.where(X > 2, 1e300, X)
NAN[0], BIG[0] = np.nan, 1e300


def replaced(values, first):
    return [first, *list(values)[1:]]


ARRAYS = {
    "inputs of one dimension": ({"x": X[:, 0]}, r"x has shape \(30,\), expected \[N, ...\]; give \[N, 1\] for one"),
    "no examples": ({"x": X[:0], "y": Y[:0]}, r"x has shape \(0, 2\), and so no numbers"),
    "no features": ({"x": X[:, :0]}, r"x has shape \(30, 0\), and so no numbers"),
    "ragged": ({"x": [[1, 2], [3]], "y": [0, 1]}, "x is no array .*; give examples of one shape"),
    "objects": ({"x": np.array([["a", 1]] * 30, object)}, "x holds object of shape"),
    "texts": ({"x": np.array([["a", "b"]] * 30)}, "x holds <U1 of shape"),
    "complex": ({"x": X + 1j}, "x holds complex128"),
    "dates": ({"x": np.zeros((30, 2), "datetime64[D]")}, "x holds datetime64"),
    "NaN": ({"x": NAN}, r"inputs are not finite in \d of 30 examples, the first of them x\[0\]; mend"),
    "NaN to test on": (
        {**TEST, "x_test": np.vstack([X, [[0, np.nan]]]), "y_test": [*Y, 1]},
        r"not finite in 1 of 31 .* them x_test\[30\]",
    ),
    "infinite": ({"x": np.where(np.isnan(NAN), np.inf, X)}, "inputs are not finite"),
    "beyond float32": ({"x": BIG}, "x has numbers beyond float32's 3.4e38; scale them down"),
    "fewer labels": ({"y": Y[:-1]}, "x has 30 examples, but y has 29; give one each"),
    "one-hot labels": ({"y": np.eye(2)[Y]}, r"y has shape \(30, 2\), expected \[N\]; of one-hot labels give y.argmax"),
    "no labels": ({"y": None}, r"y has shape \(\), expected \[N\]"),
    "NaN labels": ({"y": replaced(Y, np.nan)}, "y is NaN or infinite in 1 of 30 examples"),
    "missing labels": ({"y": replaced("ab" * 15, None)}, "y is missing in 1 of 30 examples"),
    "fractional owners": ({"owner": Y + 0.5}, "owner holds 0.5, expected whole numbers or names$"),
    "fractional labels": ({"y": Y + 0.5}, "y holds 0.5, expected whole numbers or names"),
    "mixed labels": ({"y": np.array(replaced("ab" * 15, 3), object)}, r"y holds values of several kinds .*int, str"),
    "complex labels": ({"y": Y + 1j}, "y holds complex128, expected whole numbers, texts or bools"),
    "one label": ({"y": 0 * Y}, "all labels are 0; expected two or more classes"),
    "a regression": ({"x": np.ones((300, 1)), "y": np.arange(300)}, "300 different labels of 300 examples; is it"),
    "inputs to test alone": ({"x_test": X}, "x_test alone; give both x_test and y_test, or none"),
    "labels to test alone": ({"y_test": Y}, "y_test alone; give both"),
    "test inputs of another shape": ({**TEST, "x_test": X[:, :1]}, r"x has examples of shape \(2,\), x_test \(1,\)"),
    "images in two forms": (
        {**TEST, "x": np.zeros((30, 2), np.uint8)}, "x is uint8, x_test float64: images in two forms",
    ),
    "test labels of another kind": ({**TEST, "y_test": ["a"] * 30}, "y holds numbers, but y_test texts"),
    "test data and a fraction": ({**TEST, "test_fraction": 0.5}, "test_fraction=0.5 beside test data"),
    "a fraction of all": ({"test_fraction": 1.0}, "test_fraction=1.0: expected a number above 0 and below 1"),
    "a fraction as text": ({"test_fraction": "0.2"}, "test_fraction='0.2': expected a number"),
    "a fraction of none": ({"test_fraction": 0.01}, "leaves none to test; give more of either"),
    "a fraction that is False": ({"test_fraction": False}, "test_fraction=False: expected a number from 0 to below 1"),
    "False beside test data": ({**TEST, "test_fraction": False}, "test_fraction=False: expected a number from 0"),
    "a fraction of NumPy's False": ({"test_fraction": np.False_}, "test_fraction=.*False.*: expected a number from 0"),
    "a list of fractions": ({"test_fraction": [0.2]}, r"test_fraction=\[0.2\]: expected a number above 0 and below 1"),
    "by something else": ({"test_by": "day"}, "unknown test_by 'day'; known: label, owner"),
    "by owner without": ({"test_by": "owner"}, "test_by=owner needs the owner of each example"),
    "fewer owners": ({"owner": Y[1:]}, "x has 30 examples, but owner has 29"),
    "NaN owners": ({"owner": replaced(Y, np.nan)}, "owner is NaN or infinite in 1 of 30 examples"),
    "test owners alone": ({**TEST, "owner_test": Y}, "owner_test needs owner and x_test"),
    "owners in two forms": ({**TEST, "owner": Y, "owner_test": ["a"] * 30}, "owner holds numbers, but owner_test"),
    "test ids alone": ({"ids_test": Y}, "ids_test needs ids and x_test"),
    "a name that is none": ({"name": 3}, "name=3, labels='': expected texts"),
    "a negative seed": ({"seed": -1}, "seed=-1: expected a whole number of at least 0"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), ARRAYS.values(), ids=ARRAYS)
def test_arrays(change, message):
    with pytest.raises(InputError, match=message) as told:
        fdjax.from_arrays(**{"x": X, "y": Y} | change)
    assert "\n" not in str(told.value)


def column(**columns):
    return lambda frame: frame.assign(**columns)


TABLES = {
    "arrays": (lambda frame: X, {}, "frame is an ndarray, expected a pandas DataFrame; give arrays to"),
    "no rows": (lambda frame: frame[:0], {}, "frame has no rows"),
    "columns of one name": (lambda frame: frame.set_axis(["a", "a", "y"], axis=1), {}, "more than one column called a"),
    "no such target": (None, {"target": "yy"}, r"unknown column of frame 'yy' \(did you mean 'y'\?\)"),
    "no target": (None, {"target": None}, "frame: target=None, expected the column of labels; give one of a, b, y"),
    "no such owner": (None, {"owner": "who"}, "unknown column of frame 'who'"),
    "one column for two things": (None, {"owner": "y"}, "target, owner, row_id, test and ignore name y, y; expected"),
    "ignored target": (None, {"ignore": ["y"]}, "name y, y; expected different ones"),
    "nothing left": (None, {"ignore": "a,b"}, "frame has no column beside the target and those left out"),
    "missing values": (column(a=NAN[:, 0]), {}, r"missing values among 30 rows: a \d+; give missing=drop, mean"),
    "a missing target": (
        lambda frame: frame.assign(y=frame.y.where(frame.index > 0)), {"missing": "mean"}, "y 1; give missing=drop, or",
    ),
    "nothing but missing": (column(a=np.nan), {"missing": "mean"}, "'a' is missing in all training rows; leave it out"),
    "dropped all": (column(a=np.nan), {"missing": "drop"}, "every row has a missing value"),
    "infinite": (column(a=replaced(X[:, 0], np.inf)), {}, "frame: column 'a' is infinite in row 1; mend or"),
    "infinite far down": (column(a=[*X[:28, 0], np.inf, -np.inf]), {}, "infinite in 2 rows, the first of them row 29"),
    "a list for a target": (None, {"target": ["y"]}, r"target=\['y'\] is a list, expected a column's name; give 'y'"),
    "an array for an owner": (
        None, {"owner": np.arange(600) % 3},
        r"owner is an ndarray, expected a column's name; .* frame.assign\(owner=...\), and give owner='owner'",
    ),
    "a mask for a test": (None, {"test": [True] * 30}, "test is a list, expected a fraction, another DataFrame or"),
    "an owner of parts": (column(w=Y + 0.5), {"owner": "w"}, "owner column 'w' holds 0.5, expected .* or names$"),
    "a target of parts": (column(y=Y + 0.5), {}, r"target column 'y' holds 0.5, .* names \(fdjax classifies\)"),
    "a cell that is no number": (
        column(a=replaced([str(i % 12) for i in range(30)], "x")), {},
        r"'a' has numbers in 29 of 30 rows, but 'x' in row 1; write numbers there, or make the column categories in "
        r"Python, by frame.astype\(\{'a': 'category'\}\)",
    ),
    "cells that are no numbers": (
        column(a=[*(str(i % 28) for i in range(27)), "x", "x", "x"]), {}, "but 'x' in 3 rows, the first of them row 28",
    ),
    "thousands": (
        column(a=["1,057", "12,001,000.5", "3"] * 10), {},
        "in 10 of 30 rows, but '1,057' in 20 rows, .* there, without commas, or",
    ),
    "decimal commas": (column(a=["1,5", "-12,25"] * 15), {}, "numbers in 0 of 30 rows, but '1,5' in 30 rows"),
    "a cell that is no date": (
        column(a=[*(f"2026-01-{i + 1:02}" for i in range(29)), "31.1."]), {},
        "dates in 29 of 30 rows, but '31.1.' in row 30",
    ),
    "complex": (column(a=X[:, 0] + 1j), {}, "column 'a' holds complex numbers"),
    "lists": (column(a=[[1]] * 30), {}, "column 'a' holds list; expected numbers, or texts, or dates, of one kind"),
    "texts and numbers": (column(a=replaced(["b"] * 30, 1)), {}, "column 'a' holds int, str; expected"),
    "ids": (column(a=[f"k{i}" for i in range(30)]), {}, "'a' has .* different values in .* training rows, as"),
    "too many levels": (
        lambda frame: frame.loc[frame.index.repeat(1000)].reset_index(drop=True).assign(
            a=lambda each: (each.index // 2).astype(str)
        ),
        {"test": 0}, "one-hot codes are 15,001 inputs, 15,000 of them of column 'a'; leave it out",
    ),
    "another way": (None, {"missing": "guess"}, "unknown missing 'guess'; known: drop, level, mean, refuse"),
    "another coding": (None, {"categories": "onehot"}, r"unknown categories 'onehot' \(did you mean 'one_hot'\?\)"),
    "a column of two kinds to test by": (column(s=Y + 1), {"test": "s"}, "column 's' has 1, 2; expected train"),
    "nothing to test": (column(s=False), {"test": "s"}, "column 's' makes 0 of 30 rows test rows"),
    "test rows without a column": (None, {"test": "tests"}, "frame's test rows: no column b, which the"),
    "a test that is False": (None, {"test": False}, "test_fraction=False: expected a number from 0 to below 1"),
    "a test that is True": (None, {"test": True}, "test_fraction=True: expected a number from 0 to below 1"),
    "ignore that is none": (None, {"ignore": 3}, "ignore=3: expected names of columns"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "options", "message"), TABLES.values(), ids=TABLES)
def test_tables(change, options, message):
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"a": X[:, 0], "b": X[:, 1], "y": Y})
    frame = frame if change is None else change(frame)
    options = {"test": frame[["a", "y"]]} if options == {"test": "tests"} else options
    with pytest.raises(InputError, match=message) as told:
        fdjax.from_frame(frame, **{"target": "y"} | options)
    assert "\n" not in str(told.value)


ROWS = "".join(f"{i},{i % 3},{'ab'[i % 2]}\n" for i in range(30))
FILES = {
    "no target": ("a.csv", "x,z,y\n" + ROWS, {}, "a.csv needs its column of labels, --target=...; it has x, z, y"),
    "no header": ("a.csv", "0,5,a\n" + ROWS, {"target": "y"}, r"its first row has numbers \(0, 5\), as data have"),
    "columns of one name": ("a.csv", "x,x,y\n" + ROWS, {"target": "y"}, "more than one column called x"),
    "rows of more cells": ("a.csv", "x,y\n" + ROWS, {"target": "y"}, "a.csv cannot be read as a table: "),
    "a row of more cells": ("a.csv", "x,z,y\n" + ROWS + "1,2,3,4\n", {"target": "y"}, "cannot be read as a table"),
    "an empty file": ("a.csv", "", {"target": "y"}, "a.csv cannot be read as a table: .*expected UTF-8 rows"),
    "another encoding": ("a.csv", b"x,z,y\n\xff\xfe,1,2\n", {"target": "y"}, "a.csv cannot be read as a table: "),
    "no gzip": ("a.csv.gz", "x,z,y\n" + ROWS, {"target": "y"}, "a.csv.gz cannot be read as a table: "),
    "no parquet": ("a.parquet", "x", {"target": "y"}, "a.parquet cannot be read as a table: "),
    "no such column": ("a.csv", "x,z,y\n" + ROWS, {"target": "income"}, "unknown column of a 'income'; known: x, y, z"),
    "no such option": ("a.csv", "x,z,y\n" + ROWS, {"image_size": 3}, "unknown option of a table"),
    "test data and a fraction": (
        "a.csv", "x,z,y\n" + ROWS, {"target": "y", "test_data": "a.csv", "test_fraction": 0.5}, "beside test data a",
    ),
    "no npz": ("a.npz", "x", {}, "a.npz' is not an npz of plain arrays: it is no npz, but another kind of file; write"),
    "an empty npz": ("a.npz", "", {}, "a.npz' is not an npz of plain arrays: it is empty; write"),
    "an npz cut short": ("a.npz", b"PK\x03\x04" + b"0" * 99, {}, "a.npz' is not an npz of plain arrays: it is "),
    "a table with a bad cell": (
        "a.csv", "x,z,y\n" + ROWS.replace("\n3,", "\nthree,", 1), {"target": "y"}, "a: column 'x' has numbers in 29 of",
    ),
    "an owner of parts": (
        "a.csv", "x,z,y\n" + ROWS.replace("\n3,", "\n.5,", 1), {"target": "y", "owner": "x"}, "owner column 'x' holds",
    ),
    "another kind of file": ("a.xlsx", "x", {}, "a.xlsx is of no kind that can be read; expected arrays by name"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "options", "message"), FILES.values(), ids=FILES)
def test_files(tmp_path, name, content, options, message):
    pytest.importorskip("pandas")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    options = {n: tmp_path / v if n == "test_data" else v for n, v in options.items()}
    with pytest.raises(InputError, match=message) as told:
        data.load(tmp_path / name, **options)
    assert "\n" not in str(told.value)


NPZ = {
    "no labels": ({"x": X}, "a.npz has no y; it has x"),
    "nothing": ({}, "a.npz has no x and no y; it has nothing"),
    "another array": ({"x": X, "y": Y, "owners": Y}, r"unknown array of a.npz 'owners' \(did you mean 'owner'\?\)"),
    "infinite": ({"x": np.where(X[3, 0] == X, np.inf, X), "y": Y}, r"not finite in 1 of 30 .* them x\[3\]; mend"),
    "objects": ({"x": X, "y": np.array([None] * 30)}, "is not an npz of plain arrays: it holds objects"),
}


@pytest.mark.parametrize(("arrays", "message"), NPZ.values(), ids=NPZ)
def test_npz(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=message):
        data.load(tmp_path / "a.npz")


SOURCE = Source("mine", X.astype(np.float32), Y.astype(np.int32), X.astype(np.float32), Y.astype(np.int32), 2)
GIVEN = {
    "a number": (3, {}, "--dataset: an int is no data set; give a name, a path, or what fdjax.from_arrays"),
    "an array": (X, {}, "--dataset: an ndarray is no data set"),
    "no such name": ("mnist_simple", {}, r"unknown data set 'mnist_simple' \(did you mean 'mnist_sample'\?\)"),
    "no such file": ("no/such.csv", {}, "--dataset=no/such.csv: there is no such file or folder"),
    "a name of another process": (
        "mine@0123456789ab",
        {},
        "was a value, or a file that is not there now; give",
    ),
    "a list in a Source": (SOURCE._replace(train_x=[[1.0]]), {}, "mine: a Source holds NumPy arrays"),
    "labels beyond the classes": (SOURCE._replace(num_classes=1), {}, "mine has num_classes=1; expected 2 or more"),
    "an option of a value": (SOURCE, {"target": "y"}, "takes no options, but 'target' was given"),
}


@pytest.mark.parametrize(("given", "options", "message"), GIVEN.values(), ids=GIVEN)
def test_what_is_no_data_set(given, options, message):
    with pytest.raises(InputError, match=message) as told:
        data.load(given, **options)
    assert "\n" not in str(told.value)
