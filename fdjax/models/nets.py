"""The networks of the papers, as linen modules: inputs float32 `[B, H, W, c]` or `[B, F]`, outputs logits `[B, K]`.

All start from linen's defaults, whatever the paper's framework did: kernels lecun normal (variance 1 / fan-in), biases
zero. Pooling comes before the ReLU, which gives the same values (both are monotone) at a quarter of the work.
"""

from collections.abc import Sequence

import flax.linen as nn

from fdjax.models.layers import Block, Conv, Dense, Net, flatten, max_pool, norm, rectified


def dense(widths: Sequence[int], num_classes: int) -> list[Block]:
    """Hidden layers of `widths` ReLU units and the logits."""
    return [*(rectified(flatten, Dense(width)) for width in widths), Dense(num_classes)]


class MCLR(Net):
    """Multinomial logistic regression (Li et al. 2020, FedProx, for synthetic(alpha, beta))."""

    num_classes: int

    @nn.compact
    def blocks(self, train: bool) -> list[Block]:
        return [flatten, Dense(self.num_classes)]


class TwoNN(Net):
    """Two hidden layers of 200 ReLU units (McMahan et al. 2017, "2NN")."""

    num_classes: int
    width: int = 200

    @nn.compact
    def blocks(self, train: bool) -> list[Block]:
        return dense((self.width, self.width), self.num_classes)


class McMahanCNN(Net):
    """5x5 convolutions of 32 and 64 channels, each pooled, then 512 units (McMahan et al. 2017)."""

    num_classes: int

    @nn.compact
    def blocks(self, train: bool) -> list[Block]:
        convs = [rectified(Conv(features, (5, 5), padding="SAME"), max_pool) for features in (32, 64)]
        return [*convs, *dense((512,), self.num_classes)]


class NIIDCNN(Net):
    """5x5 convs of 6 and 16 channels, each pooled, then 120 and 84 units (NIID-Bench simple-cnn, Li et al. 2022)."""

    num_classes: int

    @nn.compact
    def blocks(self, train: bool) -> list[Block]:
        convs = [rectified(Conv(features, (5, 5)), max_pool) for features in (6, 16)]
        return [*convs, *dense((120, 84), self.num_classes)]


class FedGenCNN(Net):
    """3x3 stride-2 convolutions of 6 and 16 channels, normalised, then 32 units (Zhu et al. 2021, FedGen's code).

    Our choice: GroupNorm of two groups stands in for its BatchNorm (`norm` = batch), whose running statistics are not
    a client's parameters nor an average's, so that what a federation does with them is a decision of its own.
    """

    num_classes: int
    norm: str = "group"

    @nn.compact
    def blocks(self, train: bool) -> list[Block]:
        def conv(features: int) -> Block:
            layer = Conv(features, strides=(2, 2), padding=((1, 1), (1, 1)))
            return rectified(layer, norm(self.norm, 2, train))

        return [conv(6), conv(16), *dense((32,), self.num_classes)]


class FDCNN(Net):
    """3x3 convolutions of 32 and 64 channels, one pooling, then 128 units (Jeong et al. 2018, FD).

    Inferred from the paper's 1,199,648 parameters, which this net has without its biases.
    """

    num_classes: int

    @nn.compact
    def blocks(self, train: bool) -> list[Block]:
        return [rectified(Conv(32)), rectified(Conv(64), max_pool), *dense((128,), self.num_classes)]


class CNN1(Net):
    """3x3 convolutions of 32, 64, 64 channels, pooled after the first two, then 1024 and 64 units (Jiang et al. 2020).

    The paper does not say how it pads: VALID, the default of the Keras examples it resembles, is ours.
    """

    num_classes: int
    padding: str = "VALID"

    @nn.compact
    def blocks(self, train: bool) -> list[Block]:
        convs = [rectified(Conv(features, padding=self.padding), max_pool) for features in (32, 64)]
        return [*convs, rectified(Conv(64, padding=self.padding)), *dense((1024, 64), self.num_classes)]


class CNN2(Net):
    """3x3 convolutions of 128, 128 and 128 channels, pooled after the first two, then 2048 units (Jiang et al. 2020).

    The paper does not say how it pads: VALID is our default, as for `CNN1`.
    """

    num_classes: int
    padding: str = "VALID"

    @nn.compact
    def blocks(self, train: bool) -> list[Block]:
        convs = [rectified(Conv(128, padding=self.padding), max_pool) for _ in range(2)]
        return [*convs, rectified(Conv(128, padding=self.padding)), *dense((2048,), self.num_classes)]


class FedAvgCNN(Net):
    """5x5 convolutions of 32 and 64 channels without padding, each pooled, then 512 units (PFLlib's FedAvgCNN).

    On 28x28x1 the dense layer is given 1,024 numbers, on 32x32x3 1,600: what PFLlib's `dim` has to be told is seen.
    """

    num_classes: int

    @nn.compact
    def blocks(self, train: bool) -> list[Block]:
        convs = [rectified(Conv(features, (5, 5)), max_pool) for features in (32, 64)]
        return [*convs, *dense((512,), self.num_classes)]


class OneHidden(Net):
    """One hidden layer of ReLU units: PFLlib's FedAvgMLP with 200, its DNN with 100."""

    num_classes: int
    width: int = 200

    @nn.compact
    def blocks(self, train: bool) -> list[Block]:
        return dense((self.width,), self.num_classes)
