"""Selective-FD's selectors around DS-FL, MHAT and FedMD, against NumPy in float64 and bytes counted by hand."""

import chex
import engine_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from choices import some
from server_cases import BATCH, EPOCHS, RATE, descend, hard, orders, participants, proxies

from fdjax import keys
from fdjax.contract import Exchange
from fdjax.errors import InputError
from fdjax.exchange import reductions, selection
from fdjax.exchange.proxy import Labelled
from fdjax.exchange.traffic import count_bytes
from fdjax.run import experiment, settings
from fdjax.run.contract_check import Contract

ROUNDS, DISTILS = 2, 2
K, M, N = cases.CLASSES, cases.PROXIES, cases.PER_ROUND
CHOSEN = {"selection_quantile": 0.1, "selection_width": 1.5, "selection_ambiguity": 1.2}
DSFL = {"local_epochs": EPOCHS, "distill_epochs": DISTILS}


def simulated(name, rounds=ROUNDS, options=None, **hparams):
    """The state before and after the set-up and at the end, metrics, bytes of each round, metrics of the set-up."""
    _, simulation = cases.simulation(name, batch_size=BATCH, options=options)
    federation, given = cases.federation(), cases.hparams_of(name, learning_rate=RATE, **hparams)
    state, of_setup = simulation.init(0, federation), None
    fresh = jax.device_get(state)
    if simulation.setup:
        state, of_setup = simulation.setup(state, federation, given)
    start = jax.tree.map(np.array, jax.device_get(state))
    state, report = jax.device_get(simulation.run(state, federation, given, rounds))
    traffic = simulation.traffic(federation, given)
    assert all((sizes.up, sizes.down) == (0, 0) for exchange in traffic.setup for sizes in exchange)
    return fresh, start, state, report.metrics, count_bytes(traffic.round, report.sent), of_setup


def squared(a, b):
    return ((a[:, None] - b[None]) ** 2).sum(-1)


def like_own(x, key, noise, public):
    """Which proxy examples a client with the examples x labels, and how near the decision was."""
    if len(x) == 1:
        return np.zeros(M, bool), np.inf
    width = CHOSEN["selection_width"] * np.sqrt(squared(x, x).mean())
    x = x[np.asarray(keys.shuffle(key, len(x))(jnp.arange(len(x))))]
    known, held_out = x[::2], x[1::2]

    def kernel(a, b):
        return np.exp(-squared(a, b) / (2 * width**2))

    a, m, penalty = len(noise), len(known), len(noise) ** -0.5
    system = kernel(noise, noise) / a + penalty * np.eye(a)
    alpha = np.linalg.solve(system, -kernel(noise, known).sum(1) / (a * m * penalty))

    def ratio(z):
        return kernel(z, noise) @ alpha + kernel(z, known).sum(1) / (m * penalty)

    least = np.quantile(ratio(held_out), CHOSEN["selection_quantile"])
    return ratio(public) >= least, np.abs(ratio(public) - least).min()


def flags(federation, number=0):
    """[7, M] by row, by exchange `number` of the set-up; a client without examples keeps what it had."""
    public, setup = proxies()[0], keys.stream(jax.random.key(0), "setup")
    setup = keys.stream(setup, "exchange", number) if number else setup
    low, high = np.float32([public.min(), public.max()])
    noise = jax.random.uniform(keys.stream(setup, "broadcast", 0), (250, public.shape[1]), minval=low, maxval=high)
    found = np.ones((len(cases.COUNTS), M), bool)
    for row, (i, x, _) in enumerate(cases.clients_of(federation)):
        if len(x):
            found[row], gap = like_own(x, keys.stream(setup, "client", i), np.float64(noise), public)
            assert gap > 1e-4  # far more than float32 gets wrong
    return found


def subset(key):
    return np.asarray(jax.random.choice(key, M, (N,), replace=False))


def in_exchange(r, number, *path):
    key = keys.stream(cases.round_key(0, r), "exchange", number) if number else cases.round_key(0, r)
    for part in path:
        key = keys.stream(key, *part) if isinstance(part, tuple) else keys.stream(key, part)
    return key


def soft(targets):
    return lambda z, batch: cases.softmax(z) - targets[batch]


def models_of(clients):
    return [cases.Logistic(jax.tree.map(lambda x, i=i: x[i], clients)) for i in range(len(cases.COUNTS))]


def means_of(said, there, which):
    """The mean of what is said [S, N, K] over those who say it [S, N], and which of them are used [N]."""
    mean = np.stack(
        [
            each[who].mean(0) if who.any() else np.zeros(K)
            for each, who in zip(said.swapaxes(0, 1), there.T, strict=True)
        ]
    )
    used = there.any(0)
    if which in ("server", "both"):
        p = mean if said.min() >= 0 else cases.softmax(mean)
        used = used & (2 * (1 - p.max(-1)) <= CHOSEN["selection_ambiguity"])
    return mean, used


