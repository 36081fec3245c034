"""FedAD against NumPy in float64, written from the equations of our concretisation (`fdjax/algorithms/fedad.py`)."""

import chex
import engine_cases as cases
import jax
import numpy as np
import pytest

from fdjax import keys, models
from fdjax.algorithms.fedad import outside
from fdjax.client.attention import Attentive
from fdjax.errors import InputError
from fdjax.run import experiment, settings

K, BATCH, RATE, EPOCHS, SERVER_EPOCHS, WEIGHT = cases.CLASSES, 4, 0.1, 2, 3, 3.0
H = {"learning_rate": RATE, "local_epochs": EPOCHS, "distill_epochs": SERVER_EPOCHS}


def simulated(federation=None, **hparams):
    """The states before and after one round, its metrics, and bytes up and down."""
    _, simulation = cases.simulation("fedad", per_round=cases.PROXIES)
    federation, given = federation or cases.federation(), cases.hparams_of("fedad", **H | hparams)
    start = jax.device_get(simulation.init(0, federation))
    state, report = jax.device_get(simulation.run(simulation.init(0, federation), federation, given, 1))
    traffic = simulation.traffic(federation, given)
    return start, state, report.metrics, [traffic.per_participant(way)[0] for way in ("up", "down")]


def attention(model, x):
    """A [n, K] of logistic regression, whose features are x: relu(x W_c) over the largest of them, and that."""
    r = np.maximum(x @ model.W, 0)
    top = r.max(1, keepdims=True)
    return r / np.where(top > 0, top, 1), np.where(top > 0, top, 1)


def slope_of_attention(model, x, least, most):
    """dL_att / d(x W) [n, K], and L_att [n]."""
    A, top = attention(model, x)
    g = ((most < A) * 1.0 - (least > A)) / K
    through_top = np.eye(K)[A.argmax(1)] * (g * A).sum(1, keepdims=True)
    return (g - through_top) / top * (x @ model.W > 0), (np.maximum(least - A, 0) + np.maximum(A - most, 0)).mean(1)


def uploads_of(start, federation, key, px):
    """z_k, A_k, n_k^c and params of the participants."""
    clients, found = cases.clients_of(federation), []
    for row in cases.participants_of(key, len(clients), cases.PARTICIPANTS):
        i, x, y = clients[row]
        if len(y):
            mine = cases.Logistic(jax.tree.map(lambda leaf, row=row: leaf[row], start.clients[0]))
            local = keys.stream(keys.stream(key, "client", i), "train")
            mine.fit(x, y, [cases.epoch_order(local, e, len(y)) for e in range(EPOCHS)], BATCH, RATE)
            found.append((mine(px), attention(mine, px)[0], np.bincount(y, minlength=K), row, mine.params()))
    return found


