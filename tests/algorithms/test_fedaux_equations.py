"""FedAUX against NumPy in float64, written from Sattler et al. (2021) and from what its file says is ours."""

import chex
import dp_accounting as dp
import engine_cases as cases
import jax
import numpy as np
import pytest
from server_cases import BATCH, EPOCHS, RATE, descend, hard, orders, participants, proxies, server_key

import fdjax
from fdjax import keys
from fdjax.algorithms import ALGORITHMS
from fdjax.errors import InputError
from fdjax.run import experiment, report, settings
from fdjax.run.accounting import own_releases
from fdjax.run.summary import summary

ROUNDS, A, EPSILON, DELTA, G_RATE = 2, 0.05, 3.0, 1e-4, 0.05
H = {
    "learning_rate": RATE, "score_penalty": A, "score_epsilon": EPSILON, "score_delta": DELTA,
    "distill_learning_rate": G_RATE, "distill_epochs": 2,
}  # fmt: skip
NEGATIVES = 2  # of 11
BUDGET = {"score_epsilon": 2.0, "score_delta": 1e-6}


def simulated(options, **hparams):
    """The start after the set-up, the last state, metrics, those of the set-up, and the traffic."""
    _, simulation = cases.simulation("fedaux", options={"pretraining": "off"} | options)
    federation, given = cases.federation(), cases.hparams_of("fedaux", **H | hparams)
    state, of_setup = simulation.init(0, federation), None
    if simulation.setup:
        state, of_setup = simulation.setup(state, federation, given)
    start = jax.tree.map(np.array, jax.device_get(state))  # a copy: the run is given the state's own memory
    last, metrics = jax.device_get(simulation.run(state, federation, given, ROUNDS))
    return start, last, metrics.metrics, of_setup and of_setup.metrics, simulation.traffic(federation, given)


def parts(size, first):
    order = np.random.default_rng(0).permutation(size)
    return np.sort(order[:first]), np.sort(order[first:])


def rows(x):
    return np.concatenate([x / np.linalg.norm(x, axis=1, keepdims=True), np.ones((len(x), 1))], 1) / np.sqrt(2)


def certainty(own, public, a):
    """Newton's method for the mean of losses and (a/2) |w|^2; own examples are positive."""
    x = np.concatenate([own, public])
    y, w = np.r_[np.ones(len(own)), np.zeros(len(public))], np.zeros(x.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ w))
        slope = x.T @ (p - y) / len(x) + a * w
        w = w - np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x / len(x) + a * np.eye(len(w)), slope)
    return w


def scores_of(i, x, options):
    """s_k of client i on D_dist, and the noise's deviation."""
    negative, distilled = parts(cases.PROXIES, NEGATIVES)
    own, public = rows(x), rows(proxies()[0])
    n, by_sum = len(x) + NEGATIVES, options.get("calibration") == "released"
    w, sigma = certainty(own, public[negative], A / n if by_sum else A), 0.0
    if options["scores"] == "private":
        z = np.sqrt(2 * np.log(1.25 / DELTA)) / EPSILON if by_sum else 1.001 * dp.get_sigma_gaussian(EPSILON, DELTA)
        sigma = z * 2 / (n * A)
        key = keys.stream(keys.stream(jax.random.key(0), "setup"), "client", i)
        w = w + sigma * np.asarray(jax.random.normal(keys.stream(key, "noise"), w.shape))
    return 1 / (1 + np.exp(-public[distilled] @ w)) + 1e-8, sigma


class Adam:
    def __init__(self, model, rate):
        self.model, self.rate, self.t, self.m, self.v = model, rate, 0, [0.0, 0.0], [0.0, 0.0]

    def step(self, gradient):
        self.t += 1
        moves = []
        for i, g in enumerate(gradient):
            self.m[i], self.v[i] = 0.9 * self.m[i] + 0.1 * g, 0.999 * self.v[i] + 0.001 * g**2
            m, v = self.m[i] / (1 - 0.9**self.t), self.v[i] / (1 - 0.999**self.t)
            moves.append(self.rate * m / (np.sqrt(v) + 1e-8))
        self.model.W, self.model.b = self.model.W - moves[0], self.model.b - moves[1]


CHOICES = [
    {"scores": "private"},
    {"scores": "private", "calibration": "released"},
    {"scores": "exact"},
]


