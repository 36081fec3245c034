"""From settings and holdings to who may take part in rounds, how many of them do, and who never trains."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fdjax.engine.participation import Policy, places_of
from fdjax.errors import InputError
from fdjax.run.settings import Settings
from fdjax.types import Holdings

_NEW = 11  # sets the draw of new clients apart from others with the same seed


class Participants(NamedTuple):
    """Who may take part."""

    policy: Policy
    places: tuple[int, ...]  # for the participants of a round, of each cohort
    never_train: np.ndarray  # [C] bool by id
    new: tuple[int, ...]  # how many of each cohort that is; () for none at all


def policy_of(settings: Settings) -> Policy:
    """How participants are drawn, and what they do."""
    rate = settings.participation if settings.sampling == "poisson" else 1.0
    return Policy(settings.sampling, rate, settings.dropped, settings.stragglers, settings.straggler_work)


def participants(settings: Settings, holdings: Holdings, sizes: Sequence[int]) -> Participants:
    """Who may take part, of cohorts of these sizes.

    Raises InputError for too few places and too few clients to draw.
    """
    policy, ends = policy_of(settings), np.cumsum(sizes)[:-1]
    never_train, new = _new_clients(settings, sizes)
    may_train = tuple(int((~part).sum()) for part in np.split(never_train, ends))
    places = places_of(policy, settings.participation, settings.capacity, may_train, settings.rounds)
    holds = [int(part.sum()) for part in np.split((np.asarray(holdings.count) > 0) & ~never_train, ends)]
    for number, of in zip(places, holds, strict=True):
        if settings.sampling == "examples" and number > of:
            raise InputError(
                f"--sampling=examples draws {number} different clients, but only {of} hold examples; use a smaller "
                "--participation, or --sampling=examples_replaced"
            )
    if not sum(holds):
        raise InputError("no client that trains holds an example; use fewer --new_clients or another --partition_seed")
    return Participants(policy, places, never_train, new)


def _new_clients(settings: Settings, sizes: Sequence[int]) -> tuple[np.ndarray, tuple[int, ...]]:
    never_train = np.zeros(sum(sizes), bool)
    if not settings.new_clients:
        return never_train, ()
    rng, first, numbers = np.random.default_rng([settings.data_seed, _NEW]), 0, []
    for size in sizes:
        number = round(settings.new_clients * size)
        if not 0 < number < size:
            raise InputError(
                f"--new_clients={settings.new_clients:g} of {size} clients is {number}; some must be new, and some not"
            )
        never_train[first + rng.choice(size, number, replace=False)] = True
        first += size
        numbers.append(number)
    return never_train, tuple(numbers)
