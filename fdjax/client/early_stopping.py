"""Training that validates as it goes, stops when nothing gets better, and gives back the best."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fdjax.types import Array, PyTree


class Best(NamedTuple):
    """What training came to at the best of its validations."""

    params: PyTree
    score: jax.Array  # [] float32
    seen: PyTree  # what else the validation saw
    at: jax.Array  # [] int32: after how many steps
    taken: jax.Array  # [] int32: of how many


def train_to_best(
    step: Callable[[jax.Array, tuple[PyTree, PyTree]], tuple[PyTree, PyTree]],
    validate: Callable[[PyTree], tuple[jax.Array, PyTree]],
    params: PyTree,
    optimizer_state: PyTree,
    *,
    steps: Array,
    every: Array,
    patience: Array,
) -> Best:
    """The params of the highest validated score, the earliest of equals, those at the start among them.

    Args:
      step: (number [], (params, optimizer_state)) -> the same after one step.
      validate: params -> (score [], what else is to be known of them).
      params: where to start.
      optimizer_state: the optimiser's first state.
      steps: [] int32, the most steps.
      every: [] int32, the steps from one validation to the next; the last one follows the last step.
      patience: [] int32; training ends at the first validation that is so many steps after the best one.
    """

    def goes_on(carry):
        taken, _, best = carry
        return (taken < steps) & (taken - best.at < patience)

    def section(carry):
        taken, training, best = carry
        end = jnp.minimum(taken + every, steps)
        training = lax.fori_loop(taken, end, step, training)
        now = Best(training[0], *validate(training[0]), end, end)
        return end, training, jax.tree.map(lambda new, old: jnp.where(now.score > best.score, new, old), now, best)

    first = Best(params, *validate(params), jnp.int32(0), jnp.int32(0))
    taken, _, best = lax.while_loop(goes_on, section, (jnp.int32(0), (params, optimizer_state), first))
    return best._replace(taken=taken)
