"""Runs as trials of one batch: the results that each gives alone, from one compilation."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from fdjax.engine import plan, trials
from fdjax.errors import InputError
from fdjax.run import runner, settings
from fdjax.run.batch import batch, experiments

SMALL = {"dataset": "synthetic", "num_clients": 6, "samples_per_client": 20, "model": "mclr", "partition_seed": 0,
         "devices": 1, "batch_size": 8, "rounds": 4, "eval_every": 2, "participation": 0.5}  # fmt: skip
FIELDS = {"fedmd": {"proxy": "held_out", "proxy_size": 30}}
HPARAMS = {
    "fedprox": [{"learning_rate": rate, "mu": mu} for rate in (0.05, 0.2) for mu in (0.0, 1.0)],
    "feddistill": [{"temperature": T, "weight": w, "learning_rate": 0.1} for T in (1.0, 4.0) for w in (0.2, 0.8)],
    "fedmd": [{"learning_rate": r, "pretrain_epochs": e, "private_epochs": 2} for r in (0.05, 0.1) for e in (1, 3)],
}  # fmt: skip


def settings_of(name, seeds=(0,), **fields):
    """Settings of a method's trials: each of its HPARAMS with each seed."""
    return [
        settings.make(dict(hparams), algorithm=name, seed=seed, **SMALL | FIELDS.get(name, {}) | fields)
        for hparams in HPARAMS[name]
        for seed in seeds
    ]


def run_all(done, records):
    """A watch that stops nobody."""
    return ()


def run(chosen, **options):
    ready = experiments(chosen)
    return batch(ready, len(ready), **options).run(ready, run_all)


@functools.cache
def alone(chosen):
    return runner.run(chosen, progress=False)


def check_equal(result, other):
    assert result.settings == other.settings
    for part in ("rounds", "evaluations", "clients", "setup"):
        found, expected = getattr(result, part), getattr(other, part)
        assert found.keys() == expected.keys()
        for name in found:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["feddistill", "fedmd"])
def test_a_trial_in_a_batch_is_the_trial_alone(name):
    chosen = settings_of(name, seeds=(0, 1))[:6]
    results = run(chosen, devices=1)
    for each, result in zip(chosen, results, strict=True):
        check_equal(result, alone(each))
    assert bool(results[0].setup) == (name == "fedmd")  # whose clients learn from the proxy data first
    losses = {round(result.rounds["train_loss"][-1], 6) for result in results}
    assert len(losses) > len(chosen) // 2  # and trials do differ


@pytest.mark.exhaustive
def test_trials_that_differ_in_what_rounds_alone_use_begin_with_one_set_up():
    rates = (0.01, 0.3)
    fields = SMALL | FIELDS["fedmd"] | {"rounds": 2, "algorithm": "fedmd"}
    few = {"pretrain_epochs": 2, "private_epochs": 2}
    chosen = [settings.make({"digest_learning_rate": rate} | few, **fields) for rate in rates]
    results = run(chosen, devices=1)
    check_equal(results[1], alone(chosen[1]))
    assert results[0].setup == results[1].setup
    assert results[0].evaluations["local_loss"][0] == results[1].evaluations["local_loss"][0]
    assert results[0].evaluations["local_loss"][-1] != results[1].evaluations["local_loss"][-1]


@pytest.mark.exhaustive
def test_a_plateau_lowers_each_trials_own_rates():
    fields = {"validation_fraction": 0.2, "schedule": "plateau", "decay": 0.01, "eval_every": 1}
    chosen = [settings.make({"learning_rate": rate}, **SMALL | fields) for rate in (0.01, 30.0)]
    results = run(chosen)
    for result, each in zip(results, chosen, strict=True):
        check_equal(result, alone(each))
    without = alone(dataclasses.replace(chosen[1], schedule="constant", decay=0.99))
    assert without.evaluations["validation_loss"] != results[1].evaluations["validation_loss"]


def test_partitions_differ_between_trials():
    fields = {"dataset": "mnist_sample", "train_fraction": 0.05, "partition": "dirichlet_a", "samples_per_client": None}
    chosen = [settings_of("fedprox", alpha=alpha, partition_seed=None, **fields)[0] for alpha in (0.1, 10.0)]
    ready = experiments(chosen)
    assert len({e.signature for e in ready}) == 1
    assert len({e.shapes.largest for e in ready}) > 1  # the batch is made for the largest of all
    for each, result in zip(chosen, run(chosen, devices=1), strict=True):
        check_equal(result, alone(each))


