"""Nets in training mode: BatchNorm against NumPy, dropout by its key, and what a module must be told."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from fdjax.errors import InputError
from fdjax.models import build, from_linen, from_nnx
from fdjax.types import STATISTICS

MOMENTUM = 0.8


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=MOMENTUM, name="norm")(x)
        return nn.Dense(3)(x)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.Dense_0, self.Dense_1 = nnx.Linear(5, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=MOMENTUM, rngs=rngs)

    def __call__(self, x):
        return self.Dense_1(self.norm(self.Dense_0(x)))


MAKERS = {"linen": lambda: from_linen(Linen(), (5,)), "nnx": lambda: from_nnx(Nnx, (5,))}


def drawn(model, rng):
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32), shapes)


def numpy_net(params, x, train):
    """Logits of the net, and mean and variance that BatchNorm keeps, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    h = x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    old = params[STATISTICS]["norm"]
    mean, var = (h.mean(0), ((h - h.mean(0)) ** 2).mean(0)) if train else (old["mean"], old["var"])
    y = (h - mean) / np.sqrt(var + 1e-5) * params["norm"]["scale"] + params["norm"]["bias"]
    kept = {"mean": old["mean"] + (1 - MOMENTUM) * (mean - old["mean"])}
    kept["var"] = old["var"] + (1 - MOMENTUM) * (var - old["var"])
    return y @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"], kept


def close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected)


@pytest.mark.parametrize("kind", MAKERS)
def test_batch_norm(rng, kind):
    model = MAKERS[kind]()
    params, x = drawn(model, rng), rng.normal(size=(6, 5)).astype(np.float32)
    close(model.apply(params, x), numpy_net(params, x, train=False)[0])
    key = jax.random.key(0)
    logits, kept = numpy_net(params, x, train=True)
    close(model.apply(params, x, key), logits)
    for weight in (1.0, 7.0):  # the change of statistics does not depend on the loss
        gradient = jax.grad(lambda p, w=weight: w * jnp.sum(jnp.square(model.apply(p, x, key))))(params)
        change = gradient[STATISTICS]["norm"]
        close(jax.tree.map(jnp.subtract, params[STATISTICS]["norm"], change), kept)
    slope = lambda p: np.sum(numpy_net(p, x, train=True)[0] ** 2) * 7.0  # noqa: E731
    moved = jax.tree.map(lambda leaf: leaf, params)
    moved["norm"]["scale"] = params["norm"]["scale"].at[1].add(1e-3)
    np.testing.assert_allclose(gradient["norm"]["scale"][1], (slope(moved) - slope(params)) / 1e-3, rtol=1e-2)


