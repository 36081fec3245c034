"""Training examples that no client gets: proxy data, or a validation split."""

import numpy as np

from fdjax.errors import InputError
from fdjax.types import Source


def hold_out(source: Source, size: int, rng: np.random.Generator) -> tuple[Source, np.ndarray, np.ndarray]:
    """The source without `size` training examples that `rng` draws, and these: x and y."""
    have = len(source.train_y)
    chosen = np.sort(rng.choice(have, size, replace=False))
    rest = np.setdiff1d(np.arange(have), chosen)
    return source.training(rest), source.train_x[chosen], source.train_y[chosen]


def take_validation(source: Source, fraction: float, seed: int) -> Source:
    """The source with `fraction` of its training examples as `validation` instead; of none, the source itself.

    Raises InputError if that rounds to no example, or to all of them.
    """
    if not fraction:
        return source
    have = len(source.train_y)
    size = round(fraction * have)
    if not 0 < size < have:
        raise InputError(
            f"--validation_fraction={fraction} of {have} training examples holds out {size}; "
            f"expected 1 to {have - 1} of them"
        )
    source, x, y = hold_out(source, size, np.random.default_rng([seed, 2]))
    return source._replace(validation=(x, y))
