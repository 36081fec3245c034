"""FedGen against NumPy in float64, written from Zhu et al. (2021), equations 4 and 5, and their code's two terms."""

import chex
import engine_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdjax import keys, models
from fdjax.algorithms import ALGORITHMS
from fdjax.client.trained import paths_read
from fdjax.errors import InputError
from fdjax.run import experiment, settings

K, F, BATCH, GENERATED, ROUNDS, EPOCHS, STEPS = cases.CLASSES, cases.FEATURES, 4, 32, 2, 2, 3
RATE, A, B, FADE, G_RATE, DIVERSITY = 0.1, 0.7, 0.4, 0.5, 0.01, 0.8
H = {
    "learning_rate": RATE, "generated_weight": A, "latent_weight": B, "fade": FADE, "generator_steps": STEPS,
    "generator_learning_rate": G_RATE, "diversity_weight": DIVERSITY,
}  # fmt: skip


def drawn(key, labels, size, normal):
    """e [size, 32] and y [size], uniform over `labels`."""
    draw = jax.random.normal if normal else jax.random.uniform
    among = jnp.where(jnp.isin(jnp.arange(K), jnp.asarray(labels)), 0.0, -jnp.inf)
    y = jax.random.categorical(keys.stream(key, "labels"), among, shape=(size,))
    return np.float64(draw(keys.stream(key, "noise"), (size, 32))), np.asarray(y)


class Generator:
    """Dense, BatchNorm, ReLU, Dense; trained by Adam whose gradient has 0.01 of the params added."""

    def __init__(self, first):
        (p, (mean, var)) = jax.tree.map(np.float64, first)
        self.p = [p["hidden"]["kernel"], p["norm"]["scale"], p["norm"]["bias"], p["out"]["kernel"], p["out"]["bias"]]
        self.running, self.m, self.v, self.t = [mean, var], [0.0] * 5, [0.0] * 5, 0

    def __call__(self, e, y, train=False):
        V, scale, bias, U, u = self.p
        self.j = np.concatenate([e, np.eye(K)[y]], 1)
        a = self.j @ V
        mean, var = (a.mean(0, keepdims=True), a.var(0, keepdims=True)) if train else self.running
        if train:
            self.running = [0.9 * old + 0.1 * new for old, new in zip(self.running, (mean, var), strict=True)]
        self.deviation = np.sqrt(var + 1e-5)
        self.normal = (a - mean) / self.deviation
        self.r = np.maximum(self.normal * scale + bias, 0)
        return self.r @ U + u

    def step(self, slope, rate):
        """One step down dL/dG = `slope` of the batch that was generated last."""
        _, scale, _, U, _ = self.p
        dr = slope @ U.T * (self.r > 0)
        dn = dr * scale
        da = (dn - dn.mean(0) - self.normal * (dn * self.normal).mean(0)) / self.deviation
        gradient = [
            self.j.T @ da, (dr * self.normal).sum(0, keepdims=True), dr.sum(0, keepdims=True), self.r.T @ slope,
            slope.sum(0, keepdims=True),
        ]  # fmt: skip
        self.t += 1
        for i, g in enumerate(gradient):
            g = g + 0.01 * self.p[i]
            self.m[i], self.v[i] = 0.9 * self.m[i] + 0.1 * g, 0.999 * self.v[i] + 0.001 * g**2
            m, v = self.m[i] / (1 - 0.9**self.t), self.v[i] / (1 - 0.999**self.t)
            self.p[i] = self.p[i] - rate * m / (np.sqrt(v) + 1e-8)


def train(model, x, y, key, r, generator, labels, normal):
    """E epochs; returns the labels seen, [K]."""
    fading, seen = FADE**r if r else 0.0, np.zeros(K)
    for epoch in range(EPOCHS):
        order, epoch_key = cases.epoch_order(key, epoch, len(y)), jax.random.fold_in(key, epoch)
        for i, first in enumerate(range(0, len(y), BATCH)):
            b, key_now = order[first : first + BATCH], keys.stream(epoch_key, "loss", i)
            p, hard, n = cases.softmax(model(x[b])), np.eye(K)[y[b]], len(b)
            seen += hard.sum(0)
            slopes = [(x[b], p - hard)]
            if r:
                e, wanted = (v[:n] for v in drawn(keys.stream(key_now, "generated"), labels, BATCH, normal))
                h = generator(e, wanted)
                slopes.append((h, fading * A * (cases.softmax(model(h)) - np.eye(K)[wanted])))
                again = drawn(keys.stream(key_now, "latent"), labels, BATCH, normal)[0][:n]
                slopes.append((x[b], fading * B * (p - cases.softmax(model(generator(again, y[b]))))))
            model.W = model.W - RATE * sum(h.T @ s for h, s in slopes) / n
            model.b = model.b - RATE * sum(s.sum(0) for _, s in slopes) / n
    return seen


def teach(generator, heads, counts, key, rate, by_logits, normal):
    """STEPS steps down sum_k u_k CE_k, or CE of the mean logits, and the diversity term. Returns the last loss."""
    u = np.ones_like(counts) if by_logits else 1 + counts
    u, labels, loss = u / u.sum(0), np.flatnonzero(counts.sum(0)), 0.0
    for i in range(STEPS):
        e, y = drawn(keys.stream(key, "generate", i), labels, GENERATED, normal)
        g = generator(e, y, train=True)
        hard, z = np.eye(K)[y], np.array([head(g) for head in heads])
        weight = u[:, y][..., None]
        if by_logits:
            mean = (weight * z).sum(0)
            taught, dz = cases.cross_entropy(mean, y), weight * (cases.softmax(mean) - hard)
        else:
            taught = sum(w[:, 0] * cases.cross_entropy(each, y) for w, each in zip(weight, z, strict=True))
            dz = weight * (cases.softmax(z) - hard)
        slope = sum(each @ head.W.T for each, head in zip(dz, heads, strict=True)) / GENERATED
        apart, noise = g[:, None] - g[None], ((e[:, None] - e[None]) ** 2).mean(-1)
        alike = np.exp(-(np.abs(apart).mean(-1) * noise).mean())
        slope = slope - DIVERSITY * alike * 2 * (noise[..., None] * np.sign(apart)).sum(1) / (GENERATED**2 * F)
        generator.step(slope, rate)
        loss = taught.mean() + DIVERSITY * alike
    return loss


