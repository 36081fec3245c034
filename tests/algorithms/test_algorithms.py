"""The contract that every registered algorithm keeps: one row in ALGORITHMS enrols a method here.

The federation has 7 clients of 12 to 0 examples, most of which lack some of the 4 classes, and 5 of them take part.
"""

import chex
import engine_cases as cases
import jax
import numpy as np
import pytest

from fdjax.algorithms import ALGORITHMS
from fdjax.run.checkpoint import Checkpoints
from fdjax.run.settings import known_hparams

ROUNDS = 2
LIFTINGS = [  # beside shard_map on one device in chunks of 3, which all other tests use and these are compared with
    ("vmap", 3, 1),
    ("chunk", 3, 1),
    ("shard_map", 1, 2),
    ("shard_map", 2, 4),
    ("pmap", 2, 2),
    ("loop", 1, 1),
]
# Methods that between them make and test every kind of model, which is all that `init`, `setup` and `evaluate` depend
# on: these begin and end on four devices too.
MADE_AND_TESTED_ELSEWHERE = ("fedavg", "feddistill", "fedmd", "fedgkt", "ensemble")

# A pooled method is another one, on data that the experiment has merged. A scope, so that tests come method by method.
pytestmark = pytest.mark.parametrize(
    "name", [name for name, entry in ALGORITHMS.items() if not entry.pooled], scope="module"
)


def run(name, seed=0, federation=None, **layout):
    """(state, metrics [R], (scalars, values of clients [C])) after ROUNDS rounds, on the host."""
    algorithm, simulation = cases.simulation(name, **layout)
    if federation is None:
        federation = cases.federation(devices=layout.get("devices", 1))
    hparams = cases.hparams_of(algorithm)
    state, metrics = simulation.run(cases.begin(simulation, federation, hparams, seed), federation, hparams, ROUNDS)
    return jax.device_get((state, metrics, simulation.evaluate(state, federation)))


def begun(name, seed=0, federation=None):
    """The state before the first round, on the host."""
    algorithm, simulation = cases.simulation(name)
    federation = federation or cases.federation()
    return jax.device_get(cases.begin(simulation, federation, cases.hparams_of(algorithm), seed))


def largest_change(before, after):
    """Over all numbers of server and clients."""
    leaves = zip(jax.tree.leaves(before[:2]), jax.tree.leaves(after[:2]), strict=True)
    return max(np.abs(a - b).max() for a, b in leaves)


def changed_rows(before, after):
    """[C] bool: whose state differs anywhere."""
    leaves = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    changed = [(a != b).reshape(len(a), -1).any(axis=1) for a, b in leaves]
    return np.any(changed, axis=0) if changed else None


def test_runs(name):
    state, metrics, (scalars, clients) = run(name)
    assert cases.all_finite((state, metrics, scalars, clients))
    assert state.round == ROUNDS
    assert "train_loss" in metrics
    assert all(values.shape == (ROUNDS,) for values in metrics.values())
    assert all(values.shape == (7,) for values in clients.values())
    algorithm, _ = cases.simulation(name)
    assert ("central_accuracy" in scalars) == (algorithm.central is not None or algorithm.ensemble)
    assert {"local_accuracy", "own_accuracy", "worst_client"} <= scalars.keys()
    assert all(0 <= value <= 1 for key, value in scalars.items() if "accuracy" in key)
    start = begun(name)
    if algorithm.central is not None:
        params = algorithm.central[1]
        assert not np.array_equal(jax.tree.leaves(params(start.server))[-1], jax.tree.leaves(params(state.server))[-1])
    assert largest_change(start, state) > 1e-3


