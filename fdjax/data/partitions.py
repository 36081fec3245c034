"""`partition`: which client holds which training example, a pure function of labels and seed."""

from collections.abc import Callable

import numpy as np

from fdjax.data import dirichlet
from fdjax.data.holdings import deal, equal_parts, holdings_of
from fdjax.data.options import at_least, call, concentration
from fdjax.errors import InputError, unknown
from fdjax.types import Holdings

_DIRICHLET = {
    "a": ("each class over the clients, at least min_size each", dirichlet.per_class, ("fedma", "niid_bench", "moon")),
    "b": ("variant A in groups of 10 clients", dirichlet.per_group, ("feddf",)),
    "c": ("each class over the clients, then equal sizes by Sinkhorn", dirichlet.sinkhorn, ("fedaux",)),
    "d": ("a label prior per client, equal sizes, in random turns", dirichlet.prior_interleaved, ("feddyn", "fedftg")),
    "e": ("variant A on a subsample", dirichlet.subsampled, ("fedgen",)),
    "f": ("each class over the clients, as variant A", dirichlet.per_class, ("fedntd",)),
    "g": ("a label prior per client, equal sizes, client after client", dirichlet.prior_sequential, ("hsu",)),
}

PARTITIONS: dict[str, str] = {
    "iid": "random, equal sizes",
    "shards": "McMahan et al. 2017: sorted by label, shards_per_client (2) shards each",
    "shards_fedntd": "Lee et al. 2022: shards of one label, shards_per_client (2) each",
    "labels": "NIID-Bench #label-c: labels_per_client (2), label k mod K first",
    "jiang": "Jiang et al. 2020: labels_per_client (2) consecutive labels, so 5 clients share out 10 labels",
    "scarce": "Jeong et al. 2018: samples_per_client (2000) random examples, scarce_labels (3) cut to scarce_size (5)",
    "quantity": "NIID-Bench: sizes ~ Dir(beta), labels alike",
    "writer": "a client per writer; merge puts several writers into one client",
    "natural": "the data set's own clients, as in synthetic",
} | {
    name: f"Dirichlet(alpha), variant {letter.upper()}: {text}"
    for letter, (text, _, authors) in _DIRICHLET.items()
    for name in (f"dirichlet_{letter}", *(f"dirichlet_{author}" for author in authors))
}


def partition(
    name: str,
    labels: np.ndarray,
    num_clients: int | None,
    seed: int,
    *,
    owner: np.ndarray | None = None,
    owners: int | None = None,
    num_classes: int,
    **options,
) -> Holdings:
    """The holdings of C = num_clients clients of the examples with labels [N]; no example is held twice.

    `name` is one of `PARTITIONS`; `owner` [N] is each example's natural client, which `writer` and `natural` need, and
    with which they take num_clients=None for as many clients as there are owners; of `owners` natural clients, if that
    is given, some may have no example. Raises InputError for an unknown
    name or option, an option out of range, more clients than examples, or labels outside [0, num_classes).
    """
    if name not in PARTITIONS:
        raise unknown("partition", name, PARTITIONS)
    labels = _checked(labels, num_classes)
    rng = np.random.default_rng(at_least("seed", seed, 0))
    if name in ("writer", "natural"):
        if owner is None:
            raise InputError(f"partition {name!r} needs the owner of each example, but this data set has none; "
                             "use mnist_sample, mnist with writers=..., or synthetic")  # fmt: skip
        if np.shape(owner) != labels.shape:
            raise InputError(f"owner has shape {np.shape(owner)}, expected {labels.shape}, one per label")
        ids, owner = np.unique(owner, return_inverse=True)
        if name == "natural" and owners is not None:  # then ids are theirs, and some may have no example here
            ids, owner = np.arange(owners), ids[owner]
        num_clients = len(ids) if num_clients is None else at_least("num_clients", num_clients, 1)
        if name == "natural" and num_clients != len(ids):
            raise InputError(
                f"num_clients={num_clients}, but the data set has {len(ids)} clients of its own; give {len(ids)} or "
                "none"
            )
        client = call(
            "partition", name, {"writer": _writer, "natural": _natural}[name], rng, owner, num_clients, **options
        )
        return holdings_of(client, num_clients)
    if num_clients is None:
        raise InputError(f"partition {name!r} needs num_clients; only writer and natural know their own")
    num_clients = at_least("num_clients", num_clients, 1)
    if num_clients > len(labels):
        raise InputError(f"num_clients={num_clients} for {len(labels)} examples; give at most one client per example")
    if name in _SCHEMES:
        client = call("partition", name, _SCHEMES[name], rng, labels, num_clients, num_classes, **options)
    else:
        sizes = np.bincount(labels, minlength=num_classes)
        client = deal(call("partition", name, _TABLES[name], rng, sizes, num_clients, **options), labels, rng)
    return holdings_of(client, num_clients)


