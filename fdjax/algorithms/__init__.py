"""The methods, one paper a file. One row here enrols a method in the programs and in the whole contract test."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from fdjax.algorithms import fedavg, feddistill
from fdjax.local import Task
from fdjax.types import Algorithm


class Entry(NamedTuple):
    """A registered method."""

    build: Callable[[Task], Algorithm]
    hparams: dict[str, float | str]  # traced hyperparameters: default, or the name of another to follow
    summary: str  # one line for --help
    options: Mapping[str, tuple[str, ...]] = MappingProxyType({})  # static choices by name, the default first
    proxy: str | None = None  # the proxy data that it needs: "labelled" or "unlabelled"


ALGORITHMS: dict[str, Entry] = {
    "fedavg": Entry(fedavg.fedavg, fedavg.HPARAMS, "FedAvg (McMahan et al. 2017): parameters, averaged"),
    "feddistill": Entry(
        feddistill.feddistill,
        feddistill.HPARAMS,
        "FedDistill (Jiang et al. 2020): a personal teacher for the central model",
    ),
}
