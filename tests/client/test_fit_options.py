"""What a training may be told beside its optimiser, against NumPy in float64."""

import functools

import chex
import engine_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from client_cases import MODEL, F, K, context, data_of

from fdjax.client import losses, training
from fdjax.client.optimizers import Kept, with_kept_optimizers
from fdjax.client.trained import check_patterns, is_statistic, on_trained, paths
from fdjax.contract import Algorithm, Exchange, Received, Upload
from fdjax.errors import InputError
from fdjax.exchange import reductions

RATE, COUNT = 0.3, 12


def steps_of(x, y, batches, rate=RATE, smoothing=0.0, mu=0.0, trains=("kernel", "bias"), start=None):
    """Logistic regression by SGD over `batches` of positions, in float64."""
    W, b = (np.array(start["Dense_0"][name], np.float64) for name in ("kernel", "bias"))
    W0, b0 = W.copy(), b.copy()
    for batch in batches:
        target = (1 - smoothing) * np.eye(K)[y[batch]] + smoothing / K
        slope = (cases.softmax(x[batch] @ W + b) - target) / len(batch)
        dW, db = x[batch].T @ slope + mu * (W - W0), slope.sum(0) + mu * (b - b0)
        W, b = W - rate * dW * ("kernel" in trains), b - rate * db * ("bias" in trains)
    return {"Dense_0": {"kernel": W, "bias": b}}


@functools.cache
def compiled(how, whole, pull):
    """(params, data, key, epochs, work) -> params; a client that is no straggler has all of its work, as a plain 1."""

    @jax.jit
    def run(params, data, key, epochs, work):
        ctx = context(key, np.float32(RATE))._replace(work=1.0 if whole else work)
        return training.fit(how, training.supervised(MODEL, how), params, data, ctx, epochs=epochs, pull=pull)[0]

    return run


def fit(how, params, data, key, epochs=1, work=1.0, pull=None):
    return compiled(how, isinstance(work, float), pull)(params, data, key, epochs, work)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(1))


def batches_of(key, size, epochs, count=COUNT):
    orders = [np.asarray(cases.epoch_order(key, epoch, count)) for epoch in range(epochs)]
    return [order[i : i + size] for order in orders for i in range(0, count, size)]


@pytest.mark.parametrize(("steps", "work", "expected"), [(1, 1.0, 1), (5, 1.0, 5), (7, 1.0, 7), (8, 0.5, 4)])
def test_steps_in_place_of_epochs(params, steps, work, expected):
    """Of three batches an epoch; the mean loss is over the last epoch's steps."""
    data, x, y = data_of(COUNT)
    key, how = jax.random.key(3), cases.training(5)
    work = jnp.float32(work) if work < 1 else work
    amount = training.Amount(np.int32(9), np.int32(steps))
    actual = fit(how, params, data, key, amount, work)
    batches = batches_of(key, 5, 3)[:expected]
    chex.assert_trees_all_close(actual, steps_of(x, y, batches, start=params), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("work", "epochs"), [(0.01, 1), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_a_straggler_does_part_of_its_epochs(params, work, epochs):
    data, x, y = data_of(COUNT)
    key = jax.random.key(4)
    actual = fit(cases.training(6), params, data, key, np.int32(4), jnp.float32(work))
    chex.assert_trees_all_close(actual, steps_of(x, y, batches_of(key, 6, epochs), start=params), rtol=1e-4, atol=1e-5)


def test_no_epoch_is_none_for_a_straggler_too(params):
    chex.assert_trees_all_equal(
        fit(cases.training(6), params, data_of(COUNT)[0], jax.random.key(0), np.int32(0), jnp.float32(0.5)), params
    )


@pytest.mark.parametrize(("count", "steps"), [(12, 2), (3, 1), (10, 2)])
def test_drop_last(params, count, steps):
    """Only whole batches, or the one of a client that has less than one."""
    data, x, y = data_of(count)
    key = jax.random.key(5)
    actual = fit(cases.training(5)._replace(drop_last=True), params, data, key)
    batches = batches_of(key, 5, 1, count)[:steps]
    chex.assert_trees_all_close(actual, steps_of(x, y, batches, start=params), rtol=1e-4, atol=1e-5)


def test_label_smoothing(params):
    data, x, y = data_of(COUNT)
    key = jax.random.key(6)
    actual = fit(cases.training(5)._replace(label_smoothing=0.2), params, data, key)
    expected = steps_of(x, y, batches_of(key, 5, 1), smoothing=0.2, start=params)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_pull_is_added_to_the_gradient(params):
    data, x, y = data_of(COUNT)
    key, mu = jax.random.key(7), 0.7
    actual = fit(
        cases.training(5), params, data, key, np.int32(2),
        pull=lambda w: jax.tree.map(lambda a, b: mu * (a - b), w, params),
    )  # fmt: skip
    expected = steps_of(x, y, batches_of(key, 5, 2), mu=mu, start=params)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_params_that_are_not_trained_stay_and_have_no_optimiser(params):
    """Clipping is by the norm of what is trained."""
    data, x, y = data_of(COUNT)
    key = jax.random.key(8)
    how = cases.training(5)._replace(trained=paths("*bias"))
    actual = fit(how, params, data, key)
    expected = steps_of(x, y, batches_of(key, 5, 1), trains=("bias",), start=params)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)
    state = on_trained(optax.adam(1.0), params, how.trained).init(params)
    assert {leaf.shape for leaf in jax.tree.leaves(state)} == {(), (K,)}
    clipped = on_trained(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)), params, how.trained)
    gradient = {"Dense_0": {"kernel": jnp.full((F, K), 1e6), "bias": jnp.array([0.3, 0.4, 0, 0])}}
    update, _ = clipped.update(gradient, clipped.init(params), params)
    np.testing.assert_allclose(update["Dense_0"]["bias"], [-0.3, -0.4, 0, 0], rtol=1e-6)


