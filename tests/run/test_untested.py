"""What was not tested or not trained is null, and the means over clients can be made again from results.json."""

import json
import math

import numpy as np
import pytest
from run_cases import small

from fdjax.run import experiment, report, runner, settings
from fdjax.run.batch import batch, experiments
from fdjax.run.record import Recording

# Of 12 clients of the sample, some hold so few examples that they have no test part of their own.
UNEVEN = {
    "algorithm": "fd", "dataset": "mnist_sample", "train_fraction": 0.02, "num_clients": 12, "model": "mclr",
    "partition": "dirichlet_a", "alpha": 0.01, "partition_seed": 0, "min_size": 0, "rounds": 1, "devices": 1,
    "local_eval": "full",
}  # fmt: skip


def means(clients, holdings):
    """The means over clients as they are printed, of what results.json has."""
    n_k, tests, new = (np.asarray(holdings[name]) for name in ("n_k", "test_examples", "never_trains"))
    own = np.asarray(clients["own_accuracy"], float)  # null is NaN
    counts, trained = (tests > 0) & ~new, (n_k > 0) & ~new
    assert np.array_equal(np.isnan(own), tests == 0)
    return {
        "own_accuracy": own[counts].mean(),
        "own_loss": np.asarray(clients["own_loss"], float)[counts].mean(),
        "own_accuracy_weighted": np.average(own[counts], weights=n_k[counts]),
        "own_accuracy_by_test_size": np.average(own[counts], weights=tests[counts]),
        "worst_client": own[counts].min(),
        "quantile_10": np.quantile(own[counts], 0.1),
        "client_std": own[counts].std(),
        "local_accuracy": np.asarray(clients["local_accuracy"], float)[trained].mean(),
        "local_loss": np.asarray(clients["local_loss"], float)[trained].mean(),
    }


@pytest.mark.parametrize("new_clients", [pytest.param(0.0, marks=pytest.mark.exhaustive), 0.25])
def test_the_means_can_be_made_again_from_the_file(tmp_path, new_clients):
    """Before: 0.0 for a client without a test example, and nothing that told it from one that is always wrong."""
    chosen = settings.make(**UNEVEN, new_clients=new_clients)
    report.write_json(tmp_path / "results.json", report.result_dict(runner.run(chosen, progress=False)))
    found = json.loads((tmp_path / "results.json").read_text())
    clients, holdings = found["clients"], found["holdings"]
    empty = [k for k, tests in enumerate(holdings["test_examples"]) if not tests]
    assert empty
    assert all(clients["own_accuracy"][k] is clients["own_loss"][k] is None for k in empty)
    assert sum(holdings["never_trains"]) == round(12 * new_clients)
    assert [sum(row) for row in holdings["labels"]] == holdings["n_k"]
    for name, value in means(clients, holdings).items():
        assert found["final"][name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.exhaustive
def test_a_batch_has_the_same(tmp_path):
    chosen = settings.make(**UNEVEN)
    alone = runner.run(chosen, progress=False)
    trials = experiments([chosen])
    (result,) = batch(trials, 1, devices=1).run(trials, lambda *_: ())
    assert result.holdings == alone.holdings
    for name, values in alone.clients.items():
        np.testing.assert_allclose(result.clients[name], values, rtol=1e-4, err_msg=name)


def test_labels_are_counted_by_ids():
    """Of clients that are not in order of work."""
    chosen = settings.make(**UNEVEN, new_clients=0.25)
    loaded = runner.build(chosen)
    ids, y = np.asarray(loaded.federation.client), loaded.source.train_y
    assert ids.tolist() != sorted(ids)
    order, start, count = (np.asarray(x) for x in loaded.holdings)
    expected = [np.bincount(y[order[s : s + n]], minlength=10).tolist() for s, n in zip(start, count, strict=True)]
    assert runner.run(chosen, progress=False).holdings["labels"] == expected


def test_a_round_without_participants_is_null(tmp_path):
    """Before: its training loss was 0.0, as of a perfect model."""
    chosen = small(sampling="poisson", participation=0.25, rounds=8)
    result = runner.run(chosen, progress=False)
    nobody = [number == 0 for number in result.rounds["participants"]]
    assert any(nobody)
    assert not all(nobody)
    assert [math.isnan(loss) for loss in result.rounds["train_loss"]] == nobody
    report.write_json(tmp_path / "results.json", report.result_dict(result))
    losses = json.loads((tmp_path / "results.json").read_text())["rounds"]["train_loss"]
    assert [loss is None for loss in losses] == nobody


def test_nothing_to_test_is_no_divergence(capsys):
    """Where no client has a test part, and nothing else is tested."""
    built = runner.build(settings.make(**UNEVEN | {"local_eval": "own", "algorithm": "local"}))
    nothing = built.federation.test_holdings._replace(count=np.zeros(12, np.int32))
    built = built._replace(federation=built.federation._replace(test_holdings=nothing))
    simulation = built.simulation
    state = simulation.init(0, built.federation)
    scalars, clients = simulation.evaluate(state, built.federation, built.hparams)
    assert {name for name, value in scalars.items() if np.isnan(value)} == scalars.keys() >= {"own_accuracy"}
    assert all(np.isnan(values).all() for values in clients.values())
    Recording(built, experiment.traffic_of(built)).add_evaluation(0, scalars, clients)
    assert capsys.readouterr().err == ""


def test_percent_of_nothing():
    assert report.percent(math.nan) == "n/a"
    assert report.percent(0.0) == "0.00"
