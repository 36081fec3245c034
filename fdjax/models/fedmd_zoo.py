"""The twenty networks of FedMD: a row of filters each, and one rule that makes a net of them.

Source: Li and Wang (2019), FedMD, Tables 1 and 2, and its code for what the tables do not say.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fdjax.errors import InputError
from fdjax.models.layers import Conv, avg_pool
from fdjax.models.nets import flatten

# Ten parties each. The code's configuration of CIFAR repeats the list of FEMNIST; these are the paper's.
MNIST_FILTERS: tuple[tuple[int, ...], ...] = (
    (128, 256),
    (128, 384),
    (128, 512),
    (256, 256),
    (256, 512),
    (64, 128, 256),
    (64, 128, 192),
    (128, 192, 256),
    (128, 128, 128),
    (128, 128, 192),
)
CIFAR_FILTERS: tuple[tuple[int, ...], ...] = (
    (128, 256),
    (128, 128, 192),
    (64, 64, 64),
    (128, 64, 64),
    (64, 64, 128),
    (64, 128, 256),
    (64, 128, 192),
    (128, 192, 256),
    (128, 128, 128),
    (64, 64, 64, 64),
)


class FedMDCNN(nn.Module):
    """Convolutions of `filters` channels, each normalised and rectified, then logits without a bias.

    - always: 3x3 SAME, then the mean over 2x2 windows at stride 1, which keeps the size (`smooth`)
    - of two: 3x3 stride 2 VALID
    - of three: 2x2 stride 2 VALID and 2x2 average pooling, then 3x3 stride 2 VALID
    - of four (CIFAR's party 9, which the code does not have; our choice): as of three, then 3x3 SAME

    Deviations: GroupNorm of `groups` groups for BatchNorm, whose running statistics are not a client's parameters; no
    dropout (the paper's rates are 0.2 to 0.4), as a model is a pure function of parameters and inputs. The paper's
    weight decay of the last layer, 1e-3, is the training's.
    """

    num_classes: int
    filters: tuple[int, ...] = MNIST_FILTERS[0]
    groups: int = 32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if len(self.filters) not in (2, 3, 4):
            raise InputError(f"filters of FedMD's nets are 2, 3 or 4 numbers; got {self.filters}")
        first, second, *more = self.filters
        x = smooth(self._normalised(Conv(first, padding="SAME")(x)))
        if not more:
            x = self._normalised(Conv(second, strides=(2, 2))(x))
        else:
            x = avg_pool(self._normalised(Conv(second, (2, 2), strides=(2, 2))(x)))
            x = self._normalised(Conv(more[0], strides=(2, 2))(x))
        for features in more[1:]:
            x = self._normalised(Conv(features, padding="SAME")(x))
        return nn.Dense(self.num_classes, use_bias=False)(flatten(x))

    def _normalised(self, x: jax.Array) -> jax.Array:
        return nn.relu(nn.GroupNorm(num_groups=self.groups)(x))


def smooth(x: jax.Array) -> jax.Array:
    """Mean over 2x2 windows, stride 1, SAME: `[B, H, W, c]` -> `[B, H, W, c]`.

    y[i, j] = mean of x[i, j], x[i + 1, j], x[i, j + 1], x[i + 1, j + 1], of those that lie inside.
    """
    # Repeating the last row and column gives the mean of what lies inside.
    x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge")
    x = x[:, :-1] + x[:, 1:]
    return (x[:, :, :-1] + x[:, :, 1:]) / 4
