"""Reductions against NumPy in float64."""

import functools
import itertools

import engine_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fdjax.contract import Algorithm, Broadcast, Exchange, Stack, Upload
from fdjax.engine import lift
from fdjax.exchange import reductions
from fdjax.exchange.reductions import ByLabel, Weighted

K, D = 4, 3


def uploads(size, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"kernel": rng.normal(size=(3, 2)).astype(np.float32), "bias": [np.float32(rng.normal(scale=1e3))]}
        for _ in range(size)
    ]


def contribution(reduction, upload, weight):
    """What one client adds to the totals: the engine leaves out the absent where they cannot be added as zeros."""
    partials = lift.Partials(**{reduction.combine: reduction.partial(None, upload, weight)})
    return partials if reduction.combine == "sum" else lift.identity_unless(weight > 0, partials)


def reduce(trees, weights, groups=None, reduction=None):
    """finish(partials combined), the partials combined group by group, as chunks and devices do."""
    reduction = reduction or reductions.weighted_mean()
    partials = [contribution(reduction, x, jnp.float32(w)) for x, w in zip(trees, weights, strict=True)]
    cuts = [0, *(groups or []), len(partials)]
    total = lift.combine(*(lift.combine(*partials[i:j]) for i, j in itertools.pairwise(cuts) if i < j))
    return reduction.finish(None, getattr(total, reduction.combine))


def expected(trees, weights):
    total = sum(map(float, weights))
    return jax.tree.map(
        lambda *x: sum(float(w) * np.asarray(v, np.float64) for w, v in zip(weights, x, strict=True)) / total, *trees
    )


def assert_close(actual, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, wanted)


@given(
    weights=st.lists(st.floats(0, 1e5, width=32), min_size=1, max_size=6).filter(lambda w: sum(w) > 1e-3),
    cut=st.integers(0, 6),
)
def test_weighted_mean_however_partials_are_grouped(weights, cut):
    trees = uploads(len(weights))
    assert_close(reduce(trees, weights, [min(cut, len(weights))]), expected(trees, weights))


def test_counts_weigh_not_clients():
    # Two clients of 1 and 3 examples: (1 * 8 + 3 * 4) / 4 = 5, not 6.
    assert reduce([jnp.float32(8), jnp.float32(4)], [1, 3]) == 5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_upload_of_no_weight_leaves_no_trace(bad):
    trees, weights = uploads(3), [2, 0, 5]
    trees[1] = jax.tree.map(lambda x: np.full_like(x, bad), trees[1])
    assert_close(reduce(trees, weights), expected([trees[0], trees[2]], [2, 5]))


def test_an_upload_with_weight_is_not_hidden():
    trees = uploads(2)
    trees[1]["kernel"][0, 0] = np.nan
    assert np.isnan(reduce(trees, [1, 1])["kernel"][0, 0])


@pytest.mark.parametrize("value", [1.0, np.nan])
def test_without_any_weight_the_summary_is_zero(value):
    trees = jax.tree.map(lambda x: np.full_like(x, value), uploads(2))
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, np.zeros_like(x)), reduce(trees, [0, 0]))


def test_the_summary_has_the_shape_and_dtype_of_an_upload():
    tree = uploads(1)[0]
    summary = reduce([tree], [3])
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), summary, tree)


# Each reduction's uploads of seven clients, and its equation in float64. Some clients are not there, one lacks labels.

WEIGHTS = (3, 0, 7, 1, 0, 2, 5)


def draws(seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=3, size=(7, 5, K)).astype(np.float32)
    certainty = rng.uniform(1e-3, 1, size=(7, 5, 1)).astype(np.float32)
    counts = rng.integers(0, 4, size=(7, K)).astype(np.float32)
    counts[:, 2] = 0  # a label that nobody holds
    counts[:, 1] = [0, 1, 0, 0, 3, 2, 0]  # one that a single client holds, of those that are there
    sums = (rng.normal(size=(7, K, D)) * counts[..., None]).astype(np.float32)
    return logits, certainty, counts, sums


