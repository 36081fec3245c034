"""Clipped uploads and noised sums, against NumPy in float64."""

import functools

import engine_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from choices import some

from fdjax import keys
from fdjax.algorithms import ALGORITHMS
from fdjax.contract import Broadcast, Context, Exchange, Received, Stack, Upload, unchanged
from fdjax.engine import participation
from fdjax.errors import InputError
from fdjax.exchange import privacy, reductions
from fdjax.exchange.reductions import ByLabel

EQUAL = (5,) * 7
RATE = 0.3


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in jax.tree.leaves(tree)))


def clip_around(w, x, clip):
    """w + min(1, S / |x - w|) (x - w) over all leaves, by NumPy."""
    difference = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, x, w)
    scale = min(1.0, clip / max(norm(difference), 1e-300))
    return jax.tree.map(lambda b, d: b + scale * d, w, difference)


def context(key=0, **hparams):
    h = {name: jnp.float32(value) for name, value in hparams.items()}
    return Context(None, 0, jnp.int32(-1), h, jnp.int32(0), jax.random.key(key), None)


def hparams_of(clip, noise, federation, method="fedavg", **given):
    given = cases.hparams_of(method, learning_rate=RATE, **given)
    return cases.replicated(given | {"clip": np.float32(clip), "noise_multiplier": np.float32(noise)}, federation)


def privately(algorithm, number):
    return algorithm._replace(round=tuple(privacy.private(exchange, number) for exchange in algorithm.round))


def alike(algorithm):
    """The algorithm whose first exchange is a mean of clients that count alike."""
    return algorithm._replace(round=(algorithm.round[0]._replace(reduce=reductions.mean()), *algorithm.round[1:]))


@pytest.mark.parametrize("clip", [0.1, 3.0, np.inf])
def test_clipping_is_of_all_leaves_as_one_vector(clip):
    rng = np.random.default_rng(0)
    x, w = ({"a": rng.normal(size=(3, 4)), "b": [rng.normal(size=5)]} for _ in range(2))
    x, w = jax.tree.map(np.float32, (x, w))
    found = privacy.clipped(x, w, jnp.float32(clip))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, clip_around(w, x, clip))
    if clip == np.inf:
        jax.tree.map(np.testing.assert_array_equal, found, x)
    else:
        assert norm(jax.tree.map(np.subtract, found, w)) <= clip * (1 + 1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_an_upload_that_has_no_norm_counts_as_the_center(bad):
    found = privacy.clipped(np.float32([1, bad]), np.float32([2, 3]), jnp.float32(1))
    np.testing.assert_array_equal(found, [2, 3])


def test_noise_has_the_deviation_that_it_says_and_one_key_a_leaf():
    ctx = context(clip=0.5, noise_multiplier=4.0)
    tree = {"a": jnp.zeros(20_000), "b": jnp.zeros(20_000)}
    found = jax.tree.map(np.asarray, privacy.noised(ctx, tree, privacy.noise_deviation(ctx)))
    for leaf in found.values():  # deviations of 20,000 draws: 0.5 % of the spread, 0.7 % of it for the mean
        assert abs(leaf.std() / 2.0 - 1) < 0.03
        assert abs(leaf.mean()) < 2.0 * 0.035
    assert abs(np.corrcoef(*found.values())[0, 1]) < 0.04
    without = context(clip=np.inf, noise_multiplier=0.0)
    np.testing.assert_array_equal(privacy.noise_deviation(without), 0)


@functools.cache
def private_rounds(name, number, places, policy):
    """A method's simulation in which means are private, of so many participants as expected."""
    task = cases.task(options=ALGORITHMS[name].choices({}).items())
    return cases.bind(privately(ALGORITHMS[name].algorithm(task), number), task, (places,), policy=policy)


@pytest.mark.parametrize("sampling", ["uniform", "poisson"])
def test_a_private_round_of_fedavg(sampling):
    """Local SGD, clipping around what was sent and the mean by the expected number, all in float64."""
    federation, clip = cases.federation(), 0.4
    policy = participation.Policy(sampling, 0.5 if sampling == "poisson" else 1.0)
    number, places = (3.5, 7) if sampling == "poisson" else (5, 5)
    simulation = private_rounds("fedavg", number, places, policy)
    hparams = hparams_of(clip, 0, federation, local_epochs=2)
    state = simulation.init(0, federation)
    w = cases.Logistic(jax.device_get(state.server)).params()
    key, clients = cases.round_key(0, 0), cases.clients_of(federation)
    drawn = participation.draw(policy, keys.stream(key, "participants", 0), 7, 7, places, None)
    rows = range(7) if drawn is None else [r for r, t in zip(drawn.rank, drawn.times, strict=True) if t]
    total, clipped = jax.tree.map(np.zeros_like, w), 0
    for row in rows:
        i, x, y = clients[int(row)]
        mine, local = cases.Logistic(w), keys.stream(key, "client", i)
        mine.fit(x, y, [cases.epoch_order(local, e, len(y)) for e in range(2)], 4, RATE)
        near = clip_around(w, mine.params(), clip)
        clipped += norm(jax.tree.map(np.subtract, mine.params(), w)) > clip
        total = jax.tree.map(lambda t, a, b: t + a - b, total, near, w)
    expected = jax.tree.map(lambda b, t: b + t / number, w, total)
    state, _ = simulation.run(state, federation, hparams, 1)
    assert clipped
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), jax.device_get(state.server), expected
    )


