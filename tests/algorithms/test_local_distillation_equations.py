"""FedNTD, FedLSD, FedAvg+KD, FedMLB, FedCAD and FedDistill+ against NumPy in float64, written from their equations."""

import chex
import engine_cases as cases
import local_cases as local
import numpy as np
import pytest
from choices import some

from fdjax.errors import InputError
from fdjax.run import experiment, settings

K, ROUNDS, T = local.K, 2, 2.5


def without_true(z, y):
    """[B, K - 1]: the rows without their label's entry."""
    return np.stack([np.delete(row, label) for row, label in zip(z, y, strict=True)])


def fedntd(layers, w, x, y):
    z, teacher = local.logits(layers, x), local.logits(w, x)
    return cases.cross_entropy(z, y) + 0.9 * T**2 * cases.kl_divergence(without_true(teacher, y), without_true(z, y), T)


def fedlsd(layers, w, x, y):
    z, teacher = local.logits(layers, x), local.logits(w, x)
    return 0.4 * cases.cross_entropy(z, y) + 0.6 * T**2 * cases.kl_divergence(teacher, z, T)


def fedavg_kd(layers, w, x, y):
    z, teacher = local.logits(layers, x), local.logits(w, x)
    return 0.3 * cases.cross_entropy(z, y) + 0.7 * cases.kl_divergence(teacher, z)


def fedmlb(layers, w, x, y):
    given = local.forward(layers, x)
    z = given[-1]
    hybrid = [local.forward(w, h, first=b + 1)[-1] for b, h in enumerate(given[:-1])]
    more = [0.8 * cases.cross_entropy(q, y) + 1.4 * cases.kl_divergence(q, z) for q in hybrid]
    return cases.cross_entropy(z, y) + sum(more) / len(hybrid)


LOSSES = {  # the loss, its hparams, and the net
    "fedntd": (fedntd, {"distill_weight": 0.9, "temperature": T}, "mclr"),
    "fedlsd": (fedlsd, {"weight": 0.6, "temperature": T}, "mclr"),
    "fedavg_kd": (fedavg_kd, {"gamma": 0.7}, "mclr"),
    "fedmlb": (fedmlb, {"hybrid_weight": 0.8, "distill_weight": 1.4}, "2nn"),
}
NOTHING = {
    "fedntd": {"distill_weight": 0.0},
    "fedlsd": {"weight": 0.0},
    "fedavg_kd": {"gamma": 0.0},
    "fedmlb": {"hybrid_weight": 0.0, "distill_weight": 0.0},
    "fedcad": {"distill_weight": 0.0},
    "feddistill_plus": {"gamma": 0.0},
}


@pytest.mark.parametrize("name", LOSSES)
def test_rounds(name):
    loss, hparams, net = LOSSES[name]
    start, last, report = local.simulated(name, ROUNDS, local.simulation(name, net=net), **hparams)
    server = local.layers_of(start.server)
    for r in range(ROUNDS):
        w = server
        server, mean, _ = local.fedavg_round(w, r, lambda layers, x, y, w=w: loss(layers, w, x, y))
        np.testing.assert_allclose(report.metrics["train_loss"][r], mean, rtol=1e-5)
    chex.assert_trees_all_close(last.server, local.params_of(server), rtol=1e-4, atol=1e-5)


def test_fedmlb_of_one_layer_distils_from_the_received_model():
    """Its only block before the head has no params: the hybrid branch is the global model, as in FedAvg+KD."""
    _, branched, _ = local.simulated("fedmlb", ROUNDS, hybrid_weight=0.0, distill_weight=0.7 / 0.3)
    made, federation = local.simulation("fedavg_kd"), cases.federation()
    rates = {"learning_rate": local.RATE / 0.3, "local_epochs": local.EPOCHS}
    given = cases.hparams_of("fedavg_kd", gamma=0.7, **rates)
    distilled, _ = made.run(made.init(0, federation), federation, given, ROUNDS)
    chex.assert_trees_all_close(branched.server, distilled.server, rtol=1e-4, atol=1e-5)


