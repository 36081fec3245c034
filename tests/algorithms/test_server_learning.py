"""FedDF beside FedAvg and of two architectures; what methods with a server's model refuse."""

import chex
import jax
import numpy as np
import pytest
from learning_cases import HELD_OUT, SEEDS, alone, run

from fdjax.data.federation import replicated
from fdjax.errors import InputError
from fdjax.run import experiment, settings


def test_feddf_is_near_fedavg_after_a_long_local_training():
    """Not ahead, as in the paper. Measured 0.775, 0.819, 0.799 and FedAvg, of the same data, 0.818, 0.847, 0.814.

    Of the whole sample they are level: 0.800, 0.852, 0.856 and 0.789, 0.840, 0.848 in one run, and in another, whose
    averages were an ulp apart, FedDF lost the 1.2 points that it was ahead and more (0.822 to 0.840).
    """
    hparams = {"learning_rate": 0.05, "local_epochs": 20}
    made = HELD_OUT | {"rounds": 5, "eval_every": 5}
    for seed in SEEDS:
        fused, *_ = run("feddf", seed, hparams | {"server_steps": 300}, **made)
        averaged, *_ = run("fedavg", seed, hparams, **made)
        assert fused["central_accuracy"] > averaged["central_accuracy"] - 0.1
        assert fused["central_accuracy"] > alone(seed) + 0.4


MIXED = {
    "algorithm": "feddf", "dataset": "synthetic", "num_clients": 5, "model": "mclr", "models": "mclr:2,2nn:3",
    "samples_per_client": 30, "batch_size": 10, "rounds": 2, "eval_every": 2, "participation": 0.7, "proxy": "noise",
    "proxy_size": 40,
    # Adam makes a whole step of a gradient of rounding errors, so that steps must be small for numbers to be equal.
    "hparams": {"server_steps": 20, "server_learning_rate": 1e-4},
}  # fmt: skip


def test_feddf_of_two_architectures_is_the_same_under_two_liftings():
    built = experiment.build(settings.make(**MIXED, chunk=1, devices=1))
    start = jax.device_get(built.simulation.init(0, built.federation))
    state, metrics = built.simulation.run(
        built.simulation.init(0, built.federation), built.federation, built.hparams, 2
    )
    scalars, clients = built.simulation.evaluate(state, built.federation)
    assert len(state.server) == 2
    sizes = tuple(sum(leaf.nbytes for leaf in jax.tree.leaves(prototype)) for prototype in start.server)
    traffic = built.simulation.traffic(built.federation)
    assert (traffic.up, traffic.down) == (sizes, sizes)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state, metrics, scalars)))
    assert clients["local_accuracy"][0] == clients["local_accuracy"][1] == scalars["central_accuracy"]
    assert len(set(np.asarray(clients["local_accuracy"][2:]).tolist())) == 1  # the second prototype's
    assert np.abs(jax.tree.leaves(state.server[1])[0] - jax.tree.leaves(start.server[1])[0]).max() > 1e-3

    other = experiment.build(settings.make(**MIXED, chunk=2, devices=2))
    begun = jax.device_put(start, replicated(other.layout.mesh))
    other = other.simulation.run(begun, other.federation, other.hparams, other.settings.rounds)
    chex.assert_trees_all_close(jax.device_get(other), jax.device_get((state, metrics)), rtol=1e-5, atol=1e-5)


def test_what_cannot_work_is_refused():
    with pytest.raises(InputError, match="drop_worst=on needs labelled proxy data"):
        experiment.build(settings.make(**MIXED, options={"drop_worst": "on"}))
    with pytest.raises(InputError, match="models=gkt_edge:10"):
        experiment.build(settings.make(algorithm="fedgkt", dataset="mnist_sample"))
    with pytest.raises(InputError, match="features have one shape"):
        experiment.build(settings.make(algorithm="fedgkt", dataset="mnist_sample", models="2nn:5,gkt_edge:5"))
    with pytest.raises(InputError, match="whole number of at least 1"):
        settings.make({"server_steps": 0.5}, algorithm="feddf", proxy="noise")
    with pytest.raises(InputError, match="labelled proxy data"):
        experiment.build(settings.make(algorithm="fedgems", dataset="mnist_sample", proxy="noise", proxy_size=50))