def _checked(labels: np.ndarray, num_classes: int) -> np.ndarray:
    labels = np.asarray(labels)
    at_least("num_classes", num_classes, 1)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"labels have shape {labels.shape} and dtype {labels.dtype}, expected [N] whole numbers")
    if len(labels) and (labels.min() < 0 or labels.max() >= num_classes):
        raise InputError(
            f"labels reach from {labels.min()} to {labels.max()}, expected 0 to num_classes - 1 = {num_classes - 1}"
        )
    return labels


def _iid(rng: np.random.Generator, labels: np.ndarray, num_clients: int, num_classes: int) -> np.ndarray:
    """A permutation cut into C parts whose sizes differ by at most 1; every example is held."""
    del num_classes
    client = np.empty(len(labels), int)
    client[rng.permutation(len(labels))] = equal_parts(len(labels), num_clients)
    return client


def _shards(
    rng: np.random.Generator, labels: np.ndarray, num_clients: int, num_classes: int, *, shards_per_client: int = 2
) -> np.ndarray:
    """Sorted by label, cut into C * s shards of sizes that differ by at most 1, s random shards to each client."""
    del num_classes
    shards = num_clients * at_least("shards_per_client", shards_per_client, 1)
    if shards > len(labels):
        raise InputError(f"num_clients * shards_per_client = {shards} shards of {len(labels)} examples; give fewer")
    shard = np.empty(len(labels), int)
    shard[np.argsort(labels, kind="stable")] = equal_parts(len(labels), shards)
    return (rng.permutation(shards) // shards_per_client)[shard]


def _shards_fedntd(
    rng: np.random.Generator, labels: np.ndarray, num_clients: int, num_classes: int, *, shards_per_client: int = 2
) -> np.ndarray:
    """Each label cut into C * s / K shards, s random shards to each client, so at most s labels; every example is held.

    Sizes are equal if the classes are. The released code wants K to divide C * s, and so does this.
    """
    shards = num_clients * at_least("shards_per_client", shards_per_client, 1)
    if shards % num_classes:
        raise InputError(
            f"num_clients * shards_per_client = {shards} shards, expected a multiple of the {num_classes} labels"
        )
    per_label = shards // num_classes
    sizes = np.bincount(labels, minlength=num_classes)
    if sizes.min() < per_label:
        raise InputError(f"{per_label} shards of each label, but label {sizes.argmin()} has {sizes.min()} examples; "
                         "give fewer clients or shards_per_client")  # fmt: skip
    holder = (rng.permutation(shards) // shards_per_client).reshape(num_classes, per_label)
    client = np.empty(len(labels), int)
    for c in range(num_classes):
        client[np.flatnonzero(labels == c)] = holder[c][equal_parts(sizes[c], per_label)]
    return client


def _share_labels(rng: np.random.Generator, labels: np.ndarray, holds: np.ndarray) -> np.ndarray:
    """Each label's examples, shuffled, in sizes that differ by at most 1 to its holders, holds [C, K] bool."""
    client = np.full(len(labels), -1)
    for c in range(holds.shape[1]):
        pool, holders = rng.permutation(np.flatnonzero(labels == c)), np.flatnonzero(holds[:, c])
        if len(holders):
            client[pool] = holders[equal_parts(len(pool), len(holders))]
    return client


def _labels_per_client(labels_per_client: int, num_classes: int) -> int:
    budget = at_least("labels_per_client", labels_per_client, 1)
    if budget > num_classes:
        raise InputError(f"labels_per_client={budget}, but there are {num_classes} labels; give at most as many")
    return budget


def _labels(
    rng: np.random.Generator, labels: np.ndarray, num_clients: int, num_classes: int, *, labels_per_client: int = 2
) -> np.ndarray:
    """Client k holds label k mod K and c - 1 random others; each label is split equally among its holders.

    With fewer clients than labels some label may have no holder; its examples are held by nobody.
    """
    budget = _labels_per_client(labels_per_client, num_classes)
    rank = rng.random((num_clients, num_classes))
    rank[np.arange(num_clients), np.arange(num_clients) % num_classes] = -1
    return _share_labels(rng, labels, rank.argsort(axis=1).argsort(axis=1) < budget)


def _jiang(
    rng: np.random.Generator, labels: np.ndarray, num_clients: int, num_classes: int, *, labels_per_client: int = 2
) -> np.ndarray:
    """Client k holds labels kc .. kc + c - 1 (mod K); each label is split equally among its holders.

    The paper says only "5 clients, 2 classes each": this reads it as disjoint complete classes, which #label-2 with its
    random second label does not give.
    """
    budget = _labels_per_client(labels_per_client, num_classes)
    first = np.arange(num_clients)[:, None] * budget
    holds = np.zeros((num_clients, num_classes), bool)
    np.put_along_axis(holds, (first + np.arange(budget)) % num_classes, True, axis=1)
    return _share_labels(rng, labels, holds)


def _scarce(
    rng: np.random.Generator,
    labels: np.ndarray,
    num_clients: int,
    num_classes: int,
    *,
    samples_per_client: int = 2000,
    scarce_labels: int = 3,
    scarce_size: int = 5,
) -> np.ndarray:
    """Client k is dealt n random examples, then loses all but m of each of t random labels; nobody holds the rest.

    The paper's target labels; it does not say whether devices may share examples, and here none is held twice.
    """
    size, least = at_least("samples_per_client", samples_per_client, 1), at_least("scarce_size", scarce_size, 0)
    if at_least("scarce_labels", scarce_labels, 0) > num_classes:
        raise InputError(f"scarce_labels={scarce_labels}, but there are {num_classes} labels; give at most as many")
    if num_clients * size > len(labels):
        raise InputError(
            f"num_clients * samples_per_client = {num_clients * size}, but there are {len(labels)} examples; give fewer"
        )
    client = np.full(len(labels), -1)
    for k, dealt in enumerate(rng.permutation(len(labels))[: num_clients * size].reshape(num_clients, size)):
        client[dealt] = k
        for c in rng.permutation(num_classes)[:scarce_labels]:
            client[dealt[labels[dealt] == c][least:]] = -1
    return client


def _quantity(
    rng: np.random.Generator,
    labels: np.ndarray,
    num_clients: int,
    num_classes: int,
    *,
    beta: float = 0.5,
    min_size: int = 10,
) -> np.ndarray:
    """A permutation cut at floor(N cumsum(q)), q ~ Dir(beta 1_C), again until all have min_size; all is held."""
    del num_classes
    beta, least, total = concentration("beta", beta), at_least("min_size", min_size, 0), np.array([len(labels)])

    def draw(b: float) -> np.ndarray:
        return dirichlet.cut(total, rng.dirichlet(np.full(num_clients, b))[None])

    table = dirichlet.repeated(draw, beta, least, len(labels), num_clients, name="beta")
    return deal(table, np.zeros(len(labels), int), rng)


def _writer(rng: np.random.Generator, owner: np.ndarray, num_clients: int, *, merge: bool = False) -> np.ndarray:
    """C random writers, one per client; with `merge` all writers, dealt at random to C clients as evenly as can be."""
    writers = int(owner.max(initial=-1)) + 1
    if num_clients > writers:
        raise InputError(f"num_clients={num_clients}, but there are {writers} writers; give at most as many, or none")
    if merge:
        return rng.permutation(equal_parts(writers, num_clients))[owner]
    client_of_writer = np.full(writers, -1)
    client_of_writer[np.sort(rng.permutation(writers)[:num_clients])] = np.arange(num_clients)
    return client_of_writer[owner]


def _natural(rng: np.random.Generator, owner: np.ndarray, num_clients: int) -> np.ndarray:
    """Client k holds all of the k-th owner's examples."""
    del rng, num_clients
    return owner


_SCHEMES: dict[str, Callable[..., np.ndarray]] = {
    "iid": _iid,
    "shards": _shards,
    "shards_fedntd": _shards_fedntd,
    "labels": _labels,
    "jiang": _jiang,
    "scarce": _scarce,
    "quantity": _quantity,
}
_TABLES: dict[str, Callable[..., np.ndarray]] = {
    name: function
    for letter, (_, function, authors) in _DIRICHLET.items()
    for name in (f"dirichlet_{letter}", *(f"dirichlet_{author}" for author in authors))
}
