"""FedGKD and FedGKD-VOTE against NumPy in float64, written from their equations, and their bytes model by model."""

import chex
import engine_cases as cases
import jax
import local_cases as local
import numpy as np
import pytest

from fdjax.errors import InputError
from fdjax.exchange.traffic import count_bytes
from fdjax.run import experiment, settings

M, ROUNDS, GAMMA, T, T_LOSS = 2, 4, 1.6, 2.5, 0.3  # more rounds than models are kept
P = cases.FEATURES * local.K + local.K
FIELDS = {"dataset": "synthetic", "num_clients": 4, "samples_per_client": 20, "model": "mclr"}


def simulated(name, options, **hparams):
    """(first params, last state, metrics, bytes down in each round) with a buffer of M."""
    made = local.simulation(name, {"buffer": str(M), **options})
    start, last, report = local.simulated(name, ROUNDS, made, gamma=GAMMA, **hparams)
    traffic = made.traffic(cases.federation(), cases.hparams_of(name))
    assert traffic.per_participant("up") == (4 * P,)
    sent = count_bytes(traffic.round, report.sent)["down"]
    return start.server.params, last, report.metrics, sent


def divergence(teacher, z):
    return T**2 * cases.kl_divergence(teacher, z, T)


def mean_square(teacher, z):
    return ((teacher - z) ** 2).mean(-1)


def rounds(start, teachers_of, distance, uniform=False):
    """The models of all rounds and their train losses; `teachers_of(models)` are (net, vote) of each teacher."""
    models, server, means = [], local.layers_of(start), []
    for r in range(ROUNDS):
        teachers = teachers_of(models[-M:])

        def loss(layers, x, y, teachers=teachers):
            z = local.logits(layers, x)
            apart = sum(vote * distance(local.logits(net, x), z) for net, vote in teachers)
            return cases.cross_entropy(z, y) + GAMMA / 2 * apart

        uploads = [(local.trained(server, x, y, key, loss), len(y)) for key, _, x, y in local.participants(r)]
        weights = [1 if uniform else size for _, size in uploads]
        server = local.averaged([layers for (layers, *_), _ in uploads], weights)
        means.append(np.average([mean for (_, mean, _), _ in uploads], weights=[size for _, size in uploads]))
        models.append(server)
    return models, means


def mean_of(models):
    """One teacher: the mean of the models, array by array."""
    return [([tuple(map(np.mean, zip(*pair, strict=True), (0, 0))) for pair in _paired(models)], 1.0)] if models else []


def _paired(models):
    """Of each layer its arrays in all of the models: [(W, b) ...] turned into [[(W, b), ...] ...]."""
    return [[model[i] for model in models] for i in range(len(models[0]))]


def agree(found, last, metrics):
    models, means = found
    np.testing.assert_allclose(metrics["train_loss"], means, rtol=1e-5)
    assert last.server.made == ROUNDS
    chex.assert_trees_all_equal(last.server.params, jax.tree.map(lambda leaf: leaf[0], last.server.models))
    for place in range(M):
        kept = jax.tree.map(lambda leaf, i=place: leaf[i], last.server.models)
        chex.assert_trees_all_close(kept, local.params_of(models[-1 - place]), rtol=1e-4, atol=1e-5)


def test_fedgkd():
    start, last, metrics, sent = simulated("fedgkd", {}, temperature=T)
    agree(rounds(start, mean_of, divergence), last, metrics)
    down = [1, 1, 2, 2]  # the model itself, beside which a mean of it alone is nothing new; then two
    assert [*sent] == [4 * P * n * len(local.participants(r)) for r, n in enumerate(down)]


def test_fedgkd_of_the_released_code_with_a_cache():
    """Mean squares and uniform weights; a client is sent those of the last M models that it does not hold."""
    start, last, metrics, sent = simulated("fedgkd", {"distance": "mse", "weighting": "uniform", "history": "cached"})
    agree(rounds(start, mean_of, mean_square, uniform=True), last, metrics)
    held = {}  # client -> the rounds whose models it has; -1 is the first model
    for r in range(ROUNDS):
        needed, missing = {*range(r)[-M:]} or {-1}, 0
        for _, client, _, _ in local.participants(r):
            missing += len(needed - held.get(client, set()))
            held[client] = held.get(client, set()) | needed
        assert sent[r] == 4 * P * missing
    assert 0 < missing < M * len(local.participants(ROUNDS - 1))  # some have some of them


