"""Shape letters and the data that every layer shares; `fdjax.contract` has the functions of a method.

Letters, everywhere: C clients, S participants, N examples, M proxy or test examples, K classes, B batch, R rounds,
T trials.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray
PyTree = Any


class Source(NamedTuple):
    """A data set on the host, as a source delivers it and before anyone partitions it.

    Images are uint8 `[N, height, width, channels]`; everything else is float32 `[N, features]`.
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


class Holdings(NamedTuple):
    """Which examples each client holds, without padding: client k holds `order[start[k] : start[k] + count[k]]`.

    Costs one int32 per held example and two per client, whatever the largest client is.
    """

    order: Array  # [L] int32: indices into an Examples
    start: Array  # [C] int32
    count: Array  # [C] int32


class Examples(NamedTuple):
    """Examples on the device, stored once: `x * scale + shift` is what a model sees."""

    x: Array  # [N, ...] uint8 or float32
    y: Array  # [N] int32
    scale: Array  # [channels] or [1] float32
    shift: Array


class Federation(NamedTuple):
    """Everything that clients and server read: a pytree of arrays, shared by all clients, copied for none."""

    train: Examples
    test: Examples
    client: Array  # [C] int32: client ids; cohort after cohort, and within a cohort by falling number of examples
    train_holdings: Holdings  # rows as in `client`
    test_holdings: Holdings  # each client's own test part, of its own label distribution
    proxy: Examples | None = None
    validation: Examples | None = None  # nobody trains on them
    test_order: Array | None = None  # [M] int32: the test examples in a random order, whose first ones are a subsample


class Model(NamedTuple):
    """A network as two pure functions; input shape and classes are bound when it is built."""

    name: str
    init: Callable[[jax.Array], PyTree]  # key -> params
    apply: Callable[[PyTree, jax.Array], jax.Array]  # (params, x [B, ...]) -> logits [B, K]


class Split(NamedTuple):
    """A model and its two parts, which share its params: `model.apply(p, x) == head(p, features(p, x))`.

    `model` is a cohort's model like any other. A net on the features alone, FedGKT's server, is a model of inputs
    `feature_shape`.
    """

    model: Model
    features: Callable[[PyTree, jax.Array], jax.Array]  # (params, x [B, ...]) -> features [B, *feature_shape]
    head: Callable[[PyTree, jax.Array], jax.Array]  # (params, features) -> logits [B, K]
    feature_shape: tuple[int, ...]


class Cohort(NamedTuple):
    """The clients that share one architecture."""

    model: Model
    size: int  # clients
