"""The membership attack against NumPy, pair by pair, and what it finds in models that learned much or little."""

import functools

import engine_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdjax
from fdjax import keys
from fdjax.algorithms import ALGORITHMS
from fdjax.engine import membership
from fdjax.exchange import privacy
from fdjax.run.batch import batch, experiments
from fdjax.run.settings import make
from fdjax.run.summary import summary

M, N = 41, 30  # proxy examples, and those of a round: enough for pairs of most clients


def by_pairs(members, others):
    """The share of pairs that a threshold between them tells apart, a tie counting half."""
    won = [1.0 if a < b else 0.5 if a == b else 0.0 for a in members for b in others]
    return np.mean(won) if won else np.nan


@pytest.mark.parametrize("kind", ["apart", "ties", "all equal", "infinite"])
def test_the_area_is_that_of_all_pairs(kind):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=31), rng.normal(size=17) + 0.4
    if kind == "ties":
        a, b = np.round(a), np.round(b)
    if kind == "all equal":
        a, b = np.zeros(31), np.zeros(17)
    if kind == "infinite":
        a[:4], b[:3] = np.inf, np.inf
    a, b = np.float32(a), np.float32(b)
    np.testing.assert_allclose(membership.area(a, b), by_pairs(a, b), rtol=1e-6)
    in_a, in_b = rng.random(31) < 0.6, rng.random(17) < 0.6
    np.testing.assert_allclose(membership.area(a, b, (in_a, in_b)), by_pairs(a[in_a], b[in_b]), rtol=1e-6)


def test_the_area_where_there_is_nothing_or_no_number():
    a, b, no = np.float32([0, 1]), np.float32([2, 3, 4]), np.zeros(3, bool)
    assert np.isnan(membership.area(a, b, (np.ones(2, bool), no)))
    assert membership.area(np.float32([np.nan, np.nan]), np.float32([np.nan] * 3)) == 0.5
    assert membership.area(a, np.float32([np.nan, 2, 3])) == 1.0


@pytest.mark.parametrize("count", [1, 3, 10, 1000])
def test_draws_are_even_over_what_is_held(count):
    rank = jnp.arange(membership.PAIRS)
    found = np.asarray(membership.evenly(jax.random.key(count), rank, membership.PAIRS, jnp.int32(count)))
    assert found.min() >= 0
    assert found.max() < count
    often = np.bincount(found, minlength=count)
    assert (np.abs(often - membership.PAIRS / count) < 2).all()


@functools.cache
def attacked(name, wrap, devices):
    task = cases.task(options=ALGORITHMS[name].choices({}).items())._replace(proxy_size=M, proxy_per_round=N)
    algorithm = ALGORITHMS[name].algorithm(task)
    if wrap is not None:
        algorithm = algorithm._replace(round=tuple(map(wrap, algorithm.round)))
    return cases.bind(algorithm, task, (7,), devices=devices, membership=True, own_eval=False, full_eval=False)


def look(name, *, wrap=None, devices=1, tests=True, **more):
    """(state, scalars, values by row, federation) of the attack on what a method begins with."""
    federation = cases.federation(devices=devices)
    proxy = jax.device_get(federation.proxy)
    many = proxy._replace(x=np.resize(proxy.x, (M, *proxy.x.shape[1:])), y=np.resize(proxy.y, M))
    federation = federation._replace(proxy=cases.replicated(many, federation))
    if not tests:
        federation = federation._replace(
            test_holdings=federation.test_holdings._replace(count=0 * federation.test_holdings.count)
        )
    simulation = attacked(name, wrap, devices)
    hparams = cases.replicated(cases.hparams_of(name) | {n: np.float32(v) for n, v in more.items()}, federation)
    state = simulation.init(0, federation)
    scalars, clients = jax.device_get(simulation.evaluate(state, federation, hparams, len(federation.test.y)))
    return jax.device_get(state), scalars, clients, federation


def own_tests(federation):
    """(x, y) of the test part of each row."""
    test, (order, start, count) = jax.device_get((federation.test, federation.test_holdings))
    x = (test.x.astype(np.float64) - 0.25) / 1.5
    return [(x[order[s : s + n]], test.y[order[s : s + n]]) for s, n in zip(start, count, strict=True)]


def drawn(key, name, count):
    rank = jnp.arange(membership.PAIRS)
    return np.asarray(membership.evenly(keys.stream(key, name), rank, membership.PAIRS, jnp.int32(count)))


def area_of(model, key, own, others):
    (x, y), (x_2, y_2) = own, others
    a, b = drawn(key, "members", len(y)), drawn(key, "others", len(y_2))
    return by_pairs(*(cases.cross_entropy(model(x[at]), y[at]) for x, y, at in ((x, y, a), (x_2, y_2, b))))


