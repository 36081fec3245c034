"""Small methods of each shape that the contract promises to carry, against NumPy: the sketches of the design, kept.

A client's upload is the mean of its examples, so that every number can be checked by hand.
"""

import chex
import engine_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from choices import some

from fdjax.contract import Algorithm, Broadcast, Exchange, Reduction, Upload, unchanged
from fdjax.errors import InputError
from fdjax.exchange import reductions, traffic
from fdjax.exchange.privacy import private
from fdjax.method import HParam, Method

F = cases.FEATURES
COHORTS = (("mclr", 3), ("mclr", 4))
HPARAMS = Method("sketch", "", lambda task: None, {"clip": HParam(0.5), "noise_multiplier": HParam(0.0)})


def send_mean(ctx, received, state, data):
    x, _ = data.take(jnp.arange(16))
    mean = jnp.sum(jnp.where(jnp.arange(16)[:, None] < data.count, x, 0), axis=0) / jnp.maximum(data.count, 1)
    return state, Upload(mean), {"size": jnp.asarray(data.count, jnp.float32)}


def keep(ctx, server, summary):
    return summary, {}


def sketch(reduce, first, *, client=send_mean, server=keep, more=(), setup=()):
    """An algorithm whose server keeps the summary of the first exchange, `first` before it."""
    exchange = Exchange(lambda ctx, server: Broadcast(()), client, reduce, server)
    return Algorithm(
        init_server=lambda ctx, params: jax.tree.map(jnp.asarray, first),
        init_client=lambda ctx, params: (),
        round=(exchange, *more),
        setup=setup,
        central=lambda ctx, server, x: ctx.model.apply(ctx.model.init(jax.random.key(0)), x),
    )


def bind(algorithm, participants=(2, 3)):
    """(simulation, federation) on two devices."""
    task = cases.task(cohorts=COHORTS)
    simulation = cases.bind(algorithm, task, participants, chunk=2, devices=2)
    return simulation, cases.federation(devices=2, cohort_sizes=task.sizes)


def run(simulation, federation, seed=0, **hparams):
    """(state, report) after one round."""
    given = HPARAMS.resolve(hparams)
    return jax.device_get(simulation.run(simulation.init(seed, federation), federation, given, 1))


def participants(federation, numbers=(2, 3)):
    """Cohort by cohort, the (id, mean of x, n_k) of the participants of the first round that hold examples."""
    clients, seen, first = cases.clients_of(federation), [], 0
    for j, ((_, size), number) in enumerate(zip(COHORTS, numbers, strict=True)):
        rows = cases.participants_of(cases.round_key(0, 0), size, number, cohort=j)
        seen.append([(i, x.mean(0), len(y)) for i, x, y in (clients[first + row] for row in rows) if len(y)])
        first += size
    return seen


def run_and_see(algorithm):
    """(state, report, participants of all cohorts)."""
    simulation, federation = bind(algorithm)
    return *run(simulation, federation), participants(federation)


def everyone(seen):
    return [client for cohort in seen for client in cohort]