def there(values, weights=WEIGHTS):
    return [(np.asarray(v, np.float64), w) for v, w in zip(values, weights, strict=True) if w > 0]


def numpy_weighted_mean(logits, certainty, counts, sums):
    return sum(w * z for z, w in there(logits)) / sum(WEIGHTS)


def numpy_mean(logits, certainty, counts, sums):
    return np.mean([z for z, _ in there(logits)], axis=0)


def numpy_mean_probabilities(logits, certainty, counts, sums):
    return np.mean([cases.softmax(z) for z, _ in there(logits)], axis=0)


def numpy_certainty(logits, certainty, counts, sums):
    out = np.zeros((5, K))
    for m in range(5):
        pairs = [(z[m], s[m, 0]) for (z, _), (s, _) in zip(there(logits), there(certainty), strict=True)]
        out[m] = sum(s * z for z, s in pairs) / sum(s for _, s in pairs)
    return out


def numpy_class_weighted(logits, certainty, counts, sums):
    out = np.zeros((5, K))
    for c in range(K):
        n = [count[c] for count, _ in there(counts)]
        if sum(n) > 0:
            out[:, c] = sum(n_k / sum(n) * z[:, c] for n_k, (z, _) in zip(n, there(logits), strict=True))
    return out


def numpy_label_mean(logits, certainty, counts, sums, by_example=False, weights=WEIGHTS):
    value, number = np.zeros((K, D)), np.zeros(K)
    for label in range(K):
        pairs = zip(there(sums, weights), there(counts, weights), strict=True)
        held = [(s[label], n[label]) for (s, _), (n, _) in pairs if n[label] > 0]
        if not held:
            continue
        if by_example:
            number[label] = sum(n for _, n in held)
            value[label] = sum(s for s, _ in held) / number[label]
        else:
            number[label] = len(held)
            value[label] = np.mean([s / n for s, n in held], axis=0)
    return ByLabel(value, number)


def numpy_label_mean_by_example(*drawn):
    return numpy_label_mean(*drawn, by_example=True)


def numpy_minimum(logits, certainty, counts, sums):
    return np.min([z for z, _ in there(logits)], axis=0), np.min([n for n, _ in there(counts)], axis=0)


def numpy_maximum_probability(logits, certainty, counts, sums):
    return np.max([cases.softmax(z) for z, _ in there(logits)], axis=0)


REDUCTIONS = {
    "weighted_mean": (reductions.weighted_mean(), lambda z, s, n, v: z, numpy_weighted_mean),
    "mean": (reductions.mean(), lambda z, s, n, v: z, numpy_mean),
    "mean_probabilities": (reductions.mean(jax.nn.softmax), lambda z, s, n, v: z, numpy_mean_probabilities),
    "certainty": (reductions.elementwise_mean(), lambda z, s, n, v: Weighted(z, s), numpy_certainty),
    "class_weighted": (reductions.elementwise_mean(), lambda z, s, n, v: Weighted(z, n[:, None]), numpy_class_weighted),
    "label_mean": (reductions.label_mean(), lambda z, s, n, v: ByLabel(v, n), numpy_label_mean),
    "label_mean_by_example": (
        reductions.label_mean(by_example=True),
        lambda z, s, n, v: ByLabel(v, n),
        numpy_label_mean_by_example,
    ),
    "minimum": (reductions.minimum(), lambda z, s, n, v: (z, n.astype(np.int32)), numpy_minimum),
    "maximum": (reductions.maximum(jax.nn.softmax), lambda z, s, n, v: z, numpy_maximum_probability),
}
EXTREMES = ("minimum", "maximum")
ALL = pytest.mark.parametrize("name", REDUCTIONS)


def rows_of(tree):
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(7)]


def spoiled(stacked, bad):
    """The uploads with `bad` in place of everything that clients of weight 0 sent."""
    gone = np.array(WEIGHTS) == 0

    def spoil(x):
        worst = np.float32(bad) if x.dtype == np.float32 else np.iinfo(np.int32).min
        return np.where(gone.reshape(-1, *(1,) * (x.ndim - 1)), worst, x).astype(x.dtype)

    return jax.tree.map(spoil, stacked)


