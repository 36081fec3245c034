"""Generalized FedAvg against NumPy in float64, written from Algorithms 1 and 2 of Reddi et al. (2021)."""

import chex
import engine_cases as cases
import jax
import numpy as np
import optax
import pytest

from fdjax import keys
from fdjax.algorithms import fedopt
from fdjax.errors import InputError
from fdjax.run import experiment, settings

ROUNDS, RATE, ETA, B1, B2, TAU = 3, 0.3, 0.2, 0.6, 0.8, 0.05
H = {"server_learning_rate": ETA, "beta_m": B1, "beta_v": B2, "tau": TAU}


def simulated(options, name="fedopt", algorithm=None, **hparams):
    """The first server and the last one."""
    task = cases.task(options=options)
    if algorithm is None:
        _, simulation = cases.simulation(name, options=options)
    else:
        simulation = cases.bind(algorithm(task), task, (cases.PARTICIPANTS,))
    federation, given = cases.federation(), cases.hparams_of(name, learning_rate=RATE, **hparams)
    start = jax.device_get(simulation.init(0, federation)).server
    return start, jax.device_get(simulation.run(simulation.init(0, federation), federation, given, ROUNDS)[0]).server


def rounds(server, step, by_examples=False):
    """x_{t+1} = step(x_t, D_t, t) after ROUNDS rounds, t counting from 1."""
    x, clients = [np.array(server["Dense_0"][n], np.float64) for n in ("kernel", "bias")], None
    for t in range(1, ROUNDS + 1):
        key, clients = cases.round_key(0, t - 1), cases.clients_of(cases.federation())
        moves, weights = [], []
        for row in cases.participants_of(key, len(clients), cases.PARTICIPANTS):
            i, inputs, y = clients[row]
            if len(y):
                mine = cases.Logistic({"Dense_0": dict(zip(("kernel", "bias"), x, strict=True))})
                orders = [cases.epoch_order(keys.stream(key, "client", i), e, len(y)) for e in range(2)]
                mine.fit(inputs, y, orders, 4, RATE)
                moves.append([mine.W - x[0], mine.b - x[1]])
                weights.append(len(y) if by_examples else 1)
        x = step(x, [np.average([move[j] for move in moves], axis=0, weights=weights) for j in range(2)], t)
    return {"Dense_0": {"kernel": x[0], "bias": x[1]}}


def momentum(eta=ETA, b1=B1):
    m = [0.0, 0.0]

    def step(x, moved, t):
        m[:] = [b1 * a + d for a, d in zip(m, moved, strict=True)]
        return [w + eta * a for w, a in zip(x, m, strict=True)]

    return step


def adaptive(rule, v0=TAU**2, corrected=False):
    m, v = [0.0, 0.0], [v0, v0]

    def step(x, moved, t):
        for j, d in enumerate(moved):
            m[j] = B1 * m[j] + (1 - B1) * d
            if rule == "adagrad":
                v[j] = v[j] + d**2
            elif rule == "adam":
                v[j] = B2 * v[j] + (1 - B2) * d**2
            else:
                v[j] = v[j] - (1 - B2) * d**2 * np.sign(v[j] - d**2)
        eta = ETA * np.sqrt(1 - B2**t) / (1 - B1**t) if corrected else ETA
        return [w + eta * a / (np.sqrt(b) + TAU) for w, a, b in zip(x, m, v, strict=True)]

    return step


@pytest.mark.parametrize(
    ("options", "hparams", "step"),
    [
        ({"server_rule": "adam"}, {}, adaptive("adam")),
        ({"server_rule": "yogi"}, {"sqrt_v0": 0.3}, adaptive("yogi", 0.09)),
        ({"server_rule": "adagrad"}, {}, adaptive("adagrad")),
        ({"server_rule": "momentum", "weighting": "examples"}, {}, momentum()),
        ({"server_rule": "adam", "bias_correction": "on"}, {"sqrt_v0": 0.0}, adaptive("adam", 0.0, True)),
    ],
    ids=["FedAdam", "FedYogi", "FedAdagrad", "FedAvgM", "with bias correction"],
)
def test_rounds(options, hparams, step):
    start, last = simulated(options, **H, **hparams)
    expected = rounds(start["params"], step, options.get("weighting") == "examples")
    chex.assert_trees_all_close(last["params"], expected, rtol=1e-3, atol=2e-5)


def test_without_momentum_and_with_a_rate_of_1_it_is_fedavg():
    options = {"server_rule": "momentum", "weighting": "examples"}
    _, last = simulated(options, server_learning_rate=1.0, beta_m=0.0)
    chex.assert_trees_all_close(last["params"], simulated({}, "fedavg")[1], rtol=1e-6, atol=1e-6)


@pytest.mark.exhaustive
def test_any_server_optimizer_from_python():
    """SGD with momentum is FedAvgM; a user's own lambda may use hparams, which stay traced."""
    own = lambda task: fedopt.generalized(task, lambda h, round: optax.sgd(h["server_learning_rate"], h["beta_m"]))  # noqa: E731
    _, theirs = simulated({}, algorithm=own, **H)
    _, ours = simulated({"server_rule": "momentum"}, **H)
    chex.assert_trees_all_close(theirs["params"], ours["params"], rtol=1e-6)


FLOATS = {
    "algorithm": "fedopt", "dataset": "synthetic", "num_clients": 3, "samples_per_client": 20, "model": "mclr",
    "batch_size": 8, "lifting": "vmap", "partition_seed": 0, "local_eval": "none",
}  # fmt: skip


def served(rounds=2, **given):
    ready = experiment.build(settings.make(**FLOATS | given))
    state = ready.simulation.init(0, ready.federation)
    return jax.device_get(ready.simulation.run(state, ready.federation, ready.hparams, rounds)[0])


@pytest.mark.exhaustive
def test_any_server_optimizer_from_flags():
    """Momentum by flags of the server alone; and a ClientOpt whose state is fresh in each round, or kept."""
    by_flags = served(server_rule="optax", server_optimizer="sgd", server_momentum=0.5, server_learning_rate=0.5)
    as_rule = served(server_rule="momentum", beta_m=0.5, server_learning_rate=0.5)
    chex.assert_trees_all_close(by_flags.server["params"], as_rule.server["params"], rtol=1e-6)
    fresh, kept = (
        served(server_rule="momentum", optimizer="adam", optimizer_state=how).server for how in ("fresh", "kept")
    )
    difference = jax.tree.map(lambda a, b: np.abs(a - b).max(), fresh["params"], kept.state["params"])
    assert max(jax.tree.leaves(difference)) > 1e-5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bias_correction": "on", "server_rule": "adagrad"}, "--bias_correction=on: --server_rule=adagrad has none; "),
        ({"server_optimizer": "lion"}, "--server_optimizer=lion is for --server_rule=optax of fedopt; give that too"),
        (
            {"server_rule": "momentum", "beta_v": 0.5},
            "--beta_v=0.5: fedopt uses it with --server_rule=adam or yogi alone",
        ),
        ({"tau": 0.0}, "--tau=0.0: expected a finite number above 0"),
        ({"beta_m": 1.0}, "--beta_m=1.0: expected a number from 0 to 0.999999"),
        ({"server_rule": "sgd"}, "unknown server_rule 'sgd'"),
        ({"models": "mclr:1,2nn:2"}, "--models=mclr:1,2nn:2: clients of fedopt have no model of their own"),
    ],
)
def test_what_cannot_work(given, message):
    with pytest.raises(InputError) as error:
        experiment.build(settings.make(**FLOATS | given))
    assert str(error.value).startswith(message)
