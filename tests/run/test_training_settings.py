"""What of the params and of the optimisers' states stays where, as settings say: runs, bytes and one-line refusals."""

import engine_cases as cases
import jax
import numpy as np
import pytest

import fdjax
from fdjax.algorithms import ALGORITHMS
from fdjax.client import optimizers
from fdjax.errors import InputError
from fdjax.run import experiment, settings
from fdjax.run.contract_case import Case

SMALL = {
    "dataset": "synthetic", "num_clients": 3, "samples_per_client": 20, "model": "mclr", "batch_size": 0,
    "lifting": "vmap", "rounds": 2, "learning_rate": 0.1, "partition_seed": 0,
}  # fmt: skip


def built(**given):
    return experiment.build(settings.make(**SMALL | given))


def after(ready, rounds=2):
    simulation, federation = ready.simulation, ready.federation
    state = simulation.init(0, federation)
    first = jax.device_get(state)
    state, _ = simulation.run(state, federation, ready.hparams, rounds)
    return first, jax.device_get(state)


@pytest.mark.parametrize("kept", ["fresh", "kept"])
def test_momentum_over_rounds(kept):
    """FedAvg by one full-batch step a round: v_k <- 0.9 v_k + g_k;  w_k <- w - 0.1 v_k, v_k at the client or 0."""
    ready = built(momentum=0.9, optimizer_state=kept)
    first, last = after(ready)
    f = jax.device_get(ready.federation)
    server = first.server.state if kept == "kept" else first.server
    W, b = (np.array(server["Dense_0"][name], np.float64) for name in ("kernel", "bias"))
    rows = list(zip(f.train_holdings.start, f.train_holdings.count, strict=True))
    velocity = [(0.0, 0.0)] * len(rows)
    for _ in range(2):
        locals_ = []
        for k, (start, count) in enumerate(rows):
            index = f.train_holdings.order[start : start + count]
            x, y = f.train.x[index] * np.float64(f.train.scale) + f.train.shift, f.train.y[index]
            slope = (cases.softmax(x @ W + b) - np.eye(10)[y]) / count
            before = velocity[k] if kept == "kept" else (0.0, 0.0)
            velocity[k] = 0.9 * before[0] + x.T @ slope, 0.9 * before[1] + slope.sum(0)
            locals_.append((count, W - 0.1 * velocity[k][0], b - 0.1 * velocity[k][1]))
        total = sum(count for count, *_ in locals_)
        W, b = (sum(each[0] * each[i] for each in locals_) / total for i in (1, 2))
    found = last.server.state if kept == "kept" else last.server
    np.testing.assert_allclose(found["Dense_0"]["kernel"], W, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["Dense_0"]["bias"], b, rtol=1e-4, atol=1e-6)


def test_a_pull_goes_with_a_kept_optimiser():
    _, last = after(built(algorithm="fedprox", mu=1.0, optimizer="adam", optimizer_state="kept"))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(last.server))


def test_the_authors_of_fedmd_keep_their_optimisers():
    given = {"algorithm": "fedmd", "proxy": "held_out", "proxy_size": 9, "optimizer": "adam", "pretrain_epochs": 1}
    default, fresh = (built(**given | more).algorithm for more in ({}, {"optimizer_state": "fresh"}))
    assert default.init_client is not fresh.init_client


def test_the_record_says_whose_optimisers_can_go_on(monkeypatch):
    """Whatever the record says, its wrapper shows which states a round of the method replaces."""
    with_states, seen = optimizers._with_states, []
    monkeypatch.setattr(
        optimizers,
        "_with_states",
        lambda ctx, kept: seen.append((kept.optimizers, with_states(ctx, kept))) or seen[-1][1],
    )

    def replaces(name):
        monkeypatch.setitem(ALGORITHMS, name, ALGORITHMS[name]._replace(keeps_optimizer=False))
        ready = Case(name, {}, {}, {"optimizer_state": "kept", "optimizer": "adam"}).built()
        pure, federation, hparams = ready.simulation.pure, ready.federation, dict(ready.hparams)
        seen.clear()
        state = jax.eval_shape(pure.init, 0, federation)
        jax.eval_shape(lambda state: pure.run(state, federation, hparams, 1), state)
        leaves = [tuple(map(jax.tree.leaves, (before, after))) for before, (_, after) in seen]
        return any(a is not b for before, after in leaves for a, b in zip(before, after, strict=True))

    records = {name: ALGORITHMS[name].keeps_optimizer for name in ("fedavg", "fml", "fedkd", "group_distillation")}
    assert {name: replaces(name) for name in records} == {name: kept is not None for name, kept in records.items()}


def test_adapters_on_a_frozen_net():
    """Adapters alone are trained, sent and counted; the net beneath is the same for all and for ever."""
    ready = built(model="2nn", lora_rank=2, trained="*lora*", exchanged="*lora*")
    first, last = after(ready, 2)
    assert not jax.tree.leaves(last.clients)
    assert {path.split("/")[0] for path in last.server.frozen} == {"base"}
    for path, leaf in first.server.frozen.items():
        np.testing.assert_array_equal(last.server.frozen[path], leaf)
    moved = [np.abs(last.server.state[path] - leaf).max() for path, leaf in first.server.state.items()]
    assert max(moved) > 0
    floats = 2 * (60 + 200 + 200 + 200 + 200 + 10)
    sent = experiment.traffic_of(ready).round[0][0]
    assert (sent.up, sent.down) == (4 * floats, 4 * floats)
    scalars, _ = ready.simulation.evaluate(
        ready.simulation.init(0, ready.federation), ready.federation, ready.hparams, np.int32(5)
    )
    assert "central_accuracy" in scalars


def test_personal_layers_in_a_whole_run():
    result = fdjax.run(**SMALL, exchanged="!*bias", progress=False)
    assert "central_accuracy" not in result.final
    assert 0 < result.final["local_accuracy"] <= 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"algorithm": "fd", "exchanged": "*bias"}, "fd does not average the params of one model"),
        ({"exchanged": "Dense_9/*"}, "'Dense_9/\\*' meets none of the model's parameters, which are Dense_0/bias"),
        ({"trained": "!*"}, "--trained=!\\* means none of the model's parameters"),
        ({"norm_statistics": "local"}, "mclr has none; give --norm=batch"),
        (
            {"algorithm": "feddf", "proxy": "held_out", "proxy_size": 9, "norm_statistics": "local",
             "dataset": "mnist_sample", "samples_per_client": None, "train_fraction": 0.02, "model": "fedgen_cnn",
             "norm": "batch"},
            "feddf averages params and statistics; use averaged",
        ),
        ({"norm": "batch"}, "model 'mclr' has no norm"),
        ({"server_optimizer": "adam"}, "--server_optimizer=adam: fedavg has no training of the server's net"),
        ({"algorithm": "fd", "distill_momentum": 0.9}, "--distill_momentum=0.9: fd has no training on proxy data"),
        ({"stragglers": 0.5}, "of a single epoch a straggler can do no part"),
        ({"sampling": "poisson", "participation": 0.5, "capacity": 1}, "--capacity=1 is too small"),
    ],
)  # fmt: skip
def test_what_cannot_be(given, message):
    with pytest.raises(InputError, match=message):
        built(**given)
