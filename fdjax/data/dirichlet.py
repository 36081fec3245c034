"""Partitions that papers call "Dirichlet(alpha)": seven names, six procedures (F is A). Name the one you used.

Each function takes the class sizes N_c and returns the table `[C, K]` of how many examples of each class each client
holds. A small alpha concentrates, a large one tends to IID proportions.
"""

import time
from collections.abc import Callable, Iterator

import numpy as np

from fdjax.data.holdings import equal_parts
from fdjax.data.options import at_least, concentration, positive
from fdjax.errors import InputError

ATTEMPTS, SECONDS = 10_000, 5.0  # most draws of a table, and most seconds of this thread for them


def cut(sizes: np.ndarray, proportions: np.ndarray) -> np.ndarray:
    """The table `[C, K]` of class c cut at floor(N_c cumsum(proportions [K, C])_c); the last client gets the rest."""
    edges = np.floor(np.cumsum(proportions, axis=1)[:, :-1] * sizes[:, None]).astype(int)
    return np.diff(edges, prepend=0, append=sizes[:, None], axis=1).T


def capped(
    rng: np.random.Generator, sizes: np.ndarray, num_clients: int, alpha: float, cap: float, order: np.ndarray
) -> np.ndarray:
    """Class by class in `order`: p ~ Dir(alpha 1_C), p_k = 0 where client k already holds >= cap, renormalise, cut."""
    table = np.zeros((num_clients, len(sizes)), int)
    held = np.zeros(num_clients, int)
    for c in order:
        p = rng.dirichlet(np.full(num_clients, alpha)) * (held < cap)
        if p.sum() == 0:  # every open client's share underflowed: a tiny alpha picks one of them
            p = np.zeros(num_clients)
            p[rng.choice(np.flatnonzero(held < cap)) if (held < cap).any() else rng.integers(num_clients)] = 1
        table[:, c] = cut(sizes[c : c + 1], p[None] / p.sum())[:, 0]
        held += table[:, c]
    return table


def repeated(
    draw: Callable[[float], np.ndarray],
    alpha: float,
    least: int,
    total: int,
    num_clients: int,
    *,
    name: str = "alpha",
    relief: str = "fewer clients or a smaller min_size",
) -> np.ndarray:
    """The first table of `draw(alpha)` in which each client holds at least `least` of `total` examples.

    Raises InputError after `ATTEMPTS` draws or `SECONDS`, saying for which larger alpha (called `name`) most draws
    succeed, if that is found in as many seconds.
    """

    def tables(value: float, attempts: int, end: float) -> Iterator[np.ndarray | None]:
        """A table a draw, or None for one that leaves a client too little."""
        for _ in range(attempts):
            table = draw(value)
            yield table if table.sum(axis=1).min() >= least else None
            if time.thread_time() > end:
                return

    if least * num_clients > total:
        raise InputError(
            f"num_clients={num_clients}: {total} examples cannot give each client min_size={least}; "
            f"give num_clients <= {total // least} or a smaller min_size"
        )
    draws = 0
    for table in tables(alpha, ATTEMPTS, time.thread_time() + SECONDS):
        if table is not None:
            return table
        draws += 1
    end = time.thread_time() + SECONDS
    larger = (alpha * 2**i for i in range(1, 15) if time.thread_time() < end)
    works = next((value for value in larger if sum(t is not None for t in tables(value, 10, end)) > 5), None)
    advice = f"give {name}={works:.3g}, which works, or {relief}" if works else f"give {relief}"
    raise InputError(
        f"{name}={alpha:g} with {num_clients} clients: in {draws} draws some client always had fewer than {least} "
        f"of {total} examples; {advice}"
    )


