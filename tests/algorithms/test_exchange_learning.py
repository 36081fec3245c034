"""What exchange is worth where clients hold few labels, measured against the same training without it."""

import engine_cases as cases
import numpy as np
import pytest
from learning_cases import SEEDS, alone, run

from fdjax.algorithms import ALGORITHMS
from fdjax.data.federation import federate
from fdjax.errors import InputError
from fdjax.run import experiment, settings

FLOATS = {"dataset": "synthetic", "num_clients": 4, "samples_per_client": 20, "model": "mclr"}

# Which accuracy, how far above that of `local` for every seed, and how far for seeds 0, 1, 2 when it was measured.
BETTER = {
    "fedavg": ("central", 0.45, (0.568, 0.515, 0.593)),
    "fedprox": ("central", 0.45, (0.566, 0.512, 0.591)),
    "feddistill": ("central", 0.45, (0.558, 0.540, 0.571)),
    "ensemble": ("central", 0.2, (0.343, 0.249, 0.343)),
    "centralized": ("central", 0.6, (0.678, 0.666, 0.666)),
    "fedmd": ("local", 0.5, (0.607, 0.604, 0.592)),
    "cronus": ("local", 0.03, (0.124, 0.046, 0.063)),
    "dsfl": ("local", 0.25, (0.382, 0.349, 0.375)),
    "feddf": ("central", 0.45, (0.585, 0.550, 0.560)),
    "cfd": ("central", 0.15, (0.365, 0.253, 0.311)),
    "fedgems": ("local", 0.5, (0.638, 0.632, 0.622)),
}
CHOSEN = {
    "feddf": {"local_epochs": 5, "server_steps": 300},
    "cfd": {"local_epochs": 2, "distill_epochs": 5},
    "fedgems": {"distill_epochs": 2, "server_epochs": 5},
    "fedgkt": {"learning_rate": 0.03, "server_epochs": 5},  # 0.1 diverges for one seed, with a 2nn as the server's
}
# Not expected to be better, as their docstrings say. How far apart at the most; measured 0.005, -0.002, 0.006 (fd) and
# -0.012, -0.007, -0.014 (fedgkt).
LEVEL = {"fd": 0.03, "fedgkt": 0.03}


def test_every_method_is_measured():
    assert {*BETTER, *LEVEL, "local"} == {*ALGORITHMS}


@pytest.mark.parametrize("algorithm", BETTER)
def test_beats_training_alone(algorithm):
    kind, margin, _ = BETTER[algorithm]
    for seed in SEEDS:
        scalars, *_ = run(algorithm, seed, CHOSEN.get(algorithm))
        assert scalars[f"{kind}_accuracy"] > alone(seed) + margin, (seed, scalars, alone(seed))


@pytest.mark.parametrize("algorithm", LEVEL)
def test_is_level_with_training_alone(algorithm):
    models = {"models": "2nn:10", "model": "mclr"} if algorithm == "fedgkt" else {}
    for seed in SEEDS:
        scalars, *_ = run(algorithm, seed, CHOSEN.get(algorithm), **models)
        assert abs(scalars["local_accuracy"] - alone(seed)) < LEVEL[algorithm], (seed, scalars, alone(seed))


def test_fedmd_owes_its_lead_to_the_consensus_too():
    """Most of what FedMD has before `local` are the labels of the public data; a digest of nothing loses the rest."""
    for seed in SEEDS:
        with_it, without = (run("fedmd", seed, given)[0] for given in (None, {"digest_learning_rate": 0.0}))
        assert with_it["local_accuracy"] > without["local_accuracy"] + 0.15


def test_dsfl_central_model_beats_the_mean_of_models_alone():
    """Measured 0.675, 0.612, 0.683 against 0.245, 0.256, 0.250."""
    for seed in SEEDS:
        assert run("dsfl", seed)[0]["central_accuracy"] > alone(seed) + 0.3


def test_cfd_sends_a_thirtieth_of_its_symbols():
    """And less than a code without deltas could: one of 10 labels an example is log2(10) bits."""
    for seed in SEEDS:
        _, metrics, traffic = run("cfd", seed, CHOSEN["cfd"])
        assert metrics["bytes_up"].max() < traffic.round_up / 30  # which is 1 byte a symbol, 5 kB a client
        assert metrics["bytes_up"][1:].mean() < 10 * 500 * np.log2(10) / 8 / 1.5