@pytest.mark.parametrize("weight", [WEIGHT, 0.0])
def test_a_round(weight):
    start, state, metrics, sent = simulated(attention_weight=weight)
    federation, key = cases.federation(), cases.round_key(0, 0)
    px = (np.float64(federation.proxy.x) - 0.25) / 1.5
    found = uploads_of(start, federation, key, px)
    z, A, n = (np.array([upload[i] for upload in found], float) for i in range(3))
    held = n.sum(0) > 0
    assert not held.all(), "one class is to be nobody's"
    ensemble = np.where(held, (n[:, None] * z).sum(0) / np.where(held, n.sum(0), 1), z.mean(0))
    least, most = A.min(0), A.max(0)

    student, at_server = cases.Logistic(start.server.params), keys.stream(keys.stream(key, "server"), "distil")
    for epoch in range(SERVER_EPOCHS):
        order, losses = cases.epoch_order(at_server, epoch, len(px)), []
        for first in range(0, len(px), BATCH):
            b = order[first : first + BATCH]
            x, zs = px[b], student(px[b])
            look, apart = slope_of_attention(student, x, least[b], most[b])
            losses.append((cases.kl_divergence(ensemble[b], zs) + weight * apart).mean())
            slope = cases.softmax(zs) - cases.softmax(ensemble[b])
            student.W = student.W - RATE * x.T @ (slope + weight * look) / len(b)
            student.b = student.b - RATE * slope.mean(0)
        assert np.mean(apart) > 0.01  # or attention would teach nothing
    chex.assert_trees_all_close(state.server.params, student.params(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["server_loss"][0], np.mean(losses), rtol=1e-4)
    for *_, row, params in found:
        own = jax.tree.map(lambda leaf, row=row: leaf[row], state.clients[0])
        chex.assert_trees_all_close(own, params, rtol=1e-4, atol=1e-5)
    assert sent == [4 * len(px) * (K + K) + 4 * K, 0]  # maps of 1 x 1; all public data, so no ids


def test_maps_of_a_convolutional_net():
    """Grad-CAM by hand: dense(32), ReLU, dense(K) on the flattened 7 x 7 x 16 features."""
    model = models.build("fedgen_cnn", (28, 28, 1), K)
    net, params = Attentive(model, (28, 28, 1)), jax.jit(model.init)(jax.random.key(0))
    x = np.random.default_rng(1).normal(size=(3, 28, 28, 1)).astype(np.float32)
    assert net.size == (7, 7)

    @jax.jit
    def all_of(params, x):
        h = net.features(params, x)
        return (
            h,
            net.logits(params, h),
            model.apply(params, x),
            net.maps(params, h, (7, 7)),
            net.maps(params, h, (3, 3)),
        )

    h, logits, whole, maps, small = all_of(params, x)
    np.testing.assert_allclose(logits, whole, rtol=1e-5, atol=1e-6)
    f = np.float64(h).reshape(3, -1)
    V, v, U = (np.float64(params[a][b]) for a, b in (("Dense_0", "kernel"), ("Dense_0", "bias"), ("Dense_1", "kernel")))
    for i in range(3):
        slope = (V * (f[i] @ V + v > 0)) @ U  # [7 7 16, K]
        alpha = slope.reshape(49, 16, K).mean(0)
        cam = np.maximum(f[i].reshape(49, 16) @ alpha, 0).T
        expected = (cam / cam.max()).reshape(K, 7, 7)
        np.testing.assert_allclose(maps[i], expected, rtol=1e-4, atol=1e-5)
    assert small.shape == (3, K, 3, 3)
    np.testing.assert_allclose(np.max(small, (1, 2, 3)), 1.0, rtol=1e-6)


def test_a_student_that_sees_what_all_see_is_not_moved_by_attention():
    """A single participant is intersection and union at once: a copy of it has no loss of attention."""
    model = models.build("fedgen_cnn", (8, 8, 1), K)
    net, params = Attentive(model, (8, 8, 1)), jax.jit(model.init)(jax.random.key(0))
    x = np.random.default_rng(1).normal(size=(3, 8, 8, 1)).astype(np.float32)
    maps = jax.jit(lambda params, x: net.maps(params, net.features(params, x), net.size))(params, x)
    assert (outside(maps, maps, maps) == 0).all()
    assert (outside(maps, maps + 0.1, maps + 0.2) > 0).all()
    assert (outside(maps, maps - 0.1, maps + 0.1) == 0).all()


@pytest.mark.exhaustive
def test_other_nets_and_other_sizes_of_maps():
    """Clients of 7 x 7, of 1 x 1 (an MLP) and of another architecture teach a student; all numbers are finite."""
    ready = experiment.build(settings.make(
        algorithm="fedad", dataset="mnist_sample", partition="iid", train_fraction=0.03, num_clients=4, rounds=1,
        model="fedgen_cnn", models="niid_cnn:2,2nn:2", batch_size=10, lifting="vmap", proxy="held_out", proxy_size=12,
        proxy_per_round=8, local_epochs=1, distill_epochs=1, distill_batch_size=4, local_eval="own",
    ))  # fmt: skip
    state = ready.simulation.init(0, ready.federation)
    state, report = jax.device_get(ready.simulation.run(state, ready.federation, ready.hparams, 1))
    assert cases.all_finite((state.server, report.metrics))
    traffic = experiment.traffic_of(ready)
    assert traffic.per_participant("up")[0] == 4 * 8 * (10 + 10 * 49) + 4 * 10
    assert traffic.per_participant("down")[0] == 4 * 8


def test_what_cannot_work():
    with pytest.raises(InputError, match=r"^fedad needs proxy data, whose labels it does not use; give --proxy="):
        settings.make(algorithm="fedad")
    with pytest.raises(InputError, match=r"^--attention_weight=-1\.0: expected a finite number of at least 0"):
        settings.make(algorithm="fedad", proxy="held_out", attention_weight=-1.0)
