"""Wrappers over exchanges and reductions: the server's work on each upload, codecs and their bytes, required sums."""

import functools

import chex
import engine_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fdjax import keys
from fdjax.algorithms import fedavg
from fdjax.contract import Algorithm, Broadcast, Exchange, Reduction, Upload
from fdjax.errors import InputError
from fdjax.exchange import reductions, traffic
from fdjax.exchange.wrappers import Codec, after, coded, require_sum

ROUNDS = 2
P = 4 * (cases.FEATURES * cases.CLASSES + cases.CLASSES)  # bytes of the central model
HPARAMS = cases.hparams_of("fedavg")


def fedavg_with(change):
    """FedAvg whose only exchange is `change(exchange)`."""
    algorithm = fedavg.fedavg(cases.task())
    (exchange,) = algorithm.round
    return algorithm._replace(round=(change(exchange),), name="changed")


@functools.cache
def bound(change):
    return cases.bind(fedavg_with(change), cases.task(), (cases.PARTICIPANTS,))


def run(simulation):
    """(state, report) after ROUNDS rounds, on the host."""
    federation = cases.federation()
    return jax.device_get(simulation.run(simulation.init(0, federation), federation, HPARAMS, ROUNDS))


def present():
    """How many participants of each round hold examples."""
    drawn = [cases.participants_of(cases.round_key(0, r), 7, cases.PARTICIPANTS) for r in range(ROUNDS)]
    count = np.asarray(cases.federation().train_holdings.count)
    return np.array([(count[rows] > 0).sum() for rows in drawn])


# The server's work on each upload.


def test_after_reduces_what_the_function_makes_of_an_upload(rng):
    """And tells it the surroundings; how a reduction combines stays as it was."""
    uploads, weights = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32), (2.0, 0.0, 5.0)
    for inner in (reductions.weighted_mean(), reductions.maximum()._replace(per_cohort=True), reductions.stack()):
        outer = after(lambda ctx, x: ctx * x**2, inner)
        assert (outer.combine, outer.per_cohort, outer.finish) == (inner.combine, inner.per_cohort, inner.finish)
        for upload, weight in zip(uploads, weights, strict=True):
            chex.assert_trees_all_equal(outer.partial(3.0, upload, weight), inner.partial(3.0, 3 * upload**2, weight))


def predicted(exchange):
    """FedAvg whose server has also the mean of the clients' logits on the proxy data, which it applies them to."""

    def predict(ctx, params):
        return ctx.model.apply(params, ctx.proxy.x)

    return exchange._replace(
        reduce={"params": exchange.reduce, "logits": after(predict, reductions.mean())},
        server=lambda ctx, params, summary: (summary["params"], {"largest": jnp.max(summary["logits"])}),
    )


def test_what_the_server_makes_of_uploads_is_not_sent():
    simulation = bound(predicted)
    assert simulation.traffic(cases.federation(), HPARAMS).per_participant("up") == (P,)
    state, report = run(simulation)
    server = simulation.init(0, cases.federation()).server
    x = np.asarray(cases.federation().proxy.x, np.float64)
    for r in range(ROUNDS):
        key, uploads, clients = cases.round_key(0, r), [], cases.clients_of(cases.federation())
        for row in cases.participants_of(key, 7, cases.PARTICIPANTS):
            i, own_x, y = clients[row]
            if len(y):
                model = cases.Logistic(server)
                orders = [cases.epoch_order(keys.stream(key, "client", i), e, len(y)) for e in range(2)]
                model.fit(own_x, y, orders, 4, 0.3)
                uploads.append((model, len(y)))
        mean = np.mean([model(x) for model, _ in uploads], axis=0)
        np.testing.assert_allclose(report.metrics["largest"][r], mean.max(), rtol=1e-4)
        server = cases.weighted_average([model.params() for model, _ in uploads], [n for _, n in uploads])
    chex.assert_trees_all_close(state.server, server, rtol=1e-4, atol=1e-5)


# Codecs.


def bits_of(bytes_sent):
    """A codec that loses nothing, the bits of floats as whole numbers, and says that it takes `bytes_sent`."""
    return Codec(
        encode=lambda ctx, tree: jax.tree.map(lambda x: lax.bitcast_convert_type(x, jnp.int32), tree),
        decode=lambda ctx, code: jax.tree.map(lambda x: lax.bitcast_convert_type(x, jnp.float32), code),
        count=lambda ctx, code, memory: (jnp.float32(bytes_sent) + ctx.round, memory),
    )


