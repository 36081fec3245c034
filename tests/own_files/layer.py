"""What `net.py` imports from beside it."""

import flax.linen as nn


class Block(nn.Module):
    """A dense layer and its activation."""

    width: int

    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Dense(self.width)(x.reshape(len(x), -1)))
