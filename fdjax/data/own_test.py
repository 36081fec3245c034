"""`own_test_part`: what each client is tested on by itself."""

import numpy as np

from fdjax.data.holdings import count_labels, from_counts, holder_of
from fdjax.types import Holdings


def own_test_part(
    train_labels: np.ndarray,
    train_holdings: Holdings,
    test_labels: np.ndarray,
    num_classes: int,
    seed: int,
    *,
    train_owner: np.ndarray | None = None,
    test_owner: np.ndarray | None = None,
    only_own: bool = False,
) -> Holdings:
    """For each client a part of the M test examples with its own label distribution, about M in all.

    Client k with n_k of all n held examples gets m_k = max(1, round(n_k M / n)) test examples, of class c the largest-
    remainder rounding of m_k n_kc / n_k, at most as many as the class has. Classes absent from the test set are left
    out; a client with nothing else, or with no examples, gets none. A client's own part has no example twice, but
    parts overlap: each class is dealt out round by round, so over all clients its examples serve equally often.

    Where owners are given and no owner's training examples are spread over clients, a client gets instead its owners'
    own test examples, if they have any; with `only_own` nothing else, as it must be where each client's test was cut
    from what it holds.
    """
    num_clients = len(train_holdings.count)
    client, index = _by_label(count_labels(train_holdings, train_labels, num_classes), test_labels, seed)
    if train_owner is not None and test_owner is not None:
        own_client, own_index = _by_owner(train_holdings, train_owner, test_owner)
        others = ~np.isin(client, own_client) & (not (only_own and len(own_client)))
        client = np.concatenate([own_client, client[others]])
        index = np.concatenate([own_index, index[others]])
    order = index[np.argsort(client, kind="stable")]
    return from_counts(order, np.bincount(client, minlength=num_clients))


def _by_label(held: np.ndarray, test_labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Clients and test examples, [L] each, from the table `[C, K]` of held labels."""
    rng = np.random.default_rng(seed)
    num_classes = held.shape[1]
    available = np.bincount(test_labels, minlength=num_classes)
    size = np.maximum(np.rint(held.sum(axis=1) * len(test_labels) / max(held.sum(), 1)), 1)
    usable = held * (available > 0)
    usable_total = usable.sum(axis=1)
    share = usable * (size * (usable_total > 0) / np.maximum(usable_total, 1))[:, None]
    quota = np.minimum(largest_remainder(share), available)
    clients, indices = [np.zeros(0, int)], [np.zeros(0, int)]
    for c in np.flatnonzero(available):
        pool = rng.permutation(np.flatnonzero(test_labels == c))
        clients.append(np.repeat(np.arange(len(held)), quota[:, c]))
        indices.append(pool[np.arange(quota[:, c].sum()) % len(pool)])
    return np.concatenate(clients), np.concatenate(indices)


def largest_remainder(share: np.ndarray) -> np.ndarray:
    """Whole numbers [C, K] with the (whole) row sums of share [C, K]: floors, then one more by largest fraction."""
    quota = np.floor(share + 1e-9).astype(int)
    missing = np.rint(share.sum(axis=1)).astype(int) - quota.sum(axis=1)
    rank = np.argsort(np.argsort(quota - share, axis=1, kind="stable"), axis=1, kind="stable")
    return quota + (rank < missing[:, None])


def _by_owner(holdings: Holdings, train_owner: np.ndarray, test_owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Clients and test examples, [L] each, of the owners that some client holds alone."""
    none = np.zeros(0, int), np.zeros(0, int)
    num_clients = len(holdings.count)
    owner = train_owner[holdings.order].astype(np.int64)
    owners, clients = np.divmod(np.unique(owner * num_clients + holder_of(holdings)), num_clients)
    if len(owners) == 0 or len(np.unique(owners)) < len(owners):
        return none
    position = np.minimum(np.searchsorted(owners, test_owner), len(owners) - 1)
    index = np.flatnonzero(owners[position] == test_owner)
    return clients[position[index]], index
