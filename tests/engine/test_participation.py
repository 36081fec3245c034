"""Who takes part: each policy against its exact probabilities, and what participants count for and send."""

import itertools

import engine_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import binom, chisquare

from fdjax.contract import Algorithm, Broadcast, Exchange, Upload
from fdjax.engine import participation
from fdjax.engine.participation import Policy
from fdjax.errors import InputError
from fdjax.exchange import reductions, traffic
from fdjax.method import HParam, Method

HELD = np.array([5, 3, 1, 1])  # of four clients, by rank
DRAWS = 20_000
LEAST = 1e-4  # p-value of a chi-square test, of fixed seeds


def draws(policy, places, held=HELD, may_train=None):
    """(rank, times) [DRAWS, places]."""
    may_train, cumulative = may_train or len(held), np.cumsum(held).astype(np.int32)
    one = jax.jit(
        jax.vmap(lambda key: participation.draw(policy, key, len(held), may_train, places, jnp.asarray(cumulative)))
    )
    return jax.device_get(one(jax.random.split(jax.random.key(0), DRAWS)))


def fits(found, expected):
    """Whether numbers of draws are as expected of these probabilities."""
    assert sum(expected) == pytest.approx(1)
    return len(found) == 1 or chisquare(found, np.asarray(expected) * np.sum(found)).pvalue > LEAST


def in_turns(share, members):
    """The probability to draw just these without replacement, each in proportion to its share of what is left."""
    total = 0.0
    for order in itertools.permutations(members):
        left, chance = 1.0, 1.0
        for k in order:
            chance *= share[k] / left
            left -= share[k]
        total += chance
    return total


@pytest.mark.parametrize(("clients", "places"), [(4, 2), (7, 3), (5, 1)])
def test_uniform_draws_every_subset_alike(clients, places):
    rank, times = draws(Policy(), places, np.ones(clients, int))
    assert (np.diff(rank, axis=1) > 0).all()
    assert (times == 1).all()
    subsets = list(itertools.combinations(range(clients), places))
    found = [np.all(rank == subset, axis=1).sum() for subset in subsets]
    assert fits(found, np.full(len(subsets), 1 / len(subsets)))


@pytest.mark.parametrize("others", [0, 8], ids=["by exponential times", "by rejection"])
def test_examples_draws_without_replacement_by_what_is_left(others):
    held = np.concatenate([HELD, np.zeros(others, int)])
    rank, times = draws(Policy("examples"), 2, held)
    assert (times == 1).all()
    subsets = list(itertools.combinations(range(4), 2))
    found = [np.all(rank == subset, axis=1).sum() for subset in subsets]
    assert sum(found) == DRAWS
    assert fits(found, [in_turns(HELD / HELD.sum(), subset) for subset in subsets])


def test_examples_replaced_counts_who_is_drawn_twice():
    rank, times = draws(Policy("examples_replaced"), 3)
    assert (times.sum(1) == 3).all()
    assert ((rank == 4) == (times == 0)).all()
    assert (np.diff(rank, axis=1)[times[:, 1:] > 0] > 0).all()
    drawn = np.array([np.where(rank == k, times, 0).sum(1) for k in range(4)])  # [client, draw]
    for k, share in enumerate(HELD / HELD.sum()):
        assert fits(np.bincount(drawn[k].astype(int), minlength=4), binom.pmf(np.arange(4), 3, share))


def test_poisson_draws_each_by_itself():
    policy, clients = Policy("poisson", rate=0.3), 6
    (places,) = participation.places_of(policy, 0.3, 0, (clients,), 10)
    rank, times = draws(policy, places, np.ones(clients, int))
    present = np.array([(np.where(times > 0, rank, -1) == k).any(1) for k in range(clients)])
    pattern = np.sum(present * 2 ** np.arange(clients)[:, None], axis=0)
    sizes = np.array([bin(i).count("1") for i in range(2**clients)])
    expected = 0.3**sizes * 0.7 ** (clients - sizes)
    assert fits(np.bincount(pattern, minlength=2**clients), expected)
    assert fits(np.bincount(present.sum(0), minlength=7), binom.pmf(np.arange(7), 6, 0.3))


def test_who_never_trains_is_never_drawn():
    for policy in (Policy(), Policy("poisson", rate=0.5), Policy("examples"), Policy("examples_replaced")):
        held = np.where(np.arange(8) < 6, 2, 0) if policy.alike else np.full(8, 2)
        rank, times = draws(policy, 3, held, may_train=6)
        assert rank[times > 0].max() == 5
        assert set(rank[times == 0].tolist()) <= {8}


def test_poisson_has_as_many_places_as_it_needs():
    policy = Policy("poisson", rate=0.1)
    for clients, rounds in ((100, 10), (1_000_000, 1), (3, 1000)):
        (places,) = participation.places_of(policy, 0.1, 0, (clients,), rounds)
        assert rounds * binom.sf(places, clients, 0.1) < 1e-9
        assert places == 1 or rounds * binom.sf(places - 1, clients, 0.1) >= 1e-9
        assert participation.places_of(policy, 0.1, places, (clients,), rounds) == (places,)
        if places > 1:
            with pytest.raises(InputError, match=rf"--capacity={places - 1} is too small.*give at least {places},"):
                participation.places_of(policy, 0.1, places - 1, (clients,), rounds)