@pytest.mark.parametrize(("kind", "chunk", "devices"), LIFTINGS, ids=str)
def test_is_the_same_under_every_lifting(name, kind, chunk, devices):
    state, metrics, evaluation = run(name)
    algorithm, simulation = cases.simulation(name, chunk=chunk, devices=devices, kind=kind)
    federation, hparams = cases.federation(devices=devices), cases.hparams_of(algorithm)
    everything = devices == 4 and name in MADE_AND_TESTED_ELSEWHERE
    start = (
        cases.begin(simulation, federation, hparams) if everything else cases.replicated(begun(name), federation)
    )  # the same start, to save compiling `init` and `evaluate` again
    other, other_metrics = simulation.run(start, federation, hparams, ROUNDS)
    chex.assert_trees_all_close(other, state, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(other_metrics, metrics, rtol=1e-5, atol=1e-5)
    if everything:
        chex.assert_trees_all_close(simulation.evaluate(other, federation), evaluation, rtol=1e-5, atol=1e-5)


def test_is_the_same_every_time_and_another_with_another_seed(name):
    first = run(name)
    chex.assert_trees_all_equal(run(name), first)
    other, *_ = run(name, seed=1)
    assert largest_change(first[0], other) > 1e-3


def test_new_hparams_seeds_epochs_and_partitions_compile_nothing(name):
    run(name)
    algorithm, simulation = cases.simulation(name)
    defaults = cases.hparams_of(algorithm)
    for hparam in known_hparams(name):
        value = defaults[hparam] + 1 if hparam.endswith("epochs") else 0.75 * defaults[hparam]
        other, federation = cases.hparams_of(algorithm, **{hparam: value}), cases.federation((3, 9, 5, 12, 1, 0, 7))
        with jax.no_tracing():
            state, metrics = simulation.run(
                cases.begin(simulation, federation, other, seed=3), federation, other, ROUNDS
            )
            simulation.evaluate(state, federation)
        assert cases.all_finite((state, metrics))


def test_every_hparam_is_used(name):
    federation = cases.federation()

    def losses(simulation, hparams):
        state, _ = simulation.run(cases.begin(simulation, federation, hparams), federation, hparams, ROUNDS)
        scalars, _ = simulation.evaluate(state, federation)
        return np.array([v for key, v in sorted(scalars.items()) if key in ("central_loss", "local_loss")])

    before = {}
    for hparam in known_hparams(name):
        options = cases.NEEDS.get((name, hparam), {})
        algorithm, simulation = cases.simulation(name, options=options)
        hparams = cases.hparams_of(algorithm)
        if str(options) not in before:
            before[str(options)] = losses(simulation, hparams)
        value = hparams[hparam]
        other = np.asarray(value + 1 if hparam.endswith("epochs") else 0.5 * value, value.dtype)
        after = losses(simulation, hparams | {hparam: other})
        assert np.abs(after - before[str(options)]).max() > 1e-6, f"{hparam} changes nothing"


def test_stays_on_the_device(name):
    """A superstep asks the host for nothing: every transfer is an error."""
    run(name)
    algorithm, simulation = cases.simulation(name)
    federation = cases.federation()
    hparams = jax.device_put(cases.hparams_of(algorithm))
    state = cases.begin(simulation, federation, hparams)
    with jax.transfer_guard("disallow"):
        with pytest.raises(Exception, match="Disallowed host-to-device"):  # the guard does guard
            simulation.run(state, federation, jax.tree.map(np.asarray, cases.hparams_of(algorithm)), ROUNDS)
        state, metrics = simulation.run(state, federation, hparams, ROUNDS)
        simulation.evaluate(state, federation)
    assert cases.all_finite(metrics)


def test_only_participants_change(name):
    def took_part(seed):
        rounds = [cases.participants_of(cases.round_key(seed, r), 7, cases.PARTICIPANTS) for r in range(ROUNDS)]
        return np.isin(np.arange(7), np.concatenate(rounds))

    federation = cases.federation()
    holds = np.asarray(federation.train_holdings.count) > 0
    seed = next(seed for seed in range(100) if not took_part(seed)[holds].all())
    before = begun(name, seed)
    after, *_ = run(name, seed)
    changed = changed_rows(before.clients[0], after.clients[0])
    if changed is None:
        pytest.skip(f"{name} keeps nothing on its clients")
    np.testing.assert_array_equal(changed, took_part(seed) & holds)


@pytest.mark.parametrize(
    "counts", [(0, 0, 12, 0, 0, 0, 0), (1,) * 7, (0, 0, 0, 1, 0, 0, 36), (6, 0, 6, 0, 6, 0, 6)], ids=str
)
def test_survives_sparse_federations(name, counts):
    assert cases.all_finite(run(name, federation=cases.federation(counts)))


def test_without_any_examples_the_server_stays(name):
    nobody = cases.federation((0,) * 7)
    before = jax.device_get(cases.simulation(name)[1].init(0, nobody))  # setup changes nobody without examples either
    after, metrics, evaluation = run(name, federation=nobody)
    chex.assert_trees_all_equal(after.server, before.server)
    chex.assert_trees_all_equal(after.clients, before.clients)
    assert cases.all_finite((metrics, evaluation))
    assert metrics["train_loss"].tolist() == [0.0] * ROUNDS


def test_a_single_participant(name):
    algorithm, simulation = cases.simulation(name, participants=(1,))
    federation = cases.federation()
    before = begun(name)
    start = cases.replicated(before, federation)
    after, metrics = jax.device_get(simulation.run(start, federation, cases.hparams_of(algorithm), ROUNDS))
    assert cases.all_finite((after, metrics))
    chosen = [int(cases.participants_of(cases.round_key(0, r), 7, 1)[0]) for r in range(ROUNDS)]
    changed = changed_rows(before.clients[0], after.clients[0])
    assert changed is None or set(np.flatnonzero(changed)) <= set(chosen)


def test_resumes_bitwise(name, tmp_path):
    algorithm, simulation = cases.simulation(name)
    federation, hparams = cases.federation(), cases.hparams_of(algorithm)

    def two_rounds(state):
        return simulation.run(state, federation, hparams, ROUNDS)[0]

    at_once = jax.device_get(two_rounds(two_rounds(cases.begin(simulation, federation, hparams))))
    halfway = two_rounds(cases.begin(simulation, federation, hparams))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(halfway, {"note": "half"})
    checkpoints.close()
    del halfway
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert (checkpoints.latest(), checkpoints.record()) == (ROUNDS, {"note": "half"})
    restored = checkpoints.restore(simulation.init(99, federation))
    checkpoints.close()
    with jax.no_tracing():
        resumed = two_rounds(restored)
    chex.assert_trees_all_equal(jax.device_get(resumed), at_once)


def test_counts_its_bytes(name):
    """What is counted is what `broadcast`, one row of `address`, and `client` return, at 4 bytes a float."""
    algorithm, simulation = cases.simulation(name)
    federation = cases.federation()
    traffic = simulation.traffic(federation)
    server = begun(name).server
    P = sum(leaf.size for leaf in jax.tree.leaves(cases.model().init(jax.random.key(0))))
    if algorithm.central is not None:
        assert sum(leaf.size for leaf in jax.tree.leaves(algorithm.central[1](server))) == P
    down = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(algorithm.broadcast(server, 0)))
    if algorithm.address is not None:
        rows = jax.tree.leaves(algorithm.address(server))
        assert {len(leaf) for leaf in rows} == {7}
        down += sum(leaf[0].nbytes for leaf in rows)
    assert traffic.down == (down,)
    assert traffic.participants == (cases.PARTICIPANTS,)
    assert (traffic.round_up, traffic.round_down) == (5 * traffic.up[0], 5 * traffic.down[0])
    if name in ("fedavg", "feddistill"):
        assert (traffic.up, traffic.down) == ((4 * P,), (4 * P,))
        assert P == cases.FEATURES * cases.CLASSES + cases.CLASSES
