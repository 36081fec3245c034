"""Ways to write down and to count who holds which example."""

import numpy as np

from fdjax.types import Holdings


def holdings_of(client: np.ndarray, num_clients: int) -> Holdings:
    """Holdings from the one holder of each example, client [N] int in [0, C), or -1 for nobody.

    Each client's examples are in increasing order.
    """
    order = np.argsort(client, kind="stable").astype(np.int32)
    count = np.bincount(client[client >= 0], minlength=num_clients)
    return from_counts(order[len(order) - count.sum() :], count)


def from_counts(order: np.ndarray, count: np.ndarray) -> Holdings:
    """Holdings of clients that hold the next count [C] examples of order [L] in turn."""
    start = np.cumsum(count) - count
    return Holdings(order.astype(np.int32), start.astype(np.int32), count.astype(np.int32))


def holder_of(holdings: Holdings) -> np.ndarray:
    """The client of each entry of `holdings.order`, [L] int, for holdings laid out in client order as ours are."""
    return np.repeat(np.arange(len(holdings.count)), holdings.count)


def count_labels(holdings: Holdings, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """How many examples of each class each client holds, `[C, K]` int."""
    num_clients = len(holdings.count)
    cell = holder_of(holdings) * num_classes + labels[holdings.order]
    return np.bincount(cell, minlength=num_clients * num_classes).reshape(num_clients, num_classes)


def equal_parts(total: int, parts: int) -> np.ndarray:
    """The part [total] of each position, in order, when sizes differ by at most 1."""
    return np.arange(total) * parts // max(total, 1)


def deal(table: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The holder of each example, [N], when client k gets `table[k, c]` random examples of class c; -1 for nobody."""
    client = np.full(len(labels), -1)
    for c in range(table.shape[1]):
        pool = rng.permutation(np.flatnonzero(labels == c))[: table[:, c].sum()]
        client[pool] = np.repeat(np.arange(len(table)), table[:, c])
    return client