@pytest.mark.parametrize("name", some(["fedavg", "dsfl"], "dsfl"))
def test_without_noise_and_clipping_it_is_the_method_bit_by_bit(name):
    federation, task = cases.federation(EQUAL), cases.task(options=ALGORITHMS[name].choices({}).items())
    plain = alike(ALGORITHMS[name].algorithm(task))
    states = []
    for algorithm in (plain, privately(plain, 7)):
        simulation = cases.bind(algorithm, task, (7,))
        hparams = hparams_of(np.inf, 0, federation, name)
        state, _ = simulation.run(simulation.init(0, federation), federation, hparams, 3)
        states.append(jax.device_get((state.server, state.clients)))
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_one_client_changes_the_mean_by_no_more_than_its_share():
    """With and without the client that has most to say; another noise multiplier compiles nothing."""
    task, clip = cases.task(), 0.2
    simulation = cases.bind(privately(ALGORITHMS["fedavg"].algorithm(task), 7), task, (7,))
    servers = []
    with_all = cases.federation()
    held = with_all.train_holdings
    without = with_all._replace(train_holdings=held._replace(count=held.count.at[0].set(0)))
    for federation in (with_all, without):
        state, _ = simulation.run(simulation.init(0, federation), federation, hparams_of(clip, 0, federation), 1)
        servers.append(jax.device_get(state.server))
    change = norm(jax.tree.map(np.subtract, *servers))
    assert 0.9 * clip / 7 < change <= clip / 7 * (1 + 1e-4)
    begin, noisy = simulation.init(0, federation), hparams_of(clip, 1.5, federation)
    with jax.no_tracing():
        noisy, _ = simulation.run(begin, federation, noisy, 1)
    found = jax.tree.leaves(jax.tree.map(lambda a, b: np.ravel(a - b), jax.device_get(noisy.server), servers[-1]))
    assert 0.6 < np.std(np.concatenate(found)) / (1.5 * clip / 7) < 1.5  # of 28 numbers


def test_bytes_are_those_of_the_method():
    federation, task = cases.federation(), cases.task()
    plain = ALGORITHMS["fedavg"].algorithm(task)
    hparams = hparams_of(1, 1, federation)
    traffics = [cases.bind(a, task, (5,)).traffic(federation, hparams) for a in (plain, privately(plain, 5))]
    assert traffics[0].round == traffics[1].round
    assert traffics[0].round[0][0].up == 4 * (cases.FEATURES + 1) * cases.CLASSES


def test_whole_numbers_cannot_be_clipped():
    with pytest.raises(InputError, match="clips real numbers, but exchange count sends int32; send float32"):
        privacy.clipped({"n": jnp.int32(3)}, {"n": jnp.int32(0)}, jnp.float32(1), "count")