@pytest.mark.parametrize("kind", MAKERS)
def test_statistics_in_a_loop_over_clients_and_devices(rng, kind):
    model = MAKERS[kind]()
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(drawn(model, rng) for _ in range(4)))
    x = jnp.asarray(rng.normal(size=(4, 3, 6, 5)), jnp.float32)  # clients, steps

    def train(params, x):
        def step(params, x):
            gradient = jax.grad(lambda p: jnp.mean(model.apply(p, x, jax.random.key(0))))(params)
            return jax.tree.map(lambda p, g: p - g, params, gradient), ()

        return jax.lax.scan(step, params, x)[0]

    mesh = jax.make_mesh((2,), ("device",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    spec = PartitionSpec("device")
    many = jax.vmap(train)
    sharded = jax.shard_map(many, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False)
    client = jax.tree.map(lambda leaf: leaf[2], params)
    one = jax.jit(train)(client, x[2])
    for lifted in (many, sharded):
        close(jax.tree.map(lambda leaf: leaf[2], jax.jit(lifted)(params, x)), one)
    means = []
    for batch in np.asarray(x[2]):
        means.append(numpy_net(client, batch, train=True)[1])
        gradient = jax.grad(lambda p, b=batch: jnp.mean(model.apply(p, b, jax.random.key(0))))(client)
        client = jax.tree.map(lambda p, g: p - g, client, gradient)
        close(client[STATISTICS]["norm"], means[-1])
    close(one[STATISTICS]["norm"], means[-1])


def test_without_a_norm_params_are_as_ever():
    params = jax.eval_shape(build("fedgen_cnn", (8, 8, 1), 3).init, jax.random.key(0))
    assert {"Conv_0", "GroupNorm_0"} < params.keys()
    assert STATISTICS not in params
    params = jax.eval_shape(build("fedgen_cnn", (8, 8, 1), 3, norm="none").init, jax.random.key(0))
    assert not any("Norm" in name for name in params)
    params = jax.eval_shape(build("resnet8", (8, 8, 1), 3, norm="batch", width=2).init, jax.random.key(0))
    assert params[STATISTICS]["_Conv_0"]["BatchNorm_0"].keys() == {"mean", "var"}
    with pytest.raises(InputError, match="unknown norm 'layer'"):
        build("resnet8", (8, 8, 1), 3, norm="layer")


class Dropped(nn.Module):
    mode: str

    @nn.compact
    def __call__(self, x, train=False, deterministic=True):
        off = deterministic if self.mode == "deterministic" else not train
        x = nn.Dropout(0.5, deterministic=off)(x)
        return nn.Dropout(0.5, deterministic=off, rng_collection="other")(nn.Dense(6)(x))


class NnxDropped(nnx.Module):
    def __init__(self, rngs):
        self.dense, self.drop = nnx.Linear(5, 6, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.dense(x))


@pytest.mark.parametrize(
    "make",
    [
        lambda: from_linen(Dropped("train"), (5,)),
        lambda: from_linen(Dropped("deterministic"), (5,)),
        lambda: from_nnx(NnxDropped, (5,)),
    ],
)
def test_dropout_is_the_keys_and_off_without_one(rng, make):
    model = make()
    params, x = model.init(jax.random.key(0)), jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)
    tested = model.apply(params, x)
    np.testing.assert_array_equal(tested, model.apply(params, x))
    assert np.all(np.asarray(tested) != 0)
    one, again, other = (np.asarray(model.apply(params, x, jax.random.key(seed))) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.any((one == 0) != (other == 0))
    assert 0.2 < np.mean(one == 0) < 0.8


def test_dropout_of_the_zoo(rng):
    model = build("fedmd_mnist_5", (28, 28, 1), 3, filters=(2, 2, 2), groups=2, dropout=0.3)
    params, x = drawn(model, rng), jnp.asarray(rng.normal(size=(2, 28, 28, 1)), jnp.float32)
    plain = build("fedmd_mnist_5", (28, 28, 1), 3, filters=(2, 2, 2), groups=2)
    np.testing.assert_array_equal(model.apply(params, x), plain.apply(params, x))
    np.testing.assert_array_equal(plain.apply(params, x, jax.random.key(0)), plain.apply(params, x))
    first, second = (np.asarray(model.apply(params, x, jax.random.key(seed))) for seed in (0, 1))
    assert np.all(first != second)


class Untold(nn.Module):
    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(5)(self.layer(x))


class Counting(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.variable("cache", "seen", jnp.zeros, ())
        return nn.Dense(5)(x)


class NnxCounting(nnx.Module):
    def __init__(self, rngs):
        self.dense, self.seen = nnx.Linear(3, 5, rngs=rngs), nnx.Cache(jnp.zeros(()))

    def __call__(self, x):
        return self.dense(x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: from_linen(Untold(nn.Dropout(0.5, deterministic=False)), (3,)), "dropout.*must be told the mode"),
        (lambda: from_linen(Untold(nn.BatchNorm(use_running_average=False)), (3,)), "batch_stats.*be told the mode"),
        (lambda: from_linen(Counting(), (3,)), "keeps cache besides parameters"),
        (lambda: from_nnx(NnxCounting, (3,)), "keeps Cache besides"),
        (lambda: from_nnx(NnxCounting, (4,)), "keeps Cache besides"),
        (lambda: from_nnx(Nnx, (4,)), "model 'Nnx' cannot take inputs"),
        (lambda: from_nnx(lambda: 3, (4,)), "from_nnx needs a function of nnx.Rngs"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(InputError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


def test_a_norm_that_is_never_trained_is_a_norm_in_both_modes(rng):
    model = from_linen(Untold(nn.BatchNorm(use_running_average=True)), (3,))
    params, x = model.init(jax.random.key(0)), jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    np.testing.assert_array_equal(model.apply(params, x), model.apply(params, x, jax.random.key(0)))
    gradient = jax.grad(lambda p: jnp.sum(model.apply(p, x, jax.random.key(0))))(params)
    assert not any(map(np.any, jax.tree.leaves(gradient[STATISTICS])))
