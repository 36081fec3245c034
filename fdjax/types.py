"""Shape letters and the pytrees that every layer shares.

Letters, everywhere: C clients, N examples, M proxy or test examples, K classes, B batch, R rounds, T trials.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray
PyTree = Any
HParams = dict[str, Any]


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


class Model(NamedTuple):
    """A network as two pure functions; input shape and classes are bound when it is built."""

    name: str
    init: Callable[[jax.Array], PyTree]  # key -> params
    apply: Callable[[PyTree, jax.Array], jax.Array]  # (params, x [B, ...]) -> logits [B, K]


class Cohort(NamedTuple):
    """The clients that share one architecture."""

    model: Model
    size: int  # clients


class Reduction(NamedTuple):
    """What becomes of the uploads: `finish(sum over clients of partial(upload, weight))` is the summary.

    With `gather` the summary is `finish(uploads [C, ...], weights [C])` instead: every client's upload, and a weight of
    0 for who took no part. That costs memory for all of them.
    """

    partial: Callable[[PyTree, jax.Array], PyTree]  # one client's upload and its weight [] -> partial
    finish: Callable[..., PyTree]  # sum of partials -> summary
    gather: bool = False


class Algorithm(NamedTuple):
    """A federated method as pure functions of ONE client and of the server.

    `hparams` names the traced hyperparameters and their defaults; a string defaults to another hparam's value.
    What `broadcast` and `address` return, and what `client` returns as upload, is what crosses the network, and is
    counted. Metrics named `bytes_up` and `bytes_down` count instead of the arrays' sizes, for what is sent in coded or
    ragged form: a client's own, or the server's for one client; both are summed over participants.
    """

    name: str
    hparams: dict[str, float | str]
    init_server: Callable[[jax.Array], PyTree]  # key -> server state
    init_client: Callable[[Model, jax.Array], PyTree]  # (cohort's model, key) -> what one client keeps between rounds
    broadcast: Callable[[PyTree, int], PyTree]  # (server state, number of the cohort) -> what each participant receives
    client: Callable[..., tuple[PyTree, PyTree, dict[str, jax.Array]]]
    # (model, received, client state, data, proxy, hparams, key) -> (client state, upload, metrics)
    reduction: Reduction
    server: Callable[..., tuple[PyTree, dict[str, jax.Array]]]
    # (server state, summary, proxy, hparams, key) -> (server state, metrics)
    central: tuple[Model, Callable[[PyTree], PyTree]] | None = None  # the central model, its params in a server state
    personal: Callable[[PyTree], PyTree] | None = None  # params of the cohort's model in a client's state
    cohorts: int | None = None  # how many cohorts it can serve; None: any number
    address: Callable[[PyTree], PyTree] | None = None
    # server state -> [C, ...], of which a participant receives its own row: `received` is (broadcast, row)
    setup: Callable[..., PyTree] | None = None
    # (model, client state, data, proxy, hparams, key) -> client state: once, before the first round; sends nothing
    examine: Callable[..., PyTree] | None = None
    # (model, upload, proxy, hparams) -> what is reduced in the upload's place: work of the server, on each client
    within: Reduction | None = None
    # also reduced, within each cohort apart: the server's summary is then (summary, one of these for each cohort)
    predict: Callable[[int], Callable[[PyTree, PyTree, jax.Array], jax.Array]] | None = None
    # number of the cohort -> (server state, client state, x [B, ...]) -> logits [B, K]: how its clients predict, in the
    # place of `personal`, where that takes what the server holds
    ensemble: bool = False  # evaluate the mean of the personal models' softmax outputs as the central model
