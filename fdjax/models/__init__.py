"""The model zoo: `build` a network by name, or wrap a module of your own with `from_linen` or `from_nnx`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import flax.linen as nn

from fdjax.errors import InputError, unknown
from fdjax.models import fedmd_zoo, nets, resnet, sequences, tables
from fdjax.models.lora import with_lora
from fdjax.models.notice import notice_plain_conv
from fdjax.models.precision import in_precision
from fdjax.models.wrap import from_linen, from_nnx
from fdjax.types import Model

__all__ = [
    "MODELS", "NUMBERS", "Features", "ModelEntry", "build", "from_linen", "from_nnx", "in_precision",
    "notice_plain_conv", "of_entry", "options_of", "with_lora",
]  # fmt: skip


class ModelEntry(NamedTuple):
    """One row of the zoo: `make(num_classes, **preset, **options)` gives the linen module; options may override."""

    make: Callable[..., nn.Module]
    help: str
    preset: Mapping[str, Any] = {}


class Features(NamedTuple):
    """What inputs are, where they are not just numbers; nets that have fields of these names are given them."""

    tokens: int = 0  # sequences of int32 tokens below this number
    categories: tuple[int, ...] = ()  # of each column of a table: how many categories it has, 0 for a number

    @property
    def kind(self) -> str:
        """The field that says what they are; empty for numbers."""
        return "tokens" if self.tokens else "categories" if any(self.categories) else ""


NUMBERS = Features()

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
    "fedavg_cnn": ModelEntry(nets.FedAvgCNN, "PFLlib's FedAvgCNN: 5x5 conv 32-64 VALID, 512 units"),
    "fedavg_mlp": ModelEntry(nets.OneHidden, "PFLlib's FedAvgMLP: 200 hidden units; option width", {"width": 200}),
    "dnn": ModelEntry(nets.OneHidden, "PFLlib's DNN: 100 hidden units; option width", {"width": 100}),
    "char_lstm": ModelEntry(
        sequences.LSTM, "LEAF's and FedProx's: embedding of 8, two LSTM layers of 256; options width, layers, embedding"
    ),
    "char_lstm_small": ModelEntry(sequences.LSTM, "the same, one layer of 64", {"width": 64, "layers": 1}),
    "transformer": ModelEntry(
        sequences.Transformer, "pre-norm transformer, learned positions; options width, layers, heads, dropout"
    ),
    "embedded_mlp": ModelEntry(
        tables.EmbeddedMLP, "columns of categories embedded, then hidden layers; options width, layers, dropout"
    ),
    "gkt_edge": ModelEntry(resnet.GKTEdge, "FedGKT 2020, a client's: 3x3 conv, then a residual block"),
    "gkt_server": ModelEntry(resnet.ResNetTrunk, "FedGKT 2020, the server's, on features; option residual_blocks"),
}
for _task, _table in (("mnist", fedmd_zoo.MNIST_FILTERS), ("cifar", fedmd_zoo.CIFAR_FILTERS)):
    for _i, _filters in enumerate(_table):
        _help = f"FedMD 2019, {_task}, party {_i}: conv {'-'.join(map(str, _filters))}"
        MODELS[f"fedmd_{_task}_{_i}"] = ModelEntry(fedmd_zoo.FedMDCNN, _help, {"filters": _filters})


def build(
    name: str, input_shape: Sequence[int], num_classes: int, features: Features = NUMBERS, **options: Any
) -> Model:
    """Build a model of the zoo.

    Args:
      name: a key of `MODELS`.
      input_shape: one example's shape, `(H, W, c)`, `(F,)`, or `(L,)` of tokens.
      num_classes: K.
      features: what inputs are, if not just numbers.
      **options: fields of the module, such as padding='SAME' of cnn1.

    Returns:
      A `Model` whose apply takes x `[B, *input_shape]`, float32 or int32 tokens, and returns logits `[B, K]`.

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
    return of_entry(MODELS[name], input_shape, num_classes, name, features, options)


def of_entry(
    entry: ModelEntry, input_shape: Sequence[int], num_classes: int, name: str, features: Features,
    options: Mapping[str, Any],
) -> Model:  # fmt: skip
    """The model of a row of the zoo. Raises InputError for one that takes other inputs than these."""
    fields = _fields(entry)
    wanted = next((kind for kind in Features._fields if kind in fields), "")
    if "tokens" in (wanted, features.kind) and wanted != features.kind:
        takes, have = ("tokens" if kind == "tokens" else "numbers" for kind in (wanted, features.kind))
        able = [n for n, e in MODELS.items() if ("tokens" in _fields(e)) == (have == "tokens")]
        raise InputError(f"model {name!r} takes {takes}, but the data have {have}; choose of {', '.join(able[:4])}")
    if features.kind == "categories" and wanted != "categories":
        able = ", ".join(n for n, e in MODELS.items() if "categories" in _fields(e))
        raise InputError(
            f"model {name!r} would take the codes of categories for numbers; give the data with categories=one_hot, or "
            f"choose a model that embeds them: {able}"
        )
    facts = {wanted: getattr(features, wanted)} if wanted else {}
    made = entry.make(num_classes=num_classes, **{**entry.preset, **options, **facts})
    return from_linen(made, input_shape, name, features.tokens)


def _fields(entry: ModelEntry) -> frozenset[str]:
    return frozenset(field.name for field in dataclasses.fields(entry.make))  # pyright: ignore[reportArgumentType]


def options_of(name: str) -> frozenset[str]:
    """The options that a model of the zoo has. Raises InputError for a name that no model has."""
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    return _fields(MODELS[name]) - {"num_classes", "parent", "name", *Features._fields}