@pytest.mark.parametrize(
    "options", [{}, {"teachers": "logits", "weighting": "uniform", "noise": "normal"}], ids=["code", "text"]
)
def test_rounds(options):
    _, simulation = cases.simulation("fedgen", options=options)
    federation, given = cases.federation(), cases.hparams_of("fedgen", **H)
    state = simulation.init(0, federation)
    start = jax.device_get(state.server)
    last, report = jax.device_get(simulation.run(state, federation, given, ROUNDS))
    mean, generator, known = start["params"], Generator(start["generator"]), set()
    for r in range(ROUNDS):
        key, clients = cases.round_key(0, r), cases.clients_of(federation)
        heads, counts, weights = [], [], []
        for row in cases.participants_of(key, len(clients), cases.PARTICIPANTS):
            i, x, y = clients[row]
            if len(y):
                heads.append(cases.Logistic(mean))
                mine = keys.stream(key, "client", i)
                counts.append(train(heads[-1], x, y, mine, r, generator, sorted(known), "noise" in options))
                weights.append(len(y) if not options else 1)
        mean = cases.weighted_average([head.params() for head in heads], weights)
        at_server, counts = keys.stream(key, "server"), np.array(counts)
        loss = teach(
            generator, heads, counts, at_server, G_RATE * FADE**r, *(name in options for name in ("teachers", "noise"))
        )
        np.testing.assert_allclose(report.metrics["generator_loss"][r], loss, rtol=1e-4)
        known |= {*np.flatnonzero(counts.sum(0)).tolist()}
    chex.assert_trees_all_close(last.server["params"], mean, rtol=1e-3, atol=1e-4)
    params, statistics = last.server["generator"]
    np.testing.assert_allclose(params["out"]["kernel"], generator.p[3], rtol=1e-2, atol=1e-3)
    chex.assert_trees_all_close(statistics, tuple(generator.running), rtol=1e-2, atol=1e-3)
    assert np.flatnonzero(last.server["labels"]).tolist() == sorted(known)


def test_of_no_weights_it_is_fedavg():
    _, simulation = cases.simulation("fedgen")
    _, averaged = cases.simulation("fedavg")
    federation, ends = cases.federation(), []
    for name, each, more in (
        ("fedgen", simulation, {"generated_weight": 0, "latent_weight": 0}),
        ("fedavg", averaged, {}),
    ):
        state = each.init(0, federation)
        ends.append(jax.device_get(each.run(state, federation, cases.hparams_of(name, **more), ROUNDS)[0].server))
    chex.assert_trees_all_close(ends[0]["params"], ends[1], rtol=1e-6, atol=1e-7)


def test_a_head_is_told_by_what_it_reads():
    model = cases.model("2nn")
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert paths_read(model.head, shapes, jnp.zeros((1, 5))) == {"Dense_2/kernel", "Dense_2/bias"}
    assert len(paths_read(model.features, shapes, jnp.zeros((1, F)))) == 4
    model = models.build("fedgen_cnn", (8, 8, 1), K, norm="batch")  # statistics are looked at by every block
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert paths_read(model.head, shapes, jnp.zeros((1, 32))) == {"Dense_1/kernel", "Dense_1/bias"}


FLOATS = {
    "algorithm": "fedgen", "dataset": "synthetic", "num_clients": 3, "samples_per_client": 20, "model": "2nn",
    "batch_size": 8, "lifting": "vmap", "partition_seed": 0, "generator_steps": 2, "local_eval": "own",
}  # fmt: skip


@pytest.mark.exhaustive
def test_the_last_layer_alone_is_shared():
    """Table 4: extractors stay and differ, 4 (P_head + K) bytes go up."""
    ready = experiment.build(settings.make(**FLOATS, exchanged="Dense_2/*"))
    state = ready.simulation.init(0, ready.federation)
    state = jax.device_get(ready.simulation.run(state, ready.federation, ready.hparams, 2)[0])
    kernels = state.clients[0].own["Dense_0/kernel"]
    assert not np.allclose(kernels[0], kernels[1])
    assert {*state.server.state["params"]} == {"Dense_2/kernel", "Dense_2/bias"}
    up, down = (experiment.traffic_of(ready).per_participant(way)[0] for way in ("up", "down"))
    head, generator = 200 * 10 + 10, (32 + 10) * 256 + 4 * 256 + 256 * 200 + 200
    assert (up, down) == (4 * (head + 10), 4 * (head + generator) + 10)


def test_what_cannot_work():
    ready = experiment.build(settings.make(**FLOATS, exchanged="Dense_0/*"))
    with pytest.raises(InputError, match="fedgen teaches by whole heads, but Dense_2/bias is not sent"):
        ready.simulation.init(0, ready.federation)
    model = cases.model()._replace(name="own", blocks=())
    task = cases.task(options=ALGORITHMS["fedgen"].choices({}))._replace(model=model, models=(model,))
    with pytest.raises(InputError, match="fedgen needs the parts of its models, but 'own' has none"):
        ALGORITHMS["fedgen"].algorithm(task)
