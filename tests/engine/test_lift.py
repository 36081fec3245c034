"""Many clients on many devices against a Python loop over one."""

import functools

import chex
import engine_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fdjax.client import losses
from fdjax.engine import lift

F, K = cases.FEATURES, cases.CLASSES
LIFTINGS = [("shard_map", chunk, devices) for devices in (1, 2, 4) for chunk in (1, 2, 3, 7, 100)]
LIFTINGS += [("pmap", chunk, devices) for devices in (1, 2, 4) for chunk in (1, 3)]
LIFTINGS += [("vmap", 1, 1), ("chunk", 1, 1), ("chunk", 3, 1)]


def lifting(kind, chunk=3, devices=1, ordered=False):
    return lift.Lifting(kind, cases.mesh(devices), chunk, ordered=ordered)


def lifted(one, chunk, devices, kind="shard_map", ordered=False):
    return jax.jit(functools.partial(lift.over_clients, one, lifting=lifting(kind, chunk, devices, ordered)))


def work(shared, row):
    """As much work as the row says; a row of zeros does none and adds nothing."""
    matrix, _ = shared
    state = lax.fori_loop(0, row["steps"], lambda _, v: jnp.tanh(matrix @ v), row["vector"])
    partials = lift.Partials((row["steps"] * state, row["steps"]), row["id"], row["id"])
    return {"id": row["id"], "state": state}, lift.identity_unless(row["id"] > 0, partials)


def problem(size):
    rng = np.random.default_rng(size)
    shared = rng.normal(size=(3, 3)).astype(np.float32), np.int32(0)
    rows = {
        "id": 1 + rng.permutation(size).astype(np.int32),
        "steps": np.sort(rng.integers(0, 9, size))[::-1].astype(np.int32),
        "vector": rng.normal(size=(size, 3)).astype(np.float32),
    }
    return shared, rows


def loop(size):
    """The same, one client after another, in float64."""
    (matrix, _), rows = problem(size)
    states, total = [], np.zeros(3)
    for steps, vector in zip(rows["steps"], rows["vector"].astype(float), strict=True):
        for _ in range(steps):
            vector = np.tanh(matrix @ vector)
        states.append(vector)
        total += steps * vector
    return {"id": rows["id"], "state": np.stack(states)}, (total, rows["steps"].sum())


