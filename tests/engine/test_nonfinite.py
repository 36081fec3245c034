"""A client whose numbers stop being finite: named, and left out if asked."""

import dataclasses
import re

import numpy as np
import pytest
from choices import some

from fdjax.run import experiment, runner, settings

SMALL = {
    "dataset": "synthetic", "num_clients": 5, "model": "mclr", "samples_per_client": 20, "rounds": 2, "eval_every": 2,
}  # fmt: skip
BAD = 3


@pytest.fixture
def poisoned(monkeypatch):
    """Client BAD holds features so large that its loss is not finite."""
    load = experiment.load

    def with_poison(chosen):
        loaded = load(chosen)
        source, holdings = loaded.source, loaded.holdings
        x = source.train_x.copy()
        first = holdings.start[BAD]
        x[holdings.order[first : first + holdings.count[BAD]]] = np.float32(1e38)
        return loaded._replace(source=source._replace(train_x=x))

    monkeypatch.setattr(experiment, "load", with_poison)


@pytest.mark.parametrize("algorithm", ["fedavg", "feddistill"])
def test_a_client_that_is_not_finite_is_named(poisoned, capsys, algorithm):
    result = runner.run(settings.make({"learning_rate": 0.1}, algorithm=algorithm, **SMALL), progress=False)
    said = capsys.readouterr().err
    assert re.search(rf"warning: client {BAD}: \w+/\S+ is not finite in round 1; ", said), said
    assert "--drop_nonfinite" in said
    assert result.rounds["nonfinite_clients"][0] == 1
    assert not np.isfinite(result.final["central_loss"])


@pytest.mark.parametrize("algorithm", some(["fedavg", "feddistill"], "fedavg"))
def test_and_left_out_on_demand(poisoned, capsys, algorithm):
    chosen = settings.make({"learning_rate": 0.1}, algorithm=algorithm, **SMALL, drop_nonfinite=True)
    result = runner.run(chosen, progress=False)
    assert "left out of the rounds" in capsys.readouterr().err
    assert result.rounds["nonfinite_clients"] == [1, 1]
    assert np.isfinite(result.final["central_loss"])
    assert np.isfinite(result.rounds["train_loss"]).all()


def test_without_trouble_nothing_is_said(capsys):
    chosen = settings.make({"learning_rate": 0.1}, **SMALL)
    result = runner.run(dataclasses.replace(chosen, drop_nonfinite=True), progress=False)
    plain = runner.run(chosen, progress=False)
    assert "warning" not in capsys.readouterr().err
    assert result.final == plain.final