def test_fedcad():
    weight = 1.7
    start, last, _ = local.simulated("fedcad", ROUNDS, distill_weight=weight, temperature=T)
    server, (proxy_x, proxy_y), accuracy = local.layers_of(start.server), local.proxy(), np.zeros(K)
    for r in range(ROUNDS):
        w, right = server, local.logits(server, proxy_x).argmax(-1) == proxy_y
        accuracy = np.array([right[proxy_y == c].mean() if (proxy_y == c).any() else 0 for c in range(K)])

        def loss(layers, x, y, w=w, a=accuracy):
            z = local.logits(layers, x)
            soft = T**2 * cases.kl_divergence(local.logits(w, x), z, T)
            return cases.cross_entropy(z, y) + weight * a[y] * soft

        server, *_ = local.fedavg_round(w, r, loss)
    assert len(set(accuracy)) > 1  # or a mean weight would do as well
    chex.assert_trees_all_close(last.server, local.params_of(server), rtol=1e-4, atol=1e-5)
    assert sent("fedcad") == [4 * P, 4 * (P + K)]


def test_feddistill_plus():
    gamma, rounds = 1.3, 3
    start, last, _ = local.simulated("feddistill_plus", rounds, gamma=gamma)
    server, F = local.layers_of(start.server["params"]), {}
    for r in range(rounds):

        def loss(layers, x, y, F=dict(F)):  # noqa: B006  what was sent, not what comes of it
            z = local.logits(layers, x)
            soft = [cases.kl_divergence(F[label], row) if label in F else 0 for label, row in zip(y, z, strict=True)]
            return cases.cross_entropy(z, y) + gamma * np.array(soft)

        server, _, seen = local.fedavg_round(server, r, loss)
        for label in range(K):
            of_clients = [[z for zs, ys in steps for z, y in zip(zs, ys, strict=True) if y == label] for steps in seen]
            means = [np.mean(of_client, 0) for of_client in of_clients if of_client]
            F |= {label: np.mean(means, 0)} if means else {}
    chex.assert_trees_all_close(last.server["params"], local.params_of(server), rtol=1e-4, atol=1e-5)
    assert [*np.flatnonzero(last.server["known"])] == sorted(F)
    for label, mean in F.items():
        np.testing.assert_allclose(last.server["outputs"][label], mean, rtol=1e-4, atol=1e-5)
    assert sent("feddistill_plus") == [4 * (P + K * K + K), 4 * (P + K * K) + K]


P = cases.FEATURES * K + K


def sent(name):
    given = cases.hparams_of(name)
    traffic = local.simulation(name).traffic(cases.federation(), given)
    return [traffic.per_participant(way)[0] for way in ("up", "down")]


@pytest.mark.parametrize("name", some(NOTHING, "fedntd", "feddistill_plus"))
def test_without_distillation_it_is_fedavg(name):
    """To the bit, but for FedMLB's sums of nothing in another order."""
    averaged = local.simulated("fedavg", ROUNDS)[1].server
    server = local.simulated(name, ROUNDS, **NOTHING[name])[1].server
    params = server.get("params", server)
    if name == "fedmlb":
        chex.assert_trees_all_close(params, averaged, rtol=1e-6, atol=1e-7)
    else:
        chex.assert_trees_all_equal(params, averaged)


def test_labels_alone_teach_nothing_to_a_model_that_is_its_own_teacher():
    """FedLSD and FedAvg+KD with all weight on distillation: the received model is at the minimum."""
    for name, hparams in (("fedlsd", {"weight": 1.0}), ("fedavg_kd", {"gamma": 1.0})):
        start, last, _ = local.simulated(name, ROUNDS, **hparams)
        chex.assert_trees_all_close(last.server, start.server, rtol=1e-6, atol=1e-7)


BAD = [
    ({"algorithm": "fedntd", "temperature": 0.0}, "--temperature=0.0: expected a finite number above 0"),
    ({"algorithm": "fedntd", "distill_weight": -1.0}, "--distill_weight=-1.0: expected a finite number of at least 0"),
    ({"algorithm": "fedlsd", "temperature": -1.0}, "--temperature=-1.0: expected a finite number above 0"),
    ({"algorithm": "fedlsd", "weight": 1.5}, "--weight=1.5: expected a number from 0 to 1"),
    ({"algorithm": "fedavg_kd", "gamma": 1.5}, "--gamma=1.5: expected a number from 0 to 1"),
    ({"algorithm": "fedcad"}, "fedcad needs proxy data, with labels; give --proxy=held_out"),
    ({"algorithm": "fedmlb", "model": "tests/own_files/net.py:Net"}, "fedmlb needs the parts of its models, but"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input(fields, message):
    small = {"dataset": "synthetic", "num_clients": 4, "samples_per_client": 20, "model": "mclr"}
    with pytest.raises(InputError) as error:
        experiment.build(settings.make(**small | fields))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