@pytest.mark.parametrize(("kind", "chunk", "devices"), LIFTINGS)
def test_lifting_is_a_loop(kind, chunk, devices):
    for size in (1, 11) if chunk in (1, 100) else (11,):
        kept, totals = lifted(work, chunk, devices, kind)(*problem(size))
        total, steps = totals.sum
        expected, (expected_total, expected_steps) = loop(size)
        np.testing.assert_array_equal(kept["id"], expected["id"])  # order
        np.testing.assert_allclose(kept["state"], expected["state"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(total, expected_total, rtol=1e-5, atol=1e-5)
        assert steps == expected_steps
        assert (totals.min, totals.max) == (1, size)


@pytest.mark.parametrize(("kind", "devices"), [("chunk", 1), ("shard_map", 2), ("pmap", 2)])
@pytest.mark.parametrize("narrow", [((0.2, 1), (0.6, 2)), ((0.01, 1), (1.0, 2))], ids=str)
def test_narrower_chunks_for_the_first_change_nothing(kind, devices, narrow):
    one = lifting(kind, 4, devices)._replace(narrow=narrow)
    kept, totals = jax.jit(functools.partial(lift.over_clients, work, lifting=one))(*problem(11))
    total, steps = totals.sum
    expected, (expected_total, expected_steps) = loop(11)
    np.testing.assert_array_equal(kept["id"], expected["id"])
    np.testing.assert_allclose(kept["state"], expected["state"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(total, expected_total, rtol=1e-5, atol=1e-5)
    assert steps == expected_steps


def test_rows_may_be_arrays_of_any_rank_and_dtype():
    rows = (np.arange(5, dtype=np.uint32), np.arange(30, dtype=np.float32).reshape(5, 2, 3), np.eye(5) > 0)
    for chunk, devices in ((2, 1), (2, 4)):
        kept, total = lifted(lambda shared, row: (row, lift.Partials(row[1].sum())), chunk, devices)(
            np.float32(0), rows
        )
        chex.assert_trees_all_equal(kept, rows)
        chex.assert_trees_all_equal_dtypes(kept, rows)
        assert total.sum == rows[1].sum()


def test_a_chunk_of_one_is_not_vmapped():
    """So that what is slow when batched, such as a native convolution, is not."""
    batched = []

    @jax.custom_batching.custom_vmap
    def double(x):
        return 2 * x

    @double.def_vmap
    def _(axis_size, in_batched, x):
        batched.append(axis_size)
        return 2 * x, True

    def one(shared, row):
        return double(row), lift.Partials()

    rows = np.arange(6, dtype=np.float32)
    for chunk, expected in ((1, []), (3, [3])):
        kept, _ = lifted(one, chunk, 2)(np.float32(0), rows)
        np.testing.assert_array_equal(kept, 2 * rows)
        assert sorted(set(batched)) == expected


def test_a_python_loop_is_a_loop():
    kept, totals = lift.over_clients(work, *problem(11), lifting("loop"))
    total, steps = totals.sum
    assert (totals.min, totals.max) == (1, 11)
    expected, (expected_total, expected_steps) = loop(11)
    np.testing.assert_allclose(kept["state"], expected["state"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(total, expected_total, rtol=1e-5, atol=1e-5)
    assert steps == expected_steps


def test_a_failure_in_the_loop_names_client_stage_and_shapes():
    def one(shared, row):
        return shared["matrix"] @ row["vector"], lift.Partials()

    shared, rows = {"matrix": np.eye(3, dtype=np.float32)}, {"vector": np.ones((2, 4), np.float32)}
    with pytest.raises(TypeError) as caught:
        lift.over_clients(one, shared, rows, lifting("loop"), stage="round 7", names=np.array([40, 41]))
    note = caught.value.__notes__[-1]
    assert note.splitlines() == ["client 40, round 7", "  row: vector float32[4]", "  shared: matrix float32[3,3]"]


@pytest.mark.parametrize("kind", ["shard_map", "pmap"])
@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_ordered_sums_are_bitwise_the_same_on_any_number_of_devices(kind, chunk):
    shared, rows = problem(11)
    results = [jax.device_get(lifted(work, chunk, d, kind, ordered=True)(shared, rows)) for d in (1, 2, 4)]
    for result in results[1:]:
        chex.assert_trees_all_equal(result, results[0])
    chex.assert_trees_all_close(results[0][1].sum, loop(11)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("devices", [1, 2])
def test_ordered_sums_of_clients_that_add_nothing(devices):
    """As when the states of clients are made: FedDistill could not begin."""
    shared, rows = problem(5)
    kept, totals = lifted(lambda shared, row: (work(shared, row)[0], lift.Partials()), 2, devices, ordered=True)(
        shared, rows
    )
    assert totals == lift.Partials()
    np.testing.assert_array_equal(kept["id"], rows["id"])


@pytest.mark.parametrize("devices", [1, 2, 3, 4])
def test_devices_get_like_amounts_of_work(devices):
    """Chunks of falling work go forth and back over the devices, so none is left with the first of each turn."""
    deal, collect = lift._dealing(devices, 5)
    work = np.sort(np.random.default_rng(0).lognormal(size=5 * devices))[::-1].copy()
    dealt = deal(work)
    np.testing.assert_array_equal(collect(dealt), work)
    assert np.ptp(dealt.sum(axis=1)) <= work[0]


@pytest.mark.parametrize("kind", ["shard_map", "pmap"])
@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_gradients_of_shared_parameters_stay_with_their_client(kind, chunk, devices):
    """Under shard_map's default check_vma, grad with respect to replicated parameters is summed over devices: 36 % off
    on two, 85 % on four. Every client must get the gradient of its own examples alone."""
    rng = np.random.default_rng(0)
    params = {"W": rng.normal(size=(F, K)).astype(np.float32), "b": np.zeros(K, np.float32)}
    rows = rng.normal(size=(7, 5, F)).astype(np.float32), rng.integers(0, K, (7, 5))

    def one(params, row):
        x, y = row
        gradient = jax.grad(lambda p: losses.cross_entropy(x @ p["W"] + p["b"][None], y).mean())(params)
        return gradient, lift.Partials()

    gradients, _ = lifted(one, chunk, devices, kind)(params, rows)
    for i, (x, y) in enumerate(zip(*rows, strict=True)):
        slope = (cases.softmax(x.astype(float) @ params["W"] + params["b"]) - np.eye(K)[y]) / 5
        np.testing.assert_allclose(gradients["W"][i], x.T @ slope, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(gradients["b"][i], slope.sum(0), rtol=1e-4, atol=1e-6)
