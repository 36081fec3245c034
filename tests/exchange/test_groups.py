"""Matching of teachers and groups against plain loops in float64, written from the equations; and what is refused."""

import itertools

import engine_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from fdjax.contract import Context, Stack
from fdjax.errors import InputError
from fdjax.exchange import groups, influence

K, SMOOTHING = 4, 0.1


def histograms(seed=0, clients=7):
    rng = np.random.default_rng(seed)
    return (rng.integers(0, 12, (clients, K)) * (rng.random((clients, K)) < 0.6)).astype(np.float32)


def entropy(p):
    return -sum(q * np.log(q) for q in p if q > 0)


def criteria(n_s, n_t):
    """Similarity, uniformity and complementarity of a teacher's labels n_t [K] for a student's n_s [K]."""
    pi_s, pi_t = ((n + SMOOTHING) / (n + SMOOTHING).sum() for n in (n_s.astype(float), n_t.astype(float)))
    size_s, size_t = (n_s + SMOOTHING).sum(), (n_t + SMOOTHING).sum()
    middle = (pi_s + pi_t) / 2
    divergence = sum(a * np.log(a / m) + b * np.log(b / m) for a, b, m in zip(pi_s, pi_t, middle, strict=True)) / 2
    mixed = (size_s * pi_s + size_t * pi_t) / (size_s + size_t)
    lacks = [max(1 / K - p, 0) for p in pi_s]
    filled = sum(min(lack, p) for lack, p in zip(lacks, pi_t, strict=True)) / sum(lacks) if sum(lacks) else 0
    return 1 - divergence / np.log(2), (entropy(mixed) - entropy(pi_s)) / np.log(K), filled


def test_criteria():
    given = histograms()
    given[3] = 5  # lacks nothing
    given[4] = 0  # holds nothing
    found = jax.device_get(groups.criteria(given))
    for s, t in itertools.product(range(len(given)), repeat=2):
        np.testing.assert_allclose([part[s, t] for part in found], criteria(given[s], given[t]), atol=2e-6)
    np.testing.assert_allclose(np.diagonal(found.similarity), 1, atol=1e-6)
    assert (found.complementarity[3] == 0).all()
    apart = jax.device_get(groups.criteria(np.float32([[1e4, 0, 0, 0], [0, 1e4, 0, 0]])))
    assert [part[0, 1] for part in apart] == pytest.approx([0, 0.5, 1 / 3], abs=1e-3)  # log 2 / log 4; one of three


