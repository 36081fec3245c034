"""Which lifting a run gets, and the refusal of one that does not fit."""

import jax
import numpy as np
import pytest

from fdjax import models
from fdjax.engine import lift, plan
from fdjax.errors import InputError
from fdjax.run import experiment, runner, settings

SMALL = {
    "algorithm": "feddistill", "dataset": "synthetic", "num_clients": 6, "model": "mclr", "samples_per_client": 8,
    "rounds": 1,
}  # fmt: skip


MODEL = models.build("mclr", (60,), 10)


def work(*steps):
    """Rounds of all clients, whose steps are given cohort by cohort."""
    return plan.Work((MODEL,), tuple(map(len, steps)), steps)


def choose(clients=6, **request):
    return plan.choose(plan.Request(**request), work(np.ones(clients, np.int32)))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("shard_map", 4, 2)),
        ({"devices": 1}, ("vmap", 1, 6)),
        ({"devices": 1, "chunk": 2}, ("chunk", 1, 2)),
        ({"kind": "pmap", "devices": 2}, ("pmap", 2, 3)),
        ({"kind": "vmap"}, ("vmap", 1, 6)),
        ({"kind": "loop"}, ("loop", 1, 6)),
        ({"chunk": 5}, ("shard_map", 4, 2)),  # no device gets five of six
        ({"chunk": 5, "ordered": True}, ("shard_map", 4, 5)),  # a sum in order is of the chunks that were asked for
    ],
    ids=str,
)
def test_what_is_picked(given, expected):
    chosen = choose(**given)
    assert (chosen.lifting.kind, chosen.lifting.mesh.size, chosen.lifting.chunk) == expected
    assert chosen.why.startswith(f"{expected[0]} on {expected[1]} cpu device")


def test_the_automatic_chunk_is_evened_out_over_the_turns():
    mesh = lift.make_mesh(jax.devices()[:2])
    assert plan.automatic_chunk(work(np.ones(1000)), mesh) == 167  # 500 each, at most 214 at once: three turns
    assert plan.automatic_chunk(work(np.ones(5)), mesh) == 3


def executed(steps, chunk, narrow, devices):
    """Client steps that chunks run, those of members which are done and of empty places among them."""
    steps, start, total = np.sort(steps)[::-1], 0, 0
    for share, width in (*narrow, (1.0, chunk)):
        stop = round(share * len(steps))
        for i in range(start, stop, width):
            total += steps[i] * width
        start = max(start, stop)
    return total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("devices", [1, 2])
def test_a_power_law_federation_runs_few_idle_steps(seed, devices):
    mesh = lift.make_mesh(jax.devices()[:devices])
    sizes = np.random.default_rng(seed).lognormal(4, 2, 1000).astype(int) + 50  # synthetic(alpha, beta)'s
    steps = -(-sizes // 10)
    narrow = plan.narrower(work(steps), 167, mesh)
    assert executed(steps, 167, (), devices) > 5 * steps.sum()
    assert executed(steps, 167, narrow, devices) < 1.3 * steps.sum()


def test_clients_of_like_size_share_one_chunk_size():
    for steps in (np.full(1000, 20), np.arange(1000) // 200 + 20):
        assert plan.narrower(work(steps), 167, lift.make_mesh(jax.devices()[:2])) == ()


def test_another_chunk_has_narrower_chunks_of_its_own():
    steps = np.asarray([500] * 2 + [1] * 998)
    chosen = plan.choose(plan.Request(devices=1), work(steps))
    assert chosen.lifting.narrow
    changed = chosen.in_chunks_of(50)
    assert changed.lifting.chunk == 50
    assert changed.lifting.narrow == plan.narrower(work(steps), 50, chosen.lifting.mesh)
    assert changed.lifting._replace(chunk=chosen.lifting.chunk, narrow=chosen.lifting.narrow) == chosen.lifting
    assert plan.choose(plan.Request(devices=1, chunk=100), work(steps)).in_chunks_of(50).lifting.narrow == ()


def test_a_mesh_that_does_not_divide_the_clients_says_so():
    assert "the last turn leaves 2 of 8 places empty" in choose().why
    assert "empty" not in choose(devices=2).why


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"chunk": 7}, "--chunk=7, but a round has 6 participants"),
        ({"devices": 5}, "--devices=5, but there are 4"),
        ({"kind": "vmap", "devices": 2}, "--lifting=vmap runs on one device"),
    ],
    ids=str,
)
def test_what_cannot_be_laid_out(given, message):
    with pytest.raises(InputError, match=message):
        choose(**given)


def test_the_largest_chunk_that_fits():
    asked = []

    def needed(chunk):
        asked.append(chunk)
        return 100 + 10 * chunk

    assert plan.fit_chunk(32, 1000, needed, may_change=False) == (32, 420)
    assert asked == [32]
    assert plan.fit_chunk(32, 250, needed, may_change=True) == (15, 250)
    with pytest.raises(InputError, match="--chunk=15 would fit"):
        plan.fit_chunk(32, 250, needed, may_change=False)
    with pytest.raises(InputError, match="even one client at a time"):
        plan.fit_chunk(32, 105, needed, may_change=True)


def test_a_run_that_cannot_fit_is_refused_before_it_starts():
    fields = SMALL | {"algorithm": "fedavg", "local_eval": "none"}  # whose clients keep nothing
    chosen = settings.make(**fields, devices=1, lifting="chunk", chunk=6, memory_limit=1e-6)
    with pytest.raises(InputError, match=r"a round needs .* GB on a device at --chunk=6, and 1e-06 GB are free"):
        runner.run(chosen, progress=False)


def test_states_that_fit_nowhere_are_refused_before_anything_is_allocated():
    with pytest.raises(InputError, match=r"clients need 7.32e-06 GB on each of 2 devices, and 1e-06 GB are free"):
        runner.run(settings.make(**SMALL, devices=2, memory_limit=1e-6), progress=False)
    mesh = lift.make_mesh(jax.devices()[:4])
    states = jax.ShapeDtypeStruct((100_000_000, 2_500), np.float32)
    with pytest.raises(InputError, match=r"need 250 GB on each of 4 devices, and 200 GB are free; use more devices"):
        plan.fit_states(states, mesh, 200_000_000_000)
    assert plan.fit_states(states, mesh, 250_000_000_000) == 250_000_000_000


def test_the_chunk_shrinks_to_what_fits(capsys):
    """The estimate that the compiler makes grows with the chunk, so a limit between two chunks picks the smaller."""
    fields = SMALL | {"algorithm": "fedavg", "local_eval": "none", "num_clients": 16, "devices": 1, "lifting": "chunk"}
    built = experiment.build(settings.make(**fields))
    state = built.simulation.init(0, built.federation)

    def needed(chunk):
        other = experiment.with_plan(built, built.plan.in_chunks_of(chunk))
        calls = (
            other.simulation.run.lower(state, built.federation, built.hparams, 1),
            other.simulation.evaluate.lower(state, built.federation, built.hparams),
        )
        return max(plan.needed_bytes(call.compile()) for call in calls)

    small, large = needed(1), needed(16)
    assert small < large
    limit = (small + large) / 2e9
    result = runner.run(settings.make(**fields, memory_limit=limit), progress=True)
    said = capsys.readouterr().err
    assert "because 16 does not fit" in said
    assert np.isfinite(result.final["central_loss"])


def test_free_memory_is_shared_by_the_devices_of_a_host():
    one, four = (plan.free_bytes(lift.make_mesh(jax.devices()[:n])) for n in (1, 4))
    assert one is not None
    assert four is not None
    assert 0.2 * one < four < 0.3 * one
