"""What the functions of a metric return, checked on a few examples before anything is compiled."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdjax import own
from fdjax.client.metric import Metric, as_sum
from fdjax.engine.check import place_of
from fdjax.errors import InputError, a_kind
from fdjax.types import PyTree

MOST_CLASSES = 1000  # of a metric by class: each is a value by a name of its own
_EXAMPLES = 3


def check_metric(metric: Metric, title: str, classes: int) -> bool:
    """Whether its values are by class, [K]. Raises InputError, which names its title, for functions that are wrong.

    They are called on three examples of random logits: what they return must have the right shape and be finite, sums
    must add up over batches, and examples of weight 0 must add nothing.
    """
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.normal(size=(_EXAMPLES, classes)), jnp.float32)
    y = jnp.arange(_EXAMPLES, dtype=jnp.int32) % classes
    if metric.across is not None:
        known = jnp.linspace(0.25, 0.75, _EXAMPLES), jnp.ones(_EXAMPLES, bool)
        _number(title, "across", metric.across, _called(title, "across", metric.across, *known), ())
        return False
    if metric.per_example is not None:
        values = _called(title, "per_example", metric.per_example, z, y)
        _number(title, "per_example", metric.per_example, values, (_EXAMPLES,))
        return False
    sums, finish = metric.sums, metric.finish
    assert sums is not None
    assert finish is not None
    total = _check_sums(title, sums, z, y)
    more = (jnp.ones(classes),) if metric.holds else ()
    value = _called(title, "finish", finish, total, *more)
    by_class = getattr(value, "shape", ()) == (classes,)
    _number(title, "finish", finish, value, (classes,) if by_class else (), finite=False)
    if by_class and classes > MOST_CLASSES:
        raise InputError(
            f"metric {title}: it is by class, and there are {classes:,} of them, more than {MOST_CLASSES:,}; leave it "
            "out, or let finish return a mean"
        )
    return by_class


def _check_sums(title: str, sums: Callable, z: jax.Array, y: jax.Array) -> PyTree:
    """The sums of all examples."""
    where = f"metric {title}: sums{place_of(sums)}"
    parts = [slice(0, _EXAMPLES), slice(0, 1), slice(1, _EXAMPLES)]
    found = [_called(title, "sums", sums, z[part], y[part], jnp.ones(len(y[part]))) for part in parts]
    nothing = _called(title, "sums", sums, z, y, jnp.zeros(_EXAMPLES))
    for path, leaf in jax.tree.leaves_with_path(found[0]):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float):
            at = jax.tree_util.keystr(path)
            raise InputError(f"{where} returned {a_kind(leaf)}{at and f' at {at}'}, expected arrays of sums")
    if not jax.tree.leaves(found[0]):
        raise InputError(f"{where} returned no array at all, expected numbers that add up over batches")
    shapes = [[jnp.shape(leaf) for leaf in jax.tree.leaves(part)] for part in (*found, nothing)]
    if any(other != shapes[0] for other in shapes):
        of_one, of_three = ([*map(list, shapes[number])] for number in (1, 0))
        raise InputError(
            f"{where} returned the shapes {of_one} for one example and {of_three} for {_EXAMPLES}; sum over the "
            "examples, so that batches of all sizes add up"
        )
    whole, one, rest, none = (jax.tree.map(as_sum, part) for part in (*found, nothing))
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(whole)):
        raise InputError(f"{where} returned numbers that are not finite for finite logits; clip what is divided by")
    if any(np.any(leaf != 0) for leaf in jax.tree.leaves(none)):
        raise InputError(f"{where}: examples of weight 0 count; multiply what is summed by the weight")
    together = jax.tree.map(jnp.add, one, rest)
    if not all(np.allclose(a, b, 1e-3, 1e-4) for a, b in zip(*map(jax.tree.leaves, (whole, together)), strict=True)):
        raise InputError(
            f"{where}: what it returns for one example and for two others does not add up to what it returns for the "
            "three; return sums, and divide in finish"
        )
    return whole


def _called(title: str, name: str, function: Callable, *args: Any) -> Any:
    """What it returns, under jit, as in an evaluation."""
    try:
        return jax.jit(function)(*args)
    except Exception as error:  # whatever a user's own function raises
        raise InputError(f"metric {title}: {name}{place_of(function)} raised {own.told(error)}") from error


def _number(
    title: str, name: str, function: Callable, value: Any, shape: tuple[int, ...], *, finite: bool = True
) -> None:
    """Raises InputError for what is not an array of real numbers of this shape, finite ones unless they need not be."""
    where = f"metric {title}: {name}{place_of(function)} returned"
    expected = "one number" if not shape else f"one number for each example, float32{list(shape)} for {shape[0]}"
    expected += " or one for each class" if name == "finish" else ""
    if not hasattr(value, "dtype"):
        raise InputError(f"{where} {a_kind(value)}, expected {expected}")
    if value.shape != shape or not (jnp.issubdtype(value.dtype, jnp.number) or value.dtype == jnp.bool_):
        raise InputError(f"{where} {value.dtype}{list(value.shape)}, expected {expected}")
    if jnp.issubdtype(value.dtype, jnp.complexfloating):
        raise InputError(f"{where} complex numbers, expected real ones")
    if finite and not np.isfinite(value).all():
        raise InputError(f"{where} numbers that are not finite for finite logits; clip what is divided by")
