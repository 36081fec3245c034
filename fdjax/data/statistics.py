"""Mean and standard deviation of inputs, which standardise them."""

import numpy as np

from fdjax.types import Source


def refitted(source: Source) -> Source:
    """The source standardised by its training inputs as they are now, if it was by those that it had (`fitted`).

    Of a table, mean and std of number columns, which come after those of its encoding; other inputs stay as they are.
    """
    if not source.fitted:
        return source
    found = standard(source.train_x)
    if source.encoding is not None:
        scaled = np.asarray(source.encoding.scaled)
        found = {"mean": np.where(scaled, found["mean"], 0.0), "std": np.where(scaled, found["std"], 1.0)}
    return source._replace(**{key: tuple(value.tolist()) for key, value in found.items()})


def standard(x: np.ndarray) -> dict[str, np.ndarray]:
    """Mean and std of each channel of images, or of each feature; std 1 for a constant one."""
    if x.dtype != np.uint8:
        return feature_statistics(x)
    found = channel_statistics(x)
    return found | {"std": np.where(found["std"] > 0, found["std"], 1.0)}


def channel_statistics(x: np.ndarray) -> dict[str, np.ndarray]:
    """Exact mean and std of each channel of x uint8 `[N, height, width, channels]` scaled to [0, 1]."""
    channels = [np.bincount(x[..., c].reshape(-1), minlength=256) for c in range(x.shape[-1])]
    share = np.stack(channels) / (x.size / x.shape[-1])
    levels = np.arange(256) / 255
    mean = share @ levels
    return {"mean": mean, "std": np.sqrt(share @ levels**2 - mean**2)}


def feature_statistics(x: np.ndarray) -> dict[str, np.ndarray]:
    """Mean and std in float64 of each of the last axis's features of x `[N, ..., F]`; std 1 for a constant one."""
    rows = x.reshape(-1, x.shape[-1])
    mean = rows.mean(axis=0, dtype=np.float64)
    square, step = np.zeros(x.shape[-1]), max(1, 2**22 // x.shape[-1])
    for start in range(0, len(rows), step):  # a float64 copy of all rows might not fit
        square += ((rows[start : start + step] - mean) ** 2).sum(axis=0)
    std = np.sqrt(square / len(rows))
    constant = rows.max(axis=0) == rows.min(axis=0)
    return {"mean": mean, "std": np.where(constant | (std == 0), 1.0, std)}
