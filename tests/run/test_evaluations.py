"""Evaluations of runs: round 0, subsamples between and all at the end, what is said of them, and what is refused."""

import json

import jax
import numpy as np
import pytest
from run_cases import small

from fdjax import __main__ as command
from fdjax.errors import InputError
from fdjax.run import experiment, report, runner, settings
from fdjax.run.batch import batch, experiments
from fdjax.run.record import Clock

SMALL = {
    "algorithm": "local", "dataset": "mnist_sample", "num_clients": 6, "train_fraction": 0.05, "model": "mclr",
    "batch_size": 16, "rounds": 3, "devices": 1, "partition_seed": 0,
}  # fmt: skip


def make(**fields):
    return settings.make(**SMALL | fields)


@pytest.fixture(scope="module")
def result():
    return runner.run(make(), progress=False)


def test_personal_models_are_tested_in_full_at_the_end(result):
    assert result.evaluations["round"] == [0, 1, 2, 3]
    assert result.evaluations["local_examples"] == [100, 100, 100, 1000]
    told = json.loads(json.dumps(report.result_dict(result)))
    assert told["evaluations"]["local_examples"] == [100, 100, 100, 1000]
    table = command.summary([result])
    assert "mean local accuracy, 1,000 test examples, %" in table
    assert "local accuracy at evaluations before" in table
    for text in ("own test parts, uniform", "weighted by n_k", "weighted by test examples"):
        assert text in table


def test_round_0_is_before_any_training(result):
    """And the last evaluation is that of a run that tests in full all the time."""
    full = runner.run(make(local_eval="full"), progress=False)
    assert full.evaluations["local_examples"] == [1000] * 4
    assert full.final == result.final
    built = experiment.build(make())
    start = built.simulation.init(0, built.federation)
    scalars, _ = jax.device_get(built.simulation.evaluate(start, built.federation, built.hparams, np.int32(100)))
    assert {name: values[0] for name, values in result.evaluations.items()} == {"round": 0} | scalars


def test_round_0_is_after_the_set_up():
    chosen = make(algorithm="cronus", proxy="held_out", proxy_size=40, rounds=1)
    ran = runner.run(chosen, progress=False)
    assert report.bytes_until(ran, 0) == ran.setup["bytes_up"] + ran.setup["bytes_down"]
    assert report.bytes_until(ran, 1) == ran.rounds["bytes_up"][0] + ran.rounds["bytes_down"][0]
    built = experiment.build(chosen)
    start = built.simulation.init(0, built.federation)
    state, _ = built.simulation.setup(start, built.federation, built.hparams)
    scalars, _ = built.simulation.evaluate(state, built.federation, built.hparams, np.int32(built.tests.between))
    assert ran.evaluations["own_loss"][0] == float(scalars["own_loss"])


def test_a_run_that_goes_on_says_that_it_was_tested_in_full_before(result, tmp_path):
    runner.run(make(rounds=2), tmp_path, progress=False)
    resumed = runner.run(make(), tmp_path, resume=True, progress=False)
    assert resumed.evaluations["local_examples"] == [100, 100, 1000, 1000]
    assert resumed.final == result.final
    assert resumed.evaluations["own_loss"] == result.evaluations["own_loss"]


@pytest.mark.exhaustive
def test_trials_are_tested_as_they_are_alone():
    """On subsamples of their own, as more epochs leave more time; the last evaluation is of everything."""
    chosen = [make(local_epochs=epochs, seed=seed) for epochs in (1, 15) for seed in (0, 1)]
    ready = experiments(chosen)
    assert [each.tests.between for each in ready] == [100, 100, 500, 500]
    compiled = batch(ready[:2], 4, ["local_epochs", "seed"], devices=2)
    for each, found in zip(chosen, compiled.run(ready, lambda done, records: ()), strict=True):
        alone = runner.run(each, progress=False)
        assert found.evaluations.keys() == alone.evaluations.keys()
        for name, values in alone.evaluations.items():
            np.testing.assert_allclose(found.evaluations[name], values, rtol=1e-5, atol=1e-5, err_msg=name)


def test_the_line_at_the_start_says_what_is_tested(capsys):
    runner.run(make(rounds=1), progress=True)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lifting: ")]
    assert "; personal models are tested on 100 of 1,000 test examples, on all at the end" in line


def test_without_a_test_of_the_central_model():
    ran = runner.run(small(central_eval=False, rounds=1), progress=True)
    assert "central_accuracy" not in ran.final
    assert "own_accuracy" in ran.final
    assert "central" not in command.summary([ran])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"local_eval": "none"}, "--local_eval=none: local has no central model, so nothing would be tested"),
        ({"algorithm": "fedavg", "local_eval": "none", "central_eval": False}, "nothing would be tested; leave one of"),
        ({"algorithm": "ensemble", "local_eval": "own"}, "use --local_eval=full or auto, or --central_eval=false"),
        ({"local_eval": "all"}, "unknown local_eval 'all'"),
    ],
)
def test_a_run_without_any_test_is_refused(fields, message):
    with pytest.raises(InputError, match=message) as error:
        experiment.build(make(**fields))
    assert "\n" not in str(error.value)


def test_a_validation_split_is_test_enough():
    ran = runner.run(small(algorithm="local", local_eval="none", validation_fraction=0.2, rounds=1), progress=True)
    assert {name for name in ran.final if name.endswith("accuracy")} == {"validation_accuracy"}
    command.summary([ran])


def test_seconds_of_compilation_in_two_threads_count_once():
    running = Clock()
    running._spans = [(0.0, 4.0), (1.0, 2.0), (3.0, 6.0), (8.0, 9.0)]
    assert running.compiling == 7.0
    running.listen("/jax/compilation_cache/cache_retrieval_time_sec", 5.0)
    running.listen("/jax/core/compile/backend_compile_duration", 5.0)
    assert running.compiling == 7.0  # what came from the cache was not compiled
