"""bfloat16 arithmetic against float32, and low-rank adapters against the sum that defines them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdjax.errors import InputError
from fdjax.models import build, from_linen, in_precision, with_lora
from fdjax.run import experiment, settings
from fdjax.types import STATISTICS


def norm(tree):
    return np.sqrt(sum(float(np.sum(np.square(np.asarray(leaf, np.float64)))) for leaf in jax.tree.leaves(tree)))


def difference(a, b):
    return norm(jax.tree.map(np.subtract, *jax.device_get((a, b))))


def test_bfloat16_computes_so_and_gives_float32(rng):
    net = build("fedmd_mnist_0", (6, 6, 1), 3, filters=(4, 4), norm="batch", dropout=0.1)
    model = in_precision(net, "bfloat16")
    params, x = jax.jit(model.init)(jax.random.key(0)), jnp.asarray(rng.normal(size=(16, 6, 6, 1)), jnp.float32)

    def loss(model):
        return lambda params: jnp.mean(jnp.square(model.apply(params, x, jax.random.key(1)) - 1))

    assert "bf16[" in str(jax.make_jaxpr(loss(model))(params))
    exact, rounded = (jax.jit(jax.grad(loss(m)))(params) for m in (net, model))
    assert {leaf.dtype for leaf in jax.tree.leaves(rounded)} == {jnp.dtype("float32")}
    assert 1e-5 < difference(exact, rounded) / norm(exact) < 0.15
    # Statistics are computed in float32 of what is bfloat16.
    exact, rounded = exact[STATISTICS], rounded[STATISTICS]
    assert 1e-5 < difference(exact, rounded) / norm(exact) < 0.02
    assert model.apply(params, x).dtype == jnp.float32
    for block in model.blocks:
        x = block(params, x)
        assert x.dtype == jnp.float32


@pytest.mark.parametrize(("name", "weights", "accuracy"), [("mclr", 3e-3, 0.01), ("2nn", 0.05, 0.02)])
@pytest.mark.exhaustive
def test_fedavg_in_bfloat16_ends_near_float32(name, weights, accuracy):
    def end(dtype):
        data = {"dataset": "synthetic", "num_clients": 4, "samples_per_client": 50, "partition_seed": 0}
        built = experiment.build(settings.make(model=name, dtype=dtype, learning_rate=0.05, rounds=5, **data))
        first = built.simulation.init(0, built.federation)
        start = jax.device_get(first.server)
        last, _ = built.simulation.run(first, built.federation, built.hparams, 5)
        scalars, _ = jax.device_get(built.simulation.evaluate(last, built.federation, built.hparams))
        return start, jax.device_get(last.server), scalars["central_accuracy"]

    start, exact, right = end("float32")
    _, rounded, also = end("bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(rounded)} == {np.dtype("float32")}
    assert 0 < difference(exact, rounded) / difference(exact, start) < weights
    assert abs(right - also) < accuracy


@pytest.mark.exhaustive
def test_lora(rng):
    net = build("niid_cnn", (16, 16, 1), 3)
    model = with_lora(net, 2, alpha=6)
    params, x = jax.jit(model.init)(jax.random.key(0)), jnp.asarray(rng.normal(size=(4, 16, 16, 1)), jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, params["base"], net.init(jax.random.key(0)))
    np.testing.assert_allclose(model.apply(params, x), net.apply(params["base"], x), rtol=1e-6)
    assert {name: a["A"].shape + a["B"].shape for name, a in params["lora"].items()} == {
        "Conv_0.kernel": (25, 2, 2, 6), "Conv_1.kernel": (150, 2, 2, 16),
        "Dense_0.kernel": (16, 2, 2, 120), "Dense_1.kernel": (120, 2, 2, 84), "Dense_2.kernel": (84, 2, 2, 3),
    }  # fmt: skip
    spread = np.std(np.asarray(params["lora"]["Conv_1.kernel"]["A"])) * 150**0.5
    assert 0.8 < spread < 1.2
    params["lora"] = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 5, jnp.float32), params["lora"]
    )
    whole = jax.tree.map(np.asarray, params["base"])
    for name, a in params["lora"].items():
        layer = name.split(".")[0]
        extra = 6 / 2 * np.asarray(a["A"], np.float64) @ np.asarray(a["B"], np.float64)
        whole[layer]["kernel"] = np.float32(whole[layer]["kernel"] + extra.reshape(whole[layer]["kernel"].shape))
    np.testing.assert_allclose(model.apply(params, x), net.apply(whole, x), rtol=1e-4, atol=1e-4)
    h = x
    for block in model.blocks:
        h = block(params, h)
    np.testing.assert_allclose(h, model.apply(params, x), rtol=1e-5, atol=1e-5)


def test_gradients_of_adapters(rng):
    net = build("fedmd_mnist_0", (6, 6, 1), 3, filters=(4, 4), norm="batch")
    model = with_lora(net, 1)
    params, x = jax.jit(model.init)(jax.random.key(0)), jnp.asarray(rng.normal(size=(8, 6, 6, 1)), jnp.float32)
    key = jax.random.key(1)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(model.apply(p, x, key)))))(params)
    base = jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(net.apply(p, x, key)))))(params["base"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradient["base"], base)
    for name, adapter in gradient["lora"].items():
        slope = np.asarray(base[name.split(".")[0]]["kernel"], np.float64)
        slope = slope.reshape(-1, slope.shape[-1])
        np.testing.assert_allclose(adapter["A"], 0, atol=1e-6)  # B is zero
        A = np.asarray(params["lora"][name]["A"], np.float64)
        np.testing.assert_allclose(adapter["B"], A.T @ slope, rtol=1e-3, atol=1e-4)


class Scale(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x * self.param("scale", nn.initializers.ones, (3,)).reshape(1, 3)


def test_adapters_refuse():
    with pytest.raises(InputError, match="rank of at least 1; got 0"):
        with_lora(build("mclr", (3,), 2), 0)
    with pytest.raises(InputError, match="model 'Scale' has no kernel"):
        with_lora(from_linen(Scale(), (3,)), 1)


IMAGES = {"dataset": "mnist_sample", "num_clients": 2}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"norm": "batch"},
            r"^--norm=batch: model '2nn' has no norm; leave it out, or choose of fedgen_cnn, resnet8, ",
        ),
        ({"dropout": 0.1}, r"^--dropout=0.1: model '2nn' has no dropout; leave it out, or choose of transformer, "),
        ({"norm": "layer"}, r"^unknown norm 'layer'; known: batch, group, none"),
        ({"dropout": 1.0}, r"^--dropout=1.0: expected a number "),
        ({"dtype": "float16"}, r"^unknown dtype 'float16' \(did you mean 'bfloat16'\?\)"),
        ({"lora_rank": -1}, r"^--lora_rank=-1: expected a whole number of at least 0"),
    ],
)
def test_settings_refuse(fields, message):
    with pytest.raises(InputError, match=message):
        experiment.build(settings.make(**IMAGES, **fields))


def test_settings_make_the_models():
    def model(**fields):
        return experiment.build(settings.make(**IMAGES, **fields)).layout.central

    def shapes(model):
        return jax.eval_shape(model.init, jax.random.key(0))

    assert STATISTICS in shapes(model(model="fedgen_cnn", norm="batch"))
    assert shapes(model(lora_rank=3)).keys() == {"base", "lora"}
    assert "bf16" in str(jax.make_jaxpr(model(dtype="bfloat16").apply)(shapes(model()), jnp.zeros((1, 28, 28, 1))))
    dropped = model(model="fedmd_mnist_0", dropout=0.2)
    x = jnp.zeros((1, 28, 28, 1))
    drawn = jax.make_jaxpr(lambda p: dropped.apply(p, x, jax.random.key(0)))(shapes(dropped))
    assert "random_bits" in str(drawn)
