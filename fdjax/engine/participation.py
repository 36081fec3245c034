"""Who takes part in a round, and who of these does only part of the work or sends nothing.

A draw costs what its participants cost, however many clients there are, but for one: sampling by examples without
replacement goes through all clients where more than a quarter of them take part.
"""

import functools
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fdjax import keys
from fdjax.contract import HParams
from fdjax.errors import InputError
from fdjax.types import Array

SAMPLINGS = MappingProxyType(
    {
        "uniform": "so many clients, each with the same probability",
        "examples": "so many different clients, each next one with probability n_k / n of those left, who then count "
        "alike (FedProx)",
        "examples_replaced": "so many draws with probability n_k / n; a client drawn twice counts twice (FedProx)",
        "poisson": "each client by itself with probability --participation",
    }
)
STRAGGLER_WORKS = MappingProxyType(
    {"partial": "they send what they have done", "drop": "they receive and send nothing, and stay as they were"}
)
OVERFLOW = 1e-9  # probability that a Poisson draw of any round has more clients than places


class Policy(NamedTuple):
    """How the participants of a round are drawn, and what becomes of them."""

    sampling: str = "uniform"  # one of SAMPLINGS
    rate: float = 1.0  # a client's probability (poisson)
    dropped: float = 0.0  # probability that a participant receives and sends nothing
    stragglers: float = 0.0  # share of the participants that do only part of their epochs
    straggler_work: str = "partial"  # one of STRAGGLER_WORKS

    @property
    def alike(self) -> bool:
        """Whether participants count alike, and not by their examples."""
        return self.sampling in ("examples", "examples_replaced")


class Drawn(NamedTuple):
    """The participants of one cohort, S_j places."""

    rank: jax.Array  # [S_j] int32, rising; C_j for a place that stays empty, which are the last ones
    times: jax.Array  # [S_j] float32: how often each was drawn, 0 for an empty place


class Effort(NamedTuple):
    """What the participants of one cohort do."""

    work: jax.Array  # [S_j] float32: share of its epochs that each does
    sends: jax.Array  # [S_j] bool


def draw(
    policy: Policy, key: jax.Array, clients: int, may_train: int, places: int, cumulative: Array | None
) -> Drawn | None:
    """The participants of a cohort of C_j `clients`, of which the first `may_train` train; None for all of these.

    `cumulative` [C_j] int32: examples of the clients up to each one, for sampling by examples.
    """
    if policy.sampling == "poisson":
        return _poisson(policy.rate, key, clients, may_train, places)
    if policy.alike:
        assert cumulative is not None
        return _by_examples(policy, key, clients, may_train, places, cumulative)
    if places == may_train:
        return None
    return Drawn(jnp.sort(keys.shuffle(key, may_train)(jnp.arange(places))), jnp.ones(places))


def _poisson(rate: float, key: jax.Array, clients: int, may_train: int, places: int) -> Drawn:
    """A binomial number of clients, and so many of them uniformly: each by itself, in time of the places alone."""
    bits = jax.random.bits(keys.stream(key, "number"), (), jnp.uint32)
    number = jnp.searchsorted(_thresholds(rate, may_train, places), bits, side="right")
    who = keys.shuffle(keys.stream(key, "who"), may_train)(jnp.arange(places))
    present = jnp.arange(places) < number
    return Drawn(jnp.sort(jnp.where(present, who, clients)), present.astype(jnp.float32))


@functools.cache
def _thresholds(rate: float, may_train: int, places: int) -> np.ndarray:
    """[places] uint32: a binomial number is that of the thresholds that 32 random bits reach."""
    from scipy.stats import binom

    below = binom.cdf(np.arange(places), may_train, rate)
    return np.minimum(np.rint(below * 2.0**32), 2.0**32 - 1).astype(np.uint32)


def _by_examples(policy: Policy, key: jax.Array, clients: int, may_train: int, places: int, cumulative: Array) -> Drawn:
    held = jnp.maximum(cumulative[-1], 1)

    def some(key):
        at = jax.random.randint(key, (places,), 0, held)
        return jnp.searchsorted(cumulative, at, side="right").astype(jnp.int32)

    if policy.sampling == "examples_replaced":
        rank = jnp.sort(some(key))
        place = jnp.cumsum(jnp.append(True, rank[1:] != rank[:-1])) - 1
        different = jnp.full(places, clients, jnp.int32).at[place].set(rank)
        times = jnp.zeros(places).at[place].add(1.0)
        return Drawn(different, jnp.where(different < clients, times, 0))
    if 4 * places > may_train:
        # The least of exponential times with rates n_k: the same law (Efraimidis and Spirakis 2006).
        examples = jnp.diff(cumulative, prepend=0).astype(jnp.float32)
        score = jnp.log(examples) + jax.random.gumbel(key, (clients,))
        return Drawn(jnp.sort(lax.top_k(score, places)[1]), jnp.ones(places))

    def again(carry):
        turn, rank, _ = carry
        # Who was drawn already is drawn again in vain, so those that are left keep their relative probabilities.
        return turn + 1, *_first_different(jnp.append(rank, some(keys.stream(key, "turn", turn))), places, clients)

    start = jnp.int32(0), jnp.full(places, clients, jnp.int32), jnp.int32(0)
    _, rank, _ = lax.while_loop(lambda carry: carry[2] < places, again, start)
    return Drawn(jnp.sort(rank), jnp.ones(places))


