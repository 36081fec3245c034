"""Nets as chains of layers: units that move take their inputs and outputs along, convolutions' channels in blocks."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from choices import some

from fdjax import models
from fdjax.errors import InputError
from fdjax.exchange import chain
from fdjax.exchange.traffic import size
from fdjax.models.layers import Conv, Net, flatten, max_pool, rectified

IMAGE = (12, 12, 2)


class VGGLike(Net):
    """Two stages of two convolutions, as VGG has them, and dense layers."""

    num_classes: int = 3

    @nn.compact
    def blocks(self, train):
        drop = nn.Dropout(0.1, deterministic=not train)
        stages = [rectified(Conv(6, padding="SAME")), rectified(Conv(8, padding="SAME"), max_pool)]
        stages += [rectified(Conv(4, padding="SAME"), drop), rectified(Conv(5, padding="SAME"), max_pool)]
        return [*stages, rectified(flatten, nn.Dense(7)), nn.Dense(self.num_classes, use_bias=False)]


class Residual(Net):
    """A net whose second block adds its input."""

    num_classes: int = 3

    @nn.compact
    def blocks(self, train):
        middle = nn.Dense(6)
        return [rectified(flatten, nn.Dense(6)), lambda h: h + nn.relu(middle(h)), nn.Dense(self.num_classes)]


class Grouped(Net):
    """A net with a convolution of two groups."""

    num_classes: int = 3

    @nn.compact
    def blocks(self, train):
        convs = nn.Conv(6, (3, 3)), nn.Conv(6, (3, 3), feature_group_count=2)
        return [*map(rectified, convs), flatten, nn.Dense(self.num_classes)]


class AtOnce(nn.Module):
    """A net whose features are two layers."""

    num_classes: int = 3

    def setup(self):
        self.first, self.second, self.last = nn.Dense(5), nn.Dense(4), nn.Dense(self.num_classes)

    def features(self, x):
        return nn.relu(self.second(nn.relu(self.first(flatten(x)))))

    def head(self, h):
        return self.last(h)

    def __call__(self, x):
        return self.head(self.features(x))


NETS = {
    "2nn": lambda: models.build("2nn", IMAGE, 3, width=7),
    "niid_cnn": lambda: models.build("niid_cnn", (16, 16, 2), 3),
    "fedgen_cnn": lambda: models.build("fedgen_cnn", IMAGE, 3, norm="none"),
    "vgg": lambda: models.from_linen(VGGLike(), IMAGE),
    "mclr": lambda: models.build("mclr", IMAGE, 3),
}
SOME_NETS = some(NETS, "vgg", "mclr")
WIDTHS = {
    "2nn": (7, 7), "niid_cnn": (6, 16, 120, 84), "fedgen_cnn": (6, 16, 32),
    "vgg": (6, 8, 4, 5, 7), "mclr": (),
}  # fmt: skip


@functools.cache
def made(name):
    model = NETS[name]()
    shape = (16, 16, 2) if name == "niid_cnn" else IMAGE
    x = np.random.default_rng(1).normal(size=(4, *shape)).astype(np.float32)
    params = jax.tree.map(lambda w: w + np.float32(0.05), jax.device_get(jax.jit(model.init)(jax.random.key(0))))
    model = model._replace(apply=jax.jit(model.apply))
    return model, chain.chain_of(model, shape, "fedma"), params, x


@pytest.mark.parametrize("name", SOME_NETS)
def test_moved_units_change_nothing(name):
    """Chosen anew by a permutation, or layer by layer: its vectors moved, and then the inputs of the next layer."""
    model, net, params, x = made(name)
    assert net.widths == WIDTHS[name]
    rng, expected = np.random.default_rng(2), model.apply(params, x)
    places = [rng.permutation(width) for width in net.widths]
    chosen = jax.jit(net.chosen)
    np.testing.assert_allclose(model.apply(chosen(params, places), x), expected, rtol=1e-4, atol=1e-5)

    @jax.jit
    def moved_by(params, places):
        moved = params
        for layer, after, place in zip(net.layers[:-1], net.layers[1:], places, strict=True):
            rows = layer.vectors(layer.of(moved))
            moved = layer.put(moved, layer.from_vectors(jnp.zeros_like(rows).at[place].set(rows)))
            moved = after.put(moved, chain.inputs_moved(after.of(moved), place))
        return moved

    moved = moved_by(params, places)
    np.testing.assert_allclose(model.apply(moved, x), expected, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_equal(chosen(moved, places), params)


@pytest.mark.parametrize("name", SOME_NETS)
def test_masked_units_have_no_weights_and_no_bytes(name):
    model, net, params, x = made(name)
    whole, masked = tuple(np.ones(width, np.float32) for width in net.widths), jax.jit(net.masked)
    assert float(net.size(whole)) == size(params)
    masks = net.narrowed(0.5)
    assert [int(mask.sum()) for mask in masks] == [max(1, round(width / 2)) for width in net.widths]
    narrow = jax.device_get(masked(params, masks))
    numbers = sum(int(np.count_nonzero(leaf)) for leaf in jax.tree.leaves(narrow))
    assert float(net.size(masks)) == 4 * numbers
    rubbish = jax.tree.map(lambda w, kept: np.where(kept == 0, np.float32(9), w), params, narrow)
    chex.assert_trees_all_equal(masked(rubbish, masks), narrow)
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(model.apply(net.masked(params, masks), x) ** 2)))(rubbish)
    assert all(not np.any(g[k == 0]) for g, k in zip(*map(jax.tree.leaves, (gradient, narrow)), strict=True))


def test_scaled_kernels_make_up_for_inputs_that_they_lost():
    _, net, params, _ = made("2nn")
    masks = net.narrowed(2 / 7)
    plain, scaled = (net.layers[1].of(net.masked(params, masks, scaled=s)) for s in (False, True))
    np.testing.assert_allclose(scaled["kernel"], plain["kernel"] * np.sqrt(7 / 2), rtol=1e-6)
    np.testing.assert_allclose(scaled["bias"], plain["bias"], rtol=1e-6)


REFUSED = {
    "normalised": (
        lambda: models.build("fedgen_cnn", IMAGE, 3),
        r"^fedma needs a plain chain of layers without normalisation, a kernel and a bias each, but block 0 of "
        r"'fedgen_cnn' has .*GroupNorm_0/scale.*; use 2nn or niid_cnn, or --norm=none$",
    ),
    "at once": (lambda: models.from_linen(AtOnce(), IMAGE, "two"), "but block 0 of 'two' has first/bias, first/"),
    "residual": (
        lambda: models.from_linen(Residual(), IMAGE, "adds"),
        "^fedma needs a plain chain of layers, but the order of hidden units matters to 'adds', which adds or groups",
    ),
    "grouped": (lambda: models.from_linen(Grouped(), IMAGE, "groups"), "fedma needs a plain chain of layers"),
    "resnet": (lambda: models.build("resnet8", IMAGE, 3), "fedma needs a plain chain of layers without normalisation"),
    "no blocks": (
        lambda: models.build("2nn", IMAGE, 3)._replace(name="own", blocks=()),
        "fedma needs the parts of its models, but 'own' has none",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_other_nets_are_told_in_one_line(case):
    build, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as caught:
        chain.chain_of(build(), IMAGE, "fedma")
    assert "\n" not in str(caught.value)
