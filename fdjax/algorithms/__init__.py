"""The methods, one paper a file. One row here enrols a method in the programs and in the whole contract test."""

from collections.abc import Callable
from typing import NamedTuple

from fdjax.algorithms import fedavg, feddistill
from fdjax.local import Training
from fdjax.types import Algorithm, Model


class Entry(NamedTuple):
    """A registered method."""

    build: Callable[[Model, Training], Algorithm]  # (central model, training) -> Algorithm
    hparams: dict[str, float | str]  # traced hyperparameters: default, or the name of another to follow
    summary: str  # one line for --help


ALGORITHMS: dict[str, Entry] = {
    "fedavg": Entry(fedavg.fedavg, fedavg.HPARAMS, "FedAvg (McMahan et al. 2017): parameters, averaged"),
    "feddistill": Entry(
        feddistill.feddistill,
        feddistill.HPARAMS,
        "FedDistill (Jiang et al. 2020): a personal teacher for the central model",
    ),
}
