"""Settings of privacy: what is private, how much noise that takes, how it is accounted for, and an attack on it."""

import dataclasses
from types import MappingProxyType
from typing import Any

from fdjax.errors import InputError
from fdjax.run.optimizers import ends_with_rounds
from fdjax.run.setting import setting_field as _setting

LEVELS = MappingProxyType(
    {
        "none": "nothing",
        "client": "all that a client has, against who sees what the server sends: uploads clipped, their sum noised",
        "example": "each example of a client, against all others: DP-SGD, gradients clipped one by one and noised",
        "local": "all that a client has, against the server too: every client noises its own uploads",
        "means": "each example of a client in fd's means by label, given the models: sums and counts noised",
    }
)
BATCHES = MappingProxyType(
    {
        "fixed": "as they are, of a fixed size, drawn anew in every step: a bound that holds, and is wide",
        "poisson": "as if each example came to a batch by itself, as is usual: an approximation",
    }
)
ACCOUNTANTS = MappingProxyType(
    {"rdp": "Renyi divergences, for every sampling; fast", "pld": "privacy loss distributions, which are tighter"}
)


@dataclasses.dataclass(frozen=True)
class PrivacySettings:
    """The settings of privacy, which `Settings` has among its own."""

    privacy: str = _setting("none", "what is kept private", choices=LEVELS)
    clip: float | None = _setting(
        None, "L2 norm to which what a client adds is clipped; default: not at all, which is not private", float,
        role="traced", low=0, above=True,
    )  # fmt: skip
    noise_multiplier: float = _setting(
        0.0, "standard deviation of the noise, in multiples of clip", role="traced", low=0
    )
    count_noise_multiplier: float | None = _setting(
        None, "privacy means: the same of the counts; default: noise_multiplier", float, role="traced", low=0
    )
    delta: float = _setting(
        1e-5, "probability with which epsilon may not hold", role="run", low=0, above=True, high=1, below=True,
        resumable=True,
    )  # fmt: skip
    target_epsilon: float | None = _setting(
        None, "epsilon after the last round, for which the noise_multiplier is computed before the first", float,
        role="traced", low=0, above=True,
    )  # fmt: skip
    batch_accounting: str = _setting(
        "fixed", "privacy example: how batches are accounted for", choices=BATCHES, role="run", resumable=True
    )
    accountant: str = _setting("rdp", "how epsilon is computed", choices=ACCOUNTANTS, role="run", resumable=True)
    membership: bool = _setting(
        False,
        "attack models and uploads at every evaluation: who was trained on, as AUC; up to a round's work each time",
    )


def check_privacy(settings: Any) -> None:
    """Raises InputError for settings of privacy that mean nothing together, or to the method."""
    if settings.privacy == "none":
        return
    noise, target, sampling = settings.noise_multiplier, settings.target_epsilon, settings.sampling
    if settings.method.pooled:
        raise InputError(
            f"--privacy={settings.privacy}: {settings.method.name} has one client with all data; use fedavg"
        )
    if target is not None and noise:
        raise InputError(
            f"--target_epsilon={target:g} and --noise_multiplier={noise:g}: the one follows from the other; give one"
        )
    if settings.privacy == "example" and not settings.method.example_fits:
        raise InputError(
            f"--privacy=example: not all that {settings.method.name} shares of a client's examples is learned by one "
            "fit on them; use fedavg, fedprox, fedopt or dsfl, or another --privacy"
        )
    if settings.privacy == "means":
        _check_means(settings)
    if settings.clip is None and (noise or target is not None):
        given = f"--noise_multiplier={noise:g}" if noise else f"--target_epsilon={target:g}"
        raise InputError(f"{given} without --clip: no noise hides what is not clipped; give --clip, such as 1")
    if sampling.startswith("examples") and settings.privacy != "example":
        raise InputError(
            f"--privacy={settings.privacy} with --sampling={sampling}: who is drawn tells who holds much; use poisson "
            "or uniform"
        )
    if settings.accountant == "pld" and settings.privacy == "example" and settings.batch_accounting == "fixed":
        raise InputError(
            "--accountant=pld knows no batches of a fixed size; use --accountant=rdp, or --batch_accounting=poisson"
        )
    if settings.accountant == "pld" and settings.privacy == "client" and _fixed_size(settings):
        raise InputError(
            "--accountant=pld knows no sampling of so many clients without replacement; use --accountant=rdp, or "
            "--sampling=poisson"
        )


def _check_means(settings: Any) -> None:
    if not settings.method.label_means:
        raise InputError(
            f"--privacy=means: means by label are not all that {settings.method.name} shares; use fd, or another "
            "--privacy"
        )
    if dict(settings.hparams).get("local_steps"):
        raise InputError(
            "--privacy=means with --local_steps: how often an example is seen then tells how many there are; use "
            "--local_epochs"
        )


def bound_to_rounds(settings: Any) -> set[str]:
    """What may not be another when a run goes on: the learning rate, or the noise for an epsilon, follows from it."""
    of_schedule = {"rounds"} if ends_with_rounds(settings) else set()
    noise = {"rounds", "delta", "accountant", "batch_accounting"}
    return of_schedule if settings.target_epsilon is None else of_schedule | noise


def _fixed_size(settings: Any) -> bool:
    return settings.sampling == "uniform" and settings.participation < 1
