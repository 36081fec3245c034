"""FML and FedProto against NumPy in float64, written from their papers' equations."""

import math

import engine_cases as cases
import jax
import numpy as np
import pytest
from choices import some

from fdjax import keys, models
from fdjax.algorithms import ALGORITHMS, fedtgp
from fdjax.errors import InputError
from fdjax.exchange import low_rank
from fdjax.exchange.reductions import ByLabel
from fdjax.exchange.traffic import count_bytes

K, BATCH, RATE, EPOCHS = cases.CLASSES, 4, 0.1, 2


def rows_of(tree, row):
    return jax.tree.map(lambda leaf: np.float64(leaf[row]), tree)


def simulated(name, rounds=1, cohorts=(("mclr", 7),), options=None, **hparams):
    """The states before and after some rounds, the federation, metrics, and bytes up and down of the last round."""
    _, simulation = cases.simulation(name, cohorts=cohorts, options=options)
    federation = cases.federation()
    given = cases.hparams_of(name, learning_rate=RATE, local_epochs=EPOCHS, **hparams)
    start = jax.device_get(simulation.init(0, federation))
    state, report = simulation.run(simulation.init(0, federation), federation, given, rounds)
    return start, jax.device_get(state), federation, jax.device_get(report.metrics)


def batches_of(key, y):
    for epoch in range(EPOCHS):
        order = cases.epoch_order(key, epoch, len(y))
        for first in range(0, len(order), BATCH):
            yield order[first : first + BATCH]


def participants(federation, number=0):
    """(row, key, x, y) of those that hold examples."""
    key, clients = cases.round_key(0, number), cases.clients_of(federation)
    for row in cases.participants_of(key, len(clients), cases.PARTICIPANTS):
        i, x, y = clients[row]
        if len(y):
            yield row, keys.stream(key, "client", i), x, y


def mutual(own, meme, x, y, key, alpha, beta):
    """Both nets after their epochs."""
    for b in batches_of(key, y):
        p, q, hard = cases.softmax(own(x[b])), cases.softmax(meme(x[b])), np.eye(K)[y[b]]
        for model, me, other, weight in ((own, p, q, alpha), (meme, q, p, beta)):
            slope = weight * (me - hard) + (1 - weight) * (me - other)
            model.W, model.b = model.W - RATE * x[b].T @ slope / len(b), model.b - RATE * slope.mean(0)


@pytest.mark.parametrize("weighting", some(["uniform", "examples"], "examples"))
@pytest.mark.parametrize(("alpha", "beta"), [(0.7, 0.2), (0.5, 0.5)])
def test_fml(weighting, alpha, beta):
    given = {"own_weight": alpha, "meme_weight": beta}
    start, state, federation, _ = simulated("fml", options={"weighting": weighting}, **given)
    memes, weights = [], []
    for row, key, x, y in participants(federation):
        own, meme = cases.Logistic(rows_of(start.clients[0], row)), cases.Logistic(start.server)
        mutual(own, meme, x, y, key, alpha, beta)
        close(rows_of(state.clients[0], row), own.params())
        memes.append(meme.params())
        weights.append(len(y) if weighting == "examples" else 1)
    close(state.server, cases.weighted_average(memes, weights))


def close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def test_fml_of_labels_alone_is_fedavg_and_training_alone():
    """alpha = beta = 1: nobody learns from anybody."""
    start, state, federation, _ = simulated("fml", options={"weighting": "examples"}, own_weight=1.0, meme_weight=1.0)
    given = cases.hparams_of("fedavg", learning_rate=RATE, local_epochs=EPOCHS)
    _, fedavg = cases.simulation("fedavg")
    averaged, _ = fedavg.run(fedavg.init(0, federation), federation, given, 1)
    close(state.server, jax.device_get(averaged.server))
    for row, key, x, y in participants(federation):
        own = cases.Logistic(rows_of(start.clients[0], row))
        own.fit(x, y, [cases.epoch_order(key, e, len(y)) for e in range(EPOCHS)], BATCH, RATE)
        close(rows_of(state.clients[0], row), own.params())