def test_the_best_teacher_and_none_where_none_is_allowed():
    scores = np.random.default_rng(1).normal(size=(7, 7)).astype(np.float32)
    levels = np.array([0, 0, 1, 2, 0, 1, 2])
    for paths, rule in (("any", np.greater_equal), ("above", np.greater), ("next", lambda t, s: t == s + 1)):
        found = np.asarray(groups.assign(scores, groups.edges(jnp.asarray(levels), paths)))
        for s in range(7):
            there = [t for t in range(7) if t != s and rule(levels[t], levels[s])]
            assert found[s] == (max(there, key=lambda t, s=s: scores[s, t]) if there else s)
    uniform = groups.assign(np.zeros((7, 7), np.float32), groups.edges(jnp.zeros(7, int), "any"))
    np.testing.assert_array_equal(uniform, [1, 0, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("students", ["1", "2"])
def test_places_of_teachers_are_assigned_at_the_least_cost(students):
    rng, q = np.random.default_rng(2), int(students)
    levels = np.array([0, 0, 0, 0, 1, 1])
    for _ in range(5):
        scores = rng.random((6, 6)).astype(np.float32)
        found = np.asarray(groups.assign(scores, groups.edges(jnp.asarray(levels), "next"), students))
        taught = np.flatnonzero(found != np.arange(6))
        assert len(taught) == min(4, 2 * q)
        assert (levels[taught] == 0).all()
        assert np.bincount(found[taught]).max() <= q
        wanted = np.repeat(scores[:4, 4:], q, axis=1)
        row, column = linear_sum_assignment(-wanted)
        assert scores[taught, found[taught]].sum() == pytest.approx(wanted[row, column].sum())


def chain(teacher, s):
    """The clients from s upwards, until one comes again."""
    seen = [s]
    while teacher[seen[-1]] not in seen:
        seen.append(teacher[seen[-1]])
    return seen, seen[seen.index(teacher[seen[-1]]) :]


def forest(teacher):
    above = []
    for s in range(len(teacher)):
        _, circle = chain(teacher, s)
        t = teacher[s]
        above.append(min(circle) if t in circle else t)
    circles = {c for s in range(len(teacher)) for c in chain(teacher, s)[1]}
    leads = {a for s, a in enumerate(above) if a != s}
    return [s if s in leads and s not in circles else above[s] for s in range(len(teacher))], above


FORESTS = {
    "uniform scores": [1, 0, 0, 0, 0, 0, 0],
    "two levels": [4, 5, 4, 6, 4, 5, 6],
    "three levels": [4, 4, 5, 5, 6, 6, 6],
    "a circle of three": [1, 2, 0, 0, 3, 5, 5],
    "nobody": [0, 1, 2, 3, 4, 5, 6],
}


@pytest.mark.parametrize("teacher", FORESTS.values(), ids=FORESTS)
def test_forest_and_averages(teacher):
    rng = np.random.default_rng(3)
    found = groups.forest(jnp.asarray(teacher))
    group, parent = forest(teacher)
    np.testing.assert_array_equal(found.group, group)
    np.testing.assert_array_equal(found.parent, parent)
    drawn, c = (rng.random((20, 7)) < 0.4).astype(np.float32), 0.3
    averages = np.asarray(jax.vmap(lambda present: groups.averaging(found, present, c))(drawn))

    def under(g):
        below = [h for h in range(7) if parent[h] == g and h != g]
        return [s for s in range(7) if group[s] == g] + [s for h in below for s in under(h)]

    def mean(g, present):
        row, members = np.zeros(7), [s for s in under(g) if present[s]]
        if not members:
            return row  # keeps what it has
        row[members] = 1 / len(members)
        return row if parent[g] == g else (1 - c) * row + c * mean(parent[g], present)

    kept = 0
    for shares, present in zip(averages, drawn, strict=True):
        for g in range(7):  # ids that lead nobody too: nobody is under them
            np.testing.assert_allclose(shares[g], mean(g, present), atol=1e-6)
            kept += g in group and parent[g] != g and not shares[g].any() and bool(shares[parent[g]].any())
    if teacher is FORESTS["uniform scores"]:
        assert {*group} == {0}
    if teacher is FORESTS["three levels"]:
        assert kept  # a group without participants under one that has some


def test_influence():
    teacher, rng = np.array([4, 4, 4, 5, 6, 6, 6]), np.random.default_rng(4)
    alpha, beta, worth, rho = rng.random(7), rng.random(7), rng.random((7, 7)), 0.3
    for absent in ((), (1,), (4,), (0, 1), (0, 1, 2, 3)):
        present = ~np.isin(np.arange(7), absent)
        weights = influence.Weights(*(jnp.asarray(v, jnp.float32) for v in (alpha, beta, rho, worth)))
        found = np.asarray(influence.influence(jnp.asarray(teacher), present, weights))
        for i in range(7):
            peers = [j for j in range(7) if j != i and teacher[j] == teacher[i] and teacher[j] != j and present[j]]
            students = [s for s in range(7) if s != i and teacher[s] == i and present[s]]
            parts, roles = np.zeros(7), []
            has_teacher, student = teacher[i] != i, np.zeros(7)
            if has_teacher:
                if present[teacher[i]]:
                    student[teacher[i]] += 1 - rho
                for j in peers:
                    student[j] += rho * worth[i, j] / sum(worth[i, k] for k in peers)
                if student.sum():
                    roles.append(alpha[i] * student / student.sum())
            if students:
                roles.append(beta[i] * np.isin(np.arange(7), students) / len(students))
            parts = sum(roles) / len(roles) if roles else parts
            np.testing.assert_allclose(found[i], parts, atol=1e-6)


@pytest.mark.parametrize("kind", ["reverse", "forward"])
def test_one_mixture_has_the_gradient_of_all(kind):
    rng = np.random.default_rng(5)
    logits, mine = (jnp.asarray(rng.normal(size=(n, 5, K)) * 2, jnp.float32) for n in (3, 1))
    weights = jnp.float32([[0.5, 0.0, 0.2]])
    mixture = influence.mixture(kind, weights, logits)
    divergence = influence.DIVERGENCES[kind]
    one = jax.grad(lambda z: 0.7 * jnp.sum(divergence(mixture[0], z)))(mine[0])
    every = jax.grad(lambda z: sum(w * jnp.sum(divergence(other, z)) for w, other in zip(weights[0], logits)))(mine[0])
    np.testing.assert_allclose(one, every, atol=1e-6)
    assert np.abs(one).max() > 0.05


def test_soft_weights():
    """Half the most at equal losses or kappa = 0, more where one's own loss is larger, 0.9 at most."""
    assert influence.soft_weight(1.0, 3.0, 0.7, 0.7) == 0.5
    assert influence.soft_weight(0.8, 0.0, 9.0, 0.1) == pytest.approx(0.4)
    assert influence.soft_weight(1.0, 2.0, 1.5, 1.0) == pytest.approx(1 / (1 + np.exp(-1)))
    assert influence.soft_weight(1.8, 50.0, 9.0, 0.1) == pytest.approx(0.9)
    teacher, known = jnp.array([3, 3, 3, 3]), jnp.array([True, True, False, True])
    weights = {name: jnp.float32(value) for name, value in (("alpha_max", 1), ("beta_max", 0.5), ("kappa", 2))}
    alpha, beta = influence.soft_weights(weights, teacher, jnp.float32([1.0, 2.0, 7.0, 0.5]), known)
    np.testing.assert_allclose(alpha[:3], [1 / (1 + np.exp(-1)), 0.9, 0.9], rtol=1e-6)
    assert beta[3] == pytest.approx(0.5 / (1 + np.exp(2)), rel=1e-6)  # its students' mean is 1.5, one of three unknown


def test_noise_below_nothing_counts_as_nothing():
    options = {"levels": "cohorts", "paths": "any", "students": "all"}
    exchange, given = groups.matching(cases.task(options=options)), histograms(6)
    ctx = context({"similarity": 1.0, "uniformity": 0.5, "complementarity": 0.5, "chance": 0.0})
    noised = given - 3.0 * (given == 0)

    def teachers(numbers):
        stack = Stack(jnp.asarray(numbers), jnp.arange(7), jnp.ones(7))
        return np.asarray(exchange.server(ctx, {}, stack)[0]["teacher"])

    np.testing.assert_array_equal(teachers(noised), teachers(given))
    assert len({*teachers(given)}) > 1


def context(hparams):
    return Context(None, 0, np.int32(-1), hparams, np.int32(0), jax.random.key(0), None)


def test_levels_by_examples_and_by_cohorts():
    task = cases.task(options={"levels": "3", "paths": "any", "students": "all"})
    counts = np.float32(cases.COUNTS)[:, None] * np.float32([[1, 0, 0, 0]])
    np.testing.assert_array_equal(groups.levels_of(task, jnp.asarray(counts)), [1, 0, 0, 2, 1, 0, 2])
    by_cohort = cases.task(cohorts=(("mclr", 4), ("2nn", 3)), options={"levels": "cohorts", "paths": "next"})
    np.testing.assert_array_equal(groups.levels_of(by_cohort, jnp.asarray(counts)), [0] * 4 + [1] * 3)


@pytest.mark.parametrize(
    ("cohorts", "options", "message"),
    [
        (
            (("mclr", 7),),
            {"paths": "next"},
            "levels without an edge: by --levels=cohorts levels of 7 clients, so with ",
        ),
        (
            (("mclr", 7),),
            {"paths": "above"},
            "levels without an edge: by --levels=cohorts levels of 7 clients, so with ",
        ),
        ((("mclr", 1),), {}, "levels without an edge: by --levels=cohorts levels of 1 clients, so with --paths=any"),
        ((("mclr", 2),), {"levels": "3", "paths": "next"}, "levels without an edge: by --levels=3 levels of 1, 1, 0"),
    ],
)
def test_levels_without_an_edge(cohorts, options, message):
    given = {"levels": "cohorts", "paths": "any", "students": "all"} | options
    with pytest.raises(InputError) as error:
        groups.matching(cases.task(cohorts=cohorts, options=given))
    assert str(error.value).startswith(message)
    assert "give several architectures in --models, --levels=2 or --paths=any" in str(error.value)
