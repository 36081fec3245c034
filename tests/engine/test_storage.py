"""States of clients lie on the devices that work on them, and nowhere else."""

import chex
import engine_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from choices import some

from fdjax.contract import Algorithm, Broadcast, Exchange, Upload
from fdjax.engine import lift
from fdjax.engine.storage import Storage, placed, storage
from fdjax.exchange import reductions

CLIENTS, PARTICIPANTS, CHUNK, NUMBERS = 256, 8, 2, 5_000


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("devices", [1, 2, 3, 4])
@pytest.mark.parametrize("clients", [1, 7, 24])
def test_rows_and_ranks(clients, devices, ordered):
    found = storage(clients, lift.Lifting("shard_map", cases.mesh(devices), 3, ordered=ordered))
    assert found.rows % devices == 0
    rank = np.arange(clients)
    dealt = found.deal(rank + 1)
    assert (dealt[found.row(rank)] == rank + 1).all()
    assert dealt.sum() == (rank + 1).sum()  # zeros elsewhere
    np.testing.assert_array_equal(found.collect(dealt), rank + 1)
    assert devices == 1 or found.row(np.array(clients)) == found.rows
    (stored,) = placed([found], (rank,), cases.mesh(devices))
    np.testing.assert_array_equal(found.collect(np.asarray(stored)), rank)
    np.testing.assert_array_equal(jax.jit(found.collect)(jax.jit(found.deal)(jnp.asarray(rank))), rank)


def test_devices_get_like_amounts_of_work():
    work = np.sort(np.random.default_rng(0).lognormal(size=100))[::-1]
    for devices in (2, 3, 4):
        each = Storage(100, devices, 1, 34).deal(work).reshape(devices, -1) if devices == 3 else None
        each = Storage(100, devices, 1, 100 // devices).deal(work).reshape(devices, -1) if each is None else each
        assert np.ptp(each.sum(1)) <= work[0]
        assert (np.diff(each, axis=1) <= 0).all()  # chunks of like work


def drift(ctx, received, state, data):
    x, _ = data.take(jnp.arange(2) % jnp.maximum(data.count, 1))
    return 0.9 * state + jnp.mean(x), Upload(jnp.mean(state)), {"mean": jnp.mean(state)}


EXCHANGE = Exchange(
    lambda ctx, server: Broadcast(server),
    drift,
    {"mean": reductions.weighted_mean(), "all": reductions.stack()},
    lambda ctx, server, s: (s["mean"] + jnp.sum(s["all"].partials * s["all"].client) / CLIENTS**2, {}),
)


def algorithm(size=NUMBERS):
    """Every client's state is so many numbers, which its prediction uses."""
    return Algorithm(
        init_server=lambda ctx, params: jnp.float32(0),
        init_client=lambda ctx, params: jax.random.normal(ctx.key, (size,)),
        round=(EXCHANGE,),
        setup=(EXCHANGE,),
        personal=lambda ctx, server, state, x: x[:, : cases.CLASSES] * jnp.mean(state),
    )


def bind(devices, participants, ordered=False, size=NUMBERS):
    task = cases.task(cohorts=(("mclr", CLIENTS),))
    simulation = cases.bind(
        algorithm(size), task, (participants,), chunk=CHUNK, devices=devices, ordered=ordered,
        kind="shard_map" if devices > 1 else "chunk",
    )  # fmt: skip
    return simulation, cases.federation((3, 2, 2, 1) * (CLIENTS // 4), devices)


def test_no_device_holds_the_states_of_others():
    devices, number = 4, 4  # bytes of a number
    simulation, federation = bind(devices, PARTICIPANTS)
    states, chunk = CLIENTS * NUMBERS * number, CHUNK * NUMBERS * number
    state = simulation.init(0, federation)
    (leaf,) = state.clients
    assert {shard.data.nbytes for shard in leaf.addressable_shards} == {states // devices}
    compiled = {
        "init": simulation.init.lower(0, federation),
        "run": simulation.run.lower(state, federation, {}, 3),
        "evaluate": simulation.evaluate.lower(state, federation, {}),
        "setup": simulation.setup.lower(state, federation, {}),
    }
    for name, lowered in compiled.items():
        memory = lowered.compile().memory_analysis()
        held = states // devices + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        held -= memory.output_size_in_bytes if name == "init" else 0
        everyone = states // devices if name == "setup" else 0  # all take part, and what they become is apart
        allowed = 1.3 * (states / devices + everyone + PARTICIPANTS * NUMBERS * number + chunk)
        assert held < allowed, f"{name}: {held:,} of {allowed:,.0f} bytes"
    state, _ = simulation.run(state, federation, {}, 1)
    assert {shard.data.nbytes for shard in state.clients[0].addressable_shards} == {states // devices}


@pytest.mark.parametrize(
    ("participants", "ordered"), some([(PARTICIPANTS, False), (CLIENTS, False), (CLIENTS, True)], (PARTICIPANTS, False))
)
def test_any_number_of_devices_gives_the_same(participants, ordered):
    def run(devices):
        simulation, federation = bind(devices, participants, ordered, size=3)
        state, setup = simulation.setup(simulation.init(0, federation), federation, {})
        state, report = simulation.run(state, federation, {}, 2)
        evaluation = simulation.evaluate(state, federation, {})
        return simulation.fetch(state), *jax.device_get((setup, report, evaluation))

    alone, found = run(1), run(3)
    if ordered:
        chex.assert_trees_all_equal(found[0].server, alone[0].server)
    chex.assert_trees_all_close(found, alone, rtol=1e-5, atol=1e-6)