def test_fedgkd_vote():
    start, last, metrics, sent = simulated("fedgkd_vote", {}, temperature=T, vote_temperature=T_LOSS)
    x, y = local.proxy()

    def teachers(models):
        powers = [np.exp(-cases.cross_entropy(local.logits(net, x), y).mean() / T_LOSS) for net in models]
        return [(net, power / sum(powers)) for net, power in zip(models, powers, strict=True)]

    found = rounds(start, teachers, divergence)
    agree(found, last, metrics)
    votes = [vote for _, vote in teachers(found[0][-M:])]
    assert abs(votes[0] - votes[1]) > 0.01  # or a plain mean would do as well
    down = [4 * P, 4 * P + 4, 2 * (4 * P + 4), 2 * (4 * P + 4)]
    assert [*sent] == [size * len(local.participants(r)) for r, size in enumerate(down)]


def test_without_distillation_it_is_fedavg():
    """In every bit, from params that are the same in every bit."""
    averaging, federation = local.simulation("fedavg"), cases.federation()
    given = cases.hparams_of("fedavg", learning_rate=local.RATE, local_epochs=local.EPOCHS)
    for name in ("fedgkd", "fedgkd_vote"):
        made = local.simulation(name, {"buffer": str(M)})
        start, last, _ = local.simulated(name, ROUNDS, made, gamma=0.0)
        state = averaging.init(0, federation)
        chex.assert_trees_all_close(start.server.params, jax.device_get(state.server), rtol=1e-6)
        state = state._replace(server=cases.replicated(start.server.params, federation))
        averaged, _ = averaging.run(state, federation, given, ROUNDS)
        chex.assert_trees_all_equal(last.server.params, jax.device_get(averaged.server))


def test_a_buffer_of_one_is_fedavg_kd():
    """After the first round, in which it does not distil, at T = 1: (1 - g) (CE + g / (1 - g) KL)."""
    g, federation = 0.3, cases.federation()
    plain, kept = local.simulation("fedavg_kd"), local.simulation("fedgkd", {"buffer": "1"})
    given = cases.hparams_of("fedavg_kd", learning_rate=local.RATE / (1 - g), gamma=g)
    expected, _ = plain.run(plain.init(0, federation), federation, given, ROUNDS)
    state = kept.init(0, federation)
    state = state._replace(server=state.server._replace(made=state.server.made + 1))
    given = cases.hparams_of("fedgkd", learning_rate=local.RATE, gamma=2 * g / (1 - g), temperature=1.0)
    last, report = kept.run(state, federation, given, ROUNDS)
    chex.assert_trees_all_close(last.server.params, expected.server, rtol=1e-4, atol=1e-5)
    sent = count_bytes(kept.traffic(federation, given).round, jax.device_get(report.sent))["down"]
    assert [*sent] == [4 * P * len(local.participants(r)) for r in range(ROUNDS)]


BAD = [
    ({"algorithm": "fedgkd", "temperature": 0.0}, "--temperature=0.0: expected a finite number above 0"),
    ({"algorithm": "fedgkd", "buffer": "0"}, "unknown buffer '0' (did you mean '10'?); known: 1"),
    ({"algorithm": "fedgkd", "buffer": "10", "rounds": 9}, "--buffer=10: more past rounds than the run has, with --ro"),
    ({"algorithm": "fedgkd", "distance": "mse", "temperature": 2.0}, "--temperature=2: fedgkd uses it with --distance"),
    ({"algorithm": "fedgkd_vote"}, "fedgkd_vote needs proxy data, with labels; give --proxy=held_out"),
    ({"algorithm": "fedgkd_vote", "proxy": "noise", "proxy_size": 9}, "fedgkd_vote needs labelled proxy data, but"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input(fields, message):
    with pytest.raises(InputError) as error:
        experiment.build(settings.make(**FIELDS | fields))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_run_shorter_than_the_usual_buffer_is_no_mistake():
    assert dict(settings.make(algorithm="fedgkd", rounds=2, **FIELDS).options)["buffer"] == "5"
