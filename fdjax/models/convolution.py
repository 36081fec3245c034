"""2-d convolution that runs near the speed of a matrix product inside loops and under vmap.

XLA:CPU computes the gradients of a convolution slowly inside a loop, and a vmapped convolution with a kernel per
client (a grouped convolution) slower still. So the three bilinear maps of a convolution, `conv2d`, its input gradient
and its weight gradient, are written here in forms that stay fast on CPU. Each is the derivative of the other two, so
reverse-mode gradients of any order work; forward mode (`jax.jvp`) does not.

Elsewhere than on CPU the three are XLA's own convolutions, and a batch of matrix products under vmap with own kernels.
That is lowered for CUDA in the tests, and was timed on one GPU (`benchmarks/results/speed_gpu`). The form is chosen at
lowering (`lax.platform_dependent`) and not by the default backend at tracing, so that exporting and mixed devices work
too.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from fdjax.errors import InputError
from fdjax.types import Array

Pads = tuple[tuple[int, int], tuple[int, int]]
Padding = str | Sequence[tuple[int, int]]

# The weight gradient's patches are built and multiplied in pieces of this size, so that they stay in a core's cache.
PIECE_BYTES = 2 << 20


def conv2d(x: Array, kernel: Array, strides: tuple[int, int] = (1, 1), padding: Padding = "VALID") -> jax.Array:
    """Cross-correlate images with a kernel.

    y[b, i, j, o] = sum_{u, v, c} x[b, i*s0 + u - p0, j*s1 + v - p1, c] * kernel[u, v, c, o], with x zero outside.

    Args:
      x: `[B, H, W, c]`.
      kernel: `[h, w, c, o]`.
      strides: `(s0, s1)`.
      padding: 'SAME', 'VALID' or ((low, high), (low, high)).

    Returns:
      `[B, H', W', o]`.

    Raises:
      InputError: the shapes do not fit, or the input is smaller than the kernel.
    """
    pads = resolve_padding(x.shape, kernel.shape, strides, padding)
    dtype = jnp.result_type(x, kernel)
    return _conv(jnp.asarray(x, dtype), jnp.asarray(kernel, dtype), tuple(strides), pads)


def resolve_padding(
    x_shape: Sequence[int], kernel_shape: Sequence[int], strides: tuple[int, int], padding: Padding
) -> Pads:
    """`padding` as ((low, high), (low, high)); raises `InputError` for shapes that cannot be convolved."""
    if len(x_shape) != 4 or len(kernel_shape) != 4 or x_shape[3] != kernel_shape[2]:
        raise InputError(
            f"conv2d takes x [B, H, W, c] and kernel [h, w, c, o] with the same c; got {tuple(x_shape)} and "
            f"{tuple(kernel_shape)}"
        )
    size, window = x_shape[1:3], kernel_shape[:2]
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise InputError(f"padding must be 'SAME', 'VALID' or two (low, high) pairs; got {padding!r}")
        pads = lax.padtype_to_pads(size, window, strides, padding)
    else:
        pads = padding
    (a, b), (c, d) = pads
    if size[0] + a + b < window[0] or size[1] + c + d < window[1]:
        raise InputError(
            f"an image of {size[0]}x{size[1]} is smaller than the {window[0]}x{window[1]} kernel; "
            "use padding='SAME' or larger images"
        )
    return ((int(a), int(b)), (int(c), int(d)))


# The three bilinear maps, each with the other two as its derivative.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x, kernel, strides, pads):
    static = {"strides": strides, "pads": pads}
    one, product = functools.partial(_conv_one, **static), functools.partial(_patch_conv, **static)
    return _lifted(one, product, fold_first=_fold_batch, fold_second=_fold_out)(x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _input_gradient(g, kernel, strides, pads, size):
    static = {"strides": strides, "pads": pads, "size": size}
    one, product = functools.partial(_input_gradient_one, **static), functools.partial(_turned, _patch_conv, **static)
    return _lifted(one, product, fold_first=_fold_batch)(g, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _weight_gradient(x, g, strides, pads, window):
    static = {"strides": strides, "pads": pads, "window": window}
    one, product = functools.partial(_weight_gradient_one, **static), functools.partial(_patch_gradient, **static)
    return _lifted(one, product, fold_second=_fold_out)(x, g)


def _conv_bwd(strides, pads, saved, g):
    x, kernel = saved
    dx = _input_gradient(g, kernel, strides, pads, x.shape[1:3])
    return dx, _weight_gradient(x, g, strides, pads, kernel.shape[:2])


def _input_gradient_bwd(strides, pads, size, saved, dx):
    g, kernel = saved
    return _conv(dx, kernel, strides, pads), _weight_gradient(dx, g, strides, pads, kernel.shape[:2])


def _weight_gradient_bwd(strides, pads, window, saved, dk):
    x, g = saved
    return _input_gradient(g, dk, strides, pads, x.shape[1:3]), _conv(x, dk, strides, pads)


_conv.defvjp(lambda x, k, *static: (_conv(x, k, *static), (x, k)), _conv_bwd)
_input_gradient.defvjp(lambda g, k, *static: (_input_gradient(g, k, *static), (g, k)), _input_gradient_bwd)
_weight_gradient.defvjp(lambda x, g, *static: (_weight_gradient(x, g, *static), (x, g)), _weight_gradient_bwd)


# Each map for one client: native where that is fast, and what replaces it on CPU.


def _native(x, kernel, strides, pads):
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _conv_one(x, kernel, strides, pads):
    native = functools.partial(_native, strides=strides, pads=pads)
    window, size = kernel.shape[:2], _out_size(x, kernel, strides, pads)
    if x.shape[-1] != 1 or math.prod((x.shape[0], *size, *window)) * x.dtype.itemsize > _piece_bytes(x):
        return native(x, kernel)

    def product(x, kernel):
        patches = _tap_rows(_pad(x, pads), strides, size, window)
        y = lax.dot_general(patches, kernel.reshape(len(patches), -1), (((0,), (0,)), ((), ())))
        return y.reshape(x.shape[0], *size, -1)

    # XLA:CPU convolves one channel at a tenth of the speed of a product.
    return lax.platform_dependent(x, kernel, cpu=product, default=native)


def _input_gradient_one(g, kernel, strides, pads, size):
    x = jax.ShapeDtypeStruct((g.shape[0], *size, kernel.shape[2]), g.dtype)
    native = lambda g, kernel: jax.linear_transpose(lambda x: _native(x, kernel, strides, pads), x)(g)[0]  # noqa: E731
    turned = functools.partial(_turned, _native, strides=strides, pads=pads, size=size)
    return lax.platform_dependent(g, kernel, cpu=turned, default=native)


def _turned(conv, g, kernel, strides, pads, size):
    """A forward convolution of g, spread by the strides, with the kernel turned by 180 degrees."""
    window = kernel.shape[:2]
    low = [w - 1 - p for w, (p, _) in zip(window, pads, strict=True)]
    high = [
        n + w - 1 - lo - ((m - 1) * s + 1)
        for n, w, lo, m, s in zip(size, window, low, g.shape[1:3], strides, strict=True)
    ]
    edges = tuple(zip(low, high, strict=True))
    turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    if max(strides) == 1:
        return conv(g, turned, (1, 1), edges)
    # XLA:CPU has no fast path for a dilated input, so the zeros are written out.
    return conv(_pad(g, edges, [s - 1 for s in strides]), turned, (1, 1), ((0, 0), (0, 0)))


def _weight_gradient_one(x, g, strides, pads, window):
    kernel = jax.ShapeDtypeStruct((*window, x.shape[-1], g.shape[-1]), x.dtype)
    native = lambda x, g: jax.linear_transpose(lambda k: _native(x, k, strides, pads), kernel)(g)[0]  # noqa: E731
    product = functools.partial(_patch_gradient, strides=strides, pads=pads, window=window, piece_bytes=_piece_bytes(x))
    return lax.platform_dependent(x, g, cpu=product, default=native)


# The same maps as products of patches.


def _patch_conv(x, kernel, strides, pads):
    window, size = kernel.shape[:2], _out_size(x, kernel, strides, pads)
    patches = _patches(_pad(x, pads), strides, size, window)
    return patches @ kernel.reshape(-1, kernel.shape[-1])


def _patch_gradient(x, g, strides, pads, window, piece_bytes=None):
    """sum_{b, i, j} patches(x)[b, i, j, :] g[b, i, j, :]', in pieces of the batch."""
    batch, *out, features = g.shape
    x = _pad(x, pads)
    width = window[0] * window[1] * x.shape[-1]
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def piece(x, g, stored=False):
        g = g.reshape(-1, features)
        if x.shape[-1] == 1:
            return jnp.matmul(_tap_rows(x, strides, out, window), g, preferred_element_type=wide).T
        patches = jnp.concatenate(_taps(x, strides, out, window), -1) if stored else _patches(x, strides, out, window)
        patches = patches.reshape(-1, width)
        # g first: XLA:CPU multiplies [o, n] @ [n, width] faster than its transpose.
        return lax.dot_general(g, patches, (((0,), (0,)), ((), ())), preferred_element_type=wide)

    def step(index, total):
        return total + piece(*(lax.dynamic_slice_in_dim(a, index * size, size) for a in (x, g)), stored=True)

    image_bytes = math.prod(out) * width * x.dtype.itemsize
    size = batch if piece_bytes is None else min(batch, max(1, piece_bytes // image_bytes))
    whole = batch // size
    # A loop, because XLA:CPU builds the patches of all unrolled pieces before it multiplies the first.
    zero = jnp.zeros((features, width), wide)
    total = lax.fori_loop(0, whole, step, zero) if whole > 1 else piece(x[:size], g[:size])
    if batch % size:
        total += piece(x[whole * size :], g[whole * size :])
    return total.T.reshape(*window, -1, features).astype(x.dtype)


def _piece_bytes(x):
    """Twice the piece for one channel, so that more often the whole batch's patches serve x's map and the gradient."""
    return PIECE_BYTES * (2 if x.shape[-1] == 1 else 1)


def _patches(x, strides, size, window):
    """The taps of a padded x side by side, `[B, H', W', h * w * c]`.

    Columns first: XLA:CPU computes what x comes from anew for each slice of it, unless it is stored, as in a loop.
    """
    (s0, s1), (rows, columns) = strides, size
    x = jnp.concatenate([x[:, :, v : v + (columns - 1) * s1 + 1 : s1] for v in range(window[1])], -1)
    return jnp.concatenate([x[:, u : u + (rows - 1) * s0 + 1 : s0] for u in range(window[0])], -1)


def _taps(x, strides, size, window):
    """What each kernel element (u, v) meets of a padded x: `[B, H', W', c]` each."""
    (s0, s1), (rows, columns) = strides, size
    return [
        x[:, u : u + (rows - 1) * s0 + 1 : s0, v : v + (columns - 1) * s1 + 1 : s1]
        for u in range(window[0])
        for v in range(window[1])
    ]


def _tap_rows(x, strides, size, window):
    """The taps of a padded x of one channel, a row each: `[h * w, B * H' * W']`; written faster than `[.., h * w]`."""
    return jnp.stack([tap.reshape(-1) for tap in _taps(x, strides, size, window)])


def _pad(x, pads, interior=(0, 0)):
    """x with zeros around (a negative edge cuts) and between its pixels."""
    edges = [(*edge, between) for edge, between in zip(pads, interior, strict=True)]
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])


