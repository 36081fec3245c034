"""A batch of trials: the numbers that each gives alone, from one compilation."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from fdjax.engine import lift, plan
from fdjax.errors import InputError
from fdjax.run import runner, settings, trials

SMALL = {"dataset": "synthetic", "num_clients": 6, "samples_per_client": 20, "model": "mclr", "partition_seed": 0,
         "devices": 1, "batch_size": 8, "rounds": 4, "eval_every": 2, "participation": 0.5}  # fmt: skip
FIELDS = {"fedmd": {"proxy": "held_out", "proxy_size": 30}}
HPARAMS = {
    "fedprox": [{"learning_rate": rate, "mu": mu} for rate in (0.05, 0.2) for mu in (0.0, 1.0)],
    "feddistill": [{"temperature": T, "weight": w, "learning_rate": 0.1} for T in (1.0, 4.0) for w in (0.2, 0.8)],
    "fedmd": [{"learning_rate": r, "pretrain_epochs": e, "private_epochs": 2} for r in (0.1, 0.2) for e in (1, 3)],
}  # fmt: skip


def made(name, seeds=(0,), **fields):
    return [
        settings.make(dict(hparams), algorithm=name, seed=seed, **SMALL | FIELDS.get(name, {}) | fields)
        for hparams in HPARAMS[name]
        for seed in seeds
    ]


def run(chosen, watch=lambda done, records: (), **options):
    ready = trials.experiments(chosen)
    return trials.batch(ready, options.pop("slots", len(ready)), **options).run(ready, watch)


@functools.cache
def alone(one):
    return runner.run(one, progress=False)


def check_equal(one, other):
    assert one.settings == other.settings
    assert one.rounds.keys() == other.rounds.keys()
    for a, b in ((one.rounds, other.rounds), (one.evaluations, other.evaluations), (one.clients, other.clients)):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", ["feddistill", "fedmd"])
def test_a_trial_in_a_batch_is_the_trial_alone(name):
    chosen = made(name, seeds=(0, 1))[:6]
    results = run(chosen, devices=1)
    for one, result in zip(chosen, results, strict=True):
        check_equal(result, alone(one))
    losses = {round(result.rounds["train_loss"][-1], 6) for result in results}
    assert len(losses) > len(chosen) // 2  # and trials do differ


def test_partitions_differ_between_trials():
    fields = {"dataset": "mnist_sample", "train_fraction": 0.05, "partition": "dirichlet_a", "samples_per_client": None}
    chosen = [
        one
        for alpha in (0.1, 10.0)
        for one in made("fedprox", seeds=(0, 1), alpha=alpha, partition_seed=None, **fields)[:2]
    ]
    ready = trials.experiments(chosen)
    assert len({e.signature for e in ready}) == 1
    assert len({e.shapes.largest for e in ready}) > 1  # the batch is made for the largest of all
    for one, result in zip(chosen, run(chosen), strict=True):
        check_equal(result, alone(one))


def test_the_same_on_any_devices_and_in_any_width(monkeypatch):
    chosen = made("fedprox", seeds=(0, 1))
    expected = list(map(alone, chosen))
    for devices, width in ((2, 1), (4, 2)):
        monkeypatch.setattr(trials, "_width", lambda one, rows, shares, width=width: min(width, rows))
        for a, b in zip(run(chosen, devices=devices), expected, strict=True):
            check_equal(a, b)


def test_what_trials_share_is_computed_once():
    """Teachers of FedDistill do not depend on the temperature: the compiled superstep trains one set of them."""
    ready = trials.experiments(made("feddistill"))
    simulation, first = ready[0].simulation, ready[0]
    init = jax.eval_shape(simulation.init, 0, first.federation)
    hparams = {name: np.stack([e.hparams[name] for e in ready]) for name in first.hparams}
    varies = {name: name in ("temperature", "weight") for name in hparams}
    hparams = {name: value if varies[name] else value[0] for name, value in hparams.items()}
    nothing = jax.tree.map(lambda _: False, (init, first.federation))
    state, metrics = lift.what_varies(
        lambda state, federation, hparams: simulation.run(state, federation, hparams, 1),
        (init, first.federation, hparams),
        (*nothing, varies),
    )
    assert all(jax.tree.leaves(state.server))
    assert not any(jax.tree.leaves(state.clients))
    assert metrics["train_loss"]
    assert not metrics["teacher_loss"]


def test_later_batches_compile_nothing():
    ready = trials.experiments(made("feddistill"))
    batch = trials.batch(ready, 4, ["seed"])
    batch.run(ready, lambda done, records: ())
    others = trials.experiments(made("feddistill", seeds=(5, 6))[1:4])
    with jax.no_tracing():
        results = batch.run(others, lambda done, records: ())
    for one, result in zip(others, results, strict=True):
        check_equal(result, alone(one.settings))


def test_stopped_trials_end_and_the_others_go_on():
    chosen = made("feddistill", seeds=(0, 1), rounds=6)
    seen = []

    def watch(done, records):
        seen.append((done, sorted(records)))
        return {2: [0, 5, 6, 7], 4: [1]}[done]

    ready = trials.experiments(chosen)
    results = trials.batch(ready, 8, devices=2).run(ready, watch)
    assert seen == [(2, [0, 1, 2, 3, 4, 5, 6, 7]), (4, [1, 2, 3, 4])]
    assert [int(r.evaluations["round"][-1]) for r in results] == [2, 4, 6, 6, 6, 2, 2, 2]
    for number in (2, 3, 4):
        check_equal(results[number], alone(chosen[number]))
    assert results[0].rounds["train_loss"] == pytest.approx(alone(chosen[0]).rounds["train_loss"][:2], abs=1e-5)
    assert results[0].rounds["bytes_up"] == alone(chosen[0]).rounds["bytes_up"][:2]


def test_a_stopped_trial_costs_nothing():
    """Rows without a trial are in no turn of a device."""
    places = trials._places([0, 3, 4], devices=2, rows=4)
    assert places == [0, 4, -1, -1, 3, -1, -1, -1]
    assert trials._turns(places, 2, 1).tolist() == [2, 1]
    assert trials._turns(trials._places([], 2, 4), 2, 2).tolist() == [0, 0]
    lifted = lift.over_trials(lambda x: x + 1.0, (True,), True, lift.make_trial_mesh(jax.devices()[:2]), 1)
    out = jax.jit(lifted)(np.asarray([2, 1], np.int32), np.arange(8.0, dtype=np.float32))
    assert out.tolist() == [1, 2, 0, 0, 5, 0, 0, 0]  # what is in no turn is not computed


def limited(chosen, gigabytes):
    """Experiments of the same trials that may use so much."""
    ready = trials.experiments(chosen)
    return [e._replace(settings=dataclasses.replace(e.settings, memory_limit=gigabytes)) for e in ready]


def test_too_large_a_batch_is_split(monkeypatch):
    chosen = made("fedprox", seeds=(0, 1))
    monkeypatch.setattr(plan, "needed_bytes", lambda compiled: 0)  # so that the states alone decide
    batch = trials.batch(limited(chosen, 2e-5), 8, devices=2)
    assert batch.why.startswith(f"8 trials in batches of {batch.slots}, for a trial takes ")
    assert 2 <= batch.slots < 8
    for one, result in zip(chosen, batch.run(trials.experiments(chosen), lambda done, records: ()), strict=True):
        check_equal(result, alone(one))


def test_what_cannot_fit_is_refused():
    with pytest.raises(InputError, match=r"^a round needs .* GB on a device .* GB are free"):
        trials.batch(limited(made("fedprox"), 1e-7), 4, devices=2)


def test_trials_that_do_not_fit_are_refused():
    """Clients larger than the batch has room for would be cut short without a word."""
    fields = {"dataset": "mnist_sample", "train_fraction": 0.05, "partition": "dirichlet_a", "samples_per_client": None}

    def of(alpha):
        return trials.experiments(made("fedprox", alpha=alpha, **fields)[:2])

    small, large = sorted((of(10.0), of(0.1)), key=lambda ready: ready[0].shapes.largest)
    assert small[0].signature == large[0].signature
    assert not trials.batch(small, 2, ["alpha"]).fits(large)
    assert trials.batch([*small, *large], 2).fits(large)


def test_trials_that_differ_in_more_are_refused():
    ready = trials.experiments(made("feddistill"))
    batch = trials.batch(ready[:2], 2)
    with pytest.raises(InputError, match=r"^these trials differ in more than the batch was made for"):
        batch.run(trials.experiments(made("feddistill", seeds=(0, 3))[:2]), lambda done, records: ())