@pytest.mark.parametrize(("name", "what"), [("fedavg", "central_auc"), ("fd", "local_auc")])
def test_models_against_numpy(name, what):
    state, scalars, found, federation = look(name)
    root = keys.stream(jax.random.wrap_key_data(state.root), "membership")
    expected = []
    for row, ((i, x, y), test) in enumerate(zip(cases.clients_of(federation), own_tests(federation), strict=True)):
        params = state.server if name == "fedavg" else jax.tree.map(lambda leaf, row=row: leaf[row], state.clients[0])
        key = keys.stream(root, "client", i)
        both = len(y) and len(test[1])
        expected.append(area_of(cases.Logistic(params), key, (x, y), test) if both else np.nan)
    assert 0 < np.isfinite(expected).sum() < 7
    np.testing.assert_allclose(found[what], expected, atol=2e-4)
    np.testing.assert_allclose(scalars[what], np.nanmean(expected), atol=2e-4)


def candidates_of(state, federation):
    """x, y, id of the owner, whether a member and whether there, of what stands in for the proxy data."""
    key = keys.stream(jax.random.wrap_key_data(state.root), "membership")
    clients, tests = cases.clients_of(federation), own_tests(federation)
    pairs, C = M // 2, len(clients)
    row, rank = np.arange(pairs) % C, np.arange(pairs) // C
    draws = np.array([sum(row == r) for r in row])
    found = []
    for name in ("members", "others"):
        held = [(x, y) for _, x, y in clients] if name == "members" else tests
        count = np.array([len(held[r][1]) for r in row])
        at = np.asarray(membership.evenly(keys.stream(key, name), rank, draws, jnp.asarray(count)))
        for r, p, n in zip(row, at, count, strict=True):
            there = n > 0 and len(clients[r][2]) > 0 and len(tests[r][1]) > 0
            x, y = (held[r][0][p], held[r][1][p]) if n else (np.zeros(cases.FEATURES), 0)
            found.append((x, y, clients[r][0], name == "members", there))
    found += [(np.zeros(cases.FEATURES), 0, -1, False, False)] * (M % 2)
    return [np.array(column) for column in zip(*found, strict=True)]


def test_outputs_on_candidates_against_numpy():
    """FedMD: what each client would say next of members and others, and the mean of it."""
    state, scalars, found, federation = look("fedmd")
    x, y, owner, member, there = candidates_of(state, federation)
    ids = state.server.ids
    x, y, owner, member, there = (column[ids] for column in (x, y, owner, member, there))
    assert len(ids) == N < M
    clients, said = cases.clients_of(federation), []
    for row, (i, _, held) in enumerate(clients):
        z = cases.Logistic(jax.tree.map(lambda leaf, row=row: leaf[row], first_of(state.clients[0])))(x)
        loss, mine = cases.cross_entropy(z, y), there & (owner == i)
        expected = by_pairs(loss[mine & member], loss[mine & ~member]) if len(held) else np.nan
        np.testing.assert_allclose(found["upload_auc"][row], expected, atol=1e-6)
        said += [z] if len(held) else []
    assert np.isfinite(found["upload_auc"]).sum() >= 4
    loss = cases.cross_entropy(np.mean(said, axis=0), y)
    expected = by_pairs(loss[there & member], loss[there & ~member])
    np.testing.assert_allclose(scalars["consensus_auc"], expected, atol=1e-6)


def first_of(state):
    """The params of a client's state, which may hold an optimiser's beside them."""
    return state["params"] if isinstance(state, dict) and "params" in state else state


@pytest.mark.exhaustive
def test_what_noise_hides_and_from_whom():
    noise = {"clip": 1.0, "noise_multiplier": 1e4}
    _, plain, each, _ = look("dsfl")
    assert {"upload_auc", "consensus_auc", "local_auc", "central_auc"} <= plain.keys()
    _, summed, of_sum, _ = look("dsfl", wrap=lambda exchange: privacy.private(exchange, 7), **noise)
    assert "upload_auc" not in summed
    assert "upload_auc" not in of_sum
    assert summed["consensus_auc"] != plain["consensus_auc"]
    _, _, own, _ = look("dsfl", wrap=privacy.locally_private, **noise)
    assert np.isfinite(each["upload_auc"]).sum() >= 4
    assert not np.array_equal(own["upload_auc"], each["upload_auc"], equal_nan=True)
    assert "upload_auc" not in look("fedavg", wrap=lambda exchange: privacy.private(exchange, 7), **noise)[1]


def test_there_is_no_consensus_on_nobody():
    _, scalars, found, _ = look("fedmd", tests=False)
    assert np.isnan(scalars["consensus_auc"])
    assert np.isnan(found["upload_auc"]).all()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "given"),
    [("fedgkd", {}), ("fml", {"own_weight": 1, "meme_weight": 1})],
    ids=["fedgkd", "fml"],
)
def test_uploads_of_params_are_attacked_as_those_of_fedavg(name, given):
    """What these send in the first round is what FedAvg's clients send."""
    plain, found = look("fedavg")[2]["upload_auc"], look(name, **given)[2]["upload_auc"]
    assert np.isfinite(plain).sum() >= 4
    np.testing.assert_allclose(found, plain, atol=2e-3)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["fedavg", "dsfl"])
