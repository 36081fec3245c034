"""conv2d and its gradients against sums written from the definition, wherever a federation puts them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from fdjax.errors import InputError
from fdjax.models import convolution
from fdjax.models.convolution import conv2d

# B, (H, W), c, (h, w), o, strides, padding
CASES = [
    (5, (6, 5), 3, (3, 3), 4, (1, 1), "VALID"),
    (5, (6, 5), 3, (3, 3), 4, (1, 1), "SAME"),
    (2, (7, 8), 2, (2, 4), 3, (1, 1), "SAME"),
    (2, (7, 8), 2, (5, 3), 3, (2, 3), "VALID"),
    (2, (8, 7), 2, (3, 3), 3, (2, 2), "SAME"),
    (2, (8, 7), 1, (3, 3), 3, (2, 2), ((1, 1), (1, 1))),
    (2, (6, 6), 2, (1, 1), 3, (3, 1), "VALID"),
    (1, (4, 4), 1, (2, 2), 1, (1, 1), ((3, 0), (1, 2))),
]


def pads(size, window, strides, padding):
    if padding == "VALID":
        return [(0, 0), (0, 0)]
    if padding == "SAME":  # ceil(size / stride) outputs; the odd one of the zeros goes to the high side
        need = [max((-(-n // s) - 1) * s + w - n, 0) for n, w, s in zip(size, window, strides)]
        return [(n // 2, n - n // 2) for n in need]
    return padding


def out_size(size, window, strides, padding):
    edges = pads(size, window, strides, padding)
    return [(n + sum(e) - w) // s + 1 for n, e, w, s in zip(size, edges, window, strides)]


def numpy_conv(x, kernel, g, strides, padding):
    """y, and the dx and dk of sum(g * y), one output pixel at a time in float64."""
    window, size = kernel.shape[:2], x.shape[1:3]
    edges = pads(size, window, strides, padding)
    padded = np.pad(x.astype(np.float64), ((0, 0), *edges, (0, 0)))
    out = out_size(size, window, strides, padding)
    y = np.zeros((x.shape[0], *out, kernel.shape[-1]))
    dx, dk = np.zeros_like(padded), np.zeros(kernel.shape)
    for i, j in itertools.product(*map(range, out)):
        here = (slice(None), slice(i * strides[0], i * strides[0] + window[0]))
        here += (slice(j * strides[1], j * strides[1] + window[1]),)
        y[:, i, j] = np.einsum("buvc,uvco->bo", padded[here], kernel)
        dx[here] += np.einsum("bo,uvco->buvc", g[:, i, j], kernel)
        dk += np.einsum("buvc,bo->uvco", padded[here], g[:, i, j])
    (a, _), (b, _) = edges
    return y, dx[:, a : a + size[0], b : b + size[1]], dk


def draw(rng, case, clients=()):
    batch, size, channels, window, features, strides, padding = case
    shapes = (
        (batch, *size, channels),
        (*window, channels, features),
        (batch, *out_size(size, window, strides, padding), features),
    )
    return [rng.normal(size=(*clients, *shape)).astype(np.float32) for shape in shapes]


def all_three(case):
    """(x, kernel, g) -> y, dx, dk by conv2d."""

    def run(x, kernel, g):
        y, pull = jax.vjp(lambda x, kernel: conv2d(x, kernel, *case[-2:]), x, kernel)
        return y, *pull(g)

    return run


def close(actual, expected, tolerance=1e-4):
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance)


def stacked(triples):
    return [np.stack(leaves) for leaves in zip(*triples, strict=True)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_definition(rng, case):
    x, kernel, g = draw(rng, case)
    expected = numpy_conv(x, kernel, g, *case[-2:])
    close(all_three(case)(x, kernel, g), expected)
    close(jax.jit(all_three(case))(x, kernel, g), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64(rng, case):
    with jax.enable_x64(True):
        args = [a.astype(np.float64) for a in draw(rng, case)]
        actual = jax.jit(all_three(case))(*args)
        assert {a.dtype for a in actual} == {np.dtype(np.float64)}
        close(actual, numpy_conv(*args, *case[-2:]), 1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_of_patches(rng, case):
    """The forms of other devices, which no test on CPU reaches through conv2d."""
    x, kernel, g = draw(rng, case)
    static = case[-2], tuple(pads(x.shape[1:3], kernel.shape[:2], *case[-2:]))
    actual = (
        convolution._patch_conv(x, kernel, *static),
        convolution._turned(convolution._patch_conv, g, kernel, *static, x.shape[1:3]),
        convolution._patch_gradient(x, g, *static, kernel.shape[:2]),
    )
    close(actual, numpy_conv(x, kernel, g, *case[-2:]))


@pytest.mark.parametrize("shared", ["", "x", "kernel"])
@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[5]], ids=str)
def test_vmap(rng, case, shared):
    x, kernel, g = draw(rng, case, (3,))
    axes = [None if name == shared else 0 for name in ("x", "kernel", "g")]
    args = [a[0] if axis is None else a for a, axis in zip((x, kernel, g), axes)]
    rows = [np.broadcast_to(a, (3, *a.shape)) if axis is None else a for a, axis in zip(args, axes)]
    expected = stacked(numpy_conv(*row, *case[-2:]) for row in zip(*rows))
    close(jax.jit(jax.vmap(all_three(case), in_axes=axes))(*args), expected)


def test_vmap_with_one_cotangent(rng):
    x, kernel, g = draw(rng, CASES[0], (3,))
    expected = stacked(numpy_conv(x[i], kernel[0], g[0], *CASES[0][-2:]) for i in range(3))
    close(jax.vmap(all_three(CASES[0]), in_axes=(0, None, None))(x, kernel[0], g[0]), expected)


@pytest.mark.parametrize("outer", [(0, 0, 0), (None, 0, 0), (0, None, 0)], ids=["own", "shared x", "shared kernel"])
def test_trials_outside_clients(rng, outer):
    args = draw(rng, CASES[1], (2, 3))
    args = [a[0] if axis is None else a for a, axis in zip(args, outer)]
    rows = [np.broadcast_to(a, (2, *a.shape)) if axis is None else a for a, axis in zip(args, outer)]
    actual = jax.jit(jax.vmap(jax.vmap(all_three(CASES[1])), in_axes=outer))(*args)
    for t in range(2):
        expected = stacked(numpy_conv(*(a[t, c] for a in rows), *CASES[1][-2:]) for c in range(3))
        close([a[t] for a in actual], expected)


def test_inside_scan_while_and_checkpoint(rng):
    x, kernel, g = draw(rng, CASES[1], (3,))
    expected = stacked(numpy_conv(*row, *CASES[1][-2:]) for row in zip(x, kernel, g))
    one = jax.checkpoint(all_three(CASES[1]))
    close(jax.jit(lambda *rows: lax.scan(lambda _, row: (None, one(*row)), None, rows)[1])(x, kernel, g), expected)

    def step(i, total):
        return jax.tree.map(jnp.add, total, one(x[i], kernel[i], g[i]))

    @jax.jit
    def loop(steps):
        return lax.fori_loop(0, steps, step, tuple(jnp.zeros(e.shape[1:], jnp.float32) for e in expected))

    x, kernel, g = map(jnp.asarray, (x, kernel, g))
    close(loop(3), [e.sum(0) for e in expected])


@pytest.mark.parametrize("channels", [1, 3])
def test_in_pieces(rng, monkeypatch, channels):
    case = (7, (6, 5), channels, (3, 3), 4, (1, 1), "SAME")
    x, kernel, g = draw(rng, case)
    expected = numpy_conv(x, kernel, g, *case[-2:])
    one = 6 * 5 * 9 * channels * 4 // (2 if channels == 1 else 1)  # one channel is given twice the room
    for images in (0, 1, 3, 4, 7):  # no room for one, one by one, with a rest of one, one piece and a rest, all
        monkeypatch.setattr(convolution, "PIECE_BYTES", images * one)
        close(all_three(case)(x, kernel, g), expected)


def test_shard_map_trains_each_client_on_its_own_data(rng):
    x, kernel, g = draw(rng, CASES[1], (4,))
    expected = stacked(numpy_conv(x[i], kernel[0], g[i], *CASES[1][-2:]) for i in range(4))
    mesh = jax.make_mesh((2,), ("c",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    own = PartitionSpec("c")
    run = jax.shard_map(
        lambda x, kernel, g: jax.vmap(all_three(CASES[1]), in_axes=(0, None, 0))(x, kernel, g),
        mesh=mesh,
        in_specs=(own, PartitionSpec(), own),
        out_specs=(own, own, own),
        check_vma=False,
    )
    close(jax.jit(run)(x, kernel[0], g), expected)


def test_second_derivatives(rng):
    x, kernel, _ = draw(rng, CASES[3])
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)

    def norm(conv):
        def value(x, kernel):
            gradients = jax.grad(lambda *args: jnp.sum(jnp.sin(conv(*args))), (0, 1))(x, kernel)
            return sum(jnp.sum(jnp.cos(gradient)) for gradient in gradients)

        return jax.grad(value, (0, 1))(x, kernel)

    def native(x, kernel):
        return lax.conv_general_dilated(x, kernel, CASES[3][-2], "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    close(norm(lambda *args: conv2d(*args, *CASES[3][-2:])), norm(native))


@pytest.mark.parametrize("axes", [(0, 0, 0), (None, 0, 0), (0, None, 0)])
def test_vmap_lowers_to_no_grouped_convolution(rng, axes):
    x, kernel, g = draw(rng, CASES[0], (3,))
    args = [a[0] if axis is None else a for a, axis in zip((x, kernel, g), axes)]
    text = jax.jit(jax.vmap(all_three(CASES[0]), in_axes=axes)).lower(*args).as_text()
    assert "stablehlo.convolution" in text
    assert "feature_group_count = 1 " in text
    for line in text.splitlines():
        if "stablehlo.convolution" in line:
            assert "feature_group_count = 1 " in line
            assert "batch_group_count = 1 " in line


def lowered(device, case, args, axes=None):
    run = all_three(case) if axes is None else jax.vmap(all_three(case), in_axes=axes)
    return jax.jit(run).trace(*args).lower(lowering_platforms=(device,)).as_text()


def test_other_devices_convolve_natively(rng):
    x, kernel, g = draw(rng, CASES[1])
    assert lowered("cuda", CASES[1], (x, kernel, g)).count("stablehlo.convolution") == 3
    assert lowered("cpu", CASES[1], (x, kernel, g)).count("stablehlo.convolution") == 2


def test_other_devices_take_clients_with_own_kernels_at_once(rng):
    text = lowered("cuda", CASES[1], draw(rng, CASES[1], (3,)), (0, 0, 0))
    assert "stablehlo.convolution" not in text
    assert "stablehlo.while" not in text
    assert text.count("batching_dims = [0] x [0]") == 3


def test_one_channel_is_a_product_on_cpu(rng):
    case = (2, (6, 6), 1, (3, 3), 4, (1, 1), "SAME")
    x, kernel, _ = draw(rng, case)
    run = jax.jit(lambda x, kernel: conv2d(x, kernel, *case[-2:]))
    for device, native in (("cpu", False), ("cuda", True)):
        text = run.trace(x, kernel).lower(lowering_platforms=(device,)).as_text()
        assert ("stablehlo.convolution" in text) == native


def test_input_gradient_of_first_layer_is_not_computed(rng):
    x, kernel, g = draw(rng, CASES[0])
    compiled = jax.jit(lambda x, kernel, g: all_three(CASES[0])(x, kernel, g)[2]).lower(x, kernel, g).compile()
    assert " convolution(" not in compiled.as_text()


@pytest.mark.parametrize(
    ("x", "kernel", "padding", "message"),
    [
        ((1, 4, 4, 2), (3, 3, 3, 1), "VALID", "same c"),
        ((4, 4, 2), (3, 3, 2, 1), "VALID", "same c"),
        ((1, 2, 4, 2), (3, 3, 2, 1), "VALID", "smaller than the 3x3 kernel"),
        ((1, 4, 4, 2), (3, 3, 2, 1), "same", "padding must be"),
    ],
)
def test_bad_shapes(x, kernel, padding, message):
    with pytest.raises(InputError, match=message):
        conv2d(np.zeros(x, np.float32), np.zeros(kernel, np.float32), padding=padding)
