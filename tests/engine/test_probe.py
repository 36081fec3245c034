"""One algorithm with every feature is the same under every lifting, on one, two and four devices, and on two hosts."""

import functools

import chex
import engine_cases as cases
import jax
import numpy as np
import probe
import programs
import pytest
from choices import some
from host_processes import begin, finish, free_port

from fdjax.exchange import traffic

LIFTINGS = [  # beside shard_map on one device in chunks of two, which these are compared with
    ("vmap", 1, 1),
    ("chunk", 2, 1),
    ("shard_map", 1, 2),
    ("shard_map", 2, 4),
    ("pmap", 2, 2),
    ("loop", 1, 1),
]
USUAL = (("vmap", 1, 1), ("shard_map", 2, 4), ("pmap", 2, 2))


ROUNDS = 2


@functools.cache
def reference():
    """(state before the first round, the set-up's report, state, report, evaluation), on the host."""
    simulation, federation, hparams = probe.bind()
    begun, setup = simulation.setup(simulation.init(0, federation), federation, hparams)
    start = simulation.fetch(begun)
    state, report = simulation.run(begun, federation, hparams, ROUNDS)
    evaluation = simulation.evaluate(state, federation, hparams)
    return start, jax.device_get(setup), simulation.fetch(state), *jax.device_get((report, evaluation))


@pytest.mark.parametrize(("kind", "chunk", "devices"), some(LIFTINGS, *USUAL), ids=str)
def test_is_the_same_under_every_lifting(kind, chunk, devices):
    start, setup, *expected, evaluation = reference()
    assert cases.all_finite((start, setup, *expected))
    simulation, federation, hparams = probe.bind(kind, chunk, devices)
    if devices == 4:  # elsewhere no need to compile them anew
        begun, own_setup = simulation.setup(simulation.init(0, federation), federation, hparams)
        found = simulation.fetch(begun), jax.device_get(own_setup)
        chex.assert_trees_all_close(found, (start, setup), rtol=1e-5, atol=1e-5)
    state, report = simulation.run(simulation.place(start), federation, hparams, ROUNDS)
    chex.assert_trees_all_close([simulation.fetch(state), jax.device_get(report)], expected, rtol=1e-5, atol=1e-5)
    if devices == 4:
        own_evaluation = simulation.evaluate(state, federation, hparams)
        chex.assert_trees_all_close(own_evaluation, evaluation, rtol=1e-5, atol=1e-5)


def test_is_the_same_on_two_hosts(tmp_path):
    """Two processes of one device each, joined by jax.distributed: in both the same set-up, rounds and tests."""
    program, cluster = str(programs.ROOT / "tests/engine/probe_on_hosts.py"), (f"localhost:{free_port()}", "2")
    for code, _, said in finish(*(begin(tmp_path, program, f"{tmp_path}/two.npz", *cluster, str(i)) for i in range(2))):
        assert code == 0, said
    found, (_, setup, *ends) = np.load(tmp_path / "two.npz"), reference()
    expected = jax.tree.leaves_with_path((setup, *ends))
    assert len(found.files) == len(expected) > 20
    for name, (path, values) in zip(found.files, expected, strict=True):
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-5, err_msg=jax.tree_util.keystr(path))


@pytest.mark.exhaustive  # `make test` has FedDistill's, compiled as in use, in `as_in_use.py`
@pytest.mark.parametrize("number", [2, 4])
def test_ordered_sums_are_bitwise_the_same_on_any_number_of_devices(number):
    def run(devices):
        linear = tuple(("mclr", size) for _, size in probe.COHORTS)
        simulation, federation, hparams = probe.bind("shard_map", 1, devices, linear, ordered=True)
        state, _ = simulation.run(simulation.init(0, federation), federation, hparams, ROUNDS)
        return jax.device_get(state.server)  # a client's own training may differ in the last bit

    chex.assert_trees_all_equal(run(number), run(1))


def test_resumed_and_repeated_bitwise_without_compiling_or_asking_the_host():
    start, _, *expected, _ = reference()
    simulation, federation, hparams = probe.bind()

    def run(state, rounds, hparams=hparams):
        return simulation.run(simulation.place(state), federation, jax.device_put(hparams), rounds)

    half, _ = run(start, 1)
    whole, _ = run(jax.device_get(half), 1)
    chex.assert_trees_all_equal(jax.device_get(whole), expected[0])
    other = probe.METHOD.resolve({"noise": 0.1, "local_epochs": 3, "learning_rate": 0.1})
    state, values = simulation.place(start), jax.device_put(other)
    with jax.no_tracing(), jax.transfer_guard("disallow"):
        _, report = simulation.run(state, federation, values, 1)
    assert cases.all_finite(report)


def test_everything_was_used():
    _, setup, state, report, (scalars, clients) = reference()
    assert {"train_loss", "own_loss", "spread", "server_draw"} == report.metrics.keys()
    assert setup.metrics.keys() == {"first_label"}
    for name, leaf in state.server.items():
        assert all(np.any(x != 0) for x in jax.tree.leaves(leaf)), name
    least, most = state.server["range"]
    assert (least < most).all()
    assert {"central_accuracy", "local_accuracy"} <= scalars.keys()
    assert {values.shape for values in clients.values()} == {(7,)}


def test_bytes_are_counted_by_arrays_and_by_clients():
    simulation, federation, hparams = probe.bind()
    _, setup, _, report, _ = reference()
    found = simulation.traffic(federation, hparams)
    F, P = cases.FEATURES, cases.FEATURES * cases.CLASSES + cases.CLASSES
    assert [(s.exchange, s.up, s.down) for s in found.setup[0]] == [("sum_up", 4 * F + 4, 4 * F)] * 2
    assert [(s.exchange, s.up, s.down) for s in found.round[0]] == [("train", None, 4 * P + 4 * F)] * 2
    assert [(s.exchange, s.up, s.down) for s in found.round[1]] == [("revisit", None, None)] * 2
    of_setup = traffic.count_bytes(found.setup, setup.sent)
    assert of_setup["up"] == 6 * (4 * F + 4)  # one of the seven clients holds nothing
    assert of_setup["down"] == 6 * 4 * F
    of_rounds = traffic.count_bytes(found.round, report.sent)
    participants = sum(cohort.participants for cohort in report.sent[0])
    changed = of_rounds["up"] - participants * (4 * P + 3)  # the codec's numbers, and one more a client
    assert changed[0] <= participants[0] * 4 * (F + 1)
    assert (changed >= 4 * participants).all()
    assert (changed % 4 == 0).all()
    assert (of_rounds["down"] > participants * (4 * P + 4 * F)).all()