@ALL
@pytest.mark.parametrize("bad", [1.0, np.nan, np.inf, -np.inf])
def test_reduction_is_its_equation_and_the_absent_leave_no_trace(name, bad):
    reduction, pack, equation = REDUCTIONS[name]
    summary = reduce(rows_of(spoiled(pack(*draws()), bad)), WEIGHTS, reduction=reduction)
    assert_close(summary, equation(*draws()))


@pytest.mark.parametrize("name", [name for name in REDUCTIONS if name not in EXTREMES])
@pytest.mark.parametrize("bad", [1.0, np.nan])
def test_without_any_client_the_summary_is_zero(name, bad):
    reduction, pack, _ = REDUCTIONS[name]
    stacked = jax.tree.map(lambda x: np.full_like(x, bad), pack(*draws()))
    for leaf in jax.tree.leaves(reduce(rows_of(stacked), [0] * 7, reduction=reduction)):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


@pytest.mark.parametrize(("name", "least_or_most"), [("minimum", np.inf), ("maximum", -np.inf)])
def test_without_any_client_an_extreme_is_what_no_upload_exceeds(name, least_or_most):
    reduction, pack, _ = REDUCTIONS[name]
    summary = reduce(rows_of(pack(*draws())), [0] * 7, reduction=reduction)
    np.testing.assert_array_equal(jax.tree.leaves(summary)[0], np.full((5, K), least_or_most))


@ALL
@given(order=st.permutations(range(7)))
def test_the_order_of_clients_does_not_matter(name, order):
    reduction, pack, equation = REDUCTIONS[name]
    trees = rows_of(pack(*draws()))
    summary = reduce([trees[i] for i in order], [WEIGHTS[i] for i in order], reduction=reduction)
    assert_close(summary, equation(*draws()))


@ALL
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_reduction_over_devices_and_chunks(name, devices):
    reduction, pack, equation = REDUCTIONS[name]

    def one(shared, row):
        upload, weight = row
        return (), contribution(reduction, upload, weight)

    rows = spoiled(pack(*draws()), np.nan), np.array(WEIGHTS, np.float32)
    for chunk in (1, 3):  # of seven clients, so that chunks and devices are filled up with clients of no weight
        lifting = lift.Lifting("shard_map", cases.mesh(devices), chunk)

        @jax.jit
        def run(rows, lifting=lifting):
            _, total = lift.over_clients(one, np.float32(0), rows, lifting)
            return reduction.finish(None, getattr(total, reduction.combine))

        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), run(rows), equation(*draws()))


# Several reductions of one upload, in a round.

INFINITE = 4  # the id of a client whose upload is not finite


def upload_of(client, x):
    """What a client of examples x [n, F] sends: their sum, and its own id."""
    return {"total": x.sum(0), "id": client}


@functools.cache
def probe(devices):
    """A simulation whose server keeps the summary of `upload_of` under every way to combine, and nothing else."""
    upload = {"total": jnp.zeros(cases.FEATURES), "id": jnp.int32(0)}
    stack = Stack(upload["total"], jnp.int32(0), jnp.float32(0))

    def send(ctx, received, state, data):
        position = jnp.arange(max(cases.COUNTS))
        x, _ = data.take(jnp.minimum(position, jnp.maximum(data.count - 1, 0)))
        total = upload_of(ctx.client, jnp.where((position < data.count)[:, None], x, 0))
        total["total"] = jnp.where(ctx.client == INFINITE, jnp.inf, total["total"])
        return state, Upload(total), {}

    exchange = Exchange(
        broadcast=lambda ctx, server: Broadcast(()),
        client=send,
        reduce={
            "least": reductions.minimum(),
            "most": reductions.maximum(lambda upload: upload["id"]),
            "each": reductions.stack(lambda upload: upload["total"]),
            "mean": reductions.mean(lambda upload: upload["total"]),
            "nothing": reductions.nothing(),
        },
        server=lambda ctx, server, summary: (summary, {}),
    )
    size = (cases.PARTICIPANTS,)
    first = {
        "least": upload,
        "most": jnp.int32(0),
        "each": jax.tree.map(lambda x: jnp.zeros(size + x.shape, x.dtype), stack),
        "mean": upload["total"],
        "nothing": (),
    }
    algorithm = Algorithm(
        init_server=lambda ctx, params: first,
        init_client=lambda ctx, params: (),
        round=(exchange,),
        central=lambda ctx, server, x: jnp.zeros((len(x), cases.CLASSES)),
        name="probe",
    )
    return cases.bind(algorithm, cases.task(), size, devices=devices, drop_nonfinite=True)


