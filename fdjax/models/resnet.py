"""Residual networks for small images, and the two halves of FedGKT's.

Deviations from the papers: GroupNorm (2 groups) for BatchNorm (`norm` = batch), whose running statistics are not a
client's parameters; linen's initialisation, as for all nets here.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from fdjax.errors import InputError
from fdjax.models.convolution import conv2d
from fdjax.models.layers import Block, Net, norm, rectified


class _Conv(nn.Module):
    """h x h convolution without a bias, padded by h // 2 on every side, then a normalisation."""

    features: int
    size: int = 3
    stride: int = 1
    groups: int = 2
    norm: str = "group"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        edge = (self.size // 2, self.size // 2)
        y = conv2d(x, kernel, (self.stride, self.stride), (edge, edge))
        return norm(self.norm, self.groups, train)(y)


class BasicBlock(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + x); x goes through a 1x1 convolution where the shapes differ."""

    features: int
    stride: int = 1
    groups: int = 2
    norm: str = "group"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = functools.partial(_Conv, self.features, groups=self.groups, norm=self.norm)
        y = nn.relu(conv(stride=self.stride)(x, train))
        y = conv()(y, train)
        if x.shape != y.shape:
            x = conv(size=1, stride=self.stride)(x, train)
        return nn.relu(x + y)


def mean(x: jax.Array) -> jax.Array:
    """Of every channel: `[B, h, w, c]` -> `[B, c]`."""
    return x.mean((1, 2))


class ResNetTrunk(Net):
    """Three stages of `residual_blocks` of `width`, 2 and 4 times `width` channels, global mean, logits.

    A ResNet without its first convolution: the server's net of FedGKT (He et al. 2020), on features `[B, h, w, c]`. 9
    and 18 residual blocks have the 55 and 109 layers of the paper's (whose code has 6 and 12 bottleneck blocks).
    """

    num_classes: int
    residual_blocks: int = 1
    width: int = 16
    groups: int = 2
    norm: str = "group"

    @nn.compact
    def blocks(self, train: bool) -> list[Block]:
        blocks = [
            BasicBlock(self.width << stage, 2 if stage and not i else 1, self.groups, self.norm)
            for stage in range(3)
            for i in range(self.residual_blocks)
        ]
        return [*(functools.partial(block, train=train) for block in blocks), mean, nn.Dense(self.num_classes)]


class ResNet(Net):
    """ResNet for CIFAR of `depth` = 6 n + 2 layers, n blocks a stage of 16, 32 and 64 channels (He et al. 2016).

    Of depth 8 and 20 in Lin et al. (2020), FedDF, whose code has 1x1 convolutions for shortcuts, as here.
    """

    num_classes: int
    depth: int = 8
    width: int = 16
    groups: int = 2
    norm: str = "group"

    @nn.compact
    def blocks(self, train: bool) -> list[Block]:
        if self.depth < 8 or self.depth % 6 != 2:
            raise InputError(f"a ResNet has depth 8, 14, 20, ... (6 n + 2); got {self.depth}")
        stem = _Conv(self.width, groups=self.groups, norm=self.norm)
        trunk = ResNetTrunk(self.num_classes, (self.depth - 2) // 6, self.width, self.groups, self.norm)
        return [rectified(functools.partial(stem, train=train)), *trunk.blocks(train)]


class GKTEdge(Net):
    """A client's net of FedGKT (He et al. 2020): one 3x3 convolution, its extractor, then blocks, mean, logits.

    The paper's has `width` = 16, `stride` = 1 and 1 of `residual_blocks` (its ResNet-5) or more. Our defaults, half the
    channels at a quarter of the pixels, send an eighth of its features.
    """

    num_classes: int
    width: int = 8
    stride: int = 2
    residual_blocks: int = 1
    groups: int = 2
    norm: str = "group"

    @nn.compact
    def blocks(self, train: bool) -> list[Block]:
        more = {"groups": self.groups, "norm": self.norm}
        stem = _Conv(self.width, stride=self.stride, **more, name="stem")
        body = [BasicBlock(self.width, **more, name=f"body_{i}") for i in range(self.residual_blocks)]
        body = [functools.partial(block, train=train) for block in body]
        return [
            rectified(functools.partial(stem, train=train)), *body, mean, nn.Dense(self.num_classes, name="out")
        ]  # fmt: skip
