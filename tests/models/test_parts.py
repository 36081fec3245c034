"""Parts of models: blocks one after another are the net, for every net of the zoo and for a user's modules."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fdjax.errors import InputError
from fdjax.method import Method
from fdjax.models import MODELS, Features, build, from_linen, from_nnx, in_precision, with_lora

LETTERS = (6,)
SHAPES = {"mclr": (60,), "gkt_server": (16, 16, 8), "embedded_mlp": (60,)}
SHAPES |= dict.fromkeys(("char_lstm", "char_lstm_small", "transformer"), LETTERS)


def chain(model):
    def apply(params, x):
        for block in model.blocks:
            x = block(params, x)
        return x

    return apply


def program(function, model, x):
    """What a function computes, operation by operation."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    return re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(function)(params, x)))


@pytest.mark.parametrize("name", MODELS)
def test_blocks_one_after_another_are_the_net(name):
    shape = SHAPES.get(name, (28, 28, 1))
    model = build(name, shape, 7, Features(9 if shape == LETTERS else 0))
    x = model.example(shape, 2)
    assert len(model.blocks) >= 2
    for net in (model, in_precision(model, "bfloat16")) if name == "cnn1" else (model,):
        whole, blocks = program(net.apply, net, x), program(chain(net), net, x)
        assert whole == blocks or net is not model
    last = jax.eval_shape(model.features, jax.eval_shape(model.init, jax.random.key(0)), x)
    assert last.ndim == 2


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: in_precision(m, "bfloat16"), lambda m: with_lora(m, 2)])
@pytest.mark.parametrize("key", [None, 3])
def test_parts_of_a_net_with_statistics_and_dropout(rng, wrap, key):
    options = {"filters": (2, 2), "norm": "batch", "dropout": 0.5}
    model = wrap(build("fedmd_mnist_0", (6, 6, 1), 3, **options))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.float32(rng.uniform(0.1, 0.6, leaf.shape)), shapes)
    x, key = jnp.asarray(rng.normal(size=(4, 6, 6, 1)), jnp.float32), None if key is None else jax.random.key(key)

    @jax.jit
    def all_three(params):
        def loss(apply):
            return jax.value_and_grad(lambda params: jnp.sum(jnp.sin(apply(params))))(params)

        def blocks(params):
            h = x
            for block in model.blocks:
                h = block(params, h, key)
            return h

        parts = lambda params: model.head(params, model.features(params, x, key), key)  # noqa: E731
        return [loss(f) for f in (lambda params: model.apply(params, x, key), blocks, parts)]

    (value, gradient), *others = all_three(params)
    for other, slope in others:
        np.testing.assert_allclose(value, other, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, slope)


class TwoParts(nn.Module):
    def setup(self):
        self.embed, self.drop, self.out = nn.Dense(7), nn.Dropout(0.5), nn.Dense(3)

    def features(self, x, training):
        return self.drop(nn.relu(self.embed(x)), deterministic=not training)

    def head(self, h):
        return self.out(h)

    def __call__(self, x, training):
        return self.head(self.features(x, training))


class Three(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(5, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)])

    def blocks(self):
        return [lambda x: nnx.relu(self.layers[0](x)), *self.layers[1:]]

    def __call__(self, x):
        for block in self.blocks():
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("make", "parts"), [(lambda: from_linen(TwoParts(), (5,)), 2), (lambda: from_nnx(Three, (5,)), 3)]
)
def test_any_module_with_parts(rng, make, parts):
    model = make()
    params, x = jax.jit(model.init)(jax.random.key(0)), jnp.asarray(rng.normal(size=(2, 5)), jnp.float32)
    assert len(model.blocks) == parts
    np.testing.assert_array_equal(model.apply(params, x), chain(model)(params, x))
    key = jax.random.key(1)
    np.testing.assert_array_equal(model.apply(params, x, key), model.head(params, model.features(params, x, key), key))


class Whole(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x)


class Short(Whole):
    def blocks(self):
        return [lambda x: x]


def test_a_model_without_parts_says_so():
    model = from_linen(Whole(), (5,))
    for part in (model.features, model.head):
        with pytest.raises(InputError, match=r"^the method needs the parts of its models, but 'Whole' has none; give"):
            part({}, jnp.zeros((1, 5)))
    method = Method("fedproto", "", lambda task: None, {}, parts=True)
    task = type("Task", (), {"model": model, "models": (model,)})
    with pytest.raises(InputError, match=r"^fedproto needs the parts of its models, but 'Whole' has none"):
        method.algorithm(task)
    with pytest.raises(InputError, match=r"\[B, K\] by its blocks one after another; for x \(2, 5\)"):
        from_linen(Short(), (5,))
