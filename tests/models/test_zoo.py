"""Every model of the zoo: its parameters, one training step, and what it refuses."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from choices import some

from fdjax.client.losses import cross_entropy
from fdjax.errors import InputError
from fdjax.models import MODELS, Features, build, from_linen

MNIST, CIFAR = (28, 28, 1), (32, 32, 3)
LETTERS = {"features": Features(tokens=80)}

# name, input, classes, options, parameters: the papers' own numbers where they give them
COUNTS = [
    ("mclr", (60,), 10, {}, 610),
    ("2nn", MNIST, 10, {}, 199_210),
    ("mcmahan_cnn", MNIST, 10, {}, 1_663_370),
    ("niid_cnn", MNIST, 10, {}, 44_426),
    ("fedgen_cnn", MNIST, 10, {}, 26_390 + 44),  # 44: scale and bias of the normalisations of 6 and 16 channels
    ("fd_cnn", MNIST, 10, {}, 1_199_882),
    ("cnn1", MNIST, 10, {}, 712_842),
    ("cnn1", MNIST, 10, {"padding": "SAME"}, 3_334_282),
    ("cnn2", CIFAR, 10, {}, 4_515_594),
    ("cnn2", CIFAR, 10, {"padding": "SAME"}, 17_098_506),
    # The counts of BatchNorm's nets with convolutional shortcuts: scale and bias are as many.
    ("resnet8", CIFAR, 10, {}, 78_042),
    ("resnet20", CIFAR, 10, {}, 272_474),
    ("gkt_edge", CIFAR, 10, {"width": 16, "stride": 1}, 464 + 2 * (9 * 16 * 16 + 32) + 170),
    ("gkt_edge", MNIST, 10, {}, 72 + 16 + 2 * (9 * 8 * 8 + 16) + 90),
    ("gkt_server", (32, 32, 16), 10, {}, 78_042 - 464),  # ResNet-8 without its first convolution
    ("gkt_server", (32, 32, 16), 10, {"residual_blocks": 3}, 272_474 - 464),
    ("fedavg_cnn", MNIST, 10, {}, 582_026),  # as PFLlib's with its dim = 1024
    ("fedavg_cnn", CIFAR, 10, {}, 878_538),  # and with dim = 1600
    ("fedavg_mlp", MNIST, 10, {}, 159_010),
    ("dnn", MNIST, 10, {}, 79_510),
    # LEAF's: 80 x 8, 4 x 256 x (8 + 256 + 1), 4 x 256 x (256 + 256 + 1), 256 x 80 + 80.
    ("char_lstm", (80,), 80, LETTERS, 640 + 271_360 + 525_312 + 20_560),
    ("char_lstm_small", (80,), 80, LETTERS, 640 + 4 * 64 * (8 + 64 + 1) + 64 * 80 + 80),
    # Tokens and places, two blocks of 4 + 8 kernels 64 x 64, biases, two norms, the last norm and the head.
    ("transformer", (80,), 80, LETTERS, 2 * 80 * 64 + 2 * (12 * 64**2 + (3 + 1 + 4 + 1 + 4) * 64) + 128 + 65 * 80),
    ("embedded_mlp", (3,), 2, {"features": Features(categories=(0, 4, 0))}, 8 + 4 * 64 + 64 + 65 * 64 + 65 * 2),
]

# FedMD's nets of 16 outputs: the filters, written once more, and the flattened image's side by the rule of its block.
FEDMD = {
    "mnist": "128-256 128-384 128-512 256-256 256-512 64-128-256 64-128-192 128-192-256 128-128-128 128-128-192",
    "cifar": "128-256 128-128-192 64-64-64 128-64-64 64-64-128 64-128-256 64-128-192 128-192-256 128-128-128 "
    "64-64-64-64",
}


def fedmd_count(filters, shape):
    side, channels = shape[0], shape[2]
    kernels = [3] + ([3] if len(filters) == 2 else [2, 3, 3])
    total = 0
    for kernel, features in zip(kernels, filters):
        total += kernel * kernel * channels * features + features + 2 * features  # bias; scale and shift of the norm
        channels = features
    side = (side - 3) // 2 + 1 if len(filters) == 2 else (side // 2 // 2 - 3) // 2 + 1
    return total + side * side * channels * 16


for task, shape in (("mnist", MNIST), ("cifar", CIFAR)):
    for i, row in enumerate(FEDMD[task].split()):
        COUNTS.append((f"fedmd_{task}_{i}", shape, 16, {}, fedmd_count([int(f) for f in row.split("-")], shape)))


def count(params):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def draw(rng, model, clients=()):
    """Random parameters, without compiling an init."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.normal(size=(*clients, *leaf.shape)), jnp.float32), shapes)


@pytest.mark.parametrize(("name", "shape", "classes", "options", "expected"), COUNTS)
def test_parameter_count(name, shape, classes, options, expected):
    assert count(jax.eval_shape(build(name, shape, classes, **options).init, jax.random.key(0))) == expected


