"""One client's training and testing, on its own examples."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import lax

from fdjax import keys
from fdjax.client import losses
from fdjax.models.split import Split
from fdjax.types import Array, Examples, HParams, Model, PyTree

Loss = Callable[[PyTree, jax.Array, PyTree], jax.Array]  # (params, x [B, ...], targets [B, ...]) -> losses [B]


class Data(Protocol):
    """What `fit` trains on: `count` examples, taken by position."""

    @property
    def count(self) -> Array: ...  # [] int32

    def take(self, position: jax.Array) -> tuple[jax.Array, PyTree]:
        """x [B, ...] and targets [B, ...] at `position` [B]."""
        ...


class ClientData(NamedTuple):
    """One client's view of the shared examples; of proxy data, `order` being the ids in use."""

    examples: Examples
    order: Array  # [L] int32
    start: Array  # [] int32
    count: Array  # [] int32

    def take(self, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The client's examples at `position` [B] (0 <= position < count): x [B, ...] float32 and y [B] int32."""
        index = self.order[self.start + position]
        x = self.examples.x[index].astype(jnp.float32)
        channels = (1,) * (x.ndim - 1) + (-1,)
        return x * self.examples.scale.reshape(channels) + self.examples.shift.reshape(channels), self.examples.y[index]


class Targets(NamedTuple):
    """Proxy examples `ids` with a target each, such as a consensus, in place of labels."""

    examples: Examples
    ids: Array  # [n] int32
    targets: PyTree  # [n, ...]

    @property
    def count(self) -> Array:
        """n."""
        return jnp.int32(len(self.ids))

    def take(self, position: jax.Array) -> tuple[jax.Array, PyTree]:
        """x [B, ...] and targets [B, ...] at `position` [B]."""
        data = ClientData(self.examples, self.ids, jnp.int32(0), self.count)
        return data.take(position)[0], jax.tree.map(lambda t: t[position], self.targets)


class Beside(NamedTuple):
    """Data with something kept beside each example, by its position: targets (y, what is kept)."""

    data: Data
    kept: PyTree  # [n_max, ...]

    @property
    def count(self) -> Array:
        """That of the data."""
        return self.data.count

    def take(self, position: jax.Array) -> tuple[jax.Array, PyTree]:
        """x [B, ...] and targets at `position` [B]."""
        x, y = self.data.take(position)
        return x, (y, jax.tree.map(lambda kept: kept[position], self.kept))


class Ragged(NamedTuple):
    """Padded rows, such as clients' uploads, as one set of examples; of row k, those from `ends[k-1]` to `ends[k]`."""

    x: jax.Array  # [C, n_max, ...]
    targets: PyTree  # [C, n_max, ...]
    ends: jax.Array  # [C] int32, rising

    @property
    def count(self) -> Array:
        """Of all rows together."""
        return self.ends[-1]

    def find(self, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The row, and the column there, of `position` [B]."""
        row = jnp.searchsorted(self.ends, position, side="right")
        return row, position - jnp.where(row > 0, self.ends[row - 1], 0)

    def take(self, position: jax.Array) -> tuple[jax.Array, PyTree]:
        """x [B, ...] and targets [B, ...] at `position` [B]."""
        at = self.find(position)
        return self.x[at], jax.tree.map(lambda target: target[at], self.targets)


def everything(examples: Examples) -> ClientData:
    """All of `examples` as one client's data."""
    size = len(examples.y)
    return ClientData(examples, jnp.arange(size, dtype=jnp.int32), jnp.int32(0), jnp.int32(size))


class Training(NamedTuple):
    """How a client trains: what is static about it; learning rate, epochs and the like are hparams."""

    batch_size: int
    optimizer: Callable[[HParams], optax.GradientTransformation]  # sees the hparams and hparams["round"]
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None  # (key, x [B, ...]) -> x


class Task(NamedTuple):
    """What a method is built for: everything static that it may want to know."""

    model: Model  # the central one
    models: tuple[Model, ...]  # the clients', cohort by cohort
    training: Training  # on a client's own examples
    distilling: Training  # on proxy data
    clients: int
    classes: int
    largest: int = 0  # examples of the largest client
    proxy_size: int = 0  # M, 0 without proxy data
    proxy_per_round: int = 0  # of them used in one round
    splits: tuple[Split, ...] = ()  # the clients' models in two parts, if the method needs them; `model` takes features
    options: Mapping[str, str] = MappingProxyType({})  # the method's choices by name, see its OPTIONS


def batches(count: Array, size: int) -> jax.Array:
    """ceil(count / size): the steps of one epoch; the last batch may be short and is weighted by what it holds."""
    return (jnp.asarray(count) + size - 1) // size


def fit(
    training: Training,
    loss: Loss,
    params: PyTree,
    data: Data,
    hparams: HParams,
    key: jax.Array,
    *,
    epochs: Array,
) -> tuple[PyTree, jax.Array]:
    """Minimise the mean of `loss` over `data` for `epochs` epochs, reshuffled each; the optimiser starts fresh.

    Returns the params and the mean loss over the last epoch's batches (0 for a client without examples, which trains
    nothing). Steps are counted at run time: a client pays for its own examples, and a new `epochs` compiles nothing.
    The key is consumed.
    """
    params, mean, _ = fit_observing(
        training, lambda p, x, y: (loss(p, x, y), ()), lambda *_: (), (), params, data, hparams, key, epochs=epochs
    )
    return params, mean


def fit_observing(
    training: Training,
    loss: Callable[[PyTree, jax.Array, PyTree], tuple[jax.Array, PyTree]],
    observe: Callable[[PyTree, PyTree, jax.Array], PyTree],
    account: PyTree,
    params: PyTree,
    data: Data,
    hparams: HParams,
    key: jax.Array,
    *,
    epochs: Array,
) -> tuple[PyTree, jax.Array, PyTree]:
    """`fit` that also keeps an account of what is seen on the way, such as predictions.

    `loss` returns (losses [B], seen); `observe(seen, targets, weight [B])`, of weight 0 where a short batch is filled
    up, is added to `account` at every step of every epoch, and what that comes to is returned last.
    """
    optimizer = training.optimizer(hparams)
    steps = batches(data.count, training.batch_size)

    def epoch(number, carry):
        epoch_key = jax.random.fold_in(key, number)
        shuffle = keys.shuffle(keys.stream(epoch_key, "shuffle"), data.count)

        def step(index, carry):
            params, optimizer_state, total, account = carry
            position = index * training.batch_size + jnp.arange(training.batch_size)
            weight = (position < data.count).astype(jnp.float32)
            x, y = data.take(shuffle(jnp.minimum(position, data.count - 1)))
            if training.augment is not None:
                x = training.augment(keys.stream(epoch_key, "augment", index), x)

            def mean(params):
                values, seen = loss(params, x, y)
                return losses.weighted_mean(values, weight), seen

            (value, seen), gradient = jax.value_and_grad(mean, has_aux=True)(params)
            account = jax.tree.map(jnp.add, account, observe(seen, y, weight))
            update, optimizer_state = optimizer.update(gradient, optimizer_state, params)
            return optax.apply_updates(params, update), optimizer_state, total + value, account

        params, optimizer_state, _, account = carry
        return lax.fori_loop(0, steps, step, (params, optimizer_state, jnp.float32(0), account))

    carry = params, optimizer.init(params), jnp.float32(0), account
    params, _, total, account = lax.fori_loop(0, epochs, epoch, carry)
    return params, total / jnp.maximum(steps, 1), account


class Score(NamedTuple):
    """Sums over examples, which add; `count` may be 0."""

    correct: jax.Array
    loss: jax.Array
    count: jax.Array

    def mean(self) -> tuple[jax.Array, jax.Array]:
        """Accuracy in [0, 1] and mean cross-entropy, 0 where there was nothing to test."""
        count = jnp.maximum(self.count, 1)
        return self.correct / count, self.loss / count


def test(apply: Callable[[Any, jax.Array], jax.Array], params: PyTree, data: ClientData, batch_size: int) -> Score:
    """Number of correct predictions and summed cross-entropy of a model over all of `data`, in batches."""

    def step(index, score):
        position = index * batch_size + jnp.arange(batch_size)
        weight = (position < data.count).astype(jnp.float32)
        x, y = data.take(jnp.minimum(position, data.count - 1))
        logits = apply(params, x)
        return Score(
            score.correct + jnp.sum(weight * losses.correct(logits, y)),
            score.loss + jnp.sum(weight * losses.cross_entropy(logits, y)),
            score.count + jnp.sum(weight),
        )

    zero = jnp.float32(0)
    return lax.fori_loop(0, batches(data.count, batch_size), step, Score(zero, zero, zero))


def predict(
    apply: Callable[[Any, jax.Array], jax.Array], params: PyTree, examples: Examples, batch_size: int
) -> jax.Array:
    """Logits [M, K] of a model on all of `examples` [M, ...], in batches."""
    size = len(examples.y)
    batch_size = min(batch_size, size)
    positions = jnp.arange(-(-size // batch_size) * batch_size).reshape(-1, batch_size)
    data = everything(examples)
    _, logits = lax.scan(
        lambda _, position: ((), apply(params, data.take(jnp.minimum(position, size - 1))[0])), (), positions
    )
    return logits.reshape(-1, logits.shape[-1])[:size]
