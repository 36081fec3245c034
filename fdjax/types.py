"""Shape letters and the data that every layer shares; `fdjax.contract` has the functions of a method.

Letters, everywhere: C clients, S participants, N examples, M proxy or test examples, K classes, B batch, R rounds,
T trials.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fdjax.errors import InputError

Array = jax.Array | np.ndarray
PyTree = Any


class Source(NamedTuple):
    """A data set on the host, as a source delivers it and before anyone partitions it.

    Images are uint8 `[N, height, width, channels]`, sequences of tokens int32 `[N, length]`; everything else is float32
    `[N, features]`.
    """

    name: str
    train_x: np.ndarray
    train_y: np.ndarray  # [N] int32
    test_x: np.ndarray
    test_y: np.ndarray  # [M] int32
    num_classes: int
    mean: tuple[float, ...] = (0.0,)  # per channel, of inputs in [0, 1] for images
    std: tuple[float, ...] = (1.0,)
    train_owner: np.ndarray | None = None  # [N] int32: the natural client (writer, device) of each example
    test_owner: np.ndarray | None = None  # [M] int32
    validation: tuple[np.ndarray, np.ndarray] | None = None  # x and y held out of training, to choose rounds by
    labels: str = (
        ""  # what the labels name, such as "digits": alike in sources of the same word; "": in no other source
    )
    vocabulary: tuple[str, ...] = ()  # the tokens, by their numbers in sequences; none where inputs are no sequences
    classes: tuple[str, ...] = ()  # [K] what each label is called in the data; () where 0, 1, ... are the data's own
    owners: tuple[str, ...] = ()  # what each natural client is called in the data, likewise
    categories: tuple[int, ...] = ()
    # [F] for each input column the number of its codes 0, 1, ..., which a net may embed, and 0 for a number; code 0 is
    # a level that no training row has; () where no column holds codes
    encoding: Any = None  # how rows of a table became inputs, see `data.frames.Encoding`
    fitted: bool = False  # whether mean and std are those of train_x, and follow where examples leave it
    train_index: np.ndarray | None = None  # [N] int32: the place of each training example among the rows given; in a
    # run, among the training examples as loaded

    @property
    def label_space(self) -> str:
        """What the labels name; the source's own name where it does not say."""
        return self.labels or self.name

    def training(self, rows: np.ndarray) -> "Source":
        """The same with the training examples `rows` alone, indices [N'] or a mask [N]."""
        owner, index = (None if part is None else part[rows] for part in (self.train_owner, self.train_index))
        return self._replace(
            train_x=self.train_x[rows], train_y=self.train_y[rows], train_owner=owner, train_index=index
        )


class Holdings(NamedTuple):
    """Which examples each client holds, without padding: client k holds `order[start[k] : start[k] + count[k]]`.

    Costs one int32 per held example and two per client, whatever the largest client is.
    """

    order: Array  # [L] int32: indices into an Examples
    start: Array  # [C] int32
    count: Array  # [C] int32


class Examples(NamedTuple):
    """Examples on the device, stored once: `x * scale + shift` is what a model sees, or x itself where it is tokens."""

    x: Array  # [N, ...] uint8 or float32, or int32 tokens
    y: Array  # [N] int32
    scale: Array  # [channels] or [1] float32
    shift: Array


class Federation(NamedTuple):
    """Everything that clients and server read: a pytree of arrays, shared by all clients, copied for none."""

    train: Examples
    test: Examples
    client: Array
    # [C] int32 ids; cohort after cohort, and within one by falling number of examples, those that never train last
    train_holdings: Holdings  # rows as in `client`
    test_holdings: Holdings  # each client's own test part, of its own label distribution
    proxy: Examples | None = None
    validation: Examples | None = None  # nobody trains on them
    cumulative: Array | None = None  # [C] int32: examples of a cohort's clients that train, up to each; to draw by them
    test_order: Array | None = None  # [M] int32: the test examples in a random order, whose first ones are a subsample


STATISTICS = "batch_stats"  # the dict key below which params hold BatchNorm's running statistics


class Model(NamedTuple):
    """A network as pure functions; input shape and classes are bound when it is built.

    Without a key `apply` and the blocks are the net as it is tested. With one they are in training mode: dropout draws
    from the key, BatchNorm normalises by the batch, and the "gradient" of its running statistics, which are the leaves
    of params below the key `STATISTICS`, is what they lose by this batch, old - new, whatever the loss. So an
    optimiser that subtracts it as it is updates them, and a method need not know.
    """

    name: str
    init: Callable[[jax.Array], PyTree]  # key -> params
    apply: Callable[..., jax.Array]  # (params, x [B, ...], key=None) -> logits [B, K]
    blocks: tuple[Callable[..., jax.Array], ...] = ()  # (params, h, key=None) -> h; one after another they are `apply`
    tokens: int = 0  # inputs are int32 tokens below this number; 0: they are numbers, float32

    def example(self, inputs: Sequence[int], batch: int = 1) -> jax.ShapeDtypeStruct:
        """What `apply` is given of `batch` examples, each of the shape `inputs`: their shape and type."""
        return jax.ShapeDtypeStruct((batch, *inputs), np.int32 if self.tokens else np.float32)

    def features(self, params: PyTree, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """What the last block, the head, is given: all blocks but the last, one after another."""
        for block in self.parts()[:-1]:
            x = block(params, x, key)
        return x

    def head(self, params: PyTree, h: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Logits [B, K] of features: the last block."""
        return self.parts()[-1](params, h, key)

    def parts(self, user: str = "the method") -> tuple[Callable[..., jax.Array], ...]:
        """The blocks, two or more. Raises InputError, which names the `user` (a method), for a model without."""
        if len(self.blocks) < 2:
            raise InputError(
                f"{user} needs the parts of its models, but {self.name!r} has none; give its module blocks(), or "
                "features(x) and head(h), or choose a model of the zoo"
            )
        return self.blocks


class Cohort(NamedTuple):
    """The clients that share one architecture."""

    model: Model
    size: int  # clients
