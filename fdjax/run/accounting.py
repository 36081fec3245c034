"""What a run spends of privacy: its events, and the epsilon of them by the package dp-accounting.

An epsilon means nothing without delta and the relation between the two neighbouring federations that are not to be told
apart:

- client, all clients or Poisson sampling: one has a client that the other has not. What is summed changes by S at most.
- client, a fixed number of participants: one client's data are others, so that sum changes by 2 S at most, and the
  multiplier is half of z. Sampling amplifies by the theorem for samples without replacement.
- example: one example of one client is another. Every step of DP-SGD draws B of the client's n examples without
  replacement, so z is halved and amplified as above; clients hold different examples, so the run's epsilon is that of
  the client who has spent most, as if it had taken part in every round. That bound is wide. `poisson` is the usual
  approximation in its place: q = B / n, z whole, one example more or less.
- local: one client's data are others, 2 S again, and nobody's participation hides it.
- means: one example of one client more or less, of the means by label that it sends, **given the models**, which
  learned from the same examples: that is not accounted for. Sums and counts are noised by z_s and z_n, which is one
  Gaussian of multiplier (z_s^-2 + z_n^-2)^(-1/2) a round, for each client, as if it took part in every one.

That sampling amplifies needs it to be secret: who sees the traffic of a client has the epsilon of no sampling.
What a method makes private by itself (`OwnRelease`) has an epsilon and a relation of its own beside these.
Several releases of a round are made by the same participants: z / sqrt(their number) is one that is equal to them.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from fdjax.contract import Algorithm
from fdjax.errors import InputError
from fdjax.exchange.privacy import OwnRelease

_ADD, _REPLACE, _EXAMPLE = "one client more or less", "one client's data replaced", "one example replaced"
_AS_IF = "one example more or less, as if batches were Poisson samples"
_GIVEN = "one example more or less in the means, given the models, whose training on it is not hidden"
_WORST = 4  # of the least numbers of steps: with more of them, the share of the examples in a step falls faster


class Ledger(NamedTuple):
    """What of a run its accountant must know, beside noise and delta."""

    level: str  # of privacy.LEVELS
    rate: float  # with which clients take part, each by itself
    fixed: tuple[int, int] | None  # clients, and how many of them take part, where that number is fixed
    releases: int  # of a round
    in_setup: int  # of all clients, before the first one
    samples: tuple[tuple[int, int, int], ...] = ()  # example: a client's examples, those of a step, steps of a round
    poisson: bool = False  # example: as if batches were Poisson samples
    of_counts: float | None = None  # means: noise of the counts, None where it is that of the sums

    @property
    def apart(self) -> tuple["Ledger", ...]:
        """A ledger for each of the clients who may have spent most."""
        return tuple(self._replace(samples=(sample,)) for sample in self.samples) or (self,)

    @property
    def relation(self) -> str:
        """The relation between neighbouring federations, in words."""
        if self.level == "example":
            return _AS_IF if self.poisson else _EXAMPLE
        if self.level == "means":
            return _GIVEN
        return _ADD if self.level == "client" and self.fixed is None else _REPLACE

    def events(self, noise_multiplier: float, rounds: int) -> Any:
        """The event, of dp-accounting, of the set-up and so many rounds."""
        import dp_accounting as dp

        once = dp.GaussianDpEvent(self._multiplier(noise_multiplier, self.releases))
        before = [dp.GaussianDpEvent(self._multiplier(noise_multiplier, self.in_setup))] if self.in_setup else []
        if not self.hides(noise_multiplier):
            return dp.NonPrivateDpEvent() if before or (rounds and self.releases) else dp.NoOpDpEvent()
        if self.level == "example":
            held, batch, steps = self.samples[0]
            if batch < held:
                once = (
                    dp.PoissonSampledDpEvent(batch / held, once)
                    if self.poisson
                    else dp.SampledWithoutReplacementDpEvent(held, batch, once)
                )
            return dp.SelfComposedDpEvent(once, steps * rounds) if steps * rounds else dp.NoOpDpEvent()
        if self.level == "client" and self.fixed is not None:
            once = dp.SampledWithoutReplacementDpEvent(*self.fixed, once)
        elif self.level == "client" and self.rate < 1:
            once = dp.PoissonSampledDpEvent(self.rate, once)
        rounds = rounds if self.releases else 0
        return dp.ComposedDpEvent([*before, *([dp.SelfComposedDpEvent(once, rounds)] if rounds else [])])

    def counts_noise(self, noise_multiplier: float) -> float:
        """Of means: z_n."""
        return noise_multiplier if self.of_counts is None else self.of_counts

    def hides(self, noise_multiplier: float) -> bool:
        """Whether there is noise on all that is released."""
        return noise_multiplier > 0 and self.of_counts != 0

    def _multiplier(self, noise_multiplier: float, releases: int) -> float:
        if self.level == "means":
            return joint_multiplier(noise_multiplier, self.counts_noise(noise_multiplier))
        sensitivity = 1 if self.relation in (_ADD, _AS_IF) else 2
        return noise_multiplier / sensitivity / math.sqrt(max(releases, 1))


def joint_multiplier(of_sums: float, of_counts: float) -> float:
    """(z_s^-2 + z_n^-2)^(-1/2), of the one Gaussian that both together are; 0 if one of them is."""
    return of_sums * of_counts / math.hypot(of_sums, of_counts) if of_sums and of_counts else 0.0


def ledger_of(
    settings: Any, algorithm: Algorithm, places: tuple[int, ...], may_train: tuple[int, ...], held: np.ndarray
) -> Ledger | None:
    """The ledger of a run whose clients hold so many examples, `held` [C]; None without privacy.

    Raises InputError for a method that shares nothing.
    """
    if settings.privacy == "none":
        return None
    by_poisson = settings.batch_accounting == "poisson"
    if settings.privacy == "example":
        return Ledger("example", 1.0, None, settings.method.example_fits, 0, _samples(settings, held), by_poisson)
    if settings.privacy == "means":
        return Ledger("means", 1.0, None, 1, 0, of_counts=settings.count_noise_multiplier)
    releases, in_setup = (sum(len(e.releases) for e in exchanges) for exchanges in (algorithm.round, algorithm.setup))
    if not releases + in_setup:
        raise InputError(f"--privacy={settings.privacy}: {algorithm.name} sends nothing that could tell; leave it out")
    poisson = settings.sampling == "poisson"
    # The cohort of which most take part is the one whose clients are hidden least.
    size, number = max(zip(may_train, places, strict=True), key=lambda pair: pair[1] / pair[0])
    fixed = None if poisson or all(n == c for n, c in zip(places, may_train, strict=True)) else (size, number)
    return Ledger(settings.privacy, settings.participation if poisson else 1.0, fixed, releases, in_setup)


def _samples(settings: Any, held: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """(examples, those of a step, steps of a round) of those who spend most: the least n_k for a number of steps."""
    hparams = settings.method.values(dict(settings.hparams))
    batch_size = settings.batch_size or int(np.max(held))
    least: dict[int, int] = {}
    for n in sorted({int(n) for n in held if n}):
        steps = max(n // batch_size, 1) if settings.drop_last else -(-n // batch_size)
        least.setdefault(steps, n)
    given = int(hparams.get("local_steps", 0)), int(hparams["local_epochs"])
    found = sorted(least.items())[:_WORST]
    return tuple((n, min(batch_size, n), given[0] or given[1] * steps) for steps, n in found)


def noise_of(settings: Any, ledger: Ledger | None) -> float:
    """The noise multiplier: as given, or the least one that keeps to `target_epsilon`.

    Raises InputError where no noise does.
    """
    if ledger is None or settings.target_epsilon is None:
        return settings.noise_multiplier
    return max(
        _calibrated(each, settings.rounds, settings.accountant, settings.target_epsilon, settings.delta)
        for each in ledger.apart
    )


@functools.lru_cache(maxsize=256)
def _calibrated(ledger: Ledger, rounds: int, accountant: str, epsilon: float, delta: float) -> float:
    import dp_accounting as dp
    from dp_accounting.mechanism_calibration import NoBracketIntervalFoundError

    def event(z: float) -> Any:
        return ledger.events(z, rounds)

    with _quietly():
        try:
            # Noise of float32, rounded up, so that what the round draws is what is accounted for.
            found = dp.calibrate_dp_mechanism(lambda: _accountant(ledger, accountant), event, epsilon, delta)
        except (NoBracketIntervalFoundError, ValueError) as error:
            raise InputError(
                f"--target_epsilon={epsilon:g} with --delta={delta:g} in {rounds} rounds: no noise was found for it; "
                "give a larger epsilon, fewer rounds, or --noise_multiplier"
            ) from error
    return float(np.nextafter(np.float32(found), np.float32(np.inf)))


@functools.lru_cache(maxsize=64)
def epsilons(ledger: Ledger, noise_multiplier: float, rounds: int, accountant: str, delta: float) -> tuple[float, ...]:
    """Epsilon after each of the rounds; infinite without noise."""
    if not ledger.hides(noise_multiplier):
        return (math.inf,) * rounds
    if len(ledger.apart) > 1:
        each = [epsilons(one, noise_multiplier, rounds, accountant, delta) for one in ledger.apart]
        return tuple(map(max, zip(*each, strict=True)))
    with _quietly():
        if accountant == "pld":
            return tuple(
                float(
                    _accountant(ledger, accountant).compose(ledger.events(noise_multiplier, r + 1)).get_epsilon(delta)
                )
                for r in range(rounds)
            )
        from dp_accounting.rdp import compute_epsilon

        # Divergences add, so one composition does for all rounds.
        start = _accountant(ledger, accountant).compose(ledger.events(noise_multiplier, 0))
        after = _accountant(ledger, accountant).compose(ledger.events(noise_multiplier, 1))
        a_round = np.asarray(after.rdp) - np.asarray(start.rdp)
        return tuple(
            float(compute_epsilon(start.orders, start.rdp + (r + 1) * a_round, delta)[0]) for r in range(rounds)
        )


def accounted(
    settings: Any, ledger: Ledger | None, rounds: dict[str, list[float]]
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """The histories with `epsilon` after every round, and what there is to say of privacy; as they are without."""
    if ledger is None:
        return rounds, {}
    noise, done = noise_of(settings, ledger), len(rounds["bytes_up"])
    spent = epsilons(ledger, noise, done, settings.accountant, settings.delta)
    of_counts = {"count_noise_multiplier": ledger.counts_noise(noise)} if ledger.level == "means" else {}
    return rounds | {"epsilon": list(spent)}, {
        "epsilon": spent[-1] if spent else math.nan,
        "delta": settings.delta,
        "relation": ledger.relation,
        "accountant": settings.accountant,
        "noise_multiplier": noise,
        **of_counts,
        "clip": math.inf if settings.clip is None else settings.clip,
        "events": [repr(each.events(noise, done)) for each in ledger.apart],
    }


def own_releases(algorithm: Algorithm) -> list[OwnRelease]:
    """What the method makes private by itself."""
    exchanges = (*algorithm.setup, *algorithm.round)
    return [release for e in exchanges for release in e.releases if isinstance(release, OwnRelease)]


def spent_on_its_own(settings: Any, algorithm: Algorithm, held: np.ndarray) -> dict[str, Any]:
    """{"parts": what each of them spends}, of clients that hold so many examples [C]; {} of a method without any.

    Epsilon is exact for a Gaussian (Balle, Wang 2018). It is that of the part alone: whatever else the method sends is
    not hidden by it.
    """
    if not (releases := own_releases(algorithm)):
        return {}
    import dp_accounting as dp

    hparams = settings.method.values(dict(settings.hparams))
    parts = []
    for release in releases:
        noise, delta = release.multiplier(hparams, held), hparams[release.delta]
        epsilon = float(dp.get_epsilon_gaussian(noise, delta)) if noise else math.inf
        parts.append(
            {"what": release.what, "epsilon": epsilon, "delta": delta, "relation": release.relation}
            | {"noise_multiplier": noise}
        )
    return {"parts": parts}


def _accountant(ledger: Ledger, name: str) -> Any:
    import dp_accounting as dp

    relation = dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    # A Gaussian of known sensitivity is the same under either relation; samples of a fixed size know the other alone.
    if (ledger.level == "example" and not ledger.poisson) or (ledger.level == "client" and ledger.fixed is not None):
        relation = dp.NeighboringRelation.REPLACE_ONE
    if name == "pld":
        from dp_accounting.pld import PLDAccountant

        return PLDAccountant(relation)
    from dp_accounting.rdp import RdpAccountant

    return RdpAccountant(neighboring_relation=relation)


class _quietly:  # noqa: N801
    """Without the accountant's word, at every event, that it leaves out orders that do not converge."""

    def __enter__(self):
        from absl import logging

        self._before = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)

    def __exit__(self, *_):
        from absl import logging

        logging.set_verbosity(self._before)