class TwoNN:
    """h = relu(relu(x A + a) B + b), z = h C + c."""

    def __init__(self, params):
        layers = [params[f"Dense_{i}"] for i in range(3)]
        self.W, self.b = [np.float64(v["kernel"]) for v in layers], [np.float64(v["bias"]) for v in layers]

    def features(self, x):
        self.seen = [x]
        for W, b in zip(self.W[:2], self.b[:2], strict=True):
            self.seen.append(np.maximum(self.seen[-1] @ W + b, 0))
        return self.seen[-1]

    def head(self, h):
        return h @ self.W[2] + self.b[2]

    def step(self, dz, dh):
        """One step down, by the slopes of the mean loss at logits and at features of what was seen last."""
        slope, slopes = dz, []
        for layer in (2, 1, 0):
            slopes.append((layer, self.seen[layer].T @ slope, slope.sum(0)))
            slope = slope @ self.W[layer].T + (dh if layer == 2 else 0)
            slope = slope * (self.seen[layer] > 0)
        for layer, dW, db in slopes:
            self.W[layer], self.b[layer] = self.W[layer] - RATE * dW, self.b[layer] - RATE * db

    def params(self):
        return {f"Dense_{i}": {"kernel": self.W[i], "bias": self.b[i]} for i in range(3)}


@pytest.mark.parametrize("weighting", some(["clients", "examples"], "examples"))
def test_fedproto(weighting):
    """Two rounds: in the first one there are no prototypes yet."""
    weight, rounds, cohorts = 5.0, 2, (("2nn", 7),)
    start, state, federation, metrics = simulated("fedproto", rounds, cohorts, {"weighting": weighting}, weight=weight)
    nets = [TwoNN(rows_of(start.clients[0], row)) for row in range(7)]
    d = nets[0].b[1].size
    prototypes, known = np.zeros((K, d)), np.zeros(K, bool)
    for number in range(rounds):
        total, count, losses, sizes = np.zeros((K, d)), np.zeros(K), [], []
        for row, key, x, y in participants(federation, number):
            net, in_epoch = nets[row], []
            for b in batches_of(key, y):
                h, hard = net.features(x[b]), np.eye(K)[y[b]]
                apart = known[y[b]][:, None] * (h - prototypes[y[b]])
                in_epoch.append((cases.cross_entropy(net.head(h), y[b]) + weight * (apart**2).mean(1)).mean())
                net.step((cases.softmax(net.head(h)) - hard) / len(b), weight * 2 * apart / d / len(b))
            losses.append(np.mean(in_epoch[-math.ceil(len(y) / BATCH) :]))
            sizes.append(len(y))
            for label in {*y.tolist()}:
                mine = net.features(x[y == label])
                share = len(mine) if weighting == "examples" else 1
                total[label] += share * mine.mean(0)
                count[label] += share
        known |= count > 0
        prototypes = np.where((count > 0)[:, None], total / np.maximum(count, 1)[:, None], prototypes)
        np.testing.assert_allclose(metrics["train_loss"][number], np.average(losses, weights=sizes), rtol=1e-4)
    for row in range(7):
        close(rows_of(state.clients[0], row), nets[row].params())
    close(state.server.value, prototypes)
    assert ((state.server.count > 0) == known).all()


def test_fedproto_sends_a_vector_of_each_label_that_a_client_holds():
    _, simulation = cases.simulation("fedproto", cohorts=(("2nn", 7),), participants=(7,))
    federation, given = cases.federation(), cases.hparams_of("fedproto")
    held = [len({*y.tolist()}) for _, _, y in cases.clients_of(federation)]
    state, traffic, known = simulation.init(0, federation), simulation.traffic(federation, given), 0
    for _ in range(2):
        state, report = simulation.run(state, federation, given, 1)
        found = count_bytes(traffic.round, jax.tree.map(lambda x: x[0], jax.device_get(report.sent)))
        d = state.server.value.shape[1]
        assert (found["up"], found["down"]) == (4 * d * sum(held), 4 * d * known * np.count_nonzero(held))
        known = int((np.asarray(state.server.count) > 0).sum())