@pytest.mark.parametrize("options", CHOICES, ids=lambda options: "-".join(options.values()))
def test_rounds(options):
    start, last, metrics, of_setup, _ = simulated(options)
    clients, s = cases.clients_of(cases.federation()), {}
    _, distilled = parts(cases.PROXIES, NEGATIVES)
    x_dist = proxies()[0][distilled]
    found = {i: scores_of(i, x, options) for i, x, y in clients if len(y)}
    for at, (i, _, y) in enumerate(clients):
        s[at] = found[i][0] if len(y) else np.zeros(len(distilled))
        np.testing.assert_allclose(start.clients[0][at], s[at], rtol=2e-3, atol=1e-6)
    if options["scores"] == "private":
        held = [len(y) for *_, y in clients if len(y)]
        noise = np.average([found[i][1] for i, *_ in clients if i in found], weights=held)
        np.testing.assert_allclose(of_setup["score_noise"], noise, rtol=3e-3)
    mean = start.server
    for r in range(ROUNDS):
        uploads, teachers, sure = [], [], []
        for at, key, x, y in participants(r):
            mine = cases.Logistic(mean)
            descend(mine, x, hard(y), orders(key, EPOCHS, len(y)), RATE)
            uploads.append(mine.params())
            teachers.append(mine(x_dist))
            sure.append(s[at])
        student = cases.Logistic(cases.weighted_average(uploads, [1] * len(uploads)))
        target = np.einsum("sm,smk->mk", sure, teachers) / np.sum(sure, 0)[:, None]
        key, adam, loss = server_key(r), Adam(student, G_RATE), []
        chosen = np.asarray(jax.random.permutation(keys.stream(key, "subset"), len(distilled)))[: cases.PER_ROUND]
        for epoch in range(2):
            order, loss = cases.epoch_order(keys.stream(key, "distil"), epoch, len(chosen)), []
            for first in range(0, len(order), BATCH):
                b = chosen[order[first : first + BATCH]]
                z = student(x_dist[b])
                loss.append(cases.kl_divergence(target[b], z).mean())
                slope = (cases.softmax(z) - cases.softmax(target[b])) / len(b)
                adam.step([x_dist[b].T @ slope, slope.sum(0)])
        mean = student.params()
        np.testing.assert_allclose(metrics["distill_loss"][r], np.mean(loss), rtol=1e-2, atol=1e-4)
    chex.assert_trees_all_close(last.server, mean, rtol=5e-3, atol=5e-4)
    np.testing.assert_array_equal(last.clients[0], start.clients[0])


@pytest.mark.exhaustive
def test_equal_scores_are_feddf():
    """FedDF's teacher is the mean of the logits, which of linear models are those of the mean: nothing to be learned.

    So it is where a penalty of 100 leaves all certainties near a half.
    """
    still = {"distill_learning_rate": 0.0}
    start, last, metrics, *_ = simulated({"scores": "equal"}, **still)
    mean = start.server
    for r in range(ROUNDS):
        uploads = []
        for _, key, x, y in participants(r):
            mine = cases.Logistic(mean)
            descend(mine, x, hard(y), orders(key, EPOCHS, len(y)), RATE)
            uploads.append(mine.params())
        mean = cases.weighted_average(uploads, [1] * len(uploads))
    chex.assert_trees_all_close(last.server, mean, rtol=1e-4, atol=1e-5)
    assert np.abs(metrics["distill_loss"]).max() < 1e-6
    flat, sharp = (simulated({"scores": "exact"}, score_penalty=a, **still)[2]["distill_loss"] for a in (100.0, 0.01))
    assert flat.max() < 1e-5
    assert sharp.min() > 1e-3


SMALL = {
    "algorithm": "fedaux", "dataset": "synthetic", "num_clients": 4, "samples_per_client": 20, "model": "2nn",
    "rounds": 1, "proxy": "held_out", "proxy_size": 20, "pretraining": "off", "devices": 1,
}  # fmt: skip


def test_the_run_tells_what_its_scores_spend_and_send():
    """The set-up sends h_0 down, without the head, and a score for each of 16 examples up."""
    result = fdjax.run(**SMALL | {"pretraining": "simclr"}, pretrain_steps=3, **BUDGET, progress=False)
    (part,) = result.privacy["parts"]
    assert part["relation"] == "one example of a client replaced"
    z, held = dp.get_sigma_gaussian(2.0, 1e-6), np.array(result.holdings["n_k"])
    assert part["noise_multiplier"] == pytest.approx(z, rel=3e-3)
    assert part["epsilon"] == pytest.approx(dp.get_epsilon_gaussian(part["noise_multiplier"], 1e-6))
    assert 1.99 < part["epsilon"] <= 2
    deviation = np.average(z * 2 / ((held + 4) * 0.01), weights=held)
    assert result.setup["score_noise"] == pytest.approx(deviation, rel=3e-3)
    assert "epsilon" not in result.rounds  # that of a round is without bound
    assert report.result_dict(result)["privacy"]["parts"] == [part]
    told = "epsilon of certainty scores alone at delta 1e-06, one example of a client replaced"
    assert f"| {told} | {part['epsilon']:.4g} (noise multiplier" in summary([result]).replace("  ", "")
    assert result.setup["contrastive_loss"] > 0
    extractor, head = 60 * 200 + 200 + 200 * 200 + 200, 200 * 10 + 10
    pretrain, score = result.traffic.setup
    assert [(sizes.up, sizes.down) for (sizes,) in (pretrain, score)] == [(0, 0), (4 * 16, 4 * extractor)]
    assert [result.traffic.per_participant(way) for way in ("up", "down")] == [(4 * (extractor + head),)] * 2


