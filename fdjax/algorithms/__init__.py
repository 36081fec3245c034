"""The methods, one paper a file. One row here enrols a method in the programs and in the whole contract test."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from fdjax.algorithms import (
    baselines,
    cfd,
    cronus,
    dsfl,
    fd,
    fedavg,
    feddf,
    feddistill,
    fedgems,
    fedgkt,
    fedmd,
    fedprox,
)
from fdjax.client.local import Task
from fdjax.types import Algorithm


class Entry(NamedTuple):
    """A registered method."""

    build: Callable[[Task], Algorithm]
    hparams: dict[str, float | str]  # traced hyperparameters: default, or the name of another to follow
    summary: str  # one line for --help
    options: Mapping[str, tuple[str, ...]] = MappingProxyType({})  # static choices by name, the default first
    proxy: str | None = None  # the proxy data that it needs: "labelled" or "unlabelled"
    labels_for: tuple[str, str] | None = None  # an option and its value that need them labelled
    split: bool = False  # whether clients' models are split in two, and the central one takes their features
    pooled: bool = False  # one client holds what all would hold


ALGORITHMS: dict[str, Entry] = {
    "fedavg": Entry(fedavg.fedavg, fedavg.HPARAMS, "FedAvg (McMahan et al. 2017): parameters, averaged"),
    "fedprox": Entry(fedprox.fedprox, fedprox.HPARAMS, "FedProx (Li et al. 2020): FedAvg near the start"),
    "feddistill": Entry(
        feddistill.feddistill,
        feddistill.HPARAMS,
        "FedDistill (Jiang et al. 2020): a personal teacher for the central model",
    ),
    "cfd": Entry(
        cfd.cfd,
        cfd.HPARAMS,
        "CFD (Sattler et al. 2022): soft labels in few bits, delta-coded; the server's model labels for the clients",
        cfd.OPTIONS,
        "unlabelled",
    ),
    "feddf": Entry(
        feddf.feddf,
        feddf.HPARAMS,
        "FedDF (Lin et al. 2020): parameters, averaged, then distilled from the clients' mean logits on proxy data",
        feddf.OPTIONS,
        "unlabelled",
        ("drop_worst", "on"),
    ),
    "fedgems": Entry(
        fedgems.fedgems,
        fedgems.HPARAMS,
        "FedGEMS (Cheng et al. 2021): the server's model learns from clients where it never knew better, and teaches",
        proxy="labelled",
    ),
    "fedgkt": Entry(
        fedgkt.fedgkt,
        fedgkt.HPARAMS,
        "FedGKT (He et al. 2020): features and logits up, logits down; --model is the server's, --models the clients'",
        split=True,
    ),
    "fd": Entry(fd.fd, fd.HPARAMS, "FD (Jeong et al. 2018): mean outputs by label"),
    "fedmd": Entry(fedmd.fedmd, fedmd.HPARAMS, "FedMD (Li & Wang 2019): mean logits on proxy data", proxy="labelled"),
    "cronus": Entry(
        cronus.cronus,
        cronus.HPARAMS,
        "Cronus (Chang et al. 2019): robust mean of outputs on proxy data, learned with the client's own",
        cronus.OPTIONS,
        "unlabelled",
    ),
    "dsfl": Entry(
        dsfl.dsfl,
        dsfl.HPARAMS,
        "DS-FL (Itahara et al. 2021): sharpened mean of outputs on proxy data",
        dsfl.OPTIONS,
        "unlabelled",
    ),
    "local": Entry(baselines.alone, baselines.HPARAMS, "every client by itself"),
    "ensemble": Entry(baselines.ensemble, baselines.HPARAMS, "every client by itself, tested together"),
    "centralized": Entry(baselines.centralized, baselines.HPARAMS, "one client that holds everything", pooled=True),
}
