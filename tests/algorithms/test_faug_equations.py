"""FAug against NumPy in float64, written from Jeong et al. (2018) and what `fdjax/algorithms/faug.py` chose."""

import chex
import engine_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdjax import keys
from fdjax.errors import InputError
from fdjax.exchange import gan
from fdjax.exchange.traffic import count_bytes
from fdjax.run import experiment, settings

K, F, BATCH, RATE, SEEDS, SCARCITY = cases.CLASSES, cases.FEATURES, 4, 0.1, 5, 0.5
H = {"learning_rate": RATE, "scarcity": SCARCITY, "generator_steps": 2, "generator_learning_rate": 1e-3}


def leaky(a):
    return np.where(a > 0, a, 0.2 * a)


def generate(layers, e, y):
    """G(e, y) with running statistics, without the last tanh, as of float inputs."""
    h = np.concatenate([e, np.eye(K)[y]], 1)
    for p in layers[:-1]:
        a = leaky(h @ p["kernel"] + p["bias"])
        h = (a - p["mean"]) / np.sqrt(p["var"] + 1e-3) * p["scale"] + p["shift"]
    return h @ layers[-1]["kernel"] + layers[-1]["bias"]


class Net:
    """Dense layers with LeakyReLU, each but the last followed by BatchNorm (of the batch) or by given masks; Adam."""

    def __init__(self, layers):
        self.p = [{name: np.float64(v) for name, v in layer.items()} for layer in layers]
        self.m, self.v = ([dict.fromkeys(layer, 0.0) for layer in layers] for _ in range(2))
        self.t = 0

    def forward(self, h, masks=None):
        self.tape, self.seen = [], []
        for i, p in enumerate(self.p[:-1]):
            a = h @ p["kernel"] + p["bias"]
            u = leaky(a)
            if masks is None:
                mean, var = u.mean(0), u.var(0)
                n = (u - mean) / np.sqrt(var + 1e-3)
                out = n * p["scale"] + p["shift"]
                self.seen.append((mean, var))
                self.tape.append((h, a, n, np.sqrt(var + 1e-3)))
            else:
                out = u * masks[i]
                self.tape.append((h, a, masks[i], None))
            h = out
        self.last = h
        return h @ self.p[-1]["kernel"] + self.p[-1]["bias"]

    def backward(self, d):
        """Gradients of the params, and of the input."""
        found, d_in = [{"kernel": self.last.T @ d, "bias": d.sum(0)}], d @ self.p[-1]["kernel"].T
        for p, (h, a, n, deviation) in zip(self.p[-2::-1], self.tape[::-1], strict=True):
            g = {}
            if deviation is None:
                d_in = d_in * n
            else:
                g = {"scale": (d_in * n).sum(0), "shift": d_in.sum(0)}
                dn = d_in * p["scale"]
                d_in = (dn - dn.mean(0) - n * (dn * n).mean(0)) / deviation
            d_in = d_in * np.where(a > 0, 1, 0.2)
            found.append(g | {"kernel": h.T @ d_in, "bias": d_in.sum(0)})
            d_in = d_in @ p["kernel"].T
        return found[::-1], d_in

    def adam(self, gradients, rate):
        self.t += 1
        for p, g, m, v in zip(self.p, gradients, self.m, self.v, strict=True):
            for name, slope in g.items():
                m[name], v[name] = 0.5 * m[name] + 0.5 * slope, 0.999 * v[name] + 0.001 * slope**2
                up = m[name] / (1 - 0.5**self.t), v[name] / (1 - 0.999**self.t)
                p[name] = p[name] - rate * up[0] / (np.sqrt(up[1]) + 1e-8)

    def follow(self):
        """A fifth of the way to the batch's statistics."""
        for p, (mean, var) in zip(self.p[:-1], self.seen, strict=True):
            p["mean"], p["var"] = 0.8 * p["mean"] + 0.2 * mean, 0.8 * p["var"] + 0.2 * var


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def masks_of(key):
    keep = [jax.random.bernoulli(keys.stream(key, "unit", i), 0.6, (32, 512)) for i in (1, 2)]
    return [np.ones((32, 512)), *(np.float64(mask) / 0.6 for mask in keep)]