def _first_different(rank: jax.Array, places: int, nobody: int) -> tuple[jax.Array, jax.Array]:
    """The first `places` different ones of `rank` [n], in their order, then `nobody`; and how many these are."""
    order = jnp.argsort(rank, stable=True)
    ordered = rank[order]
    new = jnp.append(True, ordered[1:] != ordered[:-1]) & (ordered != nobody)
    is_first = jnp.zeros(len(rank), bool).at[order].set(new)
    place = jnp.where(is_first, jnp.cumsum(is_first) - 1, places)
    found = jnp.full(places, nobody, jnp.int32).at[place].set(rank, mode="drop")
    return found, jnp.minimum(jnp.sum(is_first, dtype=jnp.int32), places)


def effort(policy: Policy, key: jax.Array, places: int, present: Array | int, hparams: HParams) -> Effort:
    """What each participant does; the first `present` of the places are taken.

    As in FedProx's code, round((1 - share) S) of S participants are no stragglers, and a straggler does a number of
    epochs that is uniform on 1 ... E - 1, E = `local_epochs` (1 for E = 1): `round(work * E)` of them. With
    `local_steps` E is these.
    A dropped participant, and a straggler that is dropped, does as little as it can.
    """
    work, sends = jnp.ones(places), jnp.ones(places, bool)
    if policy.stragglers:
        present = jnp.asarray(present, jnp.int32)
        number = present - jnp.round((1 - policy.stragglers) * present.astype(jnp.float32)).astype(jnp.int32)
        straggles = keys.shuffle(keys.stream(key, "stragglers"), present)(jnp.arange(places)) < number
        if policy.straggler_work == "drop":
            sends = ~straggles
        else:
            steps = jnp.asarray(hparams.get("local_steps", 0), jnp.int32)
            epochs = jnp.where(steps > 0, steps, jnp.asarray(hparams["local_epochs"], jnp.int32))
            done = jax.random.randint(keys.stream(key, "epochs"), (places,), 1, jnp.maximum(epochs, 2))
            work = jnp.where(straggles, done / jnp.maximum(epochs, 1), 1)
    if policy.dropped:
        sends &= jax.random.uniform(keys.stream(key, "dropped"), (places,)) >= policy.dropped
    return Effort(jnp.where(sends, work, 0).astype(jnp.float32), sends)


def places_of(
    policy: Policy, participation: float, capacity: int, may_train: tuple[int, ...], rounds: int
) -> tuple[int, ...]:
    """Places for the participants of each cohort. Raises InputError for a capacity that may not be enough."""
    if policy.sampling != "poisson":
        return tuple(max(1, round(participation * clients)) for clients in may_train)
    allowed = OVERFLOW / (rounds * len(may_train))
    enough = [_capacity(policy.rate, clients, allowed) for clients in may_train]
    if not capacity:
        return tuple(enough)
    if capacity < max(enough):
        missed = _probability_of_more(policy.rate, may_train, capacity, rounds)
        raise InputError(
            f"--capacity={capacity} is too small: with probability {missed:.2g} some draw of {max(may_train)} clients, "
            f"each with {policy.rate:g}, is larger in {rounds} rounds; give at least {max(enough)}, or 0"
        )
    return tuple(min(capacity, clients) for clients in may_train)


def _probability_of_more(rate: float, may_train: tuple[int, ...], capacity: int, rounds: int) -> float:
    """That in some round the draw of some cohort has more clients than `capacity`."""
    from scipy.stats import binom

    all_fit = sum(float(np.log1p(-binom.sf(min(capacity, clients), clients, rate))) for clients in may_train)
    return float(-np.expm1(rounds * all_fit))


def _capacity(rate: float, clients: int, allowed: float) -> int:
    """The least number that a binomial one exceeds with probability below `allowed`."""
    from scipy.stats import binom

    guess: Any = binom.isf(allowed, clients, rate)
    number = max(int(guess) - 2, 0)
    while binom.sf(number, clients, rate) >= allowed:
        number += 1
    return max(number, 1)
