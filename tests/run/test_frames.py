"""Results as tables: the same numbers in DataFrames, in the Parquet file and in results.json."""

import json
import types

import numpy as np
import pytest
from run_cases import run

import fdjax
from fdjax.errors import InputError
from fdjax.run import frames, report

THREE = {"rounds": 3, "eval_every": 2}


@pytest.fixture(scope="module")
def results():
    """Of two seeds, as they are without a batch."""
    return [run(seed=seed, **THREE) for seed in (0, 7)]


def test_evaluations_have_a_row_each(results):
    pytest.importorskip("pandas")
    result = results[1]
    frame = result.frame()
    assert frame["round"].tolist() == [0, 2, 3]
    assert set(frame["seed"]) == {7}
    assert {*frame.columns} == {"seed", "bytes_up", "bytes_down", *result.evaluations}
    for name in result.evaluations:
        np.testing.assert_array_equal(frame[name], result.evaluations[name])
    sent = frame["bytes_up"] + frame["bytes_down"]
    assert sent.tolist() == [report.bytes_until(result, r) for r in (0, 2, 3)]


def test_rounds_have_a_row_each(results):
    pytest.importorskip("pandas")
    frame = results[0].frame(of="rounds")
    assert frame["round"].tolist() == [1, 2, 3]
    assert {*frame.columns} == {"seed", "round", *results[0].rounds}
    for name, values in results[0].rounds.items():
        np.testing.assert_array_equal(frame[name], values)


def test_clients_have_a_row_for_each_evaluation_of_which_values_are_kept(results):
    pytest.importorskip("pandas")
    result = results[0]
    frame = result.frame(of="clients")
    last = frame[frame["round"] == 3]
    assert last["client"].tolist() == [0, 1, 2, 3]
    for name, values in result.clients.items():
        np.testing.assert_array_equal(last[name], values)
    for name, history in getattr(result, "client_evaluations", {}).items():
        np.testing.assert_array_equal(frame[name].to_numpy().reshape(3, 4), history)


def test_histories_of_clients_stand_beside_what_is_kept_of_the_last_evaluation_alone(results):
    kept = types.SimpleNamespace(
        settings=results[0].settings,
        evaluations={"round": [0, 2]},
        holdings={"n_k": [5, 5, 5]},
        client_evaluations={"own_accuracy": [[0.1, 0.2, 0.3], [0.4, 0.5, np.nan]]},
        clients={"own_accuracy": [0.4, 0.5, np.nan], "auc": [0.7, 0.8, 0.9]},
    )
    columns = frames.COLUMNS["clients"](kept)
    assert columns["round"].tolist() == [0, 0, 0, 2, 2, 2]
    assert columns["client"].tolist() == [0, 1, 2, 0, 1, 2]
    np.testing.assert_array_equal(columns["own_accuracy"], [0.1, 0.2, 0.3, 0.4, 0.5, np.nan])
    np.testing.assert_array_equal(columns["auc"], [np.nan] * 3 + [0.7, 0.8, 0.9])


def test_the_parquet_file_has_every_number_of_results_json(results, tmp_path):
    from pyarrow import parquet

    frames.write_parquet(tmp_path / "results.parquet", results)
    report.write_json(tmp_path / "results.json", {"results": [report.result_dict(result) for result in results]})
    table = parquet.read_table(tmp_path / "results.parquet")
    assert table.column_names == ["seed", "of", "round", "client", "name", "value"]
    found = {}
    for row in table.to_pylist():
        key = row["seed"], row["of"], row["name"], row["round"], row["client"]
        assert key not in found
        found[key] = row["value"]
    for told in json.loads((tmp_path / "results.json").read_text())["results"]:
        seed, at = told["settings"]["seed"], [int(r) for r in told["evaluations"]["round"]]
        rows = [("rounds", n, r, None, v) for n, vs in told["rounds"].items() for r, v in enumerate(vs, 1)]
        rows += [
            ("evaluations", n, r, None, v)
            for n, vs in told["evaluations"].items()
            for r, v in zip(at, vs, strict=True)
            if n != "round"
        ]
        rows += [("clients", n, at[-1], c, v) for n, vs in told["clients"].items() for c, v in enumerate(vs)]
        for of, name, number, client, value in rows:
            there = found[seed, of, name, number, client]
            assert there == value or (value is None and np.isnan(there))


def test_a_run_read_back_gives_the_same_frames(tmp_path):
    pytest.importorskip("pandas")
    result = run(tmp_path, **THREE)
    for of in ("evaluations", "rounds", "clients"):
        assert fdjax.load(tmp_path).frame(of=of).equals(result.frame(of=of))


@pytest.mark.parametrize("of", ["evaluation", "", 3, None, ["rounds"]])
def test_a_table_that_there_is_not_is_told(results, of):
    with pytest.raises(InputError, match=r"unknown table, frame\(of=\.\.\.\) .*known: clients, evaluations, rounds"):
        results[0].frame(of=of)


def test_without_pandas_a_frame_is_one_line(results, monkeypatch):
    monkeypatch.setattr(frames.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"result.frame needs the package pandas; pip install 'fdjax\[frames\]'"):
        results[0].frame()
