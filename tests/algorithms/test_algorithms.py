"""The contract that every method keeps: its record METHOD enrols it here.

The federation has 7 clients of 12 to 0 examples, most of which lack some of the 4 classes, and 5 of them take part.
A method costs three compilations of its superstep: the reference (one device, chunks of three), two devices with chunks
of two, and a single participant. Everything else uses the reference, or shapes alone. All liftings are held equal on
one algorithm that uses every feature of the engine (`tests/engine/test_probe.py`); the full matrix of methods and
liftings is marked `exhaustive` (`make test-all`).
"""

import functools

import chex
import engine_cases as cases
import jax
import numpy as np
import pytest

from fdjax.algorithms import ALGORITHMS
from fdjax.contract import ENSEMBLE
from fdjax.engine import layout
from fdjax.exchange import traffic
from fdjax.run.checkpoint import Checkpoints

ROUNDS = 2
LIFTINGS = [  # beside those that every method is tested under
    ("vmap", 3, 1),
    ("chunk", 3, 1),
    ("shard_map", 2, 4),
    ("pmap", 2, 2),
    ("loop", 1, 1),
]

# A pooled method is another one, on data that the experiment has merged. A scope, so that tests come method by method.
pytestmark = pytest.mark.parametrize(
    "name", [name for name, method in ALGORITHMS.items() if not method.pooled], scope="module"
)


@functools.cache
def begun(name, seed=0):
    """The state before the first round, on the host."""
    _, simulation = cases.simulation(name)
    return jax.device_get(cases.begin(simulation, cases.federation(), cases.hparams_of(name), seed))


def run(name, seed=0, federation=None):
    """(state, metrics [R], (scalars, values of clients [C])) after ROUNDS rounds of the reference, on the host."""
    _, simulation = cases.simulation(name)
    hparams = cases.hparams_of(name)
    if federation is None:
        federation, state = cases.federation(), cases.replicated(begun(name, seed), cases.federation())
    else:
        state = cases.begin(simulation, federation, hparams, seed)
    state, report = simulation.run(state, federation, hparams, ROUNDS)
    return jax.device_get((state, report.metrics, simulation.evaluate(state, federation, hparams)))


@functools.cache
def reference(name):
    return run(name)


def largest_change(before, after):
    """Over all numbers of server and clients."""
    leaves = zip(jax.tree.leaves(before[:2]), jax.tree.leaves(after[:2]), strict=True)
    return max(np.abs(a * 1.0 - b * 1.0).max() for a, b in leaves)


def changed_clients(before, after):
    """[C] bool: whose state differs anywhere."""
    leaves = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    changed = [(a != b).reshape(len(a), -1).any(axis=1) for a, b in leaves]
    return np.any(changed, axis=0) if changed else None


def test_runs(name):
    state, metrics, (scalars, clients) = reference(name)
    assert cases.all_finite((state, metrics, scalars, clients))
    assert state.round == ROUNDS
    assert "train_loss" in metrics
    assert all(values.shape == (ROUNDS,) for values in metrics.values())
    assert all(values.shape == (7,) for values in clients.values())
    algorithm, _ = cases.simulation(name)
    assert ("central_accuracy" in scalars) == (algorithm.central is not None)
    assert {"local_accuracy", "own_accuracy", "worst_client"} <= scalars.keys()
    assert all(0 <= value <= 1 for key, value in scalars.items() if "accuracy" in key)
    if algorithm.central not in (None, ENSEMBLE):
        assert largest_change((begun(name).server,), (state.server,)) > 1e-3
    assert largest_change(begun(name), state) > 1e-3


def run_elsewhere(name, **options):
    """The reference's start, carried on under another layout: (state, metrics)."""
    _, simulation = cases.simulation(name, **options)
    federation = cases.federation(devices=options.get("devices", 1))
    start = simulation.place(begun(name))  # the same start, to save compiling `init` again
    state, report = simulation.run(start, federation, cases.hparams_of(name), ROUNDS)
    return simulation.fetch(state), report.metrics


def test_is_the_same_on_two_devices(name):
    chex.assert_trees_all_close(run_elsewhere(name, chunk=2, devices=2), reference(name)[:2], rtol=1e-5, atol=1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("kind", "chunk", "devices"), LIFTINGS, ids=str)
def test_is_the_same_under_every_lifting(name, kind, chunk, devices):
    other = run_elsewhere(name, kind=kind, chunk=chunk, devices=devices)
    chex.assert_trees_all_close(other, reference(name)[:2], rtol=1e-5, atol=1e-5)


def test_a_single_participant(name):
    _, simulation = cases.simulation(name, participants=(1,))
    start = cases.replicated(begun(name), cases.federation())
    after, report = jax.device_get(simulation.run(start, cases.federation(), cases.hparams_of(name), ROUNDS))
    assert cases.all_finite((after, report))
    chosen = [int(cases.participants_of(cases.round_key(0, r), 7, 1)[0]) for r in range(ROUNDS)]
    changed = changed_clients(begun(name).clients[0], after.clients[0])
    assert changed is None or set(np.flatnonzero(changed)) <= set(chosen)


def test_is_the_same_every_time_and_another_with_another_seed(name):
    chex.assert_trees_all_equal(run(name), reference(name))
    other, *_ = run(name, seed=1)
    assert largest_change(reference(name)[0], other) > 1e-3


def losses(name, hparams):
    """Losses of the models at the end of the reference with other hparams."""
    _, simulation = cases.simulation(name)
    federation = cases.federation()
    state, _ = simulation.run(cases.begin(simulation, federation, hparams), federation, hparams, ROUNDS)
    scalars, _ = simulation.evaluate(state, federation, hparams)
    return np.array([v for key, v in sorted(scalars.items()) if key in ("central_loss", "local_loss")])


