"""What the methods that exchange outputs on proxy data have in common: which proxy examples, and their targets.

The papers communicate and then digest. Here a round digests the last consensus, trains, and then communicates: the same
sequence cut elsewhere, which lets one function be a client's round. So the first round has nothing to digest, and what
the last one agrees on nobody digests.

Of M proxy examples a round uses n, drawn without replacement and announced by ids of 4 bytes. Sent: 4nK bytes up; down
4nK for the targets, 4n for the ids of the next examples and 4n for those of the last ones, which a client needs that
took no part in the last round. Where n = M ids say nothing, and none are sent. The first round's targets, all zeros,
are counted as any others.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fdjax.client import local
from fdjax.types import Array, Examples, Model, PyTree

_BATCH = 256  # of predictions


class Exchange(NamedTuple):
    """What the server sends: ids are `()` where all proxy examples are in use."""

    targets: jax.Array  # [n, K], zeros before the first round
    ids: Any  # [n] int32: the examples that `targets` are for
    wanted: Any  # [n] int32: the examples to predict next

    def data(self, proxy: Examples) -> local.Targets:
        """The proxy examples of the targets."""
        return local.Targets(proxy, _all(proxy) if isinstance(self.ids, tuple) else self.ids, self.targets)

    def is_on(self) -> jax.Array:
        """Whether there are targets: zeros are neither probabilities nor anybody's mean logits."""
        return jnp.any(self.targets != 0)


def first(task: local.Task, key: jax.Array) -> Exchange:
    """No targets yet."""
    n = task.proxy_per_round
    nothing = () if n == task.proxy_size else jnp.zeros(n, jnp.int32)
    return Exchange(jnp.zeros((n, task.classes)), nothing, _wanted(task, key))


def following(task: local.Task, exchange: Exchange, targets: jax.Array, key: jax.Array) -> Exchange:
    """`targets` for the examples that were wanted, and others wanted next; the key is consumed."""
    return Exchange(targets, exchange.wanted, _wanted(task, key))


def predict(model: Model, params: PyTree, proxy: Examples, exchange: Exchange) -> jax.Array:
    """Logits [n, K] for the examples that are wanted."""
    if not isinstance(exchange.wanted, tuple):
        proxy = proxy._replace(x=proxy.x[exchange.wanted], y=proxy.y[exchange.wanted])
    return local.predict(model.apply, params, proxy, _BATCH)


def epochs(number: Array, exchange: Exchange, data: local.ClientData) -> jax.Array:
    """`number` if there are targets, else 0; a client without examples stays as it is, as it does in training."""
    return jnp.where(exchange.is_on() & (jnp.asarray(data.count) > 0), number, 0)


def subset(task: local.Task, key: jax.Array) -> jax.Array:
    """Ids [n] int32 of the proxy examples of a round; all, in order, where n = M. The key is consumed."""
    n, size = task.proxy_per_round, task.proxy_size
    drawn = jnp.arange(size) if n == size else jax.random.choice(key, size, (n,), replace=False)
    return drawn.astype(jnp.int32)


def _wanted(task: local.Task, key: jax.Array) -> Any:
    return () if task.proxy_per_round == task.proxy_size else subset(task, key)


def _all(proxy: Examples) -> jax.Array:
    return jnp.arange(len(proxy.y), dtype=jnp.int32)