def per_class(
    rng: np.random.Generator, sizes: np.ndarray, num_clients: int, *, alpha: float = 0.5, min_size: int = 10
) -> np.ndarray:
    """Variants A and F: each class over the clients, none beyond N/C before the class, again until all have min_size.

    For each class c, p ~ Dir(alpha 1_C); p_k = 0 where client k holds >= N/C; p renormalised; class c cut at
    floor(N_c cumsum(p)). A: FedMA `hetero-dir` (Wang et al. 2020), NIID-Bench `noniid-labeldir` (Li et al. 2022), MOON.
    F: FedNTD's `lda` (Lee et al. 2022), whose released code is the same procedure.
    """
    alpha, total = concentration("alpha", alpha), int(sizes.sum())
    order = np.arange(len(sizes))

    def draw(a: float) -> np.ndarray:
        return capped(rng, sizes, num_clients, a, total / num_clients, order)

    return repeated(draw, alpha, at_least("min_size", min_size, 0), total, num_clients)


def per_group(
    rng: np.random.Generator,
    sizes: np.ndarray,
    num_clients: int,
    *,
    alpha: float = 0.5,
    group: int = 10,
    recut: bool = False,
) -> np.ndarray:
    """Variant B, FedDF (Lin et al. 2020): variant A in groups of clients, each on a random share of the data.

    Within a group the draw repeats until the smallest client has half of the group's average. The released code then
    lays the clients' lists, each sorted by class, end to end and cuts them anew into equal parts: so does `recut`.
    """
    alpha, group = concentration("alpha", alpha), at_least("group", group, 1)
    firsts = np.arange(0, num_clients, group)
    bounds = np.append(firsts * sizes.sum() // num_clients, sizes.sum())
    shares, left = [], sizes
    for n in np.diff(bounds)[:-1]:
        shares.append(rng.multivariate_hypergeometric(left, n, method="marginals"))
        left = left - shares[-1]
    parts = []
    for first, share in zip(firsts, [*shares, left], strict=True):
        members, total = min(group, num_clients - int(first)), int(share.sum())

        def draw(a: float, share=share, members=members, total=total) -> np.ndarray:
            return capped(rng, share, members, a, total / members, np.arange(len(share)))

        parts.append(repeated(draw, alpha, int(0.5 * total / members), total, members, relief="a smaller group"))
    table = np.concatenate(parts)
    if recut:
        label = np.repeat(np.tile(np.arange(len(sizes)), num_clients), table.reshape(-1))
        table = np.zeros_like(table)
        np.add.at(table, (equal_parts(len(label), num_clients), label), 1)
    return table


def sinkhorn(rng: np.random.Generator, sizes: np.ndarray, num_clients: int, *, alpha: float = 0.5) -> np.ndarray:
    """Variant C, FedAUX (Sattler et al. 2021): for each class p_c ~ Dir(alpha 1_C), then Sinkhorn to equal sizes.

    The matrix [K, C] is scaled in turn to equal column sums and to rows of 1, at most 1,000 times, and each class cut
    at floor(N_c cumsum(p_c)). Sizes are equal up to that rounding if the classes are; the released code does not weigh
    rows by N_c, and neither does this.
    """
    p = rng.dirichlet(np.full(num_clients, concentration("alpha", alpha)), len(sizes))
    # A tiny alpha underflows whole columns to 0, which no scaling can raise; the floor keeps them positive.
    p = np.maximum(p, 1e-300)
    for _ in range(1000):
        before = p
        p = p / p.sum(axis=0)
        p = p / p.sum(axis=1, keepdims=True)
        if np.array_equal(p, before):
            break
    return cut(sizes, p)


def prior_interleaved(
    rng: np.random.Generator, sizes: np.ndarray, num_clients: int, *, alpha: float = 0.5
) -> np.ndarray:
    """Variant D, FedDyn and FedFTG (Acar et al. 2021, Zhang et al. 2022): each client a label prior Dir(alpha 1_K).

    All clients get floor(N/C) examples. A random client that is not yet full draws one label from its prior, again
    until it names a class that is not used up, and so on until all are full; N mod C examples stay unheld.
    """
    size = int(sizes.sum()) // num_clients
    prior = rng.dirichlet(np.full(len(sizes), concentration("alpha", alpha)), num_clients)
    return _draw_labels(rng, sizes, prior, _random_turns(rng, num_clients, size))


def prior_sequential(
    rng: np.random.Generator, sizes: np.ndarray, num_clients: int, *, alpha: float = 0.5
) -> np.ndarray:
    """Variant G, Hsu et al. 2019: client priors q ~ Dir(alpha p), p the class shares, sampled without replacement.

    Client after client draws its floor(N/C) examples; a class that is used up leaves every later prior, which is
    renormalised. Since p sums to 1, alpha here is K times what variant D calls alpha; N mod C examples stay unheld.
    """
    size = int(sizes.sum()) // num_clients
    weight = concentration("alpha", alpha) * sizes / sizes.sum()
    present = sizes > 0
    prior = np.zeros((num_clients, len(sizes)))
    prior[:, present] = rng.dirichlet(weight[present], num_clients)
    return _draw_labels(rng, sizes, prior, np.repeat(np.arange(num_clients), size))


def subsampled(
    rng: np.random.Generator,
    sizes: np.ndarray,
    num_clients: int,
    *,
    alpha: float = 0.5,
    sampling_ratio: float = 0.5,
    min_size: int = 10,
) -> np.ndarray:
    """Variant E, FedGen (Zhu et al. 2021): variant A on a subsample, classes in random order.

    With m = sampling_ratio * N / C, class c gives min(m, floor(sampling_ratio * N_c)) examples if sampling_ratio < 1,
    else all, and a client that holds >= m gets no further class.
    """
    alpha, ratio = concentration("alpha", alpha), positive("sampling_ratio", sampling_ratio)
    if ratio > 1:
        raise InputError(f"sampling_ratio={ratio:g}: expected a number in (0, 1]")
    cap = ratio * sizes.sum() / num_clients
    used = np.minimum(int(cap), (ratio * sizes).astype(int)) if ratio < 1 else sizes
    order = rng.permutation(len(sizes))

    def draw(a: float) -> np.ndarray:
        return capped(rng, used, num_clients, a, cap, order)

    return repeated(draw, alpha, at_least("min_size", min_size, 0), int(used.sum()), num_clients)


def _random_turns(rng: np.random.Generator, num_clients: int, size: int) -> np.ndarray:
    """Clients [C * size] in the order of uniform draws among those that still have fewer than `size` turns."""
    turns = np.zeros(0, int)
    while len(turns) < num_clients * size:
        more = np.concatenate([turns, rng.integers(num_clients, size=num_clients * size + 100)])
        order = np.argsort(more, kind="stable")
        first = np.searchsorted(more[order], np.arange(num_clients))
        nth = np.empty(len(more), int)
        nth[order] = np.arange(len(more)) - first[more[order]]
        turns = more[nth < size]
    return turns


def _draw_labels(rng: np.random.Generator, sizes: np.ndarray, prior: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """At each turn a client draws a label from its prior [C, K] among the classes not used up, in a table `[C, K]`.

    Drawing again until a class has examples left is drawing from the prior renormalised over those classes, so the
    turns between two exhaustions are one vectorised draw.
    """
    table, left = np.zeros(prior.shape, int), sizes.copy()
    uniform = rng.random(len(turns))
    at = 0
    while at < len(turns):
        # A client whose prior has nothing (or only underflow) on the remaining classes takes what is left.
        open_prior = prior * (left > 0)
        lost = open_prior.sum(axis=1) <= 0
        open_prior[lost] = left / left.sum()
        edges = np.cumsum(open_prior, axis=1)
        step = min(len(turns) - at, 16384)
        who = turns[at : at + step]
        point = np.minimum(uniform[at : at + step] * edges[who, -1], np.nextafter(edges[who, -1], 0))
        label = (point[:, None] >= edges[who]).sum(axis=1)
        seen = label[:, None] == np.arange(len(sizes))
        over = np.flatnonzero((np.cumsum(seen, axis=0) > left).any(axis=1))
        stop = over[0] if len(over) else step
        np.add.at(table, (who[:stop], label[:stop]), 1)
        left = left - seen[:stop].sum(axis=0)
        at += stop
        if stop < step:  # this turn's number has named the class that is used up: known, so no longer uniform
            uniform[at] = rng.random()
    return table