def test_fedproto_predicts_by_the_nearest_prototype_that_there_is():
    method, task = (
        ALGORITHMS["fedproto"],
        cases.task(cohorts=(("2nn", 7),), options={"inference": "prototypes"}.items()),
    )
    algorithm = method.algorithm(task._replace(options=method.choices({})))
    net = TwoNN(task.models[0].init(jax.random.key(1)))
    x = np.random.default_rng(0).normal(size=(9, cases.FEATURES)).astype(np.float32)
    h = net.features(x.astype(np.float64))
    table = np.random.default_rng(1).normal(size=(K, h.shape[1]))
    count = np.arange(K) % 2  # every other label has a prototype
    ctx = type("ctx", (), {"model": task.models[0]})
    params = jax.tree.map(np.float32, net.params())
    found = algorithm.personal(ctx, ByLabel(np.float32(table), count), params, x)
    distance = ((h[:, None] - table) ** 2).sum(-1)
    assert (np.argmax(found, 1) == np.where(count > 0, distance, np.inf).argmin(1)).all()
    far = algorithm.personal(ctx, ByLabel(np.float32(table) * 1e5, count), params, x)
    assert (count[np.argmax(far, 1)] > 0).all()  # however far
    nothing = algorithm.personal(ctx, ByLabel(np.float32(table), 0 * count), params, x)
    np.testing.assert_allclose(nothing, net.head(h), rtol=1e-4, atol=1e-5)


def test_fedproto_wants_features_of_one_length():
    task = cases.task(cohorts=(("2nn", 3), ("mclr", 4)))
    with pytest.raises(InputError, match=r"fedproto compares the features.*2nn 5, mclr 6"):
        ALGORITHMS["fedproto"].algorithm(task._replace(options=ALGORITHMS["fedproto"].choices({})))
    narrow = models.build("2nn", (cases.FEATURES,), K, width=7)
    with pytest.raises(InputError, match="must be as many"):
        ALGORITHMS["fedproto"].algorithm(
            task._replace(models=(task.models[0], narrow), options=ALGORITHMS["fedproto"].choices({}))
        )


def train_alone(net, x, y, key):
    for b in batches_of(key, y):
        h = net.features(x[b])
        net.step((cases.softmax(net.head(h)) - np.eye(K)[y[b]]) / len(b), 0)


def uploads_of(nets, federation, number):
    """(label, mean features) of each participant and label, in the order of clients."""
    for row, _, x, y in sorted(participants(federation, number), key=lambda who: who[0]):
        for label in range(K):
            if (y == label).any():
                yield label, nets[row].features(x[y == label]).mean(0)


def server_batches(key, count, epochs):
    for epoch in range(epochs):
        order = cases.epoch_order(key, epoch, count)
        yield from (order[first : first + BATCH] for first in range(0, count, BATCH))


def test_fedgh():
    """Two rounds; the server's head is that of a 2nn like the clients'."""
    epochs, rounds = 3, 2
    start, state, federation, _ = wide("fedgh", rounds, server_epochs=epochs, server_learning_rate=0.2)
    nets = [TwoNN(rows_of(start.clients[0], row)) for row in range(7)]
    W, b = sorted((np.float64(leaf) for leaf in start.server), key=lambda leaf: -leaf.ndim)
    for number in range(rounds):
        for row, key, x, y in participants(federation, number):
            nets[row].W[2], nets[row].b[2] = W, b
            train_alone(nets[row], x, y, key)
        labels, means = zip(*uploads_of(nets, federation, number), strict=True)
        labels, means = np.array(labels), np.array(means)
        for i in server_batches(keys.stream(cases.round_key(0, number), "server"), len(labels), epochs):
            slope = (cases.softmax(means[i] @ W + b) - np.eye(K)[labels[i]]) / len(i)
            W, b = W - 0.2 * means[i].T @ slope, b - 0.2 * slope.sum(0)
    for row in range(7):
        close(rows_of(state.clients[0], row), nets[row].params())
    found = sorted(state.server, key=lambda leaf: -leaf.ndim)
    close(found, [W, b])


