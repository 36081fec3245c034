"""The model zoo: `build` a network by name, or wrap a module of your own with `from_linen` or `from_nnx`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import flax.linen as nn

from fdjax.errors import InputError, unknown
from fdjax.models import fedmd_zoo, nets, resnet
from fdjax.models.lora import with_lora
from fdjax.models.notice import notice_plain_conv
from fdjax.models.precision import in_precision
from fdjax.models.wrap import from_linen, from_nnx
from fdjax.types import Model

__all__ = [
    "MODELS", "ModelEntry", "build", "from_linen", "from_nnx", "in_precision", "notice_plain_conv", "options_of",
    "with_lora",
]  # fmt: skip


class ModelEntry(NamedTuple):
    """One row of the zoo: `make(num_classes, **preset, **options)` gives the linen module; options may override."""

    make: Callable[..., nn.Module]
    help: str
    preset: Mapping[str, Any] = {}


MODELS: dict[str, ModelEntry] = {
    "mclr": ModelEntry(nets.MCLR, "multinomial logistic regression"),
    "2nn": ModelEntry(nets.TwoNN, "two hidden layers of 200 units; option width"),
    "mcmahan_cnn": ModelEntry(nets.McMahanCNN, "McMahan 2017: 5x5 conv 32-64 SAME, 512 units"),
    "niid_cnn": ModelEntry(nets.NIIDCNN, "NIID-Bench simple-cnn: 5x5 conv 6-16, 120-84 units"),
    "fedgen_cnn": ModelEntry(nets.FedGenCNN, "FedGen: 3x3 stride-2 conv 6-16 with GroupNorm, 32 units"),
    "fd_cnn": ModelEntry(nets.FDCNN, "Jeong 2018 FD: 3x3 conv 32-64 VALID, one pooling, 128 units"),
    "cnn1": ModelEntry(nets.CNN1, "Jiang 2020 CNN1: 3x3 conv 32-64-64, 1024-64 units; option padding"),
    "cnn2": ModelEntry(nets.CNN2, "Jiang 2020 CNN2: 3x3 conv 128-128-128, 2048 units; option padding"),
    "resnet8": ModelEntry(
        resnet.ResNet, "FedDF 2020: ResNet of 8 layers, GroupNorm; options width, groups, norm", {"depth": 8}
    ),
    "resnet20": ModelEntry(resnet.ResNet, "the same of 20 layers", {"depth": 20}),
    "gkt_edge": ModelEntry(resnet.GKTEdge, "FedGKT 2020, a client's: 3x3 conv, then a residual block"),
    "gkt_server": ModelEntry(resnet.ResNetTrunk, "FedGKT 2020, the server's, on features; option residual_blocks"),
}
for _task, _table in (("mnist", fedmd_zoo.MNIST_FILTERS), ("cifar", fedmd_zoo.CIFAR_FILTERS)):
    for _i, _filters in enumerate(_table):
        _help = f"FedMD 2019, {_task}, party {_i}: conv {'-'.join(map(str, _filters))}"
        MODELS[f"fedmd_{_task}_{_i}"] = ModelEntry(fedmd_zoo.FedMDCNN, _help, {"filters": _filters})


def build(name: str, input_shape: Sequence[int], num_classes: int, **options: Any) -> Model:
    """Build a model of the zoo.

    Args:
      name: a key of `MODELS`.
      input_shape: one example's shape, `(H, W, c)` or `(F,)`.
      num_classes: K.
      **options: fields of the module, such as padding='SAME' of cnn1.

    Returns:
      A `Model` whose apply takes float32 x `[B, *input_shape]` and returns logits `[B, K]`.

    Raises:
      InputError: no such model or option, fewer than two classes, or an input that the net cannot take.
    """
    allowed = options_of(name)
    if isinstance(input_shape, Integral) or not all(isinstance(size, Integral) and size > 0 for size in input_shape):
        raise InputError(f"model {name!r}: input_shape={input_shape!r}; expected one example's, (H, W, c) or (F,)")
    if num_classes < 2:
        raise InputError(f"model {name!r} needs num_classes >= 2; got {num_classes}")
    for option in options:
        if option not in allowed:
            raise unknown(f"option of model {name!r}", option, allowed)
    make, _, preset = MODELS[name]
    return from_linen(make(num_classes=num_classes, **{**preset, **options}), input_shape, name)


def options_of(name: str) -> frozenset[str]:
    """The options that a model of the zoo has. Raises InputError for a name that no model has."""
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    fields = dataclasses.fields(MODELS[name].make)  # pyright: ignore[reportArgumentType]
    return frozenset(field.name for field in fields) - {"num_classes", "parent", "name"}