def _out_size(x, kernel, strides, pads):
    sizes = zip(x.shape[1:3], kernel.shape[:2], strides, pads, strict=True)
    return [(n + sum(edge) - w) // s + 1 for n, w, s, edge in sizes]


# What vmap makes of them.


def _lifted(
    one: Callable, product: Callable, fold_first: Callable | None = None, fold_second: Callable | None = None
) -> Callable:
    """`one(a, b)` with vmap's form chosen by what is batched.

    Where one operand is shared, clients fold into another axis. Where each has its own, CPU takes them one by one;
    other devices, which a client alone would leave idle, take `product`, a batch of matrix products.
    """
    lifted = custom_vmap(one)

    @lifted.def_vmap
    def rule(axis_size, in_batched, a, b):
        first, second = in_batched
        again = _lifted(one, product, fold_first, fold_second)
        if first and not second and fold_first:
            return fold_first(again, a, b), True
        if second and not first and fold_second:
            return fold_second(again, a, b), True

        def in_sequence(a, b):
            rows = (a if first else None, b if second else None)
            return lax.map(lambda row: again(a if row[0] is None else row[0], b if row[1] is None else row[1]), rows)

        at_once = jax.vmap(product, in_axes=(0 if first else None, 0 if second else None))
        return lax.platform_dependent(a, b, cpu=in_sequence, default=at_once), True

    return lifted


def _fold_batch(bilinear, a, b):
    """Clients with one kernel are a larger batch: a `[C, B, ...]`."""
    out = bilinear(a.reshape(-1, *a.shape[2:]), b)
    return out.reshape(*a.shape[:2], *out.shape[1:])


def _fold_out(bilinear, a, b):
    """Clients with one input are more output channels: b `[C, ..., o]`."""
    out = bilinear(a, jnp.moveaxis(b, 0, -2).reshape(*b.shape[1:-1], -1))
    return jnp.moveaxis(out.reshape(*out.shape[:-1], b.shape[0], b.shape[-1]), -2, 0)