def test_fedgems_server_learns_more_than_it_knew():
    """Measured 0.877, 0.893, 0.880 for the server, whose proxy labels alone are worth much of it."""
    for seed in SEEDS:
        scalars, metrics, _ = run("fedgems", seed, CHOSEN["fedgems"])
        assert scalars["central_accuracy"] > 0.8
        assert metrics["server_known"][-1] > metrics["server_known"][0]


def test_baselines_are_in_order():
    """Pooled above together above alone; measured 0.923, 0.588, 0.245 for seed 0."""
    for seed in SEEDS:
        together, pooled = run("ensemble", seed)[0], run("centralized", seed)[0]
        assert together["local_accuracy"] == alone(seed)  # the same clients
        assert pooled["central_accuracy"] > together["central_accuracy"] + 0.2
        np.testing.assert_allclose(pooled["central_accuracy"], pooled["local_accuracy"], atol=1e-6)


def test_centralized_is_one_client_that_holds_everything():
    built = experiment.build(settings.make(algorithm="centralized", **FLOATS, participation=0.1))
    apart = experiment.build(settings.make(algorithm="local", **FLOATS))
    everything = sum(np.asarray(apart.federation.train_holdings.count).tolist())
    assert np.asarray(built.federation.train_holdings.count).tolist() == [everything]
    assert len(apart.holdings.order) == everything > 60
    assert sorted(built.holdings.order.tolist()) == sorted(apart.holdings.order.tolist())
    assert built.simulation.traffic(built.federation).round_up == 0


BAD = [
    ({"algorithm": "fedmd"}, {}, "fedmd needs proxy data, with labels; give --proxy=held_out"),
    ({"algorithm": "cronus"}, {}, "cronus needs proxy data, whose labels it does not use"),
    ({"algorithm": "dsfl"}, {}, "dsfl needs proxy data, whose labels it does not use"),
    ({"algorithm": "fedmd", "proxy": "noise"}, {}, "fedmd needs labelled proxy data, but --proxy=noise has none of"),
    ({"algorithm": "dsfl", "proxy": "mnist_sample", "proxy_size": 9}, {}, "--proxy=mnist_sample has inputs (28, 28, "),
    ({"algorithm": "dsfl", "proxy": "noise", "options": {"aggregation": "mean"}}, {}, "unknown aggregation 'mean'"),
    ({"algorithm": "cronus", "proxy": "noise", "options": {"faulty": "0.5"}}, {}, "unknown faulty '0.5'"),
    ({"algorithm": "fd", "options": {"aggregation": "era"}}, {}, "unknown option of fd 'aggregation'"),
    ({"algorithm": "fd"}, {"gamma": -0.1}, "--gamma=-0.1: expected a finite number of at least 0"),
    ({"algorithm": "dsfl", "proxy": "noise"}, {"era_temperature": 0.0}, "--era_temperature=0.0: expected a finite num"),
    ({"algorithm": "dsfl", "proxy": "noise"}, {"era_beta": -1.0}, "--era_beta=-1.0: expected a finite number of at le"),
    ({"algorithm": "dsfl", "proxy": "noise"}, {"distill_epochs": 0}, "--distill_epochs=0: expected a whole number of"),
    ({"algorithm": "ensemble", "local_eval": "own"}, {}, "ensemble tests an ensemble of personal models"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "hparams", "message"), BAD, ids=[message[:40] for *_, message in BAD])
def test_bad_input(fields, hparams, message):
    with pytest.raises(InputError) as error:
        experiment.build(settings.make(hparams, **FLOATS | {"proxy_size": 20} | fields))
    assert str(error.value).startswith(message)


def test_models_of_other_classes_are_refused():
    algorithm, simulation = cases.simulation("fedmd", cohorts=(("mclr", 3), ("five", 4)), participants=(2, 2))
    del algorithm
    with pytest.raises(InputError, match=r"^models differ in their number of classes \(mclr 4, five 5\); build all"):
        simulation.init(0, cases.federation(cohort_sizes=(3, 4)))


def test_proxy_data_of_another_shape_are_refused():
    blobs, other = cases.source(10), cases.source(5, shape=(3, 2))
    holdings = cases.from_counts(np.arange(10), np.asarray([10]))
    with pytest.raises(InputError, match=r"^proxy data have inputs \(3, 2\), but blobs has \(6,\); use proxy data of"):
        federate(blobs, holdings, holdings, (1,), cases.mesh(), (other.train_x, other.train_y))
