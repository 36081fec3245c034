"""The synthetic(alpha, beta) federation of Li et al. 2020, Federated Optimization in Heterogeneous Networks."""

import numpy as np
import psutil

from fdjax.data.options import at_least
from fdjax.errors import InputError
from fdjax.types import Source

FEATURES, CLASSES = 60, 10
_MEAN_SIZE = 453  # 50 and the mean of lognormal(4, 2)


def synthetic(
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    num_clients: int = 30,
    iid: bool = False,
    samples_per_client: int | None = None,
    seed: int = 0,
) -> Source:
    """Device k labels x by y = argmax(x W_k + b_k), its own linear model, on inputs of its own mean v_k.

        u_k ~ N(0, alpha)    W_k ~ N(u_k, 1) [60, 10]    b_k ~ N(u_k, 1) [10]
        B_k ~ N(0, beta)     v_k ~ N(B_k, 1) [60]        x ~ N(v_k, diag(j^-1.2)), j = 1..60

    `iid`: v = 0 and one W, b ~ N(0, 1) for all; synthetic(0, 0) is not IID, as W_k, b_k and v_k still differ. Since u_k
    moves all ten logits alike, alpha changes no label: it is W_k, b_k and v_k that make devices differ. Device k has
    n_k = floor(lognormal(4, 2)) + 50 examples, or `samples_per_client` (our own addition, for very many devices); the
    first floor(0.9 n_k) are its training part. Owners are the devices. The text of the paper calls alpha and beta
    variances and the split 80/20; this follows the released generator, where alpha and beta are standard deviations
    and the split is 90/10. Raises InputError for a negative alpha or beta, or fewer than 2 samples_per_client.
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not np.isfinite(value) or value < 0:
            raise InputError(f"{name}={value!r}: expected a finite number of at least 0")
    rng = np.random.default_rng(at_least("seed", seed, 0))
    sizes = _sizes(rng, num_clients, samples_per_client)
    train_sizes = (0.9 * sizes).astype(int)
    test_sizes = sizes - train_sizes
    train_x, train_y = np.empty((train_sizes.sum(), FEATURES), np.float32), np.empty(train_sizes.sum(), np.int32)
    test_x, test_y = np.empty((test_sizes.sum(), FEATURES), np.float32), np.empty(test_sizes.sum(), np.int32)

    std = np.arange(1, FEATURES + 1) ** -0.6
    u, B = rng.normal(0, alpha, num_clients), rng.normal(0, beta, num_clients)
    W, b, v = rng.normal(0, 1, (FEATURES, CLASSES)), rng.normal(0, 1, CLASSES), np.zeros(FEATURES)
    train_end, test_end = np.cumsum(train_sizes), np.cumsum(test_sizes)
    for k in range(num_clients):
        if not iid:
            v = rng.normal(B[k], 1, FEATURES)
            W, b = rng.normal(u[k], 1, (FEATURES, CLASSES)), rng.normal(u[k], 1, CLASSES)
        x = v + std * rng.standard_normal((sizes[k], FEATURES))
        y = np.argmax(x @ W + b, axis=1)
        train, test = (slice(end[k] - n[k], end[k]) for end, n in ((train_end, train_sizes), (test_end, test_sizes)))
        train_x[train], test_x[test] = np.split(x, [train_sizes[k]])
        train_y[train], test_y[test] = np.split(y, [train_sizes[k]])
    return Source(
        "synthetic(iid)" if iid else f"synthetic({alpha:g},{beta:g})",
        train_x,
        train_y,
        test_x,
        test_y,
        CLASSES,
        train_owner=np.repeat(np.arange(num_clients, dtype=np.int32), train_sizes),
        test_owner=np.repeat(np.arange(num_clients, dtype=np.int32), test_sizes),
    )


def _sizes(rng: np.random.Generator, num_clients: int, samples_per_client: int | None) -> np.ndarray:
    """Examples of each device. Raises InputError if they do not fit into memory."""
    each = _MEAN_SIZE if samples_per_client is None else at_least("samples_per_client", samples_per_client, 2)
    needed, free = (
        at_least("num_clients", num_clients, 1) * each * (FEATURES + 1) * 4,
        psutil.virtual_memory().available,
    )
    if needed > free:
        raise InputError(
            f"synthetic of num_clients={num_clients} with {each} examples each, in the mean, takes {needed / 1e9:.3g} "
            f"GB, and {free / 1e9:.3g} GB are free; give fewer num_clients, or samples_per_client"
        )
    if samples_per_client is None:
        return rng.lognormal(4, 2, num_clients).astype(int) + 50
    return np.full(num_clients, samples_per_client)
