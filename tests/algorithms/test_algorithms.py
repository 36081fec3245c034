"""The contract that every method keeps: its record METHOD enrols it here.

The checks are those of `fdjax.check_method`, which a user's own method gets (`fdjax/run/contract_check.py`), a test
each: three compilations of the superstep of one method of each kind, one of every other, and what needs none. All
liftings are held equal on one algorithm that uses every feature of the engine (`tests/engine/test_probe.py`); the full
matrix of methods and liftings is marked `exhaustive` (`make test-all`).
"""

import functools

import engine_cases as cases
import jax
import numpy as np
import pytest
from choices import some

from fdjax.algorithms import ALGORITHMS
from fdjax.exchange import traffic
from fdjax.models import nets
from fdjax.run.contract_case import CLIENTS, PARTICIPANTS, ROUNDS, SPARSE
from fdjax.run.contract_check import LIFTINGS, Contract, changed_clients

# Pinned to NumPy elsewhere: of another option, or what cuts a training that is too short here to be cut.
UNUSED = {
    "fedbe": ("concentration",),
    "fedkd": ("energy_rounds",),  # between its two energies are too few others to change a rank
    "feddkc": ("entropy",),
    # Adam's steps are of one size whatever the slope, so only tiny ones are the same on two devices.
    "fedftg": ("generator_learning_rate", "class_weight", "diversity_weight"),
    "faug": ("scarcity",),  # a label of these clients is their most frequent one, or a single example, or none
    "feddf": ("server_patience",),
    "fedgkd_vote": ("vote_temperature",),  # the second round has one past model, and the first none
    "fedmd": ("pretrain_patience", "private_patience"),
    # The best of a few teachers stays the best; two rounds have one loss before, and few of these clients two peers.
    "group_distillation": ("similarity", "memory"),
    "group_distillation_proxy": ("similarity", "revenue_temperature"),
}
# The single proxy example that validates here says nothing by accuracy.
CHOSEN = {"feddf": {"model_selection": "kl"}}
# Hundreds of steps amplify rounding, and so does a net that diverges.
FEW = {
    "faug": {"generator_steps": 3, "generator_learning_rate": 0.001},
    "fedad": {"distill_epochs": 2},
    "fedaux": {"pretrain_steps": 3, "distill_learning_rate": 0.01, "score_epsilon": 5.0, "score_penalty": 1.0},
    "feddf": {"server_steps": 20},
    "fedmd": {"pretrain_epochs": 3, "private_epochs": 5},
    "fedmlb": {"learning_rate": 0.05},
    "fedntd": {"learning_rate": 0.1},
    "fedgen": {"generated_weight": 0.5, "latent_weight": 0.5, "generator_steps": 5},
    "fedma": {"sweeps": 1},
    "fedgkt": {"server_epochs": 2, "learning_rate": 0.03},
    "feddkc": {"server_epochs": 2, "learning_rate": 0.03},
    "fedbe": {
        "posterior_samples": 3,
        "server_epochs": 5,
        "server_learning_rate": 1.0,
        "swa_every": 2,
        "swa_begins": 0.5,
    },
    "fedftg": {"server_steps": 1, "student_steps": 2, "generator_learning_rate": 1e-5},
    "fedzkt": {"server_steps": 2, "student_steps": 2, "device_steps": 2, "generator_learning_rate": 1e-4},
    "fedkd": {"learning_rate": 0.03, "energy_rounds": 1},
    "fedproto": {"learning_rate": 0.03},
    "fedtgp": {"server_epochs": 3, "margin": 0.1},
    "fedgh": {"server_epochs": 3},
}

# What their clients keep no round changes.
FROM_THE_SET_UP = ("fedaux",)
# What is matched, averaged, projected or run through a frozen net are hidden units, and so is what a head is given.
HIDDEN = {"model": functools.partial(nets.TwoNN, width=12)}
FIELDS = dict.fromkeys(("fedaux", "fedma", "fedmlb", "fedproto", "fedtgp", "fedgh", "fedkd"), HIDDEN)

# One of each kind of round. The others are traced and lowered in `make test`, and compiled by their equations alone.
KINDS = ("fedavg", "feddf", "fd", "fedmd", "dsfl", "fedgkt", "fedproto", "ensemble")
# A pooled method is another one, on data that the experiment has merged.
NAMES = [name for name, method in ALGORITHMS.items() if not method.pooled]
# A scope, so that tests come method by method.
every_method = pytest.mark.parametrize("name", NAMES, scope="module")
each_kind = pytest.mark.parametrize("name", some(NAMES, *KINDS), scope="module")


