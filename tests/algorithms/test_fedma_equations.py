"""FedMA's rounds against NumPy in float64 and SciPy's assignment, and its limits: copies of one net, one client."""

import functools

import engine_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matching_cases import expected

from fdjax import keys
from fdjax.algorithms import ALGORITHMS
from fdjax.errors import InputError
from fdjax.exchange.traffic import count_bytes
from fdjax.run import settings

F, K, ROOM, WIDTH, EPOCHS, RETRAIN, RATE, BATCH, SWEEPS = cases.FEATURES, cases.CLASSES, 9, 5, 2, 3, 0.3, 4, 2
PRIOR = {"unit_variance": 0.5, "prior_variance": 2.0, "gamma": 3.0}
GIVEN = {"client_width": WIDTH / ROOM, "retrain_epochs": RETRAIN, "sweeps": SWEEPS, **PRIOR}


@functools.cache
def simulation(centre="mean"):
    task = cases.task(BATCH, cohorts=(("wide", 7),), options={"centre": centre})._replace(model=cases.model("wide"))
    algorithm = ALGORITHMS["fedma"].algorithm(task)
    return cases.bind(algorithm, task, (len(cases.COUNTS),))


def hparams(**given):
    return cases.hparams_of("fedma", **{"learning_rate": RATE, "local_epochs": EPOCHS} | GIVEN | given)


class MLP:
    """Layers [W, b] with ReLU between them."""

    def __init__(self, layers):
        self.layers = [[np.array(W, np.float64), np.array(b, np.float64)] for W, b in layers]

    def __call__(self, x):
        self.inputs = []
        for W, b in self.layers:
            self.inputs.append(x)
            z = x @ W + b
            x = np.maximum(z, 0)
        return z

    def fit(self, x, y, orders, first):
        for order in orders:
            losses = []
            for start in range(0, len(order), BATCH):
                batch = order[start : start + BATCH]
                z = self(x[batch])
                losses.append(cases.cross_entropy(z, y[batch]).mean())
                slope = (cases.softmax(z) - np.eye(K)[y[batch]]) / len(batch)
                for n in reversed(range(first, len(self.layers))):
                    W, b = self.layers[n]
                    back = slope @ W.T * (self.inputs[n] > 0)
                    self.layers[n] = [W - RATE * self.inputs[n].T @ slope, b - RATE * slope.sum(0)]
                    slope = back
        return np.mean(losses)


def layers_of(params):
    return [[params[f"Dense_{n}"][name] for name in ("kernel", "bias")] for n in range(3)]


def started(params):
    """A first draw of clients' width: lecun normal for the inputs that there are."""
    (W0, b0), (W1, b1), (W2, b2) = layers_of(params)
    scale = np.sqrt(ROOM / WIDTH)
    return MLP([[W0[:, :WIDTH], b0[:WIDTH]], [scale * W1[:WIDTH, :WIDTH], b1[:WIDTH]], [scale * W2[:WIDTH], b2]])


def common_units(nets, n, key, centre):
    """The matched layer [W, b], and where each client's units are in it."""
    rows = {row: np.vstack([net.layers[n][0], net.layers[n][1]]).T for row, net in nets.items()}
    S = len(cases.COUNTS)
    orders = [range(S)] + [np.asarray(jax.random.permutation(jax.random.fold_in(key, s + 1), S)) for s in range(SWEEPS)]
    orders = [[int(j) for j in order if int(j) in nets] for order in orders]
    groups = sorted(expected(rows, ROOM, orders, *PRIOR.values()), key=sorted)
    place = {member: at for at, group in enumerate(groups) for member in group}
    more = PRIOR["unit_variance"] / PRIOR["prior_variance"] if centre == "posterior" else 0
    vectors = np.array([sum(rows[j][u] for j, u in group) / (len(group) + more) for group in groups])
    return [vectors[:, :-1].T, vectors[:, -1]], {j: [place[j, u] for u in range(WIDTH)] for j in nets}


def fedma_round(nets, number, centre):
    """The common layers, where clients' units are, losses, and bytes up and down without what nets start from."""
    losses, common, places, sent = [], [], [], np.zeros(2)
    held = {row: (i, x, y) for row, (i, x, y) in enumerate(cases.clients_of(cases.federation()))}
    for n in range(3):
        key = cases.round_key(0, number)
        key, means = keys.stream(key, "exchange", n) if n else key, []
        for row, net in nets.items():
            i, x, y = held[row]
            if n:
                net.layers[n - 1] = common[n - 1]
                W, b = net.layers[n]
                moved = np.zeros((len(common[n - 1][1]), W.shape[1]))
                moved[places[n - 1][row]] = W
                net.layers[n] = [moved, b]
                sent[1] += 4 * (common[n - 1][0].size + common[n - 1][1].size + WIDTH)
            mine = keys.stream(key, "client", i)
            orders = [cases.epoch_order(mine, e, len(y)) for e in range(RETRAIN if n else EPOCHS)]
            means.append(net.fit(x, y, orders, n))
            sent[0] += 4 * (sum(a.size for a in net.layers[n]) + (K if n == 2 else 0))
        losses.append(np.average(means, weights=[len(held[row][2]) for row in nets]))
        if n < 2:
            layer, where = common_units(nets, n, keys.stream(key, "server"), centre)
            common.append(layer)
            places.append(where)
    share = np.array([np.bincount(held[row][2], minlength=K) for row in nets], float)
    share = np.where(share.sum(0) > 0, share / np.maximum(share.sum(0), 1), 1 / len(nets))
    common.append(
        [sum(s * net.layers[2][part] for s, net in zip(share, nets.values(), strict=True)) for part in (0, 1)]
    )
    return MLP(common), places, losses, sent


