"""Residual networks for small images, and the two halves of FedGKT's.

Deviations from the papers: GroupNorm (2 groups) for BatchNorm, whose running statistics are not a client's parameters;
linen's initialisation, as for all nets here.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fdjax.errors import InputError
from fdjax.models.convolution import conv2d


class _Conv(nn.Module):
    """h x h convolution without a bias, padded by h // 2 on every side, then GroupNorm."""

    features: int
    size: int = 3
    stride: int = 1
    groups: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        edge = (self.size // 2, self.size // 2)
        return nn.GroupNorm(num_groups=self.groups)(conv2d(x, kernel, (self.stride, self.stride), (edge, edge)))


class BasicBlock(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + x); x goes through a 1x1 convolution where the shapes differ."""

    features: int
    stride: int = 1
    groups: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(_Conv(self.features, stride=self.stride, groups=self.groups)(x))
        y = _Conv(self.features, groups=self.groups)(y)
        if x.shape != y.shape:
            x = _Conv(self.features, 1, self.stride, self.groups)(x)
        return nn.relu(x + y)


class ResNetTrunk(nn.Module):
    """Three stages of `blocks` blocks of `width`, 2 and 4 times `width` channels, global mean, logits.

    A ResNet without its first convolution: the server's net of FedGKT (He et al. 2020), on features `[B, h, w, c]`.
    `blocks` = 9 and 18 have the 55 and 109 layers of the paper's (whose code has 6 and 12 bottleneck blocks instead).
    """

    num_classes: int
    blocks: int = 1
    width: int = 16
    groups: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for stage in range(3):
            for i in range(self.blocks):
                stride = 2 if stage and not i else 1
                x = BasicBlock(self.width << stage, stride, self.groups)(x)
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


class ResNet(nn.Module):
    """ResNet for CIFAR of `depth` = 6 n + 2 layers, n blocks a stage of 16, 32 and 64 channels (He et al. 2016).

    Of depth 8 and 20 in Lin et al. (2020), FedDF, whose code has 1x1 convolutions for shortcuts, as here.
    """

    num_classes: int
    depth: int = 8
    width: int = 16
    groups: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.depth < 8 or self.depth % 6 != 2:
            raise InputError(f"a ResNet has depth 8, 14, 20, ... (6 n + 2); got {self.depth}")
        x = nn.relu(_Conv(self.width, groups=self.groups)(x))
        return ResNetTrunk(self.num_classes, (self.depth - 2) // 6, self.width, self.groups)(x)


class GKTEdge(nn.Module):
    """A client's net of FedGKT (He et al. 2020): `features`, one 3x3 convolution, and `head`, blocks, mean, logits.

    The paper's has `width` = 16, `stride` = 1 and `blocks` = 1 (its ResNet-5) or more. Our defaults, half the channels
    at a quarter of the pixels, send an eighth of its features.
    """

    num_classes: int
    width: int = 8
    stride: int = 2
    blocks: int = 1
    groups: int = 2

    def setup(self):
        self.stem = _Conv(self.width, stride=self.stride, groups=self.groups)
        self.body = [BasicBlock(self.width, groups=self.groups) for _ in range(self.blocks)]
        self.out = nn.Dense(self.num_classes)

    def features(self, x: jax.Array) -> jax.Array:
        return nn.relu(self.stem(x))

    def head(self, h: jax.Array) -> jax.Array:
        for block in self.body:
            h = block(h)
        return self.out(h.mean((1, 2)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.features(x))