def by_hand(which):
    """What the options of `which` leave of the defaults."""
    used = {"clients": ("selection_quantile", "selection_width"), "server": ("selection_ambiguity",)}
    return CHOSEN if which == "both" else {name: CHOSEN[name] for name in used[which]}


@pytest.mark.parametrize(
    ("name", "which"),
    some([("dsfl", "both"), ("dsfl", "clients"), ("dsfl", "server"), ("mhat", "both")], ("dsfl", "both")),
)
def test_dsfl_and_mhat(name, which):
    options = {"selection": which} | ({"aggregation": "sa"} if name == "dsfl" else {})
    _, start, state, metrics, sent, _ = simulated(name, options=options, **DSFL, **CHOSEN)
    federation, (x_public, _) = cases.federation(), proxies()
    by_clients = which != "server"
    chosen = flags(federation) if by_clients else np.ones((len(cases.COUNTS), M), bool)
    clients = start.clients[0]
    if by_clients:
        np.testing.assert_array_equal(clients.labels, chosen)
        assert 0 < chosen[:-1].mean() < 1
        clients = clients.state
    models, central = models_of(clients), cases.Logistic(start.server.params)
    ids = subset(keys.stream(jax.random.key(0), "server state"))
    partly = False
    for r in range(ROUNDS):
        here, said = list(participants(r)), []
        for row, key, x, y in here:
            descend(models[row], x, hard(y), orders(keys.stream(key, "update"), EPOCHS, len(y)), RATE)
            said.append(cases.softmax(models[row](x_public[ids])))
        there = np.stack([chosen[row, ids] for row, *_ in here])
        mean, used = means_of(np.stack(said), there, which)
        partly |= 0 < used.sum() < N
        x, targets = x_public[ids][used], mean[used]
        key = in_exchange(r, 0, "server", "distil")
        descend(central, x, soft(targets), orders(key, DISTILS, len(x)), RATE)
        if name == "mhat":
            x, targets = x_public[ids], cases.softmax(central(x_public[ids]))
        for row, *_ in here:
            i, *_ = cases.clients_of(federation)[row]
            key = in_exchange(r, 1, ("client", i), "distil")
            descend(models[row], x, soft(targets), orders(key, DISTILS, len(x)), RATE)
        np.testing.assert_allclose(metrics["labels_kept"][r], used.mean(), rtol=1e-6)
        up = 4 * K * there.sum() + len(here) if by_clients else 4 * K * N * len(here)
        down = 4 * N + (4 * K * N if name == "mhat" else 4 * K * used.sum() + 1)
        assert (sent["up"][r], sent["down"][r]) == (up, down * len(here))
        ids = subset(in_exchange(r, 1, "server"))
    assert partly
    ends = state.clients[0].state if by_clients else state.clients[0]
    for actual, expected in zip(models_of(ends), models, strict=True):
        chex.assert_trees_all_close(actual.params(), expected.params(), rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(state.server.params, central.params(), rtol=1e-4, atol=1e-5)
    if name == "dsfl":
        np.testing.assert_array_equal(state.server.targets.there, used)
        np.testing.assert_allclose(state.server.targets.values[used], mean[used], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("which", some(["both", "server"], "server"))
def test_fedmd(which):
    """Logits, of which the softmax tells how ambiguous they are.

    A client who is the only one to label an example learns its own logits, where an absolute error has no slope, so
    models are compared where all label all.
    """
    _, start, state, metrics, sent, _ = simulated(
        "fedmd", rounds=1, options={"selection": which}, pretrain_epochs=2, private_epochs=2, local_epochs=EPOCHS,
        **CHOSEN,
    )  # fmt: skip
    federation, (x_public, _) = cases.federation(), proxies()
    if which == "both":
        chosen, models = flags(federation, 1), models_of(start.clients[0].state)
        np.testing.assert_array_equal(start.clients[0].labels, chosen)
    else:
        chosen, models = np.ones((len(cases.COUNTS), M), bool), models_of(start.clients[0])
    ids = subset(keys.stream(jax.random.key(0), "server state"))
    here = list(participants(0))
    there = np.stack([chosen[row, ids] for row, *_ in here])
    mean, used = means_of(np.stack([models[row](x_public[ids]) for row, *_ in here]), there, which)
    assert 0 < used.sum() < N
    np.testing.assert_array_equal(state.server.consensus.there, used)
    np.testing.assert_allclose(state.server.consensus.values, mean, rtol=1e-4, atol=1e-5)
    assert sent["up"][0] == (4 * K * there.sum() + len(here) if which == "both" else 4 * K * N * len(here))
    assert sent["down"][0] == (4 * N + 4 * K * used.sum() + 1) * len(here)
    if which == "both":
        expected = np.average(there.mean(1), weights=[len(y) for *_, y in here])
        np.testing.assert_allclose(metrics["labelled"][0], expected, rtol=1e-5)
        return
    for row, _, x, y in here:
        i, *_ = cases.clients_of(federation)[row]
        digest = orders(in_exchange(0, 1, ("client", i), "digest"), 1, int(used.sum()))
        descend(models[row], x_public[ids][used], lambda z, b: np.sign(z - mean[used][b]) / K, digest, RATE)
        descend(models[row], x, hard(y), orders(in_exchange(0, 1, ("client", i), "revisit"), EPOCHS, len(y)), RATE)
    for actual, expected in zip(models_of(state.clients[0]), models, strict=True):
        chex.assert_trees_all_close(actual.params(), expected.params(), rtol=1e-4, atol=1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["dsfl", "mhat"])
def test_of_an_ambiguity_of_2_the_server_keeps_all(name):
    _, _, plain, of_plain, _, _ = simulated(name, **DSFL)
    _, _, all_kept, metrics, _, _ = simulated(name, options={"selection": "server"}, **DSFL, selection_ambiguity=2.0)
    chex.assert_trees_all_close(all_kept.clients, plain.clients, rtol=1e-5)
    chex.assert_trees_all_close(all_kept.server.params, plain.server.params, rtol=1e-5)
    chex.assert_trees_all_close({n: metrics[n] for n in of_plain}, of_plain, rtol=1e-5)


@pytest.mark.exhaustive
def test_of_an_ambiguity_of_0_nothing_is_learned_from_proxy_data():
    _, start, end, metrics, sent, _ = simulated(
        "dsfl", options={"selection": "server"}, **DSFL, selection_ambiguity=0.0
    )
    chex.assert_trees_all_equal(end.server.params, start.server.params)
    assert (metrics["labels_kept"] == 0).all()
    assert (metrics["server_loss"] == 0).all()
    present = [len(list(participants(r))) for r in range(ROUNDS)]
    np.testing.assert_array_equal(sent["down"], (4 * N + 1) * np.array(present))


def test_ambiguity():
    p = np.array([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4, [0.1, 0.7, 0.2, 0]], np.float32)
    np.testing.assert_allclose(selection.ambiguity(p), [0, 1, 1.5, 0.6], atol=1e-6)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "which"), [("dsfl", "both"), ("fedmd", "server"), ("mhat", "clients")])