def test_statistics_take_their_change_and_nothing_else(params):
    """Whatever rate, decay and clipping do to the others."""
    whole = {"net": params, "batch_stats": {"mean": jnp.arange(3.0)}}
    optimizer = optax.chain(optax.clip(1e-3), optax.add_decayed_weights(0.1), optax.adam(0.01))
    optimizer = on_trained(optimizer, whole)
    gradient = jax.tree.map(jnp.ones_like, whole) | {"batch_stats": {"mean": jnp.array([0.5, 0.25, -1.0])}}
    update, state = optimizer.update(gradient, optimizer.init(whole), whole)
    np.testing.assert_array_equal(update["batch_stats"]["mean"], [-0.5, -0.25, 1.0])
    assert not any(leaf.shape == (3,) for leaf in jax.tree.leaves(state))


def test_patterns():
    meant = [paths(p) for p in ("Dense_0/*", "!Dense_1/*", "*kernel,!Dense_0/*", "*lora*")]
    names = ["Dense_0/kernel", "Dense_1/kernel", "Dense_1/bias", "lora/Dense_0/a"]
    assert [[m(name) for name in names] for m in meant] == [
        [True, False, False, False],
        [True, False, False, True],
        [False, True, False, False],
        [False, False, False, True],
    ]
    assert [is_statistic(p) for p in ("batch_stats/Norm_0/mean", "student/batch_stats/x", "Dense_0/batch_stats_")] == [
        True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize("patterns", ["Dense_7/*", "!*", "", "!Dense_0/*"])
def test_patterns_that_mean_nothing(params, patterns):
    with pytest.raises(InputError, match="Dense_0/bias"):
        check_patterns("trained", patterns, params)


def test_a_kept_optimiser_goes_on(params):
    """Two fits of one epoch each are one of two, and share their state with a training of the same name alone."""
    data, _, _ = data_of(COUNT)
    how = cases.training(COUNT, momentum=0.9)._replace(name="a")
    other = cases.training(COUNT)._replace(name="b")

    def client(ctx, received, params, data):
        params = fit_in(ctx, how, params, data)
        fit_in(ctx, other, params, data)
        return fit_in(ctx, how, params, data), Upload(()), {}

    def fit_in(ctx, how, params, data, keeps=True):
        loss = training.supervised(MODEL, how)
        return training.fit(how, loss, params, data, ctx, epochs=np.int32(1), keeps=keeps)[0]

    exchange = Exchange(lambda ctx, server: (), client, reductions.nothing(), lambda ctx, server, s: (server, {}))
    algorithm = Algorithm(lambda ctx, params: (), lambda ctx, params: params, (exchange,))
    task = cases.task()._replace(training=how, distilling=other, serving=how)
    keeping = with_kept_optimizers(algorithm, task)
    ctx = context(jax.random.key(0), np.float32(RATE))
    state = keeping.init_client(ctx, params)
    assert isinstance(state, Kept)
    assert set(state.optimizers) == {"a", "b"}
    both = jax.jit(lambda state: keeping.round[0].client(ctx, Received((), (), ()), state, data)[0])
    for _ in range(2):
        state = both(state)
    expected = fit(how, params, data, jax.random.key(0), np.int32(4))
    chex.assert_trees_all_close(state.state, expected, rtol=1e-5, atol=1e-6)
    fresh = params
    for _ in range(4):
        fresh = fit(how, fresh, data, jax.random.key(0))
    assert not np.allclose(fresh["Dense_0"]["kernel"], expected["Dense_0"]["kernel"], rtol=1e-3)


def test_smoothed_cross_entropy(rng):
    z, y = rng.normal(size=(5, K)), rng.integers(0, K, 5)
    log_p = cases.log_softmax(z)
    expected = -0.9 * log_p[np.arange(5), y] - 0.1 / K * log_p.sum(1)
    np.testing.assert_allclose(losses.cross_entropy(jnp.float32(z), y, 0.1), expected, rtol=1e-5)
