"""The model zoo: `build` a network by name, or wrap any linen module of your own with `from_linen`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp

from fdjax.errors import InputError, unknown
from fdjax.models import fedmd_zoo, nets, resnet
from fdjax.models.notice import notice_plain_conv
from fdjax.types import Model

__all__ = ["MODELS", "ModelEntry", "build", "from_linen", "make_module", "notice_plain_conv"]


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
        resnet.ResNet, "FedDF 2020: ResNet of 8 layers, GroupNorm; options width, groups", {"depth": 8}
    ),
    "resnet20": ModelEntry(resnet.ResNet, "the same of 20 layers", {"depth": 20}),
    "gkt_edge": ModelEntry(resnet.GKTEdge, "FedGKT 2020, a client's: 3x3 conv, then a residual block; can be split"),
    "gkt_server": ModelEntry(resnet.ResNetTrunk, "FedGKT 2020, the server's, on features; options blocks, width"),
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
    return from_linen(make_module(name, num_classes, **options), input_shape, name)


def make_module(name: str, num_classes: int, **options: Any) -> nn.Module:
    """The linen module of `build`, which has the arguments and what is raised."""
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    if num_classes < 2:
        raise InputError(f"model {name!r} needs num_classes >= 2; got {num_classes}")
    make, _, preset = MODELS[name]
    allowed = {field.name for field in dataclasses.fields(make)} - {"num_classes", "parent", "name"}  # pyright: ignore
    for option in options:
        if option not in allowed:
            raise unknown(f"option of model {name!r}", option, allowed)
    return make(num_classes=num_classes, **{**preset, **options})


def from_linen(module: nn.Module, input_shape: Sequence[int], name: str | None = None) -> Model:
    """Wrap a linen module as a `Model`; a line is logged if its convolutions will be slow on this device.

    Args:
      module: called as module(x) on x `[B, *input_shape]`, with parameters as its only variables.
      input_shape: one example's shape.
      name: how tables call it; the module's class if absent.

    Returns:
      A `Model`; its parameters are the module's "params" collection.

    Raises:
      InputError: the module cannot take such inputs, keeps state besides its parameters (BatchNorm's statistics), draws
        random numbers when applied (dropout), or does not return logits `[B, K]`.
    """
    label, shape = name or type(module).__name__, tuple(input_shape)
    if not shape or min(shape) < 1:
        raise InputError(f"model {label!r}: input_shape must have at least one axis, none of them empty; got {shape}")

    def init(key: jax.Array) -> Any:
        return module.init(key, jnp.zeros((1, *shape), jnp.float32))["params"]

    def apply(params: Any, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        if x.shape[1:] != shape or not jnp.issubdtype(x.dtype, jnp.floating):
            raise InputError(f"model {label!r} takes floats [B, {', '.join(map(str, shape))}]; got {x.dtype} {x.shape}")
        out = module.apply({"params": params}, x)
        return out  # pyright: ignore[reportReturnType]

    _check(module, shape, label)
    model = Model(label, init, apply)
    notice_plain_conv(model, shape)
    return model


def _check(module: nn.Module, shape: tuple[int, ...], label: str) -> None:
    x = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    try:
        variables = jax.eval_shape(module.init, jax.random.key(0), x)
        extra = sorted(set(variables) - {"params"})
        if extra:
            raise InputError(f"model {label!r} keeps {', '.join(extra)} besides its parameters; use GroupNorm, say")
        out = jax.eval_shape(module.apply, variables, x)
    except InputError as error:
        raise InputError(f"model {label!r} on inputs {shape}: {error}") from None
    except (flax.errors.FlaxError, TypeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(f"model {label!r} cannot take inputs {shape}: {first}") from error
    if getattr(out, "ndim", None) != 2 or out.shape[0] != 2:
        raise InputError(f"model {label!r} must return logits [B, K]; for x {x.shape} it returned {out}")