def test_the_contract(name, which):
    few = {"pretrain_epochs": 3, "private_epochs": 5} if name == "fedmd" else {}
    unused = ("pretrain_patience", "private_patience", "selection_ambiguity") if name == "fedmd" else ()
    chosen = by_hand(which) | ({"selection_quantile": 0.0} if which != "server" else {})
    contract = Contract(name, options={"selection": which}, hparams=few | chosen, unused=unused)
    for check, devices, run in contract.checks(every_lifting=False):
        assert devices <= len(jax.devices()), check
        run()


def test_an_exchange_without_a_mean_is_refused():
    task = cases.task(options={"selection": "clients"})
    stacked = Exchange(
        lambda ctx, server: (), lambda ctx, *args: args, reductions.stack(), lambda *args: args, name="vote"
    )
    algorithm, _ = cases.simulation("dsfl")
    with pytest.raises(InputError, match=r"^--selection needs a sum over all clients, but exchange vote reduces by st"):
        selection.selecting(task, algorithm._replace(round=(stacked,)))
    summed = stacked._replace(reduce=reductions.elementwise_mean())
    labelling, *_ = selection.selecting(task, algorithm._replace(round=(summed,))).round
    said = Labelled(reductions.Weighted(jnp.ones((N, K)), jnp.ones((N, 1))), jnp.ones(N, bool))
    with pytest.raises(InputError, match=r"^--selection needs a mean of what clients upload, and exchange vote has no"):
        labelling.reduce.partial(None, said, jnp.float32(1))


FLOATS = {
    "algorithm": "dsfl", "dataset": "synthetic", "num_clients": 4, "samples_per_client": 20, "model": "mclr",
    "proxy": "noise", "proxy_size": 20,
}  # fmt: skip
BAD = [
    ({"selection": "none"}, {}, {}, "unknown selection 'none'"),
    ({"selection": "both"}, {"selection_quantile": 1.1}, {}, "--selection_quantile=1.1: expected a number from 0 to 1"),
    ({"selection": "both"}, {"selection_width": 0.0}, {}, "--selection_width=0.0: expected a finite number above 0"),
    ({"selection": "both"}, {"selection_ambiguity": 2.5}, {}, "--selection_ambiguity=2.5: expected a number from 0"),
    ({}, {"selection_quantile": 0.5}, {}, "--selection_quantile=0.5: dsfl uses it with --selection=clients or both"),
    ({"selection": "clients"}, {}, {"algorithm": "fd", "proxy": None}, "unknown option of fd 'selection'"),
    ({"selection": "both"}, {}, {"privacy": "example", "clip": 1.0}, "--selection=both: which proxy examples a client"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "hparams", "fields", "message"), BAD, ids=[message[:40] for *_, message in BAD])
def test_bad_input(options, hparams, fields, message):
    made = {name: value for name, value in (FLOATS | fields).items() if value is not None}
    made = made if "proxy" in made else {name: value for name, value in made.items() if name != "proxy_size"}
    with pytest.raises(InputError) as error:
        experiment.build(settings.make(hparams, options, **made))
    assert str(error.value).startswith(message)
