"""Training that stops when nothing gets better, against Python loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdjax.client.early_stopping import train_to_best


@jax.jit
def walk(scores, steps, every, patience):
    """Params are the number of steps taken; their score is looked up."""
    return train_to_best(
        lambda i, carry: (carry[0] + 1, carry[1] + i),
        lambda params: (scores[params], params * 10),
        jnp.int32(0),
        jnp.int32(0),
        steps=steps,
        every=every,
        patience=patience,
    )


def expected(scores, steps, every, patience):
    taken = best = 0
    while taken < steps and taken - best < patience:
        taken = min(taken + every, steps)
        if scores[taken] > scores[best]:
            best = taken
    return best, taken


@pytest.mark.parametrize("kind", ["drawn", "flat", "rising", "falling", "not finite"])
def test_the_best_of_the_validated_steps(kind, rng):
    size = 60
    scores = {
        "drawn": rng.integers(0, 6, size) * 1.0,  # with ties, of which the first one wins
        "flat": np.zeros(size),
        "rising": np.arange(size) * 1.0,
        "falling": -np.arange(size) * 1.0,
        "not finite": np.where(np.arange(size) < 7, np.arange(size), np.nan),
    }[kind].astype(np.float32)
    for steps, every, patience in [
        (50, 1, 5),
        (50, 4, 9),
        (47, 5, 5),
        (50, 7, 1000),
        (1, 1, 1),
        (0, 1, 3),
        (20, 30, 4),
    ]:
        found = walk(scores, *map(np.int32, (steps, every, patience)))
        best, taken = expected(scores, steps, every, patience)
        assert (found.params, found.at, found.taken, found.seen) == (best, best, taken, 10 * best)
        assert found.score == scores[best]
    assert walk._cache_size() == 1  # patience and steps compile nothing