def test_least_and_largest_numbers():
    algorithm = sketch(
        {"least": reductions.minimum(), "most": reductions.maximum()},
        {name: np.zeros(F, np.float32) for name in ("least", "most")},
    )
    state, _, seen = run_and_see(algorithm)
    means = np.array([mean for _, mean, _ in everyone(seen)])
    np.testing.assert_allclose(state.server["least"], means.min(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.server["most"], means.max(0), rtol=1e-5, atol=1e-6)


def test_a_summary_of_each_cohort():
    algorithm = sketch(reductions.weighted_mean()._replace(per_cohort=True), (np.zeros(F, np.float32),) * 2)
    state, _, seen = run_and_see(algorithm)
    for summary, cohort in zip(state.server, seen, strict=True):
        expected = np.average([mean for _, mean, _ in cohort], axis=0, weights=[n for *_, n in cohort])
        np.testing.assert_allclose(summary, expected, rtol=1e-5, atol=1e-6)


def test_a_server_that_trains_on_every_upload():
    """A stack: the server's point descends on the sum of absolute distances, which no sum of uploads could give."""

    def train(ctx, point, stack):
        def distance(p):
            return jnp.sum(jnp.where((stack.weight > 0)[:, None], jnp.abs(stack.partials - p[None]), 0))

        return jax.lax.fori_loop(0, 5, lambda _, p: p - 0.1 * jax.grad(distance)(p), point), {}

    state, _, seen = run_and_see(sketch(reductions.stack(), np.zeros(F, np.float32), server=train))
    means, point = np.array([mean for _, mean, _ in everyone(seen)]), np.zeros(F)
    for _ in range(5):
        point = point - 0.1 * np.sign(point - means).sum(0)
    np.testing.assert_allclose(state.server, point, rtol=1e-5, atol=1e-5)


def test_a_round_of_two_exchanges():
    """The second exchange reads what the first one made: the clients' mean distance from the mean."""

    def send_distance(ctx, received, state, data):
        _, upload, _ = send_mean(ctx, received, state, data)
        return state, Upload(jnp.sum(jnp.abs(upload.tree - received.shared))), {}

    second = Exchange(
        lambda ctx, server: Broadcast(server["mean"]), send_distance, reductions.mean(),
        lambda ctx, server, mean: (server | {"distance": mean}, {}),
    )  # fmt: skip
    algorithm = sketch(
        reductions.mean(), {"mean": np.zeros(F, np.float32), "distance": np.float32(0)},
        server=lambda ctx, server, mean: (server | {"mean": mean}, {}), more=(second,),
    )  # fmt: skip
    state, report, seen = run_and_see(algorithm)
    means = np.array([mean for _, mean, _ in everyone(seen)])
    np.testing.assert_allclose(state.server["mean"], means.mean(0), rtol=1e-5, atol=1e-6)
    expected = np.abs(means - means.mean(0)).sum(1).mean()
    np.testing.assert_allclose(state.server["distance"], expected, rtol=1e-5)
    sizes = [n for *_, n in everyone(seen)]
    np.testing.assert_allclose(report.metrics["size"], [np.average(sizes, weights=sizes)], rtol=1e-6)


def test_a_private_sum():
    """Clipped in `partial`; the noise of `finish` has the spread that it says, and is another one every round."""
    algorithm = sketch(reductions.mean(), np.zeros(F, np.float32))
    algorithm = algorithm._replace(round=(private(algorithm.round[0], 6),))
    simulation, federation = bind(algorithm, (3, 4))
    means = np.array([mean for _, mean, _ in everyone(participants(federation, (3, 4)))])
    norms = np.linalg.norm(means, axis=1, keepdims=True)
    assert (norms > 0.5).any()
    exact = (means * np.minimum(1, 0.5 / norms)).mean(0)
    np.testing.assert_allclose(run(simulation, federation, clip=0.5)[0].server, exact, rtol=1e-5, atol=1e-6)
    draws = []
    for seed in range(8):
        noisy, _ = run(simulation, federation, seed, clip=0.5, noise_multiplier=4.0)
        draws.append((noisy.server - exact) * len(means) / 2.0)
    assert 0.6 < np.std(draws) < 1.4  # 48 draws of a standard normal
    assert len({float(draw[0]) for draw in draws}) == 8


def test_a_set_up_is_run_by_all_clients_and_counted():
    total = Reduction(lambda ctx, upload, weight: upload["count"], lambda ctx, total: total)

    def count(ctx, received, state, data):
        return state, Upload({"count": jnp.asarray(data.count), "mean": jnp.zeros(3)}), {}

    setup = Exchange(lambda ctx, server: Broadcast((server, server)), count, total, keep)
    algorithm = sketch(reductions.nothing(), np.int32(0), server=unchanged, setup=(setup,))
    simulation, federation = bind(algorithm, (1, 1))
    state, report = jax.device_get(simulation.setup(simulation.init(0, federation), federation, HPARAMS.resolve({})))
    assert state.server == sum(cases.COUNTS)
    sizes = simulation.traffic(federation, HPARAMS.resolve({})).setup
    counted = traffic.count_bytes(sizes, report.sent)
    assert counted == {"up": 6 * (4 + 12), "down": 6 * 8}  # one of the seven clients holds nothing


@pytest.mark.parametrize(
    ("reduce", "message"),
    [
        (reductions.stack(), "--privacy=client needs a sum over all clients, but exchange send_mean reduces by stack;"),
        (reductions.minimum(), "--privacy=client needs a sum over all clients, but exchange send_mean reduces by min;"),
        ({"a": reductions.mean()}, "--privacy=client needs one reduction, but exchange send_mean has a; use"),
        (reductions.mean()._replace(per_cohort=True), "reduces by sum of each cohort"),
    ],
    ids=["stack", "min", "dict", "cohort"],
)  # fmt: skip
def test_what_is_no_sum_cannot_be_private(reduce, message):
    with pytest.raises(InputError) as error:
        private(Exchange(lambda ctx, server: Broadcast(()), send_mean, reduce, keep), 5)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_client_without_examples_keeps_its_state_whatever_its_function_says():
    def grow(ctx, received, state, data):
        return state + 1, Upload(jnp.float32(jnp.nan)), {"size": jnp.float32(jnp.nan)}

    algorithm = sketch(
        Reduction(lambda ctx, upload, weight: jnp.where(weight > 0, 1.0, upload), lambda ctx, total: total),
        np.float32(0), client=grow,
    )._replace(init_client=lambda ctx, params: jnp.zeros(()))  # fmt: skip
    simulation, federation = bind(algorithm, (3, 4))
    state, _ = run(simulation, federation)
    holds = np.asarray(federation.train_holdings.count) > 0
    np.testing.assert_array_equal(np.concatenate(simulation.fetch(state).clients), holds * 1.0)
    assert state.server == holds.sum()  # and no NaN of its own
    chex.assert_trees_all_equal(state.round, np.int32(1))


def test_a_client_that_is_left_out_stays_out_of_the_round():
    """Its upload of the first exchange is not finite: in the second it neither counts, nor changes, nor is counted."""
    bad = 3

    def spoil(ctx, received, state, data):
        return state, Upload(jnp.where(ctx.client == bad, jnp.nan, 1.0)), {}

    def grow(ctx, received, state, data):
        return state + 1, Upload(jnp.float32(1)), {}

    total = Reduction(lambda ctx, upload, weight: upload, lambda ctx, total: total)
    second = Exchange(lambda ctx, server: Broadcast(server), grow, total, lambda ctx, s, n: (s | {"second": n}, {}))
    algorithm = sketch(
        total, {"first": np.float32(0), "second": np.float32(0)}, client=spoil, more=(second,),
        server=lambda ctx, s, n: (s | {"first": n}, {}),
    )._replace(init_client=lambda ctx, params: jnp.zeros(()))  # fmt: skip
    task = cases.task(cohorts=COHORTS)
    simulation = cases.bind(algorithm, task, (3, 4), chunk=2, devices=2, drop_nonfinite=True)
    federation = cases.federation(devices=2, cohort_sizes=task.sizes)
    state, report = run(simulation, federation)
    holds = np.asarray(federation.train_holdings.count) > 0
    counts = holds & (np.asarray(federation.client) != bad)
    assert counts.sum() == holds.sum() - 1
    assert state.server == {"first": counts.sum(), "second": counts.sum()}
    np.testing.assert_array_equal(np.concatenate(simulation.fetch(state).clients), counts * 1.0)
    numbers = [sum(int(cohort.participants[0]) for cohort in exchange) for exchange in report.sent]
    assert numbers == [holds.sum(), counts.sum()]
    assert (report.nonfinite.client[0], report.nonfinite.exchange[0]) == (bad, 0)


def test_a_server_that_nobody_helped_says_nothing():
    def server(ctx, server, summary):
        return server + 1, {"loss": jnp.float32(5)}

    simulation, _ = bind(sketch(reductions.nothing(), np.float32(0), server=server), (1, 1))
    nobody = cases.federation((0,) * 7, devices=2, cohort_sizes=(3, 4))
    state, report = run(simulation, nobody)
    assert state.server == 0
    assert np.isnan(report.metrics["loss"][0])


@pytest.mark.parametrize("name", some(["cfd", "fedgems"], "cfd"))
def test_what_was_never_learned_is_not_taught(name):
    """A first round in which nobody took part leaves the server without labels: the second sends ids alone."""
    _, simulation = cases.simulation(name)
    hparams, nobody, federation = cases.hparams_of(name), cases.federation((0,) * 7), cases.federation()
    state, _ = simulation.run(simulation.init(0, federation), nobody, hparams, 2)
    _, report = jax.device_get(simulation.run(state, federation, hparams, 2))
    sizes = simulation.traffic(federation, hparams).round
    down = traffic.count_bytes(sizes, report.sent)["down"]
    assert down[0] == report.sent[0][0].participants[0] * 4 * cases.PER_ROUND
    assert down[1] > report.sent[0][0].participants[1] * 4 * cases.PER_ROUND
    assert report.metrics["distill_loss"][0] == 0 < report.metrics["distill_loss"][1]
