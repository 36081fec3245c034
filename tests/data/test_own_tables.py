"""Tables of a user's own: what columns become, from training rows alone, and files that hold them."""

import gzip
import warnings

import numpy as np
import pytest

import fdjax
from fdjax import data
from fdjax.errors import DataWarning, InputError

pd = pytest.importorskip("pandas")

N = 60


def table(rng, **more):
    columns = {
        "age": rng.integers(18, 80, N) * 1.0,
        "job": rng.choice(["clerk", "nurse", "smith"], N),
        "member": rng.random(N) < 0.5,
        "since": pd.Timestamp("2020-01-01") + pd.to_timedelta(rng.integers(0, 900, N), "D"),
        "income": np.array(["low", "high"])[np.arange(N) % 2],
    }
    return pd.DataFrame(columns | more)


def parts(frame, rows=40):
    return frame.iloc[:rows], frame.iloc[rows:]


def quiet(*args, **named):
    """Of small tables, rows may well be alike."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        return fdjax.from_frame(*args, **named)


def test_numbers_are_standardised_by_training_rows_alone(rng):
    frame = table(rng)
    train, test = parts(frame)
    test = test.assign(age=test.age + 1000)
    source = quiet(train, "income", test=test)
    mean, std = train.age.to_numpy().mean(), train.age.to_numpy().std()
    np.testing.assert_allclose(source.train_x[:, 0], (train.age - mean) / std, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(source.test_x[:, 0], (test.age - mean) / std, rtol=1e-5)
    np.testing.assert_allclose(quiet(train, "income", test=test, standardize=False).train_x[:, 0], train.age)
    assert (source.mean, source.std) == ((0.0,), (1.0,))


def test_large_numbers_keep_their_digits(rng):
    """As float32 they would be the same."""
    seconds = 1.7e9 + np.arange(N) % 7
    source = quiet(table(rng, at=seconds), "income", test=0)
    expected = (seconds - seconds.mean()) / seconds.std()
    np.testing.assert_allclose(source.train_x[:, source.encoding.names.index("at")], expected, rtol=1e-6)


def test_categories_one_hot_and_levels_of_test_rows_alone(rng):
    train, test = parts(table(rng))
    test = test.assign(job=["pilot"] * 5 + test.job.tolist()[5:])
    with pytest.warns(DataWarning, match=r"20 test rows have levels that no training row has \(job 5\)"):
        source = fdjax.from_frame(train, "income", test=test)
    assert source.encoding.names == ("age", "job=clerk", "job=nurse", "job=smith", "member", "since")
    hot = source.train_x[:, 1:4]
    np.testing.assert_array_equal(hot, train.job.to_numpy()[:, None] == ["clerk", "nurse", "smith"])
    assert not source.test_x[:5, 1:4].any()
    assert source.categories == ()


def test_categories_as_codes(rng):
    train, test = parts(table(rng))
    test = test.assign(job=["pilot"] * 5 + test.job.tolist()[5:])
    source = quiet(train, "income", test=test, categories="embedded")
    assert source.categories == (0, 4, 0, 0)
    levels = np.array(["", "clerk", "nurse", "smith"])
    np.testing.assert_array_equal(levels[source.train_x[:, 1].astype(int)], train.job)
    assert set(source.test_x[:5, 1]) == {0}


def test_bools_and_dates_are_numbers(rng):
    frame = table(rng)
    text = frame.assign(since=frame.since.dt.strftime("%Y-%m-%d"))
    plain, parsed = quiet(frame, "income", test=0), quiet(text, "income", test=0)
    np.testing.assert_allclose(plain.train_x, parsed.train_x, atol=1e-6)
    days = (frame.since - frame.since.min()).dt.days.to_numpy()
    np.testing.assert_allclose(plain.train_x[:, -1], (days - days.mean()) / days.std(), atol=1e-5)
    member = frame.member.to_numpy(float)
    np.testing.assert_allclose(plain.train_x[:, -2], (member - member.mean()) / member.std(), rtol=1e-5)


def holes(rng):
    frame = table(rng)
    frame.loc[[1, 3, 5], "age"] = np.nan
    frame.loc[[2, 3], "job"] = None
    return frame


def test_missing_values_are_refused_with_their_counts(rng):
    with pytest.raises(
        InputError, match="missing values among 60 rows: age 3, job 2; give missing=drop, mean or level"
    ):
        fdjax.from_frame(holes(rng), "income")


def test_missing_values_dropped(rng):
    with pytest.warns(DataWarning, match="4 of 60 rows left out for their missing values"):
        source = fdjax.from_frame(frame := holes(rng), "income", missing="drop", test=0)
    np.testing.assert_array_equal(source.train_x, quiet(frame.dropna(), "income", test=0).train_x)


def test_missing_values_by_mean_and_most_frequent_level(rng):
    frame = holes(rng)
    source = quiet(frame, "income", missing="mean", test=0)
    filled = frame.assign(age=frame.age.fillna(frame.age.mean()), job=frame.job.fillna(frame.job.mode()[0]))
    scale = filled.age.std(ddof=0) / frame.age.std(ddof=0)  # the statistics are of what is there
    np.testing.assert_allclose(source.train_x[:, 0], quiet(filled, "income", test=0).train_x[:, 0] * scale, atol=1e-5)
    np.testing.assert_array_equal(source.train_x[:, 1:4], quiet(filled, "income", test=0).train_x[:, 1:4])


def test_missing_values_as_a_level(rng):
    frame = holes(rng)
    source = quiet(frame, "income", missing="level", test=0)
    names = source.encoding.names
    assert names[:6] == ("age", "age is missing", "job=clerk", "job=nurse", "job=smith", "job=missing")
    np.testing.assert_array_equal(source.train_x[:, 1], frame.age.isna())
    np.testing.assert_array_equal(source.train_x[:, 5], frame.job.isna())
    np.testing.assert_allclose(source.train_x[[1, 3, 5], 0], 0, atol=1e-7)
    embedded = quiet(frame, "income", missing="level", test=0, categories="embedded")
    assert embedded.categories == (0, 0, 5, 0, 0)
    assert embedded.train_x.shape[1] == len(embedded.encoding.names) == 5


@pytest.mark.parametrize("column", [["train", "test"], [False, True], [0, 1]])
def test_a_column_says_which_rows_are_tested_on(rng, column):
    rows = np.arange(N) % 5 == 0
    frame = table(rng, split=np.array(column)[rows.astype(int)])
    source, plain = quiet(frame, "income", test="split"), frame.drop(columns="split")
    expected = quiet(plain[~rows], "income", test=plain[rows])
    assert len(source.test_x) == 12
    for name in ("train_x", "train_y", "test_x", "test_y"):
        np.testing.assert_array_equal(getattr(source, name), getattr(expected, name))


def test_owners_and_ids_are_no_inputs(rng):
    frame = table(rng, site=np.array(["n", "s", "e"])[np.arange(N) % 3], key=[*range(N - 1), 0])
    with pytest.warns(DataWarning, match=r"1 examples have the id|1 test examples that of a training"):
        source = fdjax.from_frame(frame, "income", "site", row_id="key", test_by="owner")
    assert source.owners == ("e", "n", "s")
    assert not {"site", "key"} & {*source.encoding.names}
    assert source.train_x.shape == (48, 6)
    np.testing.assert_array_equal(np.bincount(source.test_owner), [4, 4, 4])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"key": np.arange(N)}, "column 'key' has another whole number in each row, as an id has"),
        ({"same": 3.0}, "the same in all training rows, so that nothing is learned from it: same"),
        ({"same": "x"}, "the same in all training rows, so that nothing is learned from it: same"),
    ],
)
def test_what_is_odd_is_told(rng, columns, message):
    with pytest.warns(DataWarning, match=message):
        fdjax.from_frame(table(rng, **columns), "income", test=0)


def test_rows_to_predict_on(rng):
    train, test = parts(table(rng))
    source = quiet(train, "income", test=test)
    np.testing.assert_array_equal(source.encoding.inputs(test.drop(columns="income")), source.test_x)
    with pytest.raises(InputError, match="no column job, which the training rows have"):
        source.encoding.inputs(test.drop(columns="job"))
    with pytest.raises(InputError, match="'age' holds numbers in the training rows, but texts here"):
        source.encoding.inputs(test.assign(age="old"))
    with pytest.raises(InputError, match=r"'since' holds dates .*, but texts here \('soon' in row 1\); give dates"):
        source.encoding.inputs(test.assign(since=["soon", *["2020-01-01"] * 19]))
    with pytest.raises(InputError, match=r"'since' holds dates .*, but numbers here \('3' in 20 rows, .*; give dates"):
        source.encoding.inputs(test.assign(since=3))
    with pytest.raises(InputError, match="'age' holds numbers in the training rows, but dates here"):
        source.encoding.inputs(test.assign(age=test.since))
    with pytest.raises(InputError, match="'age' is missing in 20 rows"):
        source.encoding.inputs(test.assign(age=np.nan))
    with pytest.raises(InputError, match=r"'age' holds .* but texts here \('old' in row 3\); give numbers"):
        source.encoding.inputs(test.assign(age=["1", "2", "old", *["4"] * 17]))
    with pytest.raises(InputError, match=r"the table: column 'age' holds numbers .* \('old' in row 3\)"):
        source.encoding.inputs(test.assign(age=["1", "2", "old", *map(str, range(17))]))
    with pytest.raises(InputError, match="the table has no column age, job"):
        source.encoding.inputs([3])
    with pytest.raises(InputError, match="the table is a dict, of which pandas makes no table"):
        source.encoding.inputs({"age": [3], "job": ["nurse", "smith"]})
    row = test[:1].drop(columns="income")
    np.testing.assert_array_equal(source.encoding.inputs(row.to_dict("list")), source.test_x[:1])


def test_damaged_test_rows_are_named(rng):
    train, test = parts(table(rng))
    with pytest.raises(InputError, match=r"frame's test rows: column 'age' holds .* texts here \('x' in row 2\)"):
        quiet(train, "income", test=test[:5].assign(age=["1", "x", "1", "1", "1"]))
    with pytest.raises(InputError, match="frame's test rows: column 'age' is infinite in row 1"):
        quiet(train, "income", test=test.assign(age=np.inf)[:1])


@pytest.mark.parametrize("job", [["A1", "A2", "3"], ["0", "a", "b", "c"], ["1", "2", "3"], ["1-2", "3-4"]])
def test_codes_are_categories(rng, job):
    """Of which some, or all, that are texts read as numbers."""
    source = quiet(table(rng, job=np.resize(job, N)), "income", test=0)
    assert {f"job={each}" for each in job} <= {*source.encoding.names}


def test_numbers_with_another_level_as_categories(rng):
    ages = [*map(str, range(18, 76)), "76+", "76+"]
    frame = table(rng, age=ages)
    with pytest.raises(InputError, match=r"but '76.' in 2 rows, the first of them row 59; .* 'category'"):
        fdjax.from_frame(frame, "income")
    names = quiet(table(rng, age=pd.Categorical(np.resize(ages[-12:], N))), "income", test=0).encoding.names
    assert names[:2] == ("age=66", "age=67")
    assert "age=76+" in names


def test_training_rows_are_known(rng):
    """Whatever the index of the table says, and where rows are left out."""
    frame = holes(rng).assign(at=np.arange(N) * 1.5).set_index(np.full(N, 7))
    source = quiet(frame, "income", missing="drop", standardize=False)
    np.testing.assert_array_equal(source.train_x[:, -1], frame["at"].to_numpy()[source.train_index])
    assert len({*source.train_index}) == len(source.train_x) < N - 4


# Files.


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.tsv", "a.parquet", "semicolons.csv", "bars.data"])
def test_files_are_what_the_frame_is(rng, tmp_path, name):
    frame = table(rng)
    path = tmp_path / name
    if name.endswith(".parquet"):
        frame.to_parquet(path)
    else:
        delimiter = {"a.tsv": "\t", "semicolons.csv": ";", "bars.data": "|"}.get(name, ",")
        frame.to_csv(path, index=False, sep=delimiter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        source = data.load(path, target="income", seed=3)
    expected = quiet(frame, "income", seed=3)
    np.testing.assert_allclose(source.train_x, expected.train_x, atol=1e-6)
    np.testing.assert_array_equal(source.train_y, expected.train_y)
    assert source.classes == ("high", "low")


def test_a_file_without_a_header(rng, tmp_path):
    with gzip.open(tmp_path / "a.csv.gz", "wt") as file:
        file.writelines(f"{i % 7 * 1.5}, {'ab?'[i % 3]}, {'yn'[i % 2]}\n" for i in range(N))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        source = data.load(tmp_path / "a.csv.gz", target="2", header=False, missing="level", test_fraction=0.5)
    assert source.encoding.names == ("0", "1=a", "1=b", "1=missing")
    assert source.classes == ("n", "y")


def test_names_of_columns_that_count_are_a_header(rng, tmp_path):
    pixels = pd.DataFrame(rng.integers(0, 9, (N, 4)), columns=["0", "1", "2", "3"]).assign(label=np.arange(N) % 2)
    pixels.to_csv(tmp_path / "a.csv", index=False)
    source = data.load(tmp_path / "a.csv", target="label")
    assert source.encoding.names == ("0", "1", "2", "3")


def test_a_proxy_table_has_the_encoding_of_the_data(rng, tmp_path):
    """Its levels, means and labels are those of the training rows, whatever it has itself."""
    train, other = parts(table(rng))
    train.to_csv(tmp_path / "train.csv", index=False)
    other[other.job != "smith"].assign(age=other.age + 9).to_csv(tmp_path / "other.csv", index=False)
    other.drop(columns="income").to_csv(tmp_path / "unlabelled.csv", index=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        source = data.load(tmp_path / "train.csv", target="income")
        names = [data.own.resolve(tmp_path / f"{name}.csv", "proxy") for name in ("other", "unlabelled")]
        (_, labelled), (_, unlabelled) = (data.take_proxy(source, name, 10, 0) for name in names)
    assert (labelled.labelled, unlabelled.labelled) == (True, False)
    assert set(unlabelled.y) == {-1}
    assert labelled.x.shape == unlabelled.x.shape == (10, 6)
    assert not labelled.x[:, 3].any()  # job=smith
    rows = source.encoding.inputs(other[other.job != "smith"].assign(age=other.age + 9))
    assert all((np.abs(rows - row).max(axis=1) < 1e-5).any() for row in labelled.x)


@pytest.mark.filterwarnings("ignore::fdjax.errors.DataWarning")
def test_a_frame_as_proxy_data_has_to_have_the_encoding_of_the_data(rng):
    train, other = parts(table(rng))
    source = quiet(train, "income", test=0)
    for own in (other.drop(columns="age"), other[other.job != "smith"], other.assign(age=other.age + 9)):
        name = data.own.resolve(quiet(own, "income", test=0), "proxy")
        with pytest.raises(InputError, match="became inputs by columns, levels and means of its own") as told:
            data.take_proxy(source, name, 9, 0)
        assert "fdjax.from_arrays(source.encoding.inputs(rows), rows['income']" in str(told.value)
    rows = source.encoding.inputs(other)
    way_out = fdjax.from_arrays(rows, other["income"], labels=source.labels, test_fraction=0)
    _, proxy = data.take_proxy(source, data.own.resolve(way_out, "proxy"), len(other), 0)
    assert proxy.labelled
    np.testing.assert_array_equal(proxy.x, rows)
    arrays = fdjax.from_arrays(rng.normal(size=(9, 6)), np.arange(9) % 2, test_fraction=0)
    with pytest.raises(InputError, match="--proxy=frame is a table, but arrays is none; give a table as --dataset"):
        data.take_proxy(arrays, data.own.resolve(source, "proxy"), 9, 0)


def test_proxy_tables_without_a_header_and_with_gaps(rng, tmp_path):
    rows = [f"{i % 7 + 2},{'abc'[i % 3]},{'yn'[i % 2]}\n" for i in range(N)]
    (tmp_path / "train.csv").write_text("".join(rows))
    (tmp_path / "other.csv").write_text("".join(rows[:8]) + ",a,y\n3,,n\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        source = data.load(tmp_path / "train.csv", target="2", header=False, missing="drop", test_fraction=0.5)
    proxy = data.own.resolve(tmp_path / "other.csv", "proxy")
    with pytest.raises(InputError, match="its first row has numbers"):
        data.take_proxy(source, proxy, 8, 0)
    with pytest.warns(DataWarning, match="other: 2 of 10 rows left out for their missing values"):
        _, found = data.take_proxy(source, proxy, 8, 0, header=False)
    assert (found.labelled, found.x.shape) == (True, (8, 4))


def test_noise_draws_codes_of_levels(rng):
    frame = table(rng)
    source = quiet(frame, "income", test=0, categories="embedded")
    _, noise = data.take_proxy(source, "noise", 3000, 0)
    counts = np.bincount(noise.x[:, 1].astype(int), minlength=4)
    assert counts[0] == 0
    np.testing.assert_allclose(counts[1:], 1000, atol=5 * np.sqrt(3000 * 2 / 9))
    np.testing.assert_allclose(noise.x[:, [0, 2, 3]].mean(axis=0), 0, atol=0.1)


def test_bools_of_which_some_are_missing_are_numbers(rng):
    train, test = parts(table(rng))
    member = test.member.astype(object)
    member.iloc[[0, 3]] = None
    source = quiet(train, "income", test=test.assign(member=member), missing="mean")
    expected = quiet(train, "income", test=test).test_x.copy()
    expected[[0, 3], 4] = 0  # the mean
    np.testing.assert_allclose(source.test_x, expected, atol=1e-6)
    gaps = train.assign(member=train.member.astype(object))
    gaps.iloc[:5, gaps.columns.get_loc("member")] = None
    assert quiet(gaps, "income", test=test, missing="mean").encoding.names == source.encoding.names
