"""The twenty networks of FedMD: a row of filters each, and one rule that makes a net of them.

Source: Li and Wang (2019), FedMD, Tables 1 and 2, and its code for what the tables do not say.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fdjax.errors import InputError
from fdjax.models.layers import Block, Conv, Net, avg_pool, flatten, norm, rectified

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
MNIST_DROPOUT = (0.2, 0.2, 0.2, 0.3, 0.4, 0.2, 0.2, 0.2, 0.3, 0.3)  # the paper's rates
CIFAR_DROPOUT = (0.2, 0.2, 0.2, 0.3, 0.4, 0.2, 0.2, 0.2, 0.3, 0.2)


class FedMDCNN(Net):
    """Convolutions of `filters` channels, each normalised and rectified, then logits without a bias.

    - always: 3x3 SAME, then the mean over 2x2 windows at stride 1, which keeps the size (`smooth`)
    - of two: 3x3 stride 2 VALID
    - of three: 2x2 stride 2 VALID and 2x2 average pooling, then 3x3 stride 2 VALID
    - of four (CIFAR's party 9, which the code does not have; our choice): as of three, then 3x3 SAME

    Deviations, unless asked for: GroupNorm of `groups` groups for BatchNorm (`norm` = batch), whose running statistics
    are not a client's parameters; no dropout (`dropout`, after each ReLU; `MNIST_DROPOUT` and `CIFAR_DROPOUT` have the
    paper's rates, which differ by party, where the flag is one rate for all). The paper's weight decay of the last
    layer, 1e-3, is the training's.
    """

    num_classes: int
    filters: tuple[int, ...] = MNIST_FILTERS[0]
    groups: int = 32
    norm: str = "group"
    dropout: float = 0.0

    @nn.compact
    def blocks(self, train: bool) -> list[Block]:
        if len(self.filters) not in (2, 3, 4):
            raise InputError(f"filters of FedMD's nets are 2, 3 or 4 numbers; got {self.filters}")

        def block(conv: Conv, after: Block = lambda x: x) -> Block:
            normalised = rectified(conv, norm(self.norm, self.groups, train))
            drop = nn.Dropout(self.dropout, deterministic=not train)
            return lambda x: after(drop(normalised(x)))

        first, second, *more = self.filters
        convs = [block(Conv(first, padding="SAME"), smooth)]
        if not more:
            convs += [block(Conv(second, strides=(2, 2)))]
        else:
            convs += [block(Conv(second, (2, 2), strides=(2, 2)), avg_pool)]
            convs += [block(Conv(more[0], strides=(2, 2)))]
        convs += [block(Conv(features, padding="SAME")) for features in more[1:]]
        return [*convs, flatten, nn.Dense(self.num_classes, use_bias=False)]


def smooth(x: jax.Array) -> jax.Array:
    """Mean over 2x2 windows, stride 1, SAME: `[B, H, W, c]` -> `[B, H, W, c]`.

    y[i, j] = mean of x[i, j], x[i + 1, j], x[i, j + 1], x[i + 1, j + 1], of those that lie inside.
    """
    # Repeating the last row and column gives the mean of what lies inside.
    x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge")
    x = x[:, :-1] + x[:, 1:]
    return (x[:, :, :-1] + x[:, :, 1:]) / 4