def test_what_other_scores_spend():
    """The released deviation is 2 z / (n a) and the sensitivity of a sum 2 / a, so it hides as much as z / n does."""
    values, held = ALGORITHMS["fedaux"].values(BUDGET), np.array([3, 20, 11])

    def hides(**options):
        task = cases.task(options=ALGORITHMS["fedaux"].choices(options))
        (release,) = own_releases(ALGORITHMS["fedaux"].algorithm(task))
        assert values[release.delta] == BUDGET["score_delta"]
        return release.multiplier(values, held)

    by_hand = np.sqrt(2 * np.log(1.25 / 1e-6)) / 2.0 / (20 + NEGATIVES)
    assert hides(calibration="released") == pytest.approx(by_hand, rel=1e-5)
    assert dp.get_epsilon_gaussian(by_hand, 1e-6) > 50
    assert hides(scores="exact") == 0
    equal = ALGORITHMS["fedaux"].algorithm(cases.task(options=ALGORITHMS["fedaux"].choices({"scores": "equal"})))
    assert own_releases(equal) == []


def test_pretraining_leaves_the_head():
    task = cases.task(cohorts=(("2nn", 7),), options=ALGORITHMS["fedaux"].choices({"scores": "equal"}))
    task = task._replace(model=task.models[0])
    simulation = cases.bind(ALGORITHMS["fedaux"].algorithm(task), task, (cases.PARTICIPANTS,))
    state = simulation.init(0, cases.federation())
    before = jax.tree.map(np.array, jax.device_get(state.server))
    hparams = cases.hparams_of("fedaux", pretrain_steps=3)
    after = jax.device_get(simulation.setup(state, cases.federation(), hparams)[0]).server
    changed = {name for name in before if np.abs(after[name]["kernel"] - before[name]["kernel"]).max() > 1e-4}
    assert changed == {"Dense_0", "Dense_1"}


PRIVATE = {"privacy": "local", "clip": 1.0}
BAD = [
    ({"proxy": None, "proxy_size": 1000}, "fedaux needs proxy data, whose labels it does not use; give --proxy="),
    ({"score_epsilon": 0.0}, "--score_epsilon=0.0: expected a number from 0.001 to 100"),
    ({"score_delta": 1.0}, "--score_delta=1.0: expected a number from 1e-10 to 0.1"),
    ({"score_penalty": 0.0}, "--score_penalty=0.0: expected a number from 0.0001 to 100"),
    ({"proxy_size": 2}, "--proxy_size=2: parts of 0.2 and 0.8 have 0 and 2 examples; each needs one, so give more"),
    ({"proxy_size": 1, "negatives": "0.5"}, "--proxy_size=1: parts of 0.5 and 0.5 have 0 and 1 examples"),
    ({"negatives": "1"}, "unknown negatives '1'"),
    ({"score_epsilon": 3.0, "scores": "equal"}, "--score_epsilon=3: fedaux uses it with --scores=private alone, not"),
    ({"pretrain_steps": 7}, "--pretrain_steps=7: fedaux uses it with --pretraining=simclr alone, not off"),
    ({"models": "2nn:2,mclr:2"}, "--models=2nn:2,mclr:2"),
    (PRIVATE, "--privacy=local: fedaux makes its certainty scores private by itself, against another neighbour"),
    (PRIVATE | {"privacy": "client"}, "--privacy=client: fedaux makes its certainty scores private by itself"),
    (
        PRIVATE | {"privacy": "client", "scores": "equal"},
        "--privacy=client needs one reduction, but exchange train has",
    ),
    (PRIVATE | {"privacy": "example"}, "--privacy=example: not all that fedaux shares of a client's examples is"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[message[:44] for _, message in BAD])
def test_what_cannot_work(fields, message):
    with pytest.raises(InputError) as error:
        experiment.build(settings.make(**SMALL | fields))
    assert str(error.value).startswith(message), error.value
    assert "\n" not in str(error.value)


@pytest.mark.exhaustive
def test_equal_scores_can_be_private_against_the_server():
    """Nothing is known of a client then but its noised params."""
    result = fdjax.run(**SMALL | PRIVATE, scores="equal", noise_multiplier=3.0, progress=False)
    assert result.privacy["relation"] == "one client's data replaced"
    assert np.isfinite(result.privacy["epsilon"])
    assert "parts" not in result.privacy


def test_models_without_parts():
    task = cases.task(options=ALGORITHMS["fedaux"].choices({}))
    whole = task.model._replace(blocks=())
    with pytest.raises(InputError, match="fedaux needs the parts of its models, but 'mclr' has none"):
        ALGORITHMS["fedaux"].algorithm(task._replace(model=whole, models=(whole,)))