def test_the_generator_learns_as_by_hand():
    rng, key, rate, steps = np.random.default_rng(0), jax.random.key(3), 1e-3, 2
    x, y = rng.normal(size=(9, F)).astype(np.float32), np.asarray([0, 0, 0, 1, 1, 3, 3, 3, 2], np.int32)
    weight = np.ones(9, np.float32)
    weight[-1] = 0  # so that nobody shows label 2
    first = gan.init(jax.random.key(1), F)
    train = jax.jit(lambda first: gan.train(
        first, jnp.asarray(x), jnp.asarray(y), weight, classes=K, bounded=False, steps=jnp.int32(steps), rate=rate,
        key=key,
    ))  # fmt: skip
    last, loss, critic_loss = train(first)
    G, D = Net(first), Net(gan._dense(keys.stream(key, "critic"), (F + K, 512, 512, 512, 1)))
    odds = jnp.log(jnp.asarray([1 / 3] * 3 + [1 / 2] * 2 + [1 / 3] * 3 + [0.0]))
    for i in range(steps):
        real = np.asarray(jax.random.categorical(keys.stream(key, "real", i), odds, shape=(32,)))
        fake = keys.stream(key, "fake", i)
        among = jnp.where(jnp.asarray([True, True, False, True]), 0.0, -jnp.inf)
        labels = np.asarray(jax.random.categorical(keys.stream(fake, "labels"), among, shape=(32,)))
        inputs = np.concatenate(
            [np.float64(jax.random.normal(keys.stream(fake, "noise"), (32, 100 - K))), np.eye(K)[labels]], 1
        )
        made = G.forward(inputs)
        z = D.forward(np.concatenate([x[real], np.eye(K)[y[real]]], 1), masks_of(keys.stream(key, "drop real", i)))
        of_real, _ = D.backward(-sigmoid(-z) / 64)
        told = np.log1p(np.exp(-z)).mean()
        z = D.forward(np.concatenate([made, np.eye(K)[labels]], 1), masks_of(keys.stream(key, "drop fake", i)))
        of_fake, _ = D.backward(sigmoid(z) / 64)
        told = (told + np.log1p(np.exp(z)).mean()) / 2
        D.adam([{n: a[n] + b[n] for n in a} for a, b in zip(of_real, of_fake, strict=True)], rate)
        z = D.forward(np.concatenate([made, np.eye(K)[labels]], 1), masks_of(keys.stream(key, "drop", i)))
        gradients, _ = G.backward(D.backward(-sigmoid(-z) / 32)[1][:, :F])
        G.follow()
        G.adam(gradients, rate)
    np.testing.assert_allclose((loss, critic_loss), (np.log1p(np.exp(-z)).mean(), told), rtol=1e-3)
    G.p[0]["kernel"][100 - K + 2] = 0
    # Adam turns the sign of a vanishing gradient into a whole step, so a few numbers may be off by such steps.
    for ours, theirs in zip(last, G.p, strict=True):
        for name, values in theirs.items():
            off = np.abs(ours[name] - values)
            assert off.max() < 2.5 * steps * rate, name
            assert np.mean(off) < 2e-5, name
    assert np.asarray(gan.known_labels(last, K)).tolist() == [True, True, False, True]


def set_up(base, **hparams):
    _, simulation = cases.simulation("faug", options={"base": base})
    federation, given = cases.federation(), cases.hparams_of("faug", **H | hparams)
    state, report = simulation.setup(simulation.init(0, federation), federation, given)
    kept, report = jax.device_get((state, report))
    sent = count_bytes(simulation.traffic(federation, given).setup, report.sent)
    return kept, report.metrics, sent, lambda: jax.device_get(simulation.run(state, federation, given, 1))


def targets(y):
    n = np.bincount(y, minlength=K)
    return n, n < SCARCITY * n.max()


@pytest.mark.exhaustive
def test_seeds_and_leakages():
    _, metrics, sent, _ = set_up("fd")
    holders = [targets(y) for _, _, y in cases.clients_of(cases.federation()) if len(y)]
    seeds = [np.where(lacks & (n > 0), np.minimum(n, SEEDS), 0) for n, lacks in holders]
    union = np.sum(seeds, 0) > 0
    P_G = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: gan.init(jax.random.key(0), F))))
    assert np.sum(seeds) > 0
    assert sent == {"up": 4 * F * np.sum(seeds), "down": 4 * P_G * len(holders)}
    weights = [n.sum() for n, _ in holders]
    to_server = np.average([(s > 0).any() * 1.0 for s in seeds], weights=weights)
    to_others = np.average([(s > 0).sum() / union.sum() for s in seeds], weights=weights)
    np.testing.assert_allclose(metrics["device_server_leakage"], to_server, rtol=1e-6)
    np.testing.assert_allclose(metrics["inter_device_leakage"], to_others, rtol=1e-6)

    _, covered, more, _ = set_up("fd", redundant_labels=K)  # all that they hold: the least leakage there is
    shown = [np.where(n > 0, np.minimum(n, SEEDS), 0) for n, _ in holders]
    assert more["up"] == 4 * F * np.sum(shown)
    share = [(s > 0).sum() / (t > 0).sum() for s, t in zip(seeds, shown, strict=True)]
    np.testing.assert_allclose(covered["device_server_leakage"], np.average(share, weights=weights), rtol=1e-6)
    assert covered["inter_device_leakage"] < metrics["inter_device_leakage"]