@functools.cache
def contract(name):
    given = {"hparams": FEW.get(name, {}), "options": CHOSEN.get(name, {}), "unused": UNUSED.get(name, ())}
    return Contract(name, **given, **FIELDS.get(name, {}))


@each_kind
def test_runs(name):
    contract(name).runs()
    found = contract(name).reference
    assert found.state.round == ROUNDS
    assert "train_loss" in found.metrics
    assert all(values.shape == (CLIENTS,) for values in found.clients.values())
    assert {"local_accuracy", "own_accuracy", "worst_client"} <= found.scalars.keys()


@each_kind
def test_is_the_same_on_two_devices(name):
    contract(name).is_the_same_on_two_devices()


@every_method
@pytest.mark.exhaustive
@pytest.mark.parametrize(("kind", "chunk", "devices"), LIFTINGS, ids=str)
def test_is_the_same_under_every_lifting(name, kind, chunk, devices):
    contract(name).is_the_same_elsewhere(lifting=kind, chunk=chunk, devices=devices)


@each_kind
def test_a_single_participant(name):
    contract(name).a_single_participant()


@each_kind
def test_is_the_same_every_time_and_another_with_another_seed(name):
    contract(name).is_the_same_every_time_and_another_with_another_seed()


@each_kind
def test_every_hparam_is_used_and_a_new_value_compiles_nothing(name):
    contract(name).every_hparam_is_used_and_a_new_value_compiles_nothing()


@each_kind
def test_another_partition_compiles_nothing(name):
    contract(name).another_partition_compiles_nothing()


@each_kind
def test_stays_on_the_device(name):
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed host-to-device"):
        jax.jit(lambda x: x)(np.ones(3))  # the guard does guard
    contract(name).stays_on_the_device()


@each_kind
def test_only_participants_change(name):
    def took_part(seed):
        keys = [cases.round_key(seed, r) for r in range(ROUNDS)]
        return np.isin(ids, np.concatenate([ids[cases.participants_of(key, CLIENTS, PARTICIPANTS)] for key in keys]))

    federation = contract(name).case.built().federation
    ids, holds = np.asarray(federation.client), np.asarray(federation.train_holdings.count) > 0
    seed = next(seed for seed in range(100) if not took_part(seed)[holds].all())
    before, after = contract(name).begun(seed), contract(name).run(seed).state
    if jax.tree.leaves(before.clients):  # a method may keep nothing on its clients, or what the set-up left there
        expected = took_part(seed) & holds & (name not in FROM_THE_SET_UP)
        np.testing.assert_array_equal(changed_clients(before, after), expected)


@each_kind
@pytest.mark.parametrize("counts", SPARSE, ids=str)
def test_survives_sparse_federations(name, counts):
    contract(name).survives_sparse_federations(counts)


@each_kind
def test_without_any_examples_the_server_stays(name):
    contract(name).without_any_examples_the_server_stays()
    nobody = contract(name).run(federation=contract(name).case.federation((0,) * CLIENTS))
    assert np.isnan(nobody.metrics["train_loss"]).all()


@each_kind
def test_resumes_bitwise(name):
    contract(name).resumes_bitwise()


@each_kind
def test_a_round_changes_no_shape_and_counts_its_bytes(name):
    """Every participant of the reference is sent and sends so many bytes."""
    contract(name).a_round_changes_no_shape_and_counts_its_bytes()
    built = contract(name).case.built()
    found = built.simulation.traffic(built.federation, built.hparams)
    assert [sizes[0].exchange for sizes in found.round] == [e.label for e in built.algorithm.round]
    assert len(found.setup) == len(built.algorithm.setup)
    if name in ("fedavg", "feddistill"):
        P = traffic.size(jax.eval_shape(built.layout.central.init, jax.random.key(0)))
        assert (found.per_participant("up"), found.per_participant("down")) == ((P,), (P,))
        assert P == 4 * (60 * 10 + 10)


@every_method
def test_a_superstep_is_lowered_for_other_devices(name):
    contract(name).a_superstep_is_lowered_for_other_devices()
