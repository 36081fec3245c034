"""A net of a user's own, with a layer from a file beside it."""

import flax.linen as nn
from layer import Block


class Net(nn.Module):
    """One hidden layer."""

    num_classes: int
    width: int = 12

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes)(Block(self.width)(x))