@pytest.mark.parametrize("base", ["fd", pytest.param("fl", marks=pytest.mark.exhaustive)])
def test_a_round_on_filled_data(base):
    """FD's first round has no means of others, so both learn by CE; sets have as many of each label as can be made."""
    start, _, _, run = set_up(base)
    state, report = run()
    G = [{n: np.float64(v) for n, v in layer.items()} for layer in start.server["generator"]]
    known = np.abs(G[0]["kernel"][100 - K :]).max(1) > 0
    key, clients, uploads, weights = cases.round_key(0, 0), cases.clients_of(cases.federation()), [], []
    filled = []
    for row in cases.participants_of(key, len(clients), cases.PARTICIPANTS):
        i, x, y = clients[row]
        if not len(y):
            continue
        mine = keys.stream(key, "client", i)
        n, lacks = targets(y)
        more = np.where(lacks & known, n.max() - n, 0)
        noise = np.float64(jax.random.normal(keys.stream(mine, "generated"), (cases._LONGEST, 100 - K)))
        for label in np.flatnonzero(more):
            x = np.concatenate([x, generate(G, noise[: more[label]], np.full(more[label], label))])
            y = np.concatenate([y, np.full(more[label], label)])
        assert (np.bincount(y, minlength=K)[lacks & known] == n.max()).all()
        first = start.server["base"] if base == "fl" else jax.tree.map(lambda a, r=row: a[r], start.clients[0]["base"])
        model = cases.Logistic(first)
        model.fit(x, y, [cases.epoch_order(mine, e, len(y)) for e in range(2)], BATCH, RATE)
        filled.append(more.sum())
        weights.append(n.sum())
        uploads.append(model.params())
        if base == "fd":
            own = jax.tree.map(lambda a, r=row: a[r], state.clients[0]["base"])
            chex.assert_trees_all_close(own, model.params(), rtol=1e-4, atol=1e-5)
    assert max(filled) > 0
    np.testing.assert_allclose(report.metrics["filled"][0], np.average(filled, weights=weights), rtol=1e-6)
    if base == "fl":
        mean = cases.weighted_average(uploads, weights)
        chex.assert_trees_all_close(state.server["base"], mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", ["fd", pytest.param("fl", marks=pytest.mark.exhaustive)])
def test_where_no_label_is_scarce_nothing_is_filled(base):
    """`scarcity` = 0: no seeds, no generated examples, and the parts' own round."""
    _, _, sent, run = set_up(base, scarcity=0.0)
    state, report = run()
    assert sent["up"] == 0
    assert (report.metrics["filled"] == 0).all()
    name = "fedavg" if base == "fl" else base
    _, plain = cases.simulation(name)
    federation, given = cases.federation(), cases.hparams_of(name, learning_rate=RATE)
    other = jax.device_get(plain.run(plain.init(0, federation), federation, given, 1)[0])
    of = (
        (lambda s: s.server["base"], lambda s: s.server)
        if base == "fl"
        else (lambda s: s.clients[0]["base"], lambda s: s.clients[0])
    )
    chex.assert_trees_all_close(of[0](state), of[1](other), rtol=1e-6, atol=1e-7)


@pytest.mark.exhaustive
def test_the_payload_of_table_1():
    """2 devices of 500 images, of three labels five each: 47,989,120 bits in 16 rounds of FD + FAug, to the bit."""
    ready = experiment.build(settings.make(
        algorithm="faug", dataset="mnist_sample", partition="scarce", samples_per_client=500, num_clients=2,
        model="mclr", lifting="vmap", generator_steps=1, local_eval="own",
    ))  # fmt: skip
    assert sum(leaf.size for leaf in jax.tree.leaves(gan.init(jax.random.key(0), 784))) == 1_493_520
    state = ready.simulation.init(0, ready.federation)
    state, report = jax.device_get(ready.simulation.setup(state, ready.federation, ready.hparams))
    traffic = experiment.traffic_of(ready)
    once = sum(count_bytes(traffic.setup, report.sent).values()) / 2
    each = sum(traffic.per_participant(way)[0] for way in ("up", "down"))
    assert 8 * (once + 16 * each) == 47_989_120
    assert 8 * once == 1_276_326_272 - 1_228_439_552  # what it adds to FL
    assert report.metrics["device_server_leakage"] == 1
    assert cases.all_finite(state.server)


def test_what_cannot_work():
    floats = {"algorithm": "faug", "dataset": "synthetic", "num_clients": 4, "model": "mclr"}
    with pytest.raises(InputError, match=r"^--scarcity=2\.0: expected a number from 0 to 1"):
        settings.make(**floats, scarcity=2.0)
    with pytest.raises(InputError, match=r"^unknown base 'fedavg'"):
        settings.make(**floats, base="fedavg")
    with pytest.raises(InputError, match=r"^--base=fl averages the params of one architecture; leave --models out"):
        experiment.build(settings.make(**floats, models="2nn:4", base="fl"))