@pytest.mark.parametrize("epochs", [1, 2, 20])
def test_stragglers_do_a_uniform_number_of_epochs(epochs):
    policy = Policy(stragglers=0.75)

    def one(key):
        return participation.effort(policy, key, 10, 8, {"local_epochs": jnp.int32(epochs)})

    work, sends = jax.device_get(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), DRAWS // 6)))
    assert sends.all()
    done = np.rint(work[:, :8] * epochs).astype(int)
    straggles = done < epochs
    if epochs == 1:
        assert not straggles.any()
        return
    assert (straggles.sum(1) == 6).all()  # round(0.25 * 8) do all
    assert fits(np.bincount(done[straggles], minlength=epochs)[1:], np.full(epochs - 1, 1 / (epochs - 1)))
    assert fits(straggles.sum(0), np.full(8, 1 / 8))


# Rounds of a method whose clients send their number of examples and the share of their epochs, and count their rounds.

HPARAMS = Method("sketch", "", lambda task: None, {"local_epochs": HParam(4, integer=True)}).resolve({})


def client(ctx, received, state, data):
    upload = {"count": jnp.asarray(data.count, jnp.float32), "work": ctx.work}
    return state + 1, Upload(upload), {"count": upload["count"]}


ALGORITHM = Algorithm(
    init_server=lambda ctx, params: {"count": jnp.float32(0), "work": jnp.float32(0), "number": jnp.float32(0)},
    init_client=lambda ctx, params: jnp.zeros(3),
    round=(
        Exchange(
            lambda ctx, server: Broadcast(server["count"]),
            client,
            {"mean": reductions.weighted_mean(), "stack": reductions.stack()},
            lambda ctx, server, s: (s["mean"] | {"number": jnp.sum(s["stack"].weight)}, {}),
        ),
    ),
    central=lambda ctx, server, x: jnp.zeros((len(x), cases.CLASSES)),
)


def rounds(policy, participants, number, federation=None, devices=1, **layout):
    """(state, report) of so many rounds."""
    task = cases.task()
    simulation = cases.bind(ALGORITHM, task, (participants,), devices=devices, policy=policy, **layout)
    federation = federation or with_table(cases.federation(devices=devices))
    state, report = simulation.run(simulation.init(0, federation), federation, HPARAMS, number)
    return simulation.fetch(state), jax.device_get(report)


def with_table(federation):
    table = np.cumsum(np.asarray(federation.train_holdings.count)).astype(np.int32)
    return federation._replace(cumulative=jax.device_put(table, federation.client.sharding))


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("sampling", ["examples", "examples_replaced"])
def test_clients_drawn_by_examples_count_alike(sampling, devices):
    policy = Policy(sampling)
    state, report = rounds(policy, 3, 1, devices=devices)
    count = np.asarray(cases.federation().train_holdings.count)
    key = cases.keys.stream(cases.round_key(0, 0), "participants", 0)
    drawn = participation.draw(policy, key, 7, 7, 3, jnp.asarray(np.cumsum(count), jnp.int32))
    rank, times = np.asarray(drawn.rank), np.asarray(drawn.times)
    there = times > 0
    assert state.server["number"] == times.sum() == 3
    mean = np.dot(count[rank[there]], times[there]) / 3
    np.testing.assert_allclose([state.server["count"], report.metrics["count"][0]], mean, rtol=1e-6)
    assert report.sent[0][0].participants[0] == there.sum()
    changed = np.zeros(7)
    changed[rank[there]] = 1
    np.testing.assert_array_equal(state.clients[0], changed[:, None] * np.ones(3))


def bytes_of(report):
    sizes = ((traffic.Sizes("", 0, 8, 4),),)
    return traffic.count_bytes(sizes, report.sent)


@pytest.mark.parametrize(("work", "devices"), [("partial", 1), ("drop", 4)])
def test_stragglers_that_are_dropped_receive_and_send_nothing(work, devices):
    counts = (4,) * 7  # all hold examples
    federation = cases.federation(counts, devices=devices)
    policy = Policy(stragglers=0.5, straggler_work=work)
    state, report = rounds(policy, 6, 5, federation, devices)
    counted = bytes_of(report)
    sending = 6 if work == "partial" else 3
    assert counted["down"].tolist() == [6 * 4] * 5
    assert counted["up"].tolist() == [sending * 8] * 5
    assert state.clients[0].sum() == 3 * 5 * sending
    assert state.server["count"] == 4
    assert (state.server["work"] == 1) == (work == "drop")


def test_some_participants_are_dropped():
    federation = cases.federation((4,) * 7)
    state, report = rounds(Policy(dropped=0.3), 7, 40, federation)
    sent = report.sent[0][0]
    assert (sent.participants == 7).all()
    assert 1e-3 < binom.cdf(sent.senders.sum(), 280, 0.7) < 1 - 1e-3
    assert state.clients[0].sum() == 3 * sent.senders.sum()


def test_poisson_leaves_places_empty():
    federation = cases.federation((4,) * 7, devices=2)
    state, report = rounds(Policy("poisson", rate=0.3), 6, 40, federation, devices=2)
    number = report.sent[0][0].participants
    assert len({*number.tolist()}) > 2
    assert 1e-3 < binom.cdf(number.sum(), 280, 0.3) < 1 - 1e-3
    assert state.clients[0].sum() == 3 * number.sum()
    np.testing.assert_array_equal(report.metrics["count"], np.where(number > 0, 4.0, np.nan))