def test_two_devices_find_the_same(name):
    one, two = look(name), look(name, devices=2)
    for values, same in ((one[1], two[1]), (one[2], two[2])):
        for key in (key for key in values if key.endswith("auc")):
            np.testing.assert_allclose(values[key], same[key], atol=2e-3)


@pytest.mark.parametrize("name", sorted({*ALGORITHMS} - {"centralized", "fedgkt", "faug"}))
def test_every_method_can_be_attacked(name):
    """Traced alone: names and shapes; what says that it shares something does."""
    federation, task = cases.federation(), cases.task(options=ALGORITHMS[name].choices({}).items())
    if ALGORITHMS[name].parts:
        two = cases.model("2nn")
        task = task._replace(model=two, models=(two,))
    algorithm = ALGORITHMS[name].algorithm(task)
    evaluate = cases.bind(algorithm, task, (5,), membership=True).pure.evaluate
    state = jax.eval_shape(cases.bind(algorithm, task, (5,)).pure.init, 0, federation)
    scalars, clients = jax.eval_shape(evaluate, state, federation, cases.hparams_of(name), np.int32(5))
    shares = algorithm.round[0].shares
    assert ("upload_auc" in clients) == bool(shares)
    assert ("consensus_auc" in scalars) == (shares in ("logits", "probabilities"))
    assert ("local_auc" in clients) == (algorithm.personal is not None)


def test_prototypes_of_several_architectures_are_not_taken_for_the_central_model():
    federation, options = cases.federation(cohort_sizes=(3, 4)), ALGORITHMS["feddf"].choices({}).items()
    task = cases.task(cohorts=(("2nn", 3), ("mclr", 4)), options=options, per_round=cases.PROXIES)
    algorithm = ALGORITHMS["feddf"].algorithm(task)
    pure = cases.bind(algorithm, task, (3, 4), membership=True).pure
    state = jax.eval_shape(pure.init, 0, federation)
    _, clients = jax.eval_shape(pure.evaluate, state, federation, cases.hparams_of("feddf"), np.int32(5))
    assert clients["upload_auc"].shape == (7,)


SMALL = {
    "dataset": "synthetic", "model": "mclr", "num_clients": 8, "alpha": 0.0, "beta": 0.0, "samples_per_client": 30,
    "rounds": 2, "eval_every": 2, "local_epochs": 5, "learning_rate": 0.3, "progress": False, "devices": 1,
}  # fmt: skip


@pytest.mark.exhaustive
def test_an_overfitted_model_tells_and_a_noisy_one_does_not():
    """A linear model of 784 inputs learns 25 to 35 digits by heart; DP-SGD with much noise learns nothing."""
    named = {"dataset": "mnist_sample", "train_fraction": 0.05, "model": "mclr", "num_clients": 8, "rounds": 1}
    named |= {"local_epochs": 50, "learning_rate": 0.1, "progress": False, "devices": 1, "membership": True}
    plain = fdjax.run(**named)
    assert plain.final["upload_auc"] > 0.7
    assert plain.final["upload_auc"] == pytest.approx(np.mean(plain.clients["upload_auc"]))
    assert len(plain.clients["upload_auc"]) == 8
    assert plain.evaluations["central_auc"][0] == pytest.approx(0.5, abs=0.1)  # before any training
    noisy = fdjax.run(**named, privacy="example", clip=1.0, noise_multiplier=50.0)
    assert abs(noisy.final["upload_auc"] - 0.5) < 0.1
    table = " ".join(summary([plain]).split())
    assert f"AUC of a membership attack on what one client sends | {plain.final['upload_auc']:.3f}" in table


def test_the_attack_changes_nothing_of_the_run():
    alone, attacked = fdjax.run(**SMALL), fdjax.run(**SMALL, membership=True)
    for name, values in alone.evaluations.items():
        np.testing.assert_array_equal(values, attacked.evaluations[name], err_msg=name)
    assert alone.rounds == attacked.rounds


@pytest.mark.exhaustive
def test_noise_is_an_axis_of_a_batch_of_attacked_trials():
    named = SMALL | {"membership": True, "privacy": "example", "clip": 1.0}
    del named["progress"]
    settings = [make(**named, noise_multiplier=z) for z in (0.0, 50.0)]
    trials = experiments(settings)
    results = batch(trials, 2).run(trials, lambda done, records: ())
    alone = fdjax.run(settings[1], progress=False)
    assert results[1].final["upload_auc"] == pytest.approx(alone.final["upload_auc"], abs=2e-3)
    assert results[0].final["upload_auc"] != results[1].final["upload_auc"]