@pytest.mark.parametrize("devices", [1, 4])
def test_every_way_to_combine_in_a_round_of_the_absent_and_the_infinite(devices):
    federation = cases.federation(devices=devices)
    clients = cases.clients_of(federation)

    def drawn(seed):
        rows = cases.participants_of(cases.round_key(seed, 0), len(clients), cases.PARTICIPANTS)
        return [clients[row] for row in rows]

    empty = cases.COUNTS.index(0)
    seed = next(seed for seed in range(50) if {empty, INFINITE} <= {i for i, *_ in drawn(seed)})
    summary = jax.device_get(probe(devices).run(probe(devices).init(seed, federation), federation, {}, 1)[0].server)
    uploads = [(i, x.sum(0)) for i, x, y in drawn(seed) if i not in (empty, INFINITE)]
    totals = np.array([total for _, total in uploads])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(summary["least"]["total"], totals.min(0))
    assert summary["least"]["id"] == min(i for i, _ in uploads)
    assert summary["most"] == max(i for i, _ in uploads)
    close(summary["mean"], totals.mean(0))
    assert summary["nothing"] == ()
    each = summary["each"]
    np.testing.assert_array_equal(each.client, [i for i, *_ in drawn(seed)])
    there = np.isin(each.client, [i for i, _ in uploads])
    np.testing.assert_array_equal(each.weight, [len(y) * here for (_, _, y), here in zip(drawn(seed), there)])
    close(each.partials[there], totals)
    np.testing.assert_array_equal(each.partials[~there], 0)


# Means by label.


@given(
    values=hnp.arrays(np.float32, (6, D), elements=st.floats(-100, 100, width=32)),
    labels=hnp.arrays(np.int32, 6, elements=st.integers(0, K - 1)),
    mask=hnp.arrays(np.bool_, 6),
)
def test_sum_by_label(values, labels, mask):
    value, count = np.zeros((K, D)), np.zeros(K)
    for v, y, m in zip(values.astype(float), labels, mask, strict=True):
        if m:
            value[y] += v
            count[y] += 1
    poisoned = np.where(mask[:, None], values, np.float32(np.nan))
    actual = reductions.sum_by_label(poisoned, labels, K, mask)
    np.testing.assert_allclose(actual.value, value, rtol=1e-5, atol=1e-3)
    np.testing.assert_array_equal(actual.count, count)
    everything = reductions.sum_by_label(values, labels, K)
    np.testing.assert_array_equal(everything.count, np.bincount(labels, minlength=K))


def test_class_mean():
    """Of two leaves [..., K]; class 3 is nobody's, and the third client, who knows nothing, is not there."""
    rng = np.random.default_rng(0)
    counts = np.array([[3, 0, 2, 0], [1, 4, 0, 0], [9, 9, 9, 9]], np.float32)
    trees = [{"kernel": np.float32(rng.normal(size=(2, D, K))), "bias": np.float32(rng.normal(size=K))} for _ in counts]
    trees[2] = jax.tree.map(lambda leaf: leaf * np.float32(np.nan), trees[2])
    sent = [Weighted(tree, count) for tree, count in zip(trees, counts, strict=True)]
    found = reduce(sent, [5, 5, 0], groups=[1], reduction=reductions.class_mean())
    share = np.array([[0.75, 0, 1, 0.5], [0.25, 1, 0, 0.5]])
    for name, leaf in found.items():
        mean = sum(s * tree[name].astype(np.float64) for s, tree in zip(share, trees, strict=False))
        np.testing.assert_allclose(leaf, mean, rtol=1e-4, atol=1e-5)