def test_fd_cnn_without_biases_is_the_papers_count():
    params = jax.eval_shape(build("fd_cnn", MNIST, 10).init, jax.random.key(0))
    biases = [leaf for path, leaf in jax.tree.leaves_with_path(params) if "bias" in str(path[-1])]
    assert count(params) - count(biases) == 1_199_648


def test_every_model_has_a_count():
    assert {row[0] for row in COUNTS} == set(MODELS)


def test_fedmd_counts_by_hand():
    # 1152 + 128 + 256, then 294,912 + 256 + 512, then 13 x 13 x 256 features to 16 logits without a bias.
    assert fedmd_count([128, 256], MNIST) == 1_280 + 256 + 295_168 + 512 + 692_224
    # 640 + 128; 2x2: 32,896 + 256; 3x3: 295,168 + 512; 28 -> 14 -> 7 -> 3, so 3 x 3 x 256 features.
    assert fedmd_count([64, 128, 256], MNIST) == 640 + 128 + 32_896 + 256 + 295_168 + 512 + 36_864


# FedMD's nets of two, three and four layers stand for its twenty, ResNet-8 for what is made of the same blocks.
ALIKE = {"resnet20", "gkt_server", *(name for name in MODELS if name.startswith("fedmd"))}
TRAINED = [*(name for name in MODELS if name not in ALIKE), "fedmd_mnist_0", "fedmd_cifar_2", "fedmd_cifar_9"]


@pytest.mark.parametrize(
    "name", some(TRAINED, "mclr", "2nn", "cnn1", "resnet8", "transformer", "char_lstm", "embedded_mlp")
)
def test_trains_one_step(rng, name):
    reads = name in ("char_lstm", "char_lstm_small", "transformer")
    shape = (60,) if name in ("mclr", "embedded_mlp") else (6,) if reads else MNIST
    model = build(name, shape, 4, Features(9 if reads else 0))
    params = jax.jit(model.init)(jax.random.key(0))
    x = jnp.asarray(rng.integers(0, 9, (3, 6)) if reads else rng.normal(size=(3, *shape)), model.example(shape).dtype)
    y = jnp.arange(3)

    def loss(params):
        logits = model.apply(params, x)
        assert logits.shape == (3, 4)
        return cross_entropy(logits, y).mean()

    step = jax.jit(jax.value_and_grad(loss))
    params, (before, gradient) = jax.device_get((params, step(params)))
    assert all(np.isfinite(leaf).all() and np.any(leaf != 0) for leaf in jax.tree.leaves(gradient))
    after, _ = step(jax.tree.map(lambda p, g: p - np.float32(1e-3) * g, params, gradient))
    assert np.isfinite(before)
    assert after < before


@pytest.mark.parametrize("name", ["cnn1", "fedgen_cnn"])
def test_vmapped_clients_equal_one_by_one(rng, name):
    model = build(name, MNIST, 3)
    params = draw(rng, model, (2,))
    x = jnp.asarray(rng.normal(size=(2, 2, *MNIST)), jnp.float32)

    def gradient(params, x):
        return jax.grad(lambda p: cross_entropy(model.apply(p, x), jnp.arange(2)).mean())(params)

    many = jax.jit(jax.vmap(gradient))(params, x)
    gradient = jax.jit(gradient)
    for i in range(2):
        one = gradient(jax.tree.map(lambda leaf, i=i: leaf[i], params), x[i])
        for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one)):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5)


def test_any_linen_module(rng):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(2, (3, 3))(x))
            return nn.Dense(5)(x.mean((1, 2)))

    model = from_linen(Net(), MNIST)
    assert model.name == "Net"
    assert model.apply(model.init(jax.random.key(0)), jnp.zeros((2, *MNIST))).shape == (2, 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build("cnn3", MNIST, 10), "did you mean 'cnn"),
        (lambda: build("cnn1", MNIST, 10, pad="SAME"), "did you mean 'padding'"),
        (lambda: build("cnn1", MNIST, 10, padding="FULL"), "'SAME', 'VALID'"),
        (lambda: build("cnn1", MNIST, 1), "num_classes >= 2"),
        (lambda: build("cnn1", (8, 8, 1), 10), "smaller than"),
        (lambda: build("fd_cnn", (4, 4, 1), 10), "smaller than"),
        (lambda: build("cnn1", (60,), 10), "conv2d takes"),
        (lambda: build("mclr", (), 10), "at least one"),
        (lambda: build("resnet8", CIFAR, 10, depth=9), "depth 8, 14, 20"),
        (lambda: build("fedmd_mnist_0", MNIST, 10, filters=(64,)), "2, 3 or 4"),
        (lambda: build("fedmd_mnist_5", (8, 8, 1), 10), "smaller than"),
        (lambda: from_linen(nn.Conv(2, (3, 3)), MNIST), "must return logits"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(InputError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


def test_apply_refuses_raw_bytes_and_other_shapes(rng):
    model = build("2nn", MNIST, 10)
    params = draw(rng, model)
    with pytest.raises(InputError, match="uint8"):
        model.apply(params, jnp.zeros((2, *MNIST), jnp.uint8))
    with pytest.raises(InputError, match="takes floats"):
        model.apply(params, jnp.zeros((2, *CIFAR)))