def test_every_hparam_is_used_and_a_new_value_compiles_nothing(name):
    usual = cases.hparams_of(name)
    expected = losses(name, usual)
    for hparam, value in usual.items():
        if (name, hparam) in cases.NEEDS:
            continue  # of another option: pinned to NumPy in test_exchange_equations
        other = np.asarray(value + 1 if ALGORITHMS[name].hparams[hparam].integer else 0.5 * value, value.dtype)
        with jax.no_tracing():
            found = losses(name, usual | {hparam: other})
        assert np.isfinite(found).all()
        assert np.abs(found - expected).max() > 1e-6, f"{hparam} changes nothing"


def test_another_partition_compiles_nothing(name):
    reference(name)
    with jax.no_tracing():
        assert cases.all_finite(run(name, seed=3, federation=cases.federation((3, 9, 5, 12, 1, 0, 7))))


def test_stays_on_the_device(name):
    """A superstep asks the host for nothing: every transfer is an error."""
    reference(name)
    _, simulation = cases.simulation(name)
    federation = cases.federation()
    hparams = jax.device_put(cases.hparams_of(name))
    state = cases.begin(simulation, federation, hparams)
    with jax.transfer_guard("disallow"):
        with pytest.raises(Exception, match="Disallowed host-to-device"):  # the guard does guard
            simulation.run(state, federation, jax.tree.map(np.asarray, cases.hparams_of(name)), ROUNDS)
        state, report = simulation.run(state, federation, hparams, ROUNDS)
        simulation.evaluate(state, federation, hparams)
    assert cases.all_finite(report)


def test_only_participants_change(name):
    def took_part(seed):
        rounds = [cases.participants_of(cases.round_key(seed, r), 7, cases.PARTICIPANTS) for r in range(ROUNDS)]
        return np.isin(np.arange(7), np.concatenate(rounds))

    holds = np.asarray(cases.federation().train_holdings.count) > 0
    seed = next(seed for seed in range(100) if not took_part(seed)[holds].all())
    changed = changed_clients(begun(name, seed).clients[0], run(name, seed)[0].clients[0])
    if changed is not None:  # a method may keep nothing on its clients
        np.testing.assert_array_equal(changed, took_part(seed) & holds)


@pytest.mark.parametrize(
    "counts", [(0, 0, 12, 0, 0, 0, 0), (1,) * 7, (0, 0, 0, 1, 0, 0, 36), (6, 0, 6, 0, 6, 0, 6)], ids=str
)
def test_survives_sparse_federations(name, counts):
    assert cases.all_finite(run(name, federation=cases.federation(counts)))


def test_without_any_examples_the_server_stays(name):
    nobody = cases.federation((0,) * 7)
    before = jax.device_get(cases.simulation(name)[1].init(0, nobody))  # the set-up changes nobody without examples
    after, metrics, evaluation = run(name, federation=nobody)
    chex.assert_trees_all_equal(after.server, before.server)
    chex.assert_trees_all_equal(after.clients, before.clients)
    assert cases.all_finite((metrics, evaluation))
    assert metrics["train_loss"].tolist() == [0.0] * ROUNDS


def test_resumes_bitwise(name, tmp_path):
    _, simulation = cases.simulation(name)
    federation, hparams = cases.federation(), cases.hparams_of(name)

    def two_rounds(state):
        return simulation.run(state, federation, hparams, ROUNDS)[0]

    start = functools.partial(cases.replicated, begun(name), federation)
    at_once = jax.device_get(two_rounds(two_rounds(start())))
    halfway = two_rounds(start())
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


def shapes_of(simulation, name):
    """(state, federation, hparams) of the reference as shapes."""
    federation, hparams = cases.federation(), cases.hparams_of(name)
    state = jax.eval_shape(simulation.pure.init, 0, federation)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state, federation, hparams))


def test_a_round_changes_no_shape_and_counts_its_bytes(name):
    """Shapes alone: a state is what it was, and every participant of the reference is sent and sends so many bytes."""
    algorithm, simulation = cases.simulation(name)
    state, federation, hparams = shapes_of(simulation, name)
    after, report = jax.eval_shape(functools.partial(simulation.pure.run, rounds=1), state, federation, hparams)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert isinstance(report, layout.Report)
    found = simulation.traffic(cases.federation(), hparams)
    assert [sizes[0].exchange for sizes in found.round] == [e.name or e.client.__name__ for e in algorithm.round]
    assert len(found.setup) == len(algorithm.setup)
    for sizes, (sent,) in zip(found.round, report.sent, strict=True):
        assert [sizes[0].up is None, sizes[0].down is None] == [sent.up != (), sent.down != ()]
    if name in ("fedavg", "feddistill"):
        P = traffic.size(cases.model().init(jax.random.key(0)))
        assert (found.per_participant("up"), found.per_participant("down")) == ((P,), (P,))
        assert P == 4 * (cases.FEATURES * cases.CLASSES + cases.CLASSES)


def test_a_superstep_is_lowered_for_other_devices(name):
    """It holds nothing that only a CPU has."""
    _, simulation = cases.simulation(name, kind="chunk")
    superstep = jax.jit(functools.partial(simulation.pure.run, rounds=1))
    exported = jax.export.export(superstep, platforms=("cuda", "tpu"))(*shapes_of(simulation, name))
    assert exported.platforms == ("cuda", "tpu")