@pytest.mark.parametrize("centre", ["mean", pytest.param("posterior", marks=pytest.mark.exhaustive)])
def test_rounds(centre):
    federation, engine = cases.federation(), simulation(centre)
    state, traffic = engine.init(0, federation), engine.traffic(federation, hparams())
    drawn = jax.device_get(state.clients[0]["params"])
    rows = [row for row, (_, _, y) in enumerate(cases.clients_of(federation)) if len(y)]
    nets = {row: started(jax.tree.map(lambda leaf, row=row: leaf[row], drawn)) for row in rows}
    x = np.random.default_rng(0).normal(size=(20, F))
    for r in range(2):
        state, report = engine.run(state, federation, hparams(), 1)
        report = jax.tree.map(lambda leaf: leaf[0], jax.device_get(report))
        common, places, losses, sent = fedma_round(nets, r, centre)
        names = ("train_loss", "retrain_loss_2", "retrain_loss_3")
        np.testing.assert_allclose([report.metrics[name] for name in names], losses, rtol=1e-3)
        assert [report.metrics[f"width_{n + 1}"] for n in range(2)] == [len(common.layers[n][1]) for n in range(2)]
        found = cases.model("wide").apply(jax.device_get(state.server["params"]), jnp.float32(x))
        np.testing.assert_allclose(found, common(x), rtol=2e-3, atol=2e-3)
        back = 4 * len(rows) * (F * WIDTH + WIDTH + WIDTH * WIDTH + WIDTH + WIDTH * K + K) if r else 0
        bytes_sent = count_bytes(traffic.round, report.sent)
        assert (bytes_sent["up"], bytes_sent["down"]) == (sent[0], sent[1] + back)
        (W0, b0), (W1, b1), (W2, b2) = common.layers
        for row in rows:
            a, b = (where[row] for where in places)
            nets[row] = MLP([[W0[:, a], b0[a]], [W1[np.ix_(a, b)], b1[b]], [W2[b], b2]])


def with_nets(state, federation, params):
    """The state in which clients begin with params [C, ...]."""
    client = {**state.clients[0], "params": cases.replicated(params, federation)}
    return state._replace(clients=(client,))


@pytest.mark.exhaustive
def test_permuted_copies_of_one_net_merge_to_it():
    """Nothing is trained, so whatever is matched with what has to be the net's own function."""
    federation, engine, rng = cases.federation(), simulation(), np.random.default_rng(1)
    state = engine.init(0, federation)
    (W0, b0), (W1, b1), (W2, b2) = layers_of(jax.device_get(cases.model("wide").init(jax.random.key(5))))
    b0, b1 = rng.normal(size=(2, ROOM)) / 2
    copies = []
    for _ in cases.COUNTS:
        a, b = rng.permutation(ROOM), rng.permutation(ROOM)
        moved = [[W0[:, a], b0[a]], [W1[np.ix_(a, b)], b1[b]], [W2[b], b2]]
        copies.append(
            {f"Dense_{n}": {"kernel": np.float32(W), "bias": np.float32(b)} for n, (W, b) in enumerate(moved)}
        )
    state = with_nets(state, federation, jax.tree.map(lambda *leaves: np.stack(leaves), *copies))
    given = hparams(learning_rate=0.0, client_width=1.0)
    x = np.random.default_rng(0).normal(size=(20, F))
    for _ in range(2):  # and what is taken back is the net again
        state, report = engine.run(state, federation, given, 1)
        found = cases.model("wide").apply(jax.device_get(state.server["params"]), jnp.float32(x))
        np.testing.assert_allclose(found, MLP([[W0, b0], [W1, b1], [W2, b2]])(x), rtol=1e-4, atol=1e-4)
        assert report.metrics["width_1"][0] == ROOM


@pytest.mark.exhaustive
def test_one_client_gives_itself():
    federation, engine = cases.federation((0, 0, 0, 12, 0, 0, 0)), simulation()
    state = engine.init(0, federation)
    drawn = jax.tree.map(lambda leaf: np.asarray(leaf)[0], state.clients[0]["params"])
    state, report = engine.run(state, federation, hparams(learning_rate=0.0), 1)
    x = np.random.default_rng(0).normal(size=(20, F))
    found = cases.model("wide").apply(jax.device_get(state.server["params"]), jnp.float32(x))
    np.testing.assert_allclose(found, started(drawn)(x), rtol=1e-4, atol=1e-5)
    assert [report.metrics[f"width_{n}"][0] for n in (1, 2)] == [WIDTH, WIDTH]


def test_bad_input_is_told_in_one_line():
    with pytest.raises(InputError, match=r"^--client_width=1.5: expected a number above 0 to 1$"):
        settings.make(algorithm="fedma", client_width=1.5)
    task = cases.task(cohorts=(("cnn", 7),), options={"centre": "mean"}, shape=(8, 8, 1))
    task = task._replace(model=cases.model("cnn", (8, 8, 1)))
    with pytest.raises(InputError, match=r"fedma needs a plain chain of layers without normalisation, .*GroupNorm_0"):
        ALGORITHMS["fedma"].algorithm(task)