def lossless(exchange):
    return coded(exchange, up=bits_of(10), down=bits_of(300))


def unchanged(exchange):
    return exchange


def test_a_lossless_codec_changes_no_number_and_counts_its_own_bytes():
    federation = cases.federation()
    (state, report), (plain, plain_report) = run(bound(lossless)), run(bound(unchanged))
    chex.assert_trees_all_equal(state, plain)
    chex.assert_trees_all_equal(report.metrics, plain_report.metrics)
    usual, changed = (bound(how).traffic(federation, HPARAMS) for how in (unchanged, lossless))
    assert (usual.per_participant("up"), usual.per_participant("down")) == ((P,), (P,))
    assert (changed.per_participant("up"), changed.per_participant("down")) == (None, None)
    number, round = present(), np.arange(ROUNDS)
    assert (number < cases.PARTICIPANTS).any()  # who holds nothing sends nothing
    sent = traffic.count_bytes(changed.round, report.sent)
    np.testing.assert_array_equal(sent["up"], number * (10 + round))
    np.testing.assert_array_equal(sent["down"], number * (300 + round))
    plain_sent = traffic.count_bytes(usual.round, plain_report.sent)
    np.testing.assert_array_equal([plain_sent["up"], plain_sent["down"]], [number * P] * 2)


def test_one_way_alone_is_coded():
    """The other one is counted by its arrays."""
    federation = cases.federation()
    (upward,), (downward,) = (
        bound(functools.partial(coded, **{way: bits_of(8)})).traffic(federation, HPARAMS).round
        for way in ("up", "down")
    )
    assert [(sizes.up, sizes.down) for sizes in upward] == [(None, P)]
    assert [(sizes.up, sizes.down) for sizes in downward] == [(P, None)]


def changes_alone(memory):
    """A codec of whole numbers that sends those that differ from the last ones, two bytes each."""
    return Codec(
        encode=lambda ctx, tree: tree,
        decode=lambda ctx, code: code,
        count=lambda ctx, code, known: (2.0 * jnp.sum(code != known), code),
        memory=memory,
    )


