"""Metrics and clients' histories of whole runs: the values that models and their predictions say, however they ran."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from run_cases import run

import fdjax
from fdjax import __main__ as command
from fdjax.client.metrics import METRICS
from fdjax.run import client_history, report, runner, settings
from fdjax.run.batch import batch, experiments

HERE = Path(__file__).resolve().parents[1] / "own_files"
TOP_2 = f"{HERE / 'top_2.py'}"
EVERY = ("class_accuracy", "balanced_accuracy", "macro_f1", "roc_auc", "calibration_error", "inside_accuracy",
         "outside_accuracy", "jain_index", "forgetting")  # fmt: skip
SMALL = {
    "dataset": "mnist_sample", "labels": "0,1,2", "train_fraction": 0.2, "num_clients": 5, "partition": "dirichlet_a",
    "alpha": 0.1, "min_size": 0, "model": "mclr", "batch_size": 16, "rounds": 3, "devices": 1, "partition_seed": 3,
    "learning_rate": 0.05,
}  # fmt: skip


def make(**fields):
    return settings.make(**SMALL | fields)


def ran(*out, **fields):
    return runner.run(make(**fields), *out, progress=False)


@pytest.fixture(scope="module")
def local():
    """A run of clients by themselves, with every metric."""
    return ran(algorithm="local", metrics=[*EVERY, TOP_2], local_eval="full", targets=[0.3, 0.999])


@pytest.fixture(scope="module")
def central():
    return ran(algorithm="fedavg", metrics=",".join([*EVERY, TOP_2]))


@pytest.fixture(scope="module")
def source(local):
    built = fdjax.data.load("mnist_sample")
    return fdjax.data.of_labels(built, SMALL["labels"])


def class_accuracy(logits, y):
    return np.array([(logits[y == c].argmax(1) == c).mean() for c in range(3)])


def test_the_values_are_those_of_predictions(local, central, source):
    x, y = source.test_x, source.test_y
    logits = central.central.predict(x)
    found = [central.final[f"central_class_accuracy_{c}"] for c in range(3)]
    np.testing.assert_allclose(found, class_accuracy(logits, y), rtol=1e-6)
    np.testing.assert_allclose(central.final["central_balanced_accuracy"], np.mean(found), rtol=1e-6)
    top_2 = np.any(np.argsort(-logits)[:, :2] == y[:, None], 1).mean()
    np.testing.assert_allclose(central.final["central_top_2"], top_2, rtol=1e-6)
    for client in range(5):
        logits = local.personal(client).predict(x)
        held = np.array(local.holdings["labels"][client]) > 0
        hit, inside = logits.argmax(1) == y, held[y]
        of_client = [local.clients[f"local_class_accuracy_{c}"][client] for c in range(3)]
        np.testing.assert_allclose(of_client, class_accuracy(logits, y), rtol=1e-6)
        for name, part in (("inside", inside), ("outside", ~inside)):
            expected = hit[part].mean() if part.any() else np.nan
            np.testing.assert_allclose(local.clients[f"local_{name}_accuracy"][client], expected, rtol=1e-6)


def test_what_the_central_model_knows_of_labels_that_a_client_holds(central, source):
    hit = central.central.predict(source.test_x).argmax(1) == source.test_y
    for client, labels in enumerate(central.holdings["labels"]):
        inside = np.array(labels)[source.test_y] > 0
        expected = hit[inside].mean() if inside.any() else np.nan
        np.testing.assert_allclose(central.clients["local_inside_accuracy"][client], expected, rtol=1e-6)
    assert "central_inside_accuracy" not in central.final
    assert "own_inside_accuracy" not in central.final


def test_means_over_clients_leave_out_those_without_a_value(local, central):
    for result, kind in ((local, "own"), (local, "local"), (central, "own")):
        n_k, tests = np.array(result.holdings["n_k"]), np.array(result.holdings["test_examples"])
        counts = n_k > 0 if kind == "local" else tests > 0
        for name in ("roc_auc", "balanced_accuracy", "top_2", "class_accuracy_1"):
            values = np.array(result.clients[f"{kind}_{name}"])[counts]
            there = ~np.isnan(values)
            np.testing.assert_allclose(result.final[f"{kind}_{name}"], values[there].mean(), rtol=1e-5)
            undefined = name.replace("accuracy_1", "accuracy_undefined_1") if name[-1] == "1" else f"{name}_undefined"
            assert result.final[f"{kind}_{undefined}"] == (~there).sum()
    assert local.final["own_roc_auc_undefined"] > 0  # some clients hold one label alone


def test_jain_index_and_forgetting(local, central):
    a = np.array(local.clients["own_accuracy"])[np.array(local.holdings["test_examples"]) > 0]
    np.testing.assert_allclose(local.final["own_jain_index"], a.sum() ** 2 / (len(a) * (a**2).sum()), rtol=1e-5)
    A = np.array([central.evaluations[f"central_class_accuracy_{c}"] for c in range(3)]).T
    expected = [np.mean([max(A[s, c] for s in range(t)) - A[t, c] for c in range(3)]) for t in range(1, 4)]
    np.testing.assert_allclose(central.evaluations["central_forgetting"], [np.nan, *expected], rtol=1e-6)
    assert len(local.evaluations["local_forgetting"]) == 4


def test_histories_hold_every_evaluation(local, central):
    for result in (local, central):
        assert result.client_evaluations.keys() == result.clients.keys()
        for name, values in result.client_evaluations.items():
            assert values.shape == (len(result.evaluations["round"]), 5)
            np.testing.assert_array_equal(values[-1].astype(float), result.clients[name])
        counts = np.array(result.holdings["test_examples"]) > 0
        of_rounds = result.client_evaluations["own_accuracy"][:, counts].mean(1)
        np.testing.assert_allclose(of_rounds, result.evaluations["own_accuracy"], rtol=1e-6)


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["local", "fedavg"])
def test_without_metrics_everything_is_as_it_was(local, central, method):
    """To the last bit, with the same rounds."""
    result = {"local": local, "fedavg": central}[method]
    plain = ran(algorithm=method, local_eval=result.settings.local_eval)
    for name, values in plain.evaluations.items():
        assert result.evaluations[name] == values, name
    assert not any("roc" in name or "top_2" in name for name in plain.final)
    assert plain.rounds == result.rounds


def test_a_resumed_run_keeps_its_history(tmp_path, local):
    chosen = {"algorithm": "local", "metrics": [*EVERY, TOP_2], "local_eval": "full"}
    ran(tmp_path, **chosen, rounds=2)
    resumed = runner.run(make(**chosen, targets="0.5"), tmp_path, resume=True, progress=False)
    assert resumed.evaluations.keys() == local.evaluations.keys()
    for name, values in local.evaluations.items():
        np.testing.assert_array_equal(resumed.evaluations[name], values, name)
    for name, values in local.client_evaluations.items():
        np.testing.assert_array_equal(resumed.client_evaluations[name], values, name)
    loaded = fdjax.load(tmp_path)
    assert loaded.settings.metrics == local.settings.metrics  # found in its file
    np.testing.assert_array_equal(loaded.client_evaluations["own_top_2"], local.client_evaluations["own_top_2"])


LIFTINGS = [{"devices": 2, "chunk": 2}, {"lifting": "vmap", "rounds": 1}, {"lifting": "loop", "rounds": 1}]


@pytest.mark.exhaustive
@pytest.mark.parametrize("lifting", LIFTINGS, ids=str)
def test_every_lifting_gives_the_same(lifting, local):
    measures = "macro_f1,roc_auc,calibration_error,outside_accuracy,class_accuracy,jain_index"
    found = ran(algorithm="local", local_eval="full", metrics=measures, **lifting)
    at = found.round
    for name, values in found.client_evaluations.items():
        np.testing.assert_allclose(values, local.client_evaluations[name][: at + 1], rtol=2e-4, atol=2e-4, err_msg=name)
    np.testing.assert_allclose(found.final["own_jain_index"], local.evaluations["own_jain_index"][at], rtol=1e-4)


@pytest.mark.exhaustive
def test_trials_of_a_batch(local):
    measures = "class_accuracy,roc_auc,outside_accuracy,jain_index,forgetting"
    chosen = [make(algorithm="local", local_eval="full", metrics=measures, seed=seed) for seed in (0, 1)]
    ready = experiments(chosen)
    compiled = batch(ready, 2)
    found = compiled.run(ready, lambda done, records: ())
    assert {*compiled.scalars} == {*found[0].evaluations} - {"round"}
    for name in compiled.scalars:
        alone = local.evaluations[name]
        np.testing.assert_allclose(found[0].evaluations[name], alone, rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(
        found[0].client_evaluations["local_outside_accuracy"], local.client_evaluations["local_outside_accuracy"], 1e-4
    )
    assert not np.array_equal(found[0].client_evaluations["own_loss"], found[1].client_evaluations["own_loss"])


def test_results_are_plain_json(local):
    told = json.loads(json.dumps(report.result_dict(local)))
    assert told["final"]["local_class_accuracy_2"] == local.final["local_class_accuracy_2"]
    assert told["settings"]["metrics"].startswith("class_accuracy,balanced_accuracy")
    assert told["files"] == {local.settings.metrics.split(",")[-1]: TOP_2}
    assert told["targets"]["0.999"] == {"of": "local_accuracy", "round": None, "bytes": None}


def test_rounds_and_bytes_to_a_target(central):
    result = central._replace(settings=make(targets="0.5,0.999"))
    told, accuracy = report.reached(result)["0.5"], central.evaluations["central_accuracy"]
    after = next(i for i, value in enumerate(accuracy) if value >= 0.5)
    share = (0.5 - accuracy[after - 1]) / (accuracy[after] - accuracy[after - 1])
    np.testing.assert_allclose(told["round"], after - 1 + share)
    sent = [0.0, *np.add(central.rounds["bytes_up"], central.rounds["bytes_down"])]
    np.testing.assert_allclose(told["bytes"], sent[after - 1] + share * (sent[after] - sent[after - 1]))
    table = command.summary([result])
    assert "rounds to central accuracy 50.00 %" in table
    assert "not in 3" in table


def test_the_table_names_the_metrics(local, central):
    table = command.summary([local])
    for text in ("top 2, mean on clients' own test parts, %", "roc auc, mean of clients' models on the test set",
                 "clients have none", "forgetting, mean of clients'"):  # fmt: skip
        assert text in table
    assert "class accuracy, mean of clients' models on the test set, %" in table
    assert re.search(r"\| 0: [\d.]+, 1: [\d.]+, 2: [\d.]+ +\|", table)
    table = command.summary([central])
    assert "balanced accuracy, central model, %" in table
    assert "balanced accuracy, mean of clients" not in table  # they have the central one


@pytest.mark.exhaustive
def test_an_ensemble_and_a_validation_split():
    result = ran(algorithm="ensemble", metrics="balanced_accuracy,class_accuracy", validation_fraction=0.2, rounds=1)
    for kind in ("central", "validation"):
        each = [result.final[f"{kind}_class_accuracy_{c}"] for c in range(3)]
        np.testing.assert_allclose(result.final[f"{kind}_balanced_accuracy"], np.mean(each), rtol=1e-5)
    assert result.final["local_balanced_accuracy"] < result.final["central_balanced_accuracy"]


def test_new_clients_and_a_metric_that_is_not_a_number(capsys):
    """The former have values of their own, and of the latter it is said once."""
    metric = fdjax.Metric("inverse", sums=lambda z, y, w: jnp.sum(w), finish=lambda n: n / (n - n))
    result = ran(new_clients=0.4, fine_tune_epochs=0, metrics=["balanced_accuracy", metric], rounds=2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "inverse" in line]
    assert line == "warning: metric inverse: central_inverse is inf after round 0"
    assert result.final["central_inverse"] == np.inf
    new = np.array(result.holdings["never_trains"])
    values = np.array(result.clients["own_balanced_accuracy"])
    np.testing.assert_allclose(result.final["new_balanced_accuracy"], np.nanmean(values[new]), rtol=1e-5)
    np.testing.assert_allclose(result.final["own_balanced_accuracy"], np.nanmean(values[~new]), rtol=1e-5)


# What there is no room for.


def test_a_history_that_is_not_asked_for():
    result = run(client_history=False, rounds=1)
    assert result.client_evaluations == {}
    assert "own_accuracy" in result.clients


def test_a_history_that_is_too_large(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(client_history, "MOST", 20)
    result = run(tmp_path, rounds=1)  # 4 clients x 2 evaluations x 2 values
    assert result.client_evaluations["own_loss"].shape == (2, 4)
    result = run(tmp_path, resume=True, rounds=2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "clients' values" in line]
    assert "kept of the first 2 evaluations and the last one: 4 clients x 3 evaluations x 2 values are more" in line
    assert result.client_evaluations["own_loss"].shape == (2, 4)
    frame = result.frame("clients")
    assert [*frame["round"]] == [0] * 4 + [1] * 4 + [2] * 4
    np.testing.assert_allclose(frame["own_loss"][-4:], result.clients["own_loss"])
    monkeypatch.undo()
    result = run(tmp_path, resume=True, rounds=3)
    assert result.client_evaluations["own_loss"].shape == (2, 4)  # as much as there is without a gap
    assert "the part of the run before this one has kept no more" in capsys.readouterr().err


def test_where_no_client_is_tested_nothing_is_missing():
    """Before: from the second evaluation on a run said that the one before it had kept no more."""
    for rounds in ([0], [0, 1]):
        assert client_history.add({"evaluations": {"round": rounds}}, {}, 0, 1) == ""


def test_packed_values_are_what_they_were(rng):
    values = rng.normal(size=(4, 1000)).astype(np.float32)
    values[1, :900] = np.nan
    values[2, 7] = -np.inf
    record = {"evaluations": {"round": []}}
    for number, row in enumerate(values):
        record["evaluations"]["round"].append(number)
        assert client_history.add(record, {"a": row, "b": -row}, 3 - number, 1) == ""
    assert client_history.at(record, 2)["b"][7] == np.inf
    record = json.loads(json.dumps(record))
    found = client_history.unpack(record["client_evaluations"])
    np.testing.assert_array_equal(found["a"], values)
    np.testing.assert_array_equal(found["b"], -values)
    assert len(record["client_evaluations"]["a"][1]) < 1000  # what is alike takes little room


def test_ours_as_values_are_ours():
    assert make(metrics=METRICS["roc_auc"]).metrics == "roc_auc"
    assert make(metrics=(METRICS["roc_auc"], "jain_index")) == make(metrics="roc_auc, jain_index")
