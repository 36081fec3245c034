"""SCARLET's cache of soft labels, an option of DS-FL, against NumPy in float64 and bytes counted by hand."""

import chex
import engine_cases as cases
import jax
import numpy as np
import pytest
from server_cases import BATCH, EPOCHS, RATE, descend, hard, orders, participants, proxies

from fdjax import keys
from fdjax.algorithms import ALGORITHMS
from fdjax.errors import InputError
from fdjax.exchange.traffic import count_bytes
from fdjax.run import experiment, settings
from fdjax.run.contract_check import Contract

ROUNDS, DISTILS, BETA = 6, 2, 1.5
K, M, N = cases.CLASSES, cases.PROXIES, cases.PER_ROUND
SHARPENED = {"aggregation": "enhanced_era"}


def simulated(cache="on", per_round=N, rounds=ROUNDS, **hparams):
    """The start, the last state, metrics, and bytes up and down of each round."""
    _, simulation = cases.simulation(
        "dsfl", batch_size=BATCH, options=SHARPENED | {"soft_label_cache": cache}, per_round=per_round
    )
    federation = cases.federation()
    given = cases.hparams_of(
        "dsfl", learning_rate=RATE, local_epochs=EPOCHS, distill_epochs=DISTILS, era_beta=BETA, **hparams
    )
    start = jax.device_get(simulation.init(0, federation))
    state, report = jax.device_get(simulation.run(simulation.init(0, federation), federation, given, rounds))
    return start, state, report.metrics, count_bytes(simulation.traffic(federation, given).round, report.sent)


def subset(key):
    return np.asarray(jax.random.choice(key, M, (N,), replace=False))


def soft(targets):
    return lambda z, batch: cases.softmax(z) - targets[batch]


def models_of(clients):
    return [cases.Logistic(jax.tree.map(lambda x, i=i: x[i], clients)) for i in range(len(cases.COUNTS))]