def counting(state):
    """An algorithm whose server says the round to all, and 9 to each, and whose clients answer round // 2."""

    def answer(ctx, received, state, data):
        told = received.shared[0] * 100 + received.own
        return state | {"told": told}, Upload(jnp.array([1, 1, 1]) * (received.shared[0] // 2)), {}

    exchange = Exchange(
        broadcast=lambda ctx, server: Broadcast(jnp.stack([server, server]), own=jnp.full(7, 9)),
        client=answer,
        reduce=reductions.nothing(),
        server=lambda ctx, server, summary: (server + 1, {}),
    )
    return Algorithm(
        init_server=lambda ctx, params: jnp.int32(0),
        init_client=lambda ctx, params: state,
        round=(coded(exchange, up=changes_alone("sent"), down=changes_alone("received")),),
        personal=lambda ctx, server, state, x: jnp.zeros((len(x), cases.CLASSES)),
        name="counting",
    )


def test_a_codec_with_a_memory_sends_changes_and_rows_of_ones_own_are_counted_beside_it():
    nothing = jnp.int32(0)
    state = {"told": nothing, "sent": jnp.zeros(3, jnp.int32), "received": jnp.zeros(2, jnp.int32)}
    simulation, federation = cases.bind(counting(state), cases.task(), (7,)), cases.federation()
    after_rounds, report = jax.device_get(simulation.run(simulation.init(0, federation), federation, {}, 5))
    sent = traffic.count_bytes(simulation.traffic(federation, {}).round, report.sent)
    here = 6  # one of the seven clients holds nothing
    np.testing.assert_array_equal(sent["down"], here * (4 + 2 * np.array([0, 2, 2, 2, 2])))
    np.testing.assert_array_equal(sent["up"], here * 2 * np.array([0, 0, 3, 0, 3]))
    there = np.asarray(federation.train_holdings.count) > 0
    (clients,) = after_rounds.clients
    np.testing.assert_array_equal(clients["told"], np.where(there, 409, 0))
    np.testing.assert_array_equal(clients["received"], np.where(there[:, None], [4, 4], 0))
    np.testing.assert_array_equal(clients["sent"], np.where(there[:, None], [2, 2, 2], 0))


@pytest.mark.parametrize(
    ("state", "found"),
    [({"told": jnp.int32(0), "sent": jnp.zeros(3, jnp.int32)}, "dict of sent, told"), ((), "tuple")],
    ids=["dict", "tuple"],
)
def test_a_codec_whose_memory_no_client_keeps_is_refused(state, found):
    simulation, federation = cases.bind(counting(state), cases.task(), (7,)), cases.federation()
    with pytest.raises(InputError) as error:
        simulation.run(simulation.init(0, federation), federation, {}, 1)
    assert str(error.value) == (
        "a codec of exchange answer keeps what was sent as 'received' of a client's state, which must be a dict with "
        f"that entry; it is a {found}: add it in init_client"
    )


def test_two_codecs_need_two_memories():
    (exchange,) = fedavg.fedavg(cases.task()).round
    with pytest.raises(InputError, match="both codecs of exchange train keep 'sent'; give each a name of its own"):
        coded(exchange, up=changes_alone("sent"), down=changes_alone("sent"))


def drawing(purpose):
    """A codec that draws what it sends, or what it makes of it."""

    def draw(wanted):
        return lambda ctx, tree: jax.random.uniform(ctx.key) if purpose == wanted else tree

    return Codec(draw("encode"), draw("decode"), lambda ctx, code, memory: (0.0, memory))


@pytest.mark.parametrize("purpose", ["encode", "decode"])
def test_a_codec_draws_anew_in_every_call(purpose):
    """For each upload, for the broadcast and in each round: no number is drawn twice."""

    def tell(ctx, received, state, data):
        return received.shared * jnp.ones(()), Upload(jnp.float32(0)), {}

    exchange = Exchange(
        broadcast=lambda ctx, server: Broadcast(jnp.float32(0)),
        client=tell,
        reduce=reductions.stack(),
        server=lambda ctx, server, stack: (stack.partials, {}),
    )
    algorithm = Algorithm(
        init_server=lambda ctx, params: jnp.zeros(7),
        init_client=lambda ctx, params: jnp.float32(0),
        round=(coded(exchange, up=drawing(purpose), down=drawing(purpose)),),
        personal=lambda ctx, server, state, x: jnp.zeros((len(x), cases.CLASSES)),
        name="drawing",
    )
    federation, simulation = cases.federation((1,) * 7), cases.bind(algorithm, cases.task(), (7,))
    state, seen = simulation.init(0, federation), []
    for _ in range(2):
        state, _ = simulation.run(state, federation, {}, 1)
        uploads, received = jax.device_get((state.server, state.clients[0]))
        # What is broadcast to all is encoded once, and decoded by each.
        assert len({*received.tolist()}) == (1 if purpose == "encode" else 7)
        seen += [*uploads.tolist(), *{*received.tolist()}]
    assert len({*seen}) == len(seen)


# Required sums.


def exchange_of(reduce, **more):
    return fedavg_with(lambda exchange: exchange._replace(reduce=reduce, **more)).round[0]


def test_a_sum_over_all_clients_is_what_is_required():
    reduction = reductions.weighted_mean()
    assert require_sum(exchange_of(reduction), "a private sum") is reduction


@pytest.mark.parametrize(
    ("reduce", "message"),
    [
        (
            {"params": reductions.mean(), "rest": reductions.nothing()},
            "a private sum needs one reduction, but exchange train has params, rest; make them one sum",
        ),
        (
            reductions.stack(),
            "a private sum needs a sum over all clients, but exchange train reduces by stack; use a mean, say",
        ),
        (
            Reduction(lambda ctx, x, weight: x, lambda ctx, total: total, per_cohort=True),
            "a private sum needs a sum over all clients, but exchange train reduces by sum of each cohort; use a mean, "
            "say",
        ),
    ],
    ids=["several", "stack", "per cohort"],
)
def test_what_is_no_sum_is_refused(reduce, message):
    with pytest.raises(InputError) as error:
        require_sum(exchange_of(reduce), "a private sum")
    assert str(error.value) == message
    with pytest.raises(InputError, match="exchange upload "):
        require_sum(exchange_of(reduce, name="upload"), "a private sum")
