"""Proxy data: examples that server and clients share, and that no client owns."""

from typing import NamedTuple

import numpy as np

from fdjax.data import own
from fdjax.data.held_out import hold_out
from fdjax.data.labels import of_labels
from fdjax.data.sources import SOURCES, load
from fdjax.errors import InputError, unknown
from fdjax.types import Source

KINDS = {
    "held_out": "training examples taken from all clients before the partition, with labels",
    "noise": "uniform pixels, tokens or codes, or normal features; without labels",
    "generated": "smooth random images, noise blurred at random scales; without labels",
}
DEFAULT_SIZE = 1000  # proxy examples, where nobody says how many
_UNKNOWN = -1  # the label of an example without one


class Proxy(NamedTuple):
    """Proxy examples on the host, in the form of a Source's."""

    x: np.ndarray
    y: np.ndarray  # [M] int32, -1 for those without a label
    labelled: bool
    more_labels: int = 0  # how many labels there are beside the source's own, which they come after


def take_proxy(
    source: Source,
    kind: str,
    size: int,
    seed: int,
    *,
    labels: str | None = None,
    join_labels: bool = False,
    header: bool | None = None,
    **where,
) -> tuple[Source, Proxy]:
    """`size` proxy examples of `kind`, one of KINDS or a data set's name, and the source without those it gave up.

    Labels of another data set count if they name the same (`Source.label_space`). Otherwise, with `join_labels`, they
    come after the source's own: label l is K + l; without it they are left out. Of a source that is the part `labels`
    of a data set (`of_labels`), another one with all of these labels is cut to the same part. `header`: of a table of
    your own; `where`: data_dir and cache_dir, for `load`. Raises InputError for an unknown kind, more examples than
    there are, and another input shape.
    """
    rng = np.random.default_rng([seed, 1])
    shape = source.train_x.shape[1:]
    if kind == "held_out":
        have = len(source.train_y)
        if not 0 < size < have:
            raise InputError(f"{_said(size)}: expected 1 to {have - 1} of the {have} training examples")
        kept, x, y = hold_out(source, size, rng)
        return kept, Proxy(x, y, True)
    if kind in ("noise", "generated"):
        return source, _without_labels(source, kind, size, rng)
    if kind not in SOURCES and not own.is_known(kind):
        raise unknown("proxy data", kind, {**KINDS, **SOURCES})
    other = own.load_proxy(kind, source, header=header) if own.is_known(kind) else load(kind, **where)
    if labels is not None and source.label_space.startswith(
        f"{other.label_space}: "
    ):  # the same part of the same labels
        other = of_labels(other, labels)
    if other.train_x.shape[1:] != shape or other.train_x.dtype != source.train_x.dtype:
        raise InputError(
            f"--proxy={own.title(kind)} has inputs {other.train_x.shape[1:]}, but {source.name} has {shape}; "
            "use proxy data of the same shape"
        )
    if other.vocabulary != source.vocabulary:
        raise InputError(
            f"--proxy={kind} has {len(other.vocabulary)} other tokens than the {len(source.vocabulary)} of "
            f"{source.name}; use texts that were read with one vocabulary"
        )
    if size > len(other.train_y):
        raise InputError(f"{_said(size)}, but {own.title(kind)} has {len(other.train_y)} training examples; give fewer")
    chosen = np.sort(rng.choice(len(other.train_y), size, replace=False))
    x, y = other.train_x[chosen], other.train_y[chosen]
    if other.label_space == source.label_space and other.num_classes == source.num_classes:
        return source, Proxy(x, y, True)
    if join_labels:
        return source, Proxy(x, y + np.int32(source.num_classes), True, other.num_classes)
    return source, Proxy(x, np.full(size, _UNKNOWN, np.int32), False)


def _said(size: int) -> str:
    """The setting as it is, and whether it may be that nobody gave it."""
    return f"--proxy_size={size}{' (the default)' if size == DEFAULT_SIZE else ''}"


def _without_labels(source: Source, kind: str, size: int, rng: np.random.Generator) -> Proxy:
    """Noise in the form of a source's inputs, or generated images. Raises InputError for such of what are no images."""
    shape, unlabelled = source.train_x.shape[1:], np.full(size, _UNKNOWN, np.int32)
    images = source.train_x.dtype == np.uint8
    if kind == "generated":
        if not images:
            what = "tokens" if source.vocabulary else "features"
            raise InputError(f"--proxy=generated makes images, but {source.name} has {what} {shape}; use noise")
        return Proxy(_blurred(rng, size, shape), unlabelled, False)
    if source.vocabulary:
        return Proxy(rng.integers(0, len(source.vocabulary), (size, *shape), np.int32), unlabelled, False)
    if images:
        return Proxy(rng.integers(0, 256, (size, *shape), np.uint8), unlabelled, False)
    mean, std = np.asarray(source.mean, np.float32), np.asarray(source.std, np.float32)
    x = (mean + std * rng.normal(size=(size, *shape)).astype(np.float32)).astype(np.float32)
    for j, codes in enumerate(source.categories):
        if codes > 1:  # those of levels that training rows have
            x[:, j] = rng.integers(1, codes, size)
    return Proxy(x, unlabelled, False)


def _blurred(rng: np.random.Generator, size: int, shape: tuple[int, ...]) -> np.ndarray:
    """Noise blurred at 1 to 4 pixels, each image stretched to the full range. Our own choice of generator."""
    from scipy import ndimage  # a quarter of a second, which no other start has to wait

    images = np.empty((size, *shape), np.uint8)
    for i in range(size):
        scale = rng.uniform(1, 4)
        x = ndimage.gaussian_filter(rng.normal(size=shape), (scale, scale, 0), mode="wrap")
        low, high = x.min(), x.max()
        images[i] = np.round(255 * (x - low) / (high - low))
    return images