def wide(name, rounds, **hparams):
    """The same as `simulated`, whose central model is a 2nn too."""
    method, task = ALGORITHMS[name], cases.task(cohorts=(("2nn", 7),))
    algorithm = method.algorithm(task._replace(model=task.models[0], options=method.choices({})))
    simulation = cases.bind(algorithm, task._replace(model=task.models[0]), (cases.PARTICIPANTS,))
    federation = cases.federation()
    given = cases.hparams_of(name, learning_rate=RATE, local_epochs=EPOCHS, **hparams)
    start = jax.device_get(simulation.init(0, federation))
    state, report = simulation.run(simulation.init(0, federation), federation, given, rounds)
    return start, jax.device_get(state), federation, jax.device_get(report.metrics)


class Prototypes:
    """P = relu(E A + a) B + b."""

    def __init__(self, params):
        self.p = [
            np.float64(leaf)
            for leaf in (
                params["embedding"],
                *(params[layer][name] for layer in ("hidden", "out") for name in ("kernel", "bias")),
            )
        ]

    def __call__(self):
        E, A, a, B, b = self.p
        self.h = np.maximum(E @ A + a, 0)
        return self.h @ B + b

    def step(self, dP, rate):
        E, A, _, B, _ = self.p
        dh = dP @ B.T * (self.h > 0)
        slopes = dh @ A.T, E.T @ dh, dh.sum(0), self.h.T @ dP, dP.sum(0)
        self.p = [p - rate * slope for p, slope in zip(self.p, slopes, strict=True)]


@pytest.mark.parametrize("most", [0.05, 100.0])
def test_fedtgp(most):
    epochs, rounds, weight = 3, 2, 2.0
    start, state, federation, metrics = simulated(
        "fedtgp", rounds, (("2nn", 7),), server_epochs=epochs, server_learning_rate=0.2, weight=weight, margin=most
    )
    nets, server = [TwoNN(rows_of(start.clients[0], row)) for row in range(7)], Prototypes(start.server["params"])
    P, d = None, nets[0].b[1].size
    for number in range(rounds):
        for row, key, x, y in participants(federation, number):
            for i in batches_of(key, y):
                h = nets[row].features(x[i])
                apart = 0 if P is None else weight * 2 * (h - P[y[i]]) / d / len(i)
                nets[row].step((cases.softmax(nets[row].head(h)) - np.eye(K)[y[i]]) / len(i), apart)
        labels, protos = (np.array(v) for v in zip(*uploads_of(nets, federation, number), strict=True))
        mean = {c: protos[labels == c].mean(0) for c in {*labels.tolist()}}
        nearest = [min(np.linalg.norm(mean[c] - mean[o]) for o in mean if o != c) for c in mean]
        margin = min(max(nearest), most)
        np.testing.assert_allclose(metrics["margin"][number], margin, rtol=1e-4)
        for i in server_batches(keys.stream(cases.round_key(0, number), "server"), len(labels), epochs):
            away = protos[i][:, None] - server()[None]
            distance, hard = np.sqrt((away**2).sum(-1)), np.eye(K)[labels[i]]
            slope = (cases.softmax(-(distance + margin * hard)) - hard) / len(i)  # at minus the distance
            server.step((slope[..., None] * away / distance[..., None]).sum(0), 0.2)
        P = server()
    close(state.server["shared"].value, P)
    for row in range(7):
        close(rows_of(state.clients[0], row), nets[row].params())


def test_a_margin_without_a_second_label_is_the_largest_one():
    found = fedtgp.margin(ByLabel(np.ones((3, 2), np.float32), np.array([0, 2, 0])), np.float32(7))
    assert found == 7


def test_fedgh_wants_heads_that_are_alike():
    task = cases.task(cohorts=(("2nn", 7),))
    with pytest.raises(InputError, match=r"fedgh shares one head, but that of 2nn has .*central model mclr"):
        ALGORITHMS["fedgh"].algorithm(task._replace(options={}))


def svd(change, energy):
    """The least rank whose squared singular values are more than `energy` of all; the bytes."""
    U, S, V = np.linalg.svd(change, full_matrices=False)
    rank = int(min((np.cumsum(S**2) / np.sum(S**2) <= energy).sum() + 1, len(S)))
    size = 4 * rank * (sum(change.shape) + 1)
    return ((U[:, :rank] * S[:rank]) @ V[:rank], size) if size < 4 * change.size else (change, 4 * change.size)


