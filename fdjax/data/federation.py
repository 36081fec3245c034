"""From a source and its holdings to the federation on the device."""

import itertools

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fdjax.data.checked import checked
from fdjax.errors import InputError
from fdjax.types import Examples, Federation, Holdings, Source

_TEST_ORDER = 0x7E57  # beside the seed, so that the order is none that a partition draws by the same seed


def examples(x: np.ndarray, y: np.ndarray, source: Source) -> Examples:
    """Examples that a model sees as (x / 255 - mean) / std for images, (x - mean) / std for anything else."""
    mean, std = np.asarray(source.mean, np.float32), np.asarray(source.std, np.float32)
    unit = 255 if x.dtype == np.uint8 else 1
    return Examples(x, y.astype(np.int32), np.float32(1) / (unit * std), -mean / std)


def federate(
    source: Source,
    train: Holdings,
    test: Holdings,
    cohort_sizes: tuple[int, ...],
    mesh: Mesh,
    proxy: tuple[np.ndarray, np.ndarray] | None = None,
    never_train: np.ndarray | None = None,
    by_examples: bool = False,
    test_seed: int = 0,
) -> Federation:
    """Put a partitioned source on every device of `mesh`, with the rows of each cohort in order of work.

    Clients in `never_train` [C] bool come last in their cohort. `by_examples`: with the table to draw clients by n_k.

    `proxy` is (x, y) on the host, in the source's form; a model sees it as it sees the source's examples. `test_seed`
    draws the order of the test examples.

    Clients are dealt to cohorts in order of their ids: the first `cohort_sizes[0]` to the first, and so on.
    Raises InputError for a source that is none (`data.checked`), and for sizes and proxy data that do not fit.
    """
    checked(source)
    clients = len(train.count)
    if sum(cohort_sizes) != clients:
        raise InputError(f"cohorts of {cohort_sizes} clients, but the partition has {clients}; make the sizes add up")
    if proxy is not None and proxy[0].shape[1:] != source.train_x.shape[1:]:
        raise InputError(
            f"proxy data have inputs {proxy[0].shape[1:]}, but {source.name} has {source.train_x.shape[1:]}; "
            "use proxy data of the same shape"
        )
    ids = np.arange(clients, dtype=np.int32)
    bounds = np.cumsum((0, *cohort_sizes))
    count = np.asarray(train.count)
    new = np.zeros(clients, bool) if never_train is None else never_train
    parts = [slice(low, high) for low, high in itertools.pairwise(bounds)]
    client = np.concatenate([ids[part][np.lexsort((-count[part], new[part]))] for part in parts])
    held = np.where(new, 0, count)[client]
    cumulative = np.concatenate([np.cumsum(held[part]) for part in parts]).astype(np.int32) if by_examples else None

    def rows(holdings: Holdings, size: int) -> Holdings:
        order, start, count = (np.asarray(leaf, np.int32) for leaf in holdings)
        # The same length for every partition of a data set, so that none of them compiles anything anew.
        order = np.pad(order, (0, max(0, size - len(order))))
        return Holdings(order, start[client], count[client])

    federation = Federation(
        train=examples(source.train_x, source.train_y, source),
        test=examples(source.test_x, source.test_y, source),
        client=client,
        train_holdings=rows(train, len(source.train_y)),
        test_holdings=rows(test, len(source.test_y) + clients),
        proxy=None if proxy is None else examples(*proxy, source),
        validation=None if source.validation is None else examples(*source.validation, source),
        cumulative=cumulative,
        test_order=np.random.default_rng([test_seed, _TEST_ORDER]).permutation(len(source.test_y)).astype(np.int32),
    )
    return jax.device_put(federation, replicated(mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device of `mesh`."""
    return NamedSharding(mesh, PartitionSpec())