@pytest.mark.parametrize("duration", [1, 3])
def test_against_numpy(duration):
    start, state, metrics, sent = simulated(cache_rounds=duration)
    x_public, _ = proxies()
    models, central = models_of(start.clients[0].state), cases.Logistic(start.server.state.params)
    ids = subset(keys.stream(jax.random.key(0), "server state"))
    table, has = {}, [{} for _ in models]  # x -> (label, round) at the server; x -> round at each client
    some_asked = caught_up = False
    for r in range(ROUNDS):
        here = list(participants(r))
        asked = [i for i in ids if i not in table or r - table[i][1] > duration]
        said = []
        for row, key, x, y in here:
            descend(models[row], x, hard(y), orders(keys.stream(key, "update"), EPOCHS, len(y)), RATE)
            said.append({i: cases.softmax(models[row](x_public[i])) for i in asked})
        for i in asked:
            p = np.mean([each[i] for each in said], axis=0) ** BETA
            table[i] = p / p.sum(), r
        targets = np.stack([table[i][0] for i in ids])
        key = keys.stream(keys.stream(cases.round_key(0, r), "server"), "distil")
        descend(central, x_public[ids], soft(targets), orders(key, DISTILS, N), RATE)

        down = (4 * N + 1) * len(here)  # ids and 6 bits of who is asked for
        for row, *_ in here:
            missing = [i for i in ids if has[row].get(i) != table[i][1]]
            caught_up |= bool({*missing} - {*asked})
            has[row] |= {i: table[i][1] for i in ids}
            down += 4 * K * len(missing) + 1
            i, *_ = cases.clients_of(cases.federation())[row]
            key = keys.stream(keys.stream(keys.stream(cases.round_key(0, r), "exchange", 1), "client", i), "distil")
            descend(models[row], x_public[ids], soft(targets), orders(key, DISTILS, N), RATE)
        some_asked |= 0 < len(asked) < N
        assert sent["up"][r] == 4 * K * len(asked) * len(here)
        assert sent["down"][r] == down
        np.testing.assert_allclose(metrics["labels_asked"][r], len(asked) / N, rtol=1e-6)
        ids = subset(keys.stream(keys.stream(cases.round_key(0, r), "exchange", 1), "server"))
    assert some_asked
    assert caught_up
    for actual, expected in zip(models_of(state.clients[0].state), models, strict=True):
        chex.assert_trees_all_close(actual.params(), expected.params(), rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(state.server.state.params, central.params(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.server.state.targets, targets, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(state.server.cache.made, [table.get(i, (0, -1))[1] for i in range(M)])
    held = [[mine.get(i, -1) for i in range(M)] for mine in has]
    np.testing.assert_array_equal(state.clients[0].held, held)


@pytest.mark.exhaustive
def test_a_duration_of_0_is_plain_dsfl():
    _, plain, of_plain, sent = simulated("off")
    _, cached, of_cached, more = simulated("on", cache_rounds=0)
    chex.assert_trees_all_close((cached.server.state, cached.clients[0].state), (plain.server, plain.clients[0]))
    chex.assert_trees_all_close({name: of_cached[name] for name in of_plain}, of_plain)
    np.testing.assert_array_equal(of_cached["labels_asked"], 1)
    present = np.array([len(list(participants(r))) for r in range(ROUNDS)])
    np.testing.assert_array_equal(more["up"], sent["up"])
    np.testing.assert_array_equal(more["down"], sent["down"] + 2 * present)  # flags, twice


def test_what_everybody_has_is_never_sent_again():
    _, _, _, sent = simulated(per_round=M, cache_rounds=ROUNDS)
    new, seen = [], set()
    for r in range(ROUNDS):
        rows = {row for row, *_ in participants(r)}
        new.append((len(rows), len(rows - seen)))
        seen |= rows
    np.testing.assert_array_equal(sent["up"], [4 * K * M * new[0][0]] + [0] * (ROUNDS - 1))
    np.testing.assert_array_equal(sent["down"], [4 * many + 4 * K * M * first for many, first in new])  # 2 flags a byte


@pytest.mark.exhaustive
def test_the_contract():
    contract = Contract(
        "dsfl", options={"soft_label_cache": "on"}, hparams={"cache_rounds": 1}, unused=("cache_rounds",)
    )
    contract.runs()
    contract.is_the_same_on_two_devices()
    contract.every_hparam_is_used_and_a_new_value_compiles_nothing()
    contract.survives_sparse_federations((0, 0, 12, 0, 0, 0, 0))


FLOATS = {
    "algorithm": "dsfl", "dataset": "synthetic", "num_clients": 4, "samples_per_client": 20, "model": "mclr",
    "proxy": "noise", "proxy_size": 20,
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"soft_label_cache": "yes"}, "unknown soft_label_cache 'yes'"),
        ({"soft_label_cache": "on", "cache_rounds": -1}, "--cache_rounds=-1: expected a whole number from 0 to"),
        ({"soft_label_cache": "on", "cache_rounds": 1.5}, "--cache_rounds=1.5: expected a whole number"),
        ({"cache_rounds": 5}, "--cache_rounds=5: dsfl uses it with --soft_label_cache=on alone, not off"),
        (
            {"soft_label_cache": "on", "selection": "both"},
            "--soft_label_cache=on with --selection=both: the cache knows",
        ),
        ({"algorithm": "fedmd", "soft_label_cache": "on"}, "unknown option of fedmd 'soft_label_cache'"),
    ],
)
def test_bad_input(given, message):
    options = {name: given.pop(name) for name in ("soft_label_cache", "selection") if name in given}
    named = {name: given.pop(name) for name in ("cache_rounds",) if name in given}
    with pytest.raises(InputError) as error:
        experiment.build(settings.make(named, options, **FLOATS | given))
    assert str(error.value).startswith(message)
    assert ALGORITHMS["dsfl"].hparams["cache_rounds"].default == 50