def test_local_noise_is_each_clients_own_whatever_the_reduction():
    """A stack of five uploads, of one number in 4,000 places each: clipped to S, and noise that differs."""

    def send(ctx, received, state, data):
        return state, Upload(jnp.full(4000, 3.0)), {}

    def keep(ctx, server, stack):
        return {"uploads": stack.partials, "weights": stack.weight}, {}

    exchange = Exchange(lambda ctx, server: Broadcast(()), send, reductions.stack(), keep)
    task, federation = cases.task(), cases.federation()
    algorithm = ALGORITHMS["fedavg"].algorithm(task)._replace(
        init_server=lambda ctx, params: {"uploads": jnp.zeros((7, 4000)), "weights": jnp.zeros(7)},
        round=(privacy.locally_private(exchange),),
        central=lambda ctx, server, x: ctx.model.apply(ctx.model.init(jax.random.key(0)), x),
        model_of=None,
    )  # fmt: skip
    simulation = cases.bind(algorithm, task, (7,), devices=2)
    federation = cases.federation(devices=2)
    state, _ = simulation.run(simulation.init(0, federation), federation, hparams_of(10.0, 0.2, federation), 1)
    kept = jax.device_get(state.server)
    holds = np.asarray(federation.train_holdings.count) > 0
    np.testing.assert_array_equal(kept["weights"], holds * 1.0)
    uploads = kept["uploads"][holds]
    assert np.abs(uploads.mean(1) - 10 / np.sqrt(4000)).max() < 0.15  # 4 deviations of the mean
    assert np.abs(uploads.std(1) / 2.0 - 1).max() < 0.06
    assert np.abs(np.corrcoef(uploads) - np.eye(len(uploads))).max() < 0.08


def test_an_exchange_that_sends_nothing_stays_as_it_is():
    exchange = Exchange(lambda ctx, server: Broadcast(()), lambda *_: _, reductions.nothing(), unchanged)
    assert privacy.private(exchange, 5) is exchange
    assert privacy.locally_private(exchange) is exchange


@functools.cache
def private_params(name):
    """Of a method that is FedAvg's with these hparams: the params before and after a round of clip 0.05, by Poisson."""
    off = {"fedgkd": {"gamma": 0}, "fedgkd_vote": {"gamma": 0}, "fedcad": {"distill_weight": 0}, "fedssd": {"m_max": 0}}
    federation, simulation = cases.federation(), private_rounds(name, 3.5, 7, participation.Policy("poisson", 0.5))
    state = simulation.init(0, federation)
    found = [jax.device_get(getattr(state.server, "params", state.server))]
    state, _ = simulation.run(state, federation, hparams_of(0.05, 0, federation, name, **off.get(name, {})), 1)
    return [*found, jax.device_get(getattr(state.server, "params", state.server))]


@pytest.mark.parametrize("name", some(["fedgkd", "fedgkd_vote", "fedcad", "fedssd"], "fedgkd"))
def test_params_are_clipped_around_those_that_were_sent_with_more(name):
    """Without its own term such a method is FedAvg, and so is its private round."""
    before, after = private_params(name)
    assert 0 < norm(jax.tree.map(np.subtract, after, before)) <= 0.05 * 7 / 3.5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after, private_params("fedavg")[1])


W = {"a": jnp.full(3, 4.0), "b": jnp.full((2, 2), -1.0)}
MEANS = ByLabel(jnp.full((2, 3), 5.0), jnp.full(2, 3.0))
ZEROS = functools.partial(jax.tree.map, jnp.zeros_like)