@pytest.mark.exhaustive
def test_the_same_on_any_devices_and_in_any_width(monkeypatch):
    chosen = settings_of("fedprox", seeds=(0, 1))
    expected = list(map(alone, chosen))
    for devices, width in ((2, 1), (4, 2)):
        monkeypatch.setattr(trials, "_width", lambda layout, rows, share_work, width=width: min(width, rows))
        for result, other in zip(run(chosen, devices=devices), expected, strict=True):
            check_equal(result, other)


@pytest.mark.exhaustive
def test_later_batches_compile_nothing():
    ready = experiments(settings_of("feddistill"))
    compiled = batch(ready, 4, ["seed"])
    compiled.run(ready, run_all)
    others = experiments(settings_of("feddistill", seeds=(5, 6))[1:4])
    with jax.no_tracing():
        results = compiled.run(others, run_all)
    for experiment, result in zip(others, results, strict=True):
        check_equal(result, alone(experiment.settings))


def test_stopped_trials_end_and_the_others_go_on():
    chosen = settings_of("fedprox", seeds=(0, 1), rounds=6)
    seen = []

    def watch(done, records):
        seen.append((done, sorted(records)))
        return {2: [0, 5, 6, 7], 4: [1]}[done]

    ready = experiments(chosen)
    results = batch(ready, 8, devices=2).run(ready, watch)
    assert seen == [(2, [0, 1, 2, 3, 4, 5, 6, 7]), (4, [1, 2, 3, 4])]
    assert [int(r.evaluations["round"][-1]) for r in results] == [2, 4, 6, 6, 6, 2, 2, 2]
    for number in (2, 3, 4):
        check_equal(results[number], alone(chosen[number]))
    assert results[0].evaluations["round"] == [0, 2]
    assert results[0].rounds["train_loss"] == pytest.approx(alone(chosen[0]).rounds["train_loss"][:2], abs=1e-5)
    assert results[0].rounds["bytes_up"] == alone(chosen[0]).rounds["bytes_up"][:2]


def limited(chosen, gigabytes):
    """Experiments of the same trials that may use so much."""
    ready = experiments(chosen)
    return [e._replace(settings=dataclasses.replace(e.settings, memory_limit=gigabytes)) for e in ready]


def test_too_large_a_batch_is_split(monkeypatch):
    chosen = settings_of("fedprox", seeds=(0, 1))
    monkeypatch.setattr(plan, "needed_bytes", lambda compiled: 0)  # so that the states alone decide
    compiled = batch(limited(chosen, 2e-5), 8, devices=2)
    assert compiled.why.startswith(f"8 trials in batches of {compiled.slots}, for a trial takes ")
    assert 2 <= compiled.slots < 8
    seen = []

    def watch(done, records):
        seen.append((done, sorted(records)))
        return ()

    for each, result in zip(chosen, compiled.run(experiments(chosen), watch), strict=True):
        check_equal(result, alone(each))
    assert [number for done, numbers in seen if done == 2 for number in numbers] == list(range(8))


@pytest.mark.exhaustive  # a study meets the same refusal, in tests/sweeps/test_sweeps.py
def test_what_cannot_fit_is_refused():
    with pytest.raises(InputError, match=r"^a round needs .* GB on a device .* GB are free"):
        batch(limited(settings_of("fedprox"), 1e-7), 4, devices=2)


@pytest.mark.exhaustive
def test_trials_that_do_not_fit_are_refused():
    """Clients larger than the batch has room for would be cut short without a word."""
    fields = {"dataset": "mnist_sample", "train_fraction": 0.05, "partition": "dirichlet_a", "samples_per_client": None}

    def of(alpha):
        return experiments(settings_of("fedprox", alpha=alpha, **fields)[:2])

    small, large = sorted((of(10.0), of(0.1)), key=lambda ready: ready[0].shapes.largest)
    assert small[0].signature == large[0].signature
    assert not batch(small, 2, ["alpha"]).fits(large)
    assert batch([*small, *large], 2).fits(large)


@pytest.mark.exhaustive
def test_trials_that_differ_in_more_are_refused():
    compiled = batch(experiments(settings_of("feddistill"))[:2], 2)
    others = experiments(settings_of("feddistill", seeds=(0, 3))[:2])
    with pytest.raises(InputError, match=r"^these trials differ in more than the batch was compiled for"):
        compiled.run(others, run_all)
