"""The networks of the papers, as linen modules: inputs float32 `[B, H, W, c]` or `[B, F]`, outputs logits `[B, K]`.

All start from linen's defaults, whatever the paper's framework did: kernels lecun normal (variance 1 / fan-in), biases
zero. Pooling comes before the ReLU, which gives the same values (both are monotone) at a quarter of the work.
"""

import flax.linen as nn
import jax

from fdjax.models.layers import Conv, Dense, max_pool


def flatten(x: jax.Array) -> jax.Array:
    """`[B, ...]` -> `[B, F]`."""
    return x.reshape(x.shape[0], -1)


class MCLR(nn.Module):
    """Multinomial logistic regression (Li et al. 2020, FedProx, for synthetic(alpha, beta))."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Dense(self.num_classes)(flatten(x))


class TwoNN(nn.Module):
    """Two hidden layers of 200 ReLU units (McMahan et al. 2017, "2NN"); can be split after the first."""

    num_classes: int
    width: int = 200

    def setup(self):
        self.Dense_0, self.Dense_1 = Dense(self.width), Dense(self.width)  # as nn.compact names them
        self.Dense_2 = Dense(self.num_classes)

    def features(self, x: jax.Array) -> jax.Array:
        return nn.relu(self.Dense_0(flatten(x)))

    def head(self, h: jax.Array) -> jax.Array:
        return self.Dense_2(nn.relu(self.Dense_1(h)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.features(x))


class McMahanCNN(nn.Module):
    """5x5 convolutions of 32 and 64 channels, each pooled, then 512 units (McMahan et al. 2017)."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for features in (32, 64):
            x = nn.relu(max_pool(Conv(features, (5, 5), padding="SAME")(x)))
        x = nn.relu(Dense(512)(flatten(x)))
        return Dense(self.num_classes)(x)


class NIIDCNN(nn.Module):
    """5x5 convs of 6 and 16 channels, each pooled, then 120 and 84 units (NIID-Bench simple-cnn, Li et al. 2022)."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for features in (6, 16):
            x = nn.relu(max_pool(Conv(features, (5, 5))(x)))
        x = flatten(x)
        for width in (120, 84):
            x = nn.relu(Dense(width)(x))
        return Dense(self.num_classes)(x)


class FedGenCNN(nn.Module):
    """3x3 stride-2 convolutions of 6 and 16 channels, normalised, then 32 units (Zhu et al. 2021, FedGen's code).

    Our choice: GroupNorm of two groups stands in for BatchNorm, whose running statistics are not a client's parameters
    nor an average's, so that what a federation does with them would be a decision of its own.
    """

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for features in (6, 16):
            x = Conv(features, strides=(2, 2), padding=((1, 1), (1, 1)))(x)
            x = nn.relu(nn.GroupNorm(num_groups=2)(x))
        x = nn.relu(Dense(32)(flatten(x)))
        return Dense(self.num_classes)(x)


class FDCNN(nn.Module):
    """3x3 convolutions of 32 and 64 channels, one pooling, then 128 units (Jeong et al. 2018, FD).

    Inferred from the paper's 1,199,648 parameters, which this net has without its biases.
    """

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(Conv(32)(x))
        x = nn.relu(max_pool(Conv(64)(x)))
        x = nn.relu(Dense(128)(flatten(x)))
        return Dense(self.num_classes)(x)


class CNN1(nn.Module):
    """3x3 convolutions of 32, 64, 64 channels, pooled after the first two, then 1024 and 64 units (Jiang et al. 2020).

    The paper does not say how it pads: VALID, the default of the Keras examples it resembles, is ours.
    """

    num_classes: int
    padding: str = "VALID"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for features in (32, 64):
            x = nn.relu(max_pool(Conv(features, padding=self.padding)(x)))
        x = flatten(nn.relu(Conv(64, padding=self.padding)(x)))
        for width in (1024, 64):
            x = nn.relu(Dense(width)(x))
        return Dense(self.num_classes)(x)


class CNN2(nn.Module):
    """3x3 convolutions of 128, 128 and 128 channels, pooled after the first two, then 2048 units (Jiang et al. 2020).

    The paper does not say how it pads: VALID is our default, as for `CNN1`.
    """

    num_classes: int
    padding: str = "VALID"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = nn.relu(max_pool(Conv(128, padding=self.padding)(x)))
        x = flatten(nn.relu(Conv(128, padding=self.padding)(x)))
        x = nn.relu(Dense(2048)(x))
        return Dense(self.num_classes)(x)
