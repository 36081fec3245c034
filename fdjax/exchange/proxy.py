"""What the methods that exchange outputs on proxy data have in common: which proxy examples, and their targets.

Of M proxy examples a round uses n, drawn without replacement and announced by ids of 4 bytes each. Where n = M ids say
nothing and none are sent: they are () then, here and in a server's state.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fdjax.client import testing
from fdjax.client.data import Targets
from fdjax.contract import Context
from fdjax.method import Task
from fdjax.types import Array, Examples, PyTree

_BATCH = 256  # of predictions


class SoftLabels(NamedTuple):
    """Labels of some proxy examples, as a codec sends them."""

    ids: Any  # [n] int32, or () for all
    labels: Array  # [n, K]: probabilities, or a codec's symbols


def draw_ids(task: Task, key: jax.Array) -> Any:
    """Ids [n] int32 of the proxy examples of a round, or () where it uses all of them. The key is consumed."""
    n, size = task.proxy_per_round, task.proxy_size
    return () if n == size else jax.random.choice(key, size, (n,), replace=False).astype(jnp.int32)


def positions(proxy: Examples, ids: Any) -> jax.Array:
    """The same ids as an array, also where they are ()."""
    return jnp.arange(len(proxy.y), dtype=jnp.int32) if isinstance(ids, tuple) else ids


def targets(ctx: Context, ids: Any, values: PyTree) -> Targets:
    """The proxy examples `ids` with targets [n, ...], to be learned from."""
    assert ctx.proxy is not None
    return Targets(ctx.proxy, positions(ctx.proxy, ids), values)


def predict(ctx: Context, params: PyTree, ids: Any) -> jax.Array:
    """Logits [n, K] of the context's model on the proxy examples `ids`."""
    assert ctx.proxy is not None
    chosen = ctx.proxy
    if not isinstance(ids, tuple):
        chosen = chosen._replace(x=chosen.x[ids], y=chosen.y[ids])
    return testing.predict(lambda x: ctx.model.apply(params, x), chosen, _BATCH)