@pytest.mark.parametrize(
    ("received", "sent", "center"),
    [
        (Received(W, (), ()), W, W),
        (Received({"params": W, "votes": jnp.ones(2)}, (), ()), W, W),
        (Received((), W, ()), W, W),
        (Received((), (jnp.float32(1), W), ()), W, W),
        (Received({"params": W}, (), ()), {"params": W, "outputs": MEANS}, {"params": W, "outputs": ZEROS(MEANS)}),
        (Received(MEANS, (), ()), MEANS, ZEROS(MEANS)),
        (Received((), jnp.ones((4, 4)), ()), jnp.ones((4, 4)), jnp.zeros((4, 4))),
        (Received({"params": ZEROS(W["b"])}, (), ()), W, ZEROS(W)),
    ],
    ids=["shared", "with more", "own", "part of own", "entries", "by label", "outputs", "another net"],
)
def test_what_uploads_are_clipped_around(received, sent, center):
    sent = jax.tree.map(lambda x: x + 2.0, sent)
    exchange = Exchange(lambda *_: None, lambda *_: ((), Upload(sent, bytes=1.0), {}), reductions.stack(), unchanged)
    _, upload, _ = privacy.locally_private(exchange).client(context(clip=0.5, noise_multiplier=0), received, (), None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), upload.tree, clip_around(center, sent, 0.5))
    assert upload.bytes is None  # all of it is noised, and sent


def test_students_of_a_group_are_clipped_around_those_that_it_had():
    name, federation = "group_distillation", cases.federation()
    task = cases.task(options=ALGORITHMS[name].choices({}).items())
    algorithm = ALGORITHMS[name].algorithm(task)
    algorithm = algorithm._replace(round=tuple(map(privacy.locally_private, algorithm.round)))
    simulation, hparams = cases.bind(algorithm, task, (7,)), hparams_of(1e-4, 0, federation, name, consistency=0)
    state = cases.begin(simulation, federation, hparams)
    before = jax.device_get(state.server["students"])
    after = jax.device_get(simulation.run(state, federation, hparams, 1)[0].server["students"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), before, after)


def test_a_noised_upload_is_counted_whole():
    """FedProto: K vectors and counts, and not those of the labels that a client holds."""
    federation, net = cases.federation(), cases.model("2nn")
    task = cases.task(options=ALGORITHMS["fedproto"].choices({}).items())._replace(model=net, models=(net,))
    algorithm = ALGORITHMS["fedproto"].algorithm(task)
    algorithm = algorithm._replace(round=tuple(map(privacy.locally_private, algorithm.round)))
    traffic = cases.bind(algorithm, task, (5,)).traffic(federation, hparams_of(1, 1, federation, "fedproto"))
    assert traffic.round[0][0].up == 4 * cases.CLASSES * (5 + 1)


def test_labels_that_only_noise_counts_are_held_by_nobody():
    ctx = context(3, clip=0.5, noise_multiplier=4.0)
    count = np.concatenate([np.zeros(1000), np.full(1000, 6.0)])
    exchange = Exchange(lambda *_: None, lambda *_: None, reductions.label_mean(), unchanged)
    total = ByLabel(jnp.full((2000, 2), 7.0), jnp.float32(count))
    found = privacy.private(exchange, 5).reduce.finish(ctx, total).tree
    noise = [jax.random.normal(keys.stream(ctx.key, "noise", i), x.shape) for i, x in enumerate(total)]
    value, noisy = (np.asarray(x + 2.0 * n, np.float64) for x, n in zip(total, noise, strict=True))
    held = noisy > 4
    np.testing.assert_allclose(found.count, np.where(held, noisy, 0), rtol=1e-5)
    np.testing.assert_allclose(found.value, np.where(held[:, None], value / noisy[:, None], 0), rtol=1e-4)
    assert held[:1000].mean() < 0.05 < 0.75 < held[1000:].mean()


def test_noised_counts_of_labels_are_not_negative_at_the_server():
    task = cases.task(options=ALGORITHMS["fedftg"].choices({}).items())
    (exchange,) = ALGORITHMS["fedftg"].algorithm(task).setup
    sent = Stack(jnp.float32([[3, -2, 0.5, -0.1]]), jnp.int32([2]), jnp.ones(1))
    server, _ = exchange.server(None, {"counts": jnp.zeros((7, 4))}, sent)
    np.testing.assert_array_equal(server["counts"][2], np.float32([3, 0, 0.5, 0]))
