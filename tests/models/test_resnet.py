"""Residual nets, FedMD's and FedGKT's against the sums that define them, in NumPy float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdjax.models import build
from fdjax.models.fedmd_zoo import smooth


def numpy_conv(x, kernel, stride, pads):
    """One output pixel at a time; `pads` are (low, high), alike for rows and columns."""
    x = np.pad(x, ((0, 0), pads, pads, (0, 0)))
    h = kernel.shape[0]
    rows, columns = ((n - h) // stride + 1 for n in x.shape[1:3])
    y = np.zeros((len(x), rows, columns, kernel.shape[-1]))
    for i, j in itertools.product(range(rows), range(columns)):
        window = x[:, i * stride : i * stride + h, j * stride : j * stride + h]
        y[:, i, j] = np.einsum("buvc,uvco->bo", window, kernel)
    return y


def numpy_norm(x, params, groups):
    """Each example's groups of neighbouring channels to mean 0 and variance 1, then scale and shift."""
    parts = x.reshape(*x.shape[:3], groups, -1)
    centered = parts - parts.mean((1, 2, 4), keepdims=True)
    normal = centered / np.sqrt((centered**2).mean((1, 2, 4), keepdims=True) + 1e-6)
    return normal.reshape(x.shape) * params["scale"] + params["bias"]


def relu(x):
    return np.maximum(x, 0)


def numpy_pool(x, stride):
    """Mean of what lies inside 2x2 windows."""
    rows, columns = (n // stride for n in x.shape[1:3])
    y = np.zeros((len(x), rows, columns, x.shape[-1]))
    for i, j in itertools.product(range(rows), range(columns)):
        y[:, i, j] = x[:, i * stride : i * stride + 2, j * stride : j * stride + 2].mean((1, 2))
    return y


def numpy_unit(x, params, stride=1):
    kernel = params["kernel"]
    pad = kernel.shape[0] // 2
    return numpy_norm(numpy_conv(x, kernel, stride, (pad, pad)), params["GroupNorm_0"], 2)


def numpy_block(x, params, stride=1):
    y = relu(numpy_unit(x, params["_Conv_0"], stride))
    y = numpy_unit(y, params["_Conv_1"])
    if "_Conv_2" in params:
        x = numpy_unit(x, params["_Conv_2"], stride)
    return relu(x + y)


def numpy_trunk(x, params, blocks):
    for i in range(3 * blocks):
        x = numpy_block(x, params[f"BasicBlock_{i}"], 2 if i in (blocks, 2 * blocks) else 1)
    return x.mean((1, 2)) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]


def drawn(model, seed=0):
    """Random params, as float32 and as float64."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 3, shapes)
    return params, jax.tree.map(lambda leaf: leaf.astype(np.float64), params)


def close(actual, expected):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("depth", [8, 14])
@pytest.mark.parametrize("shape", [(8, 8, 3), (7, 9, 1)])
def test_resnet(rng, depth, shape):
    model = build("resnet8", shape, 5, depth=depth, width=4)
    params, exact = drawn(model)
    x = rng.normal(size=(2, *shape)).astype(np.float32)
    h = relu(numpy_unit(x.astype(np.float64), exact["_Conv_0"]))
    close(model.apply(params, jnp.asarray(x)), numpy_trunk(h, exact["ResNetTrunk_0"], (depth - 2) // 6))


@pytest.mark.parametrize("filters", [(4, 6), (4, 6, 8), (4, 6, 8, 2)])
@pytest.mark.parametrize("side", [16, 15])
def test_fedmd_net(rng, filters, side):
    model = build("fedmd_cifar_0", (side, side, 3), 5, filters=filters, groups=2)
    params, exact = drawn(model)
    x = rng.normal(size=(2, side, side, 3)).astype(np.float32)

    def unit(i, h, stride, pads=(0, 0)):
        conv = exact[f"Conv_{i}"]
        return relu(numpy_norm(numpy_conv(h, conv["kernel"], stride, pads) + conv["bias"], exact[f"GroupNorm_{i}"], 2))

    h = numpy_pool(unit(0, x.astype(np.float64), 1, (1, 1)), 1)
    if len(filters) == 2:
        h = unit(1, h, 2)
    else:
        assert exact["Conv_1"]["kernel"].shape[:2] == (2, 2)
        h = unit(2, numpy_pool(unit(1, h, 2), 2), 2)
    if len(filters) == 4:
        h = unit(3, h, 1, (1, 1))
    close(model.apply(params, jnp.asarray(x)), h.reshape(2, -1) @ exact["Dense_0"]["kernel"])


def test_smooth(rng):
    x = rng.normal(size=(2, 5, 4, 3)).astype(np.float32)
    np.testing.assert_allclose(smooth(jnp.asarray(x)), numpy_pool(x.astype(np.float64), 1), rtol=1e-5, atol=1e-6)


# The two nets of FedGKT.


@pytest.mark.parametrize(("shape", "features"), [((28, 28, 1), (14, 14, 8)), ((32, 32, 3), (16, 16, 8))])
def test_gkt_edge_and_server(rng, shape, features):
    edge = build("gkt_edge", shape, 10)
    params, exact = drawn(edge)
    x = rng.normal(size=(2, *shape)).astype(np.float32)
    h = edge.blocks[0](params, jnp.asarray(x))
    assert h.shape == (2, *features)
    expected = relu(numpy_unit(x.astype(np.float64), exact["stem"], 2))
    close(h, expected)
    pooled = numpy_block(expected, exact["body_0"]).mean((1, 2))
    close(edge.features(params, jnp.asarray(x)), pooled)
    close(edge.apply(params, jnp.asarray(x)), pooled @ exact["out"]["kernel"] + exact["out"]["bias"])
    server = build("gkt_server", features, 10, width=8)
    above, exact = drawn(server, 1)
    close(server.apply(above, h), numpy_trunk(expected, exact, 1))


def test_every_part_trains_its_own_params(rng):
    edge = build("gkt_edge", (8, 8, 1), 3)
    params = edge.init(jax.random.key(0))
    h, names = jnp.asarray(rng.normal(size=(4, 8, 8, 1)), jnp.float32), ("stem", "body_0", "", "out")
    for block, name in zip(edge.blocks, names, strict=True):
        gradient = jax.jit(jax.grad(lambda p, block=block, h=h: jnp.sum(jnp.square(block(p, h)))))(params)
        assert {name for name, g in gradient.items() if any(map(jnp.any, jax.tree.leaves(g)))} == {name} - {""}
        h = block(params, h)
