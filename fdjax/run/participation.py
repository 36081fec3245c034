"""Settings of who takes part in a round, and what they do."""

import dataclasses
from typing import Any

from fdjax.engine.participation import SAMPLINGS, STRAGGLER_WORKS
from fdjax.errors import InputError
from fdjax.run.setting import setting_field as _setting


@dataclasses.dataclass(frozen=True)
class ParticipationSettings:
    """The settings of participation, which `Settings` has among its own."""

    participation: float = _setting(
        1.0, "fraction of the clients (of each cohort) that takes part in a round; at least 1 client",
        low=0, above=True, high=1,
    )  # fmt: skip
    sampling: str = _setting("uniform", "how participants are drawn", choices=SAMPLINGS)
    capacity: int = _setting(
        0, "places for the participants of a cohort, sampling poisson; 0: so many that hardly ever are there too few",
        low=0,
    )  # fmt: skip
    dropped: float = _setting(
        0.0, "probability that a participant receives, but sends nothing and stays as it was", low=0, high=1, below=True
    )
    stragglers: float = _setting(
        0.0, "share of the participants, others in each round, that do only 1 to E - 1 of E epochs", low=0, high=1
    )
    straggler_work: str = _setting("partial", "what becomes of stragglers", choices=STRAGGLER_WORKS)
    new_clients: float = _setting(
        0.0, "share of the clients (of each cohort) that never train and are tested by themselves; drawn by "
        "partition_seed", low=0, high=1, below=True,
    )  # fmt: skip
    fine_tune_epochs: int = _setting(
        1, "epochs that each of these trains before it is tested again, after the last round", low=0
    )


def check_participation(settings: Any) -> None:
    """Raises InputError for settings of participation that mean nothing together, or to the method."""
    if settings.capacity and settings.sampling != "poisson":
        raise InputError(
            f"--capacity={settings.capacity} is for --sampling=poisson alone; with {settings.sampling} use "
            "--participation"
        )
    method = settings.method
    if settings.stragglers and settings.straggler_work == "partial" and "local_epochs" not in method.hparams:
        raise InputError(
            f"{method.name} has no local_epochs of which stragglers could do a part; use --straggler_work=drop"
        )
    given, epochs = dict(settings.hparams), method.hparams.get("local_epochs")
    work = given.get("local_steps") or given.get("local_epochs", epochs and epochs.default)
    if settings.stragglers and settings.straggler_work == "partial" and work == 1:
        raise InputError(
            "of a single epoch a straggler can do no part; give --local_epochs above 1, --local_steps, or "
            "--straggler_work=drop"
        )
    if settings.new_clients and method.pooled:
        raise InputError(f"--new_clients={settings.new_clients:g}: {method.name} has a single client; leave it out")