def teach_one_another(mentor, mentee, bridge, x, y, key):
    """Both nets and the bridge, by the slopes of L_t + L_s."""
    for i in batches_of(key, y):
        hard = np.eye(K)[y[i]]
        h_t, h_s = mentor.features(x[i]), mentee.features(x[i])
        t, s = mentor.head(h_t), mentee.head(h_s)
        p, q = cases.softmax(t), cases.softmax(s)
        d = np.maximum(cases.cross_entropy(t, y[i]) + cases.cross_entropy(s, y[i]), 0.1)
        gap = h_t - h_s @ bridge
        dt, ds = p - hard + (p - q) / d[:, None], q - hard + (q - p) / d[:, None]
        dgap = 4 * gap / gap.shape[1] / d[:, None]
        n = len(i)
        dbridge = -h_s.T @ dgap / n
        mentor.step(dt / n, dgap / n)
        mentee.step(ds / n, -dgap @ bridge.T / n)
        bridge = bridge - RATE * dbridge
    return bridge


def test_fedkd():
    """Two rounds of 2nn mentors and a 2nn mentee."""
    start, state, federation, metrics = wide("fedkd", 2, energy_start=0.6, energy_end=0.9, energy_rounds=2)
    mentors = [TwoNN(rows_of(start.clients[0]["mentor"], row)) for row in range(7)]
    bridges = [np.float64(start.clients[0]["bridge"][row]) for row in range(7)]
    common, sent = TwoNN(start.server["params"]), 0
    for number in range(2):
        energy, changes, sizes = 0.6 + 0.3 * number / 2, [], []
        np.testing.assert_allclose(metrics["energy"][number], energy, rtol=1e-6)
        for row, key, x, y in participants(federation, number):
            mentee = TwoNN(common.params())
            bridges[row] = teach_one_another(mentors[row], mentee, bridges[row], x, y, key)
            changes.append([svd(a - b, energy)[0] for a, b in zip(mentee.W, common.W, strict=True)]
                           + [a - b for a, b in zip(mentee.b, common.b, strict=True)])  # fmt: skip
            sizes.append(len(y))
        mean = [np.average(each, axis=0, weights=sizes) for each in zip(*changes, strict=True)]
        lower = [svd(matrix, energy) for matrix in mean[:3]]
        common.W = [w + change for w, (change, _) in zip(common.W, lower, strict=True)]
        common.b = [b + change for b, change in zip(common.b, mean[3:], strict=True)]
        sent += sum(size for _, size in lower) + 4 * sum(b.size for b in common.b)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), state.server["params"], common.params()
    )
    assert 4 * state.server["sent"] == sent
    for row in range(7):
        close(rows_of(state.clients[0]["mentor"], row), mentors[row].params())
        close(state.clients[0]["bridge"][row], bridges[row])


@pytest.mark.exhaustive
def test_fedkd_of_full_rank_sends_what_was_learned():
    """An energy of 1 changes nothing: the mentee is the mean of the clients'."""
    start, state, *_ = wide("fedkd", 1, energy_start=1.0, energy_end=1.0)
    assert state.server["sent"] == sum(leaf.size for leaf in jax.tree.leaves(start.server["params"]))


@pytest.mark.parametrize("shape", [(7,), (1, 4), (5, 1), (12, 5), (4, 9), (3, 3, 2, 6), (40, 33)])
def test_the_least_rank_of_an_energy(shape):
    matrix = np.random.default_rng(3).normal(size=shape) * 0.5 ** np.arange(shape[-1])
    truncated = jax.jit(low_rank.truncated)
    for energy in (0.0, 0.5, 0.9, 0.999):
        found, size = truncated({"a": np.float32(matrix)}, np.float32(energy))
        expected, least = (matrix, 4 * matrix.size) if matrix.ndim < 2 else svd(matrix.reshape(-1, shape[-1]), energy)
        assert 4 * size == least
        np.testing.assert_allclose(found["a"].reshape(expected.shape), expected, atol=1e-5)
    assert matrix.ndim < 2 or truncated({"a": np.float32(0 * matrix)}, np.float32(0.9))[1] == 0
    np.testing.assert_array_equal(truncated({"a": np.float32(matrix)}, np.float32(1))[0]["a"], np.float32(matrix))
