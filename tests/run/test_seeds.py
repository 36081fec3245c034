"""Several seeds in one command: the runs that each would be alone, as one batch."""

import numpy as np
import pytest

import fdjax
from fdjax.errors import InputError
from fdjax.run import seeds

SMALL = {
    "dataset": "synthetic",
    "num_clients": 4,
    "samples_per_client": 20,
    "model": "mclr",
    "rounds": 3,
    "eval_every": 2,
}


@pytest.fixture(scope="module")
def results():
    return fdjax.run_seeds([3, 0], progress=False, partition_seed=1, **SMALL)


def test_each_is_the_run_alone(results):
    assert [result.settings.seed for result in results] == [3, 0]
    for result in results:
        alone = fdjax.run(seed=result.settings.seed, partition_seed=1, progress=False, **SMALL)
        assert result.rounds["bytes_up"] == alone.rounds["bytes_up"]
        for name, values in alone.evaluations.items():
            np.testing.assert_allclose(result.evaluations[name], values, rtol=1e-4, atol=1e-6)
    assert results[0].evaluations["central_loss"] != results[1].evaluations["central_loss"]


def test_data_of_other_sizes_are_compiled_apart():
    """Each seed draws its own devices here, of which each has another number of examples."""
    settings = SMALL | {"samples_per_client": None, "rounds": 1, "eval_every": 1}
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
        ([0, 1], {"lifting": "loop"}, "--lifting=loop: of several seeds, each device runs some; leave it out"),
    ],
)
def test_bad_seeds(given, more, message):
    with pytest.raises(InputError) as error:
        seeds.start(given, progress=False, **SMALL | more)
    assert str(error.value).startswith(message)


def test_stopped_seeds_give_what_there_is(monkeypatch):
    """As by Ctrl-C, here in the second round."""
    signals = []
    monkeypatch.setattr(seeds, "stop_signals", lambda: __import__("contextlib").nullcontext(signals))
    monkeypatch.setattr(seeds.tqdm, "update", lambda bar, n=1: signals.append(2))
    with pytest.raises(fdjax.InterruptedRun) as stop:
        fdjax.run_seeds([0, 1], progress=False, **SMALL | {"partition_seed": 0})
    assert stop.value.round == 2
    assert [result.round for result in stop.value.results] == [2, 2]
