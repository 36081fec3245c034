"""A small federation on which a method's contract is checked, made of nothing but numbers drawn here.

There are 7 clients of 12 to 0 examples, most of which lack most of the 10 classes, and 5 of them take part in a round.
"""

from typing import Any

import jax
import numpy as np

from fdjax.contract import HParams
from fdjax.data.federation import federate
from fdjax.data.holdings import from_counts
from fdjax.engine.layout import State
from fdjax.errors import InputError
from fdjax.run import experiment, loading
from fdjax.run.experiment import Experiment
from fdjax.run.settings import Settings, make
from fdjax.types import Federation, Holdings, PyTree

COUNTS = (7, 0, 1, 12, 5, 3, 9)  # an empty client, one with a single example, and more than one batch of 4 for most
CLIENTS, PARTICIPANTS = len(COUNTS), 5
SPARSE = ((0, 0, 12, 0, 0, 0, 0), (1,) * 7, (0, 0, 0, 1, 0, 0, 16), (6, 0, 6, 0, 6, 0, 6))
PROXIES, PER_ROUND = 11, 6  # proxy examples, labelled; how many of them a round uses
ROUNDS = 2
QUICK = {"learning_rate": 0.3, "local_epochs": 2}  # of methods that have them
_FIELDS = {
    "dataset": "synthetic", "partition": "natural", "num_clients": CLIENTS, "samples_per_client": 40, "model": "mclr",
    "batch_size": 4, "eval_batch": 10, "proxy": "held_out", "proxy_size": PROXIES, "proxy_per_round": PER_ROUND,
    "seed": 0, "rounds": ROUNDS, "lifting": "shard_map", "chunk": 3, "devices": 1,
}  # fmt: skip


class Case:
    """A method on the small federation, under any layout; each layout is compiled once."""

    def __init__(self, method: Any, hparams: dict[str, Any], options: dict[str, Any], fields: dict[str, Any]):
        made = make(None, options, algorithm=method, proxy="held_out")
        self.method, name = made.method, made.algorithm
        if self.method.pooled:
            raise InputError(f"{self.method.name} pools all data in one client: the contract is about many")
        usual = {n: value for n, value in QUICK.items() if n in self.method.hparams}
        if self.method.split:  # clients have the first part, the server a net on what comes out of it
            fields = {"models": f"2nn:{CLIENTS}"} | fields
        if self.method.proxy is None:  # the same federation, without what such a method would not use
            fields = {"proxy_per_round": 0} | fields
        self._settings = make(usual | hparams, options, algorithm=name, **_FIELDS | fields)
        self._built: dict[Settings, Experiment] = {}
        self._federations: dict[tuple[int, ...], Federation] = {}

    def built(self, *, participants: int = PARTICIPANTS, **fields: Any) -> Experiment:
        """The experiment of a layout; `fields` are settings, such as lifting, chunk and devices."""
        settings = make(
            dict(self._settings.hparams), dict(self._settings.options),
            **self._plain() | {"participation": participants / CLIENTS} | fields,
        )  # fmt: skip
        if settings not in self._built:
            self._built[settings] = experiment.build(settings, lambda whole: _holding(whole, COUNTS))
        return self._built[settings]

    def _plain(self) -> dict[str, Any]:
        public = self._settings.public()
        return {n: v for n, v in public.items() if n not in self.method.hparams and n not in self.method.options}

    def federation(self, counts: tuple[int, ...]) -> Federation:
        """The reference's federation with other numbers of examples of each client, none above 16."""
        if counts not in self._federations:
            reference = self.built()
            by_id = np.argsort(np.asarray(reference.federation.client))
            tests = reference.federation.test_holdings
            loaded = loading.load(reference.settings)
            assert loaded.proxy is not None
            self._federations[counts] = federate(
                loaded.source,
                _holding(loaded.holdings, counts),
                tests._replace(start=np.asarray(tests.start)[by_id], count=np.asarray(tests.count)[by_id]),
                tuple(size for _, size in reference.shapes.cohorts),
                reference.layout.lifting.mesh,
                (loaded.proxy.x, loaded.proxy.y),
            )
        return self._federations[counts]


def _holding(whole: Holdings, counts: tuple[int, ...]) -> Holdings:
    """So many neighbouring examples for each client, which share their labels."""
    return from_counts(np.asarray(whole.order)[: sum(counts)], np.asarray(counts))


def begin(built: Experiment, federation: Federation, seed: int, hparams: HParams | None = None) -> State:
    """The state before the first round, on the device."""
    state = built.simulation.init(seed, federation)
    return built.simulation.setup(state, federation, hparams or built.hparams)[0] if built.simulation.setup else state


def placed(tree: PyTree, federation: Federation) -> PyTree:
    """Beside the arrays of a federation, or a simulation would be compiled anew for it."""
    return jax.device_put(tree, federation.client.sharding)  # pyright: ignore[reportAttributeAccessIssue]
