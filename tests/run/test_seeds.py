"""Several seeds in one command: the runs that each would be alone, as one batch."""

import contextlib
import dataclasses
import json
import types

import numpy as np
import pytest
from run_cases import SMALL

import fdjax
from fdjax import __main__ as command
from fdjax.errors import InputError
from fdjax.run import seeds
from fdjax.run.summary import summary

THREE = SMALL | {"partition_seed": 1, "rounds": 3, "eval_every": 2}


@pytest.fixture(scope="module")
def together():
    """The results of two seeds, on the two devices that they need, and their batch, as it was compiled."""
    made, batch = [], seeds.batch.batch

    def make(*args, **named):
        made.append(batch(*args, **named))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seeds.batch, "batch", make)
        results = fdjax.run_seeds([3, 0], progress=False, **THREE | {"devices": 0})
    return results, made[0]


@pytest.fixture(scope="module")
def results(together):
    return together[0]


def test_each_is_the_run_alone(results):
    assert [result.settings.seed for result in results] == [3, 0]
    for result in results:
        alone = fdjax.run(seed=result.settings.seed, progress=False, **THREE)
        assert result.rounds["bytes_up"] == alone.rounds["bytes_up"]
        for name, values in alone.evaluations.items():
            np.testing.assert_allclose(result.evaluations[name], values, rtol=1e-4, atol=1e-6)
    assert results[0].evaluations["central_loss"] != results[1].evaluations["central_loss"]


@pytest.mark.exhaustive
def test_data_of_other_sizes_are_compiled_apart():
    """Each seed draws its own devices here, of which each has another number of examples."""
    settings = SMALL | {"partition_seed": None, "samples_per_client": None, "rounds": 1}
    found = fdjax.run_seeds([0, 1], progress=False, **settings)
    assert [result.settings.seed for result in found] == [0, 1]
    sizes = [sum(len(part) for part in result.evaluations.values()) for result in found]
    assert sizes[0] == sizes[1]
    alone = fdjax.run(seed=1, progress=False, **settings)
    assert found[1].final["central_loss"] == pytest.approx(alone.final["central_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("given", "more", "message"),
    [
        ([], {}, "seeds=[]: expected whole numbers, each another one, e.g. 0,1,2"),
        ([0, 0], {}, "seeds=[0, 0]: expected whole numbers"),
        ("012", {}, "seeds='012': expected whole numbers"),
        ([0.5], {}, "--seed=0.5: expected a whole number from 0"),
        ([0, -1], {}, "--seed=-1: expected a whole number from 0"),
        (3, {}, "seeds=3: expected whole numbers, each another one"),
        ([[0]], {}, "seeds=[[0]]: expected whole numbers, each another one"),
        ([0, 1], {"seed": 5}, "run_seeds: seed=5 beside seeds=[0, 1]; give the seeds alone"),
        (
            [0, 1],
            {"new_clients": 0.5},
            "several seeds are a batch, which tests new clients as they are; give --fine_tune",
        ),
        ([0, 1], {"lifting": "loop"}, "--lifting=loop: of several seeds, each device runs some; leave it out"),
    ],
)
def test_bad_seeds(given, more, message):
    with pytest.raises(InputError) as error:
        seeds.start(given, progress=False, **THREE | more)
    assert str(error.value).startswith(message)


def test_the_table_of_seeds_that_were_stopped_is_of_those_that_went_as_far(results, tmp_path, capsys):
    """It was a mean over other rounds, and a traceback of the picture."""
    stopped = results[1]._replace(
        rounds={name: values[:2] for name, values in results[1].rounds.items()},
        evaluations={name: values[:2] for name, values in results[1].evaluations.items()},
        client_evaluations={name: values[:2] for name, values in results[1].client_evaluations.items()},
    )
    command.leave(tmp_path, [results[0], stopped])
    table = capsys.readouterr().out
    assert "Left out, as they were interrupted: seeds 0 (round 2)." in table
    assert "±" not in table
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "results.json", "results.parquet", "curves.png"}
    assert len(json.loads((tmp_path / "results.json").read_text())["results"]) == 2


def test_models_are_not_kept(results):
    with pytest.raises(InputError, match="this result keeps no models, as those of a batch"):
        _ = results[0].central


def test_a_table_of_several_seeds(results):
    table = summary(results)
    assert "round 3; mean ± std, seeds 3, 0" in table
    accuracy = [result.final["central_accuracy"] for result in results]
    assert f"{100 * np.mean(accuracy):.2f} ± {100 * np.std(accuracy, ddof=1):.2f}" in table
    assert "| training examples of all clients" in table
    assert "| 72 " in table  # 18 of each of the four


def test_a_table_is_of_seeds_alone(results):
    """Before: other methods, settings and data were averaged as if they were seeds."""
    one, two = results
    assert summary(one) == summary([one])
    other = two._replace(settings=dataclasses.replace(two.settings, partition_seed=7))
    for given, message in (
        (
            [one, other],
            r"^fdjax.summary: partition_seed is 1 and 7: expected results that differ by their seeds alone;",
        ),
        ([one, one], r"^fdjax.summary: seed 3 is given twice; leave one of these results out$"),
        ([], r"^fdjax.summary: \[\]: expected a result, or a list of those of several seeds$"),
        ([one, None], "expected a result, or a list"),
        (None, "^fdjax.summary: None: expected a result, or a list"),
    ):
        with pytest.raises(InputError, match=message):
            summary(given)


def test_no_part_begins_after_a_signal_to_stop(monkeypatch):
    """Of data of other sizes, which are compiled apart."""

    def made(group, slots, devices):
        return types.SimpleNamespace(slots=slots, why="", run=lambda *_: pytest.fail("begun"))

    signals = [2]
    monkeypatch.setattr(seeds, "stop_signals", lambda: contextlib.nullcontext(signals))
    monkeypatch.setattr(seeds.batch, "batch", made)
    with pytest.raises(fdjax.InterruptedRun) as stop:
        fdjax.run_seeds([0, 1], progress=False, **THREE | {"partition_seed": None, "samples_per_client": None})
    assert stop.value.results == ()


def test_stopped_seeds_give_what_there_is(together, monkeypatch):
    """As by Ctrl-C, here in the second round."""
    signals = []
    monkeypatch.setattr(seeds.batch, "batch", lambda *_, **__: together[1])
    monkeypatch.setattr(seeds, "stop_signals", lambda: contextlib.nullcontext(signals))
    monkeypatch.setattr(seeds.tqdm, "update", lambda bar, n=1: signals.append(2))
    with pytest.raises(fdjax.InterruptedRun) as stop:
        fdjax.run_seeds([0, 1], progress=False, **THREE)
    assert stop.value.round == 2
    assert [result.round for result in stop.value.results] == [2, 2]
