"""The models of a run, to predict with: the central one, and each client's own."""

import operator
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fdjax import keys
from fdjax.contract import ENSEMBLE, Context
from fdjax.data.federation import examples
from fdjax.engine.layout import State
from fdjax.engine.moment import Moment, context
from fdjax.engine.new_clients import never_train
from fdjax.engine.storage import Storage
from fdjax.errors import InputError
from fdjax.run.checkpoint import FOLDER, Checkpoints, storages_of
from fdjax.run.experiment import Experiment
from fdjax.types import Array, Model, PyTree

_CERTAIN = 1e-30  # least probability of an ensemble, whose logarithm is a logit
_CLOSE = 1e-4  # how far apart logits of the same params may be, relative to the largest


class TrainedModel:
    """A model as a run left it, on one device.

    result = fdjax.run(algorithm="feddistill", model="2nn", rounds=20)
    images = fdjax.data.load("mnist_sample").test_x
    logits = result.central.predict(images)  # [N, K]
    labels = result.personal(3).predict(images).argmax(1)  # as client 3 sees them
    """

    def __init__(self, owner: "Trained", title: str, logits: Callable, arrays: PyTree, find_params: Callable):
        self._owner, self._title, self._logits, self._find_params = owner, title, logits, find_params
        self._arrays = jax.device_put(jax.device_get(arrays))

    def __repr__(self) -> str:
        return f"<{self._title}: predict(x), params>"

    def predict(self, x: Any) -> np.ndarray:
        """Logits [N, K] of inputs [N, ...] as the data set has them: uint8 images (or floats in [0, 1]), or features.

        They are standardised as the run's own examples are. Raises InputError for inputs of another shape or kind.
        """
        x, scale, shift = self._owner.inputs(x)
        batch, parts = min(self._owner.batch, len(x)), []
        for begin in range(0, len(x), batch):
            part = x[begin : begin + batch]
            whole = part[np.minimum(np.arange(batch), len(part) - 1)]  # so that the last one compiles nothing
            seen = whole if whole.dtype == np.int32 else whole.astype(np.float32) * scale + shift
            logits = self._logits(self._arrays, seen)
            parts.append(np.asarray(logits)[: len(part)])
        return np.concatenate(parts)

    @property
    def params(self) -> PyTree:
        """The params of the net, as arrays of NumPy. Raises InputError where predictions are not those of one net."""
        found = self._find_params(self._arrays, lambda x: self._logits(self._arrays, x))
        if found is None:
            raise InputError(f"{self._title} is not the params of one net alone; use its predict")
        return jax.device_get(found)


class _Kept(NamedTuple):
    """What predictions are made of, on the devices of the run or on the host."""

    state: State | None  # None: in the folder
    hparams: Any
    proxy: Any


class _Arrays(NamedTuple):
    """What a model's logits are a function of, beside the inputs."""

    server: PyTree
    hparams: Any
    proxy: Any
    round: Array
    root: Array
    clients: PyTree = ()  # (state, id) of one client, or of each cohort (states, ids, votes) of all


_on_devices: "weakref.WeakSet[Trained]" = weakref.WeakSet()


def leave_devices() -> None:
    """Make room for another run: what results keep on devices goes to the host, unless it is in a folder anyway."""
    for each in list(_on_devices):
        each.leave_devices()


class Trained:
    """What is kept of a run to predict with; nothing is copied before it is asked for or another run needs the room."""

    def __init__(
        self,
        experiment: Experiment,
        state: State,
        *,
        storages: Sequence[Storage] | None = None,
        folder: Path | None = None,
        on_disk: int | None = None,
    ):
        """Of a state that lies as `storages` say, by default as the experiment's own.

        `folder`: the run's, if its latest checkpoint has this state. `on_disk`: it is there alone, after so many
        rounds, and `state` has the shapes of it.
        """
        federation, source = experiment.federation, experiment.source
        self._algorithm, self._layout = experiment.algorithm, experiment.layout
        self._storages = tuple(storages or experiment.layout.storages)
        self._folder, self._settings = folder and folder.absolute(), experiment.settings
        self._source = source._replace(train_x=source.train_x[:0], test_x=source.test_x[:0])
        self._ids = np.asarray(federation.client)
        self._votes = (np.asarray(federation.train_holdings.count) > 0) & ~never_train(self._layout)
        self._like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        self._round = int(state.round) if on_disk is None else on_disk
        kept = state if on_disk is None and jax.process_count() == 1 else None
        self._kept = _Kept(kept, experiment.hparams, federation.proxy)
        self._compiled: dict[Any, Callable] = {}
        self.batch = experiment.settings.eval_batch
        _on_devices.add(self)

    def leave_devices(self) -> None:
        """Keep on the host, or in the folder, what was kept on devices."""
        _on_devices.discard(self)
        kept = self._kept._replace(state=None) if self._folder is not None else self._kept
        self._kept = jax.device_get(kept)

    def inputs(self, x: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs in the form of the data set, and the scale and shift that standardise them."""
        x, like = np.asarray(x), self._source.train_x
        shape = ", ".join(["N", *map(str, like.shape[1:])])
        if x.shape[1:] != like.shape[1:] or not x.size or x.dtype.kind not in "uif":
            raise InputError(
                f"predict: inputs of shape {x.shape} and type {x.dtype}; expected numbers [{shape}], as "
                f"{self._source.name} has them"
            )
        if self._source.vocabulary:
            x = _tokens(x, len(self._source.vocabulary))
        elif like.dtype != np.uint8:
            x = x.astype(np.float32)
        elif x.dtype.kind in "ui" and x.min() >= 0 and x.max() <= 255:
            x = x.astype(np.uint8)
        elif x.dtype.kind in "ui" or not (x.min() >= 0 and x.max() <= 1):  # of floats, NaN is neither
            raise InputError(
                f"predict: pixels from {x.min():g} to {x.max():g}; expected whole numbers from 0 to 255, or floats in "
                "[0, 1]"
            )
        seen = examples(x[:0], np.zeros(0, int), self._source)
        return x, np.asarray(seen.scale), np.asarray(seen.shift)

    def central(self) -> TrainedModel:
        """The central model or the ensemble. Raises InputError for a method that has neither."""
        algorithm, name = self._algorithm, self._settings.algorithm_title
        if algorithm.central is None:
            raise InputError(f"{name} has no central model; use result.personal(client)")
        if algorithm.central is ENSEMBLE:
            votes = tuple(self._all_of(j) for j in range(len(self._layout.cohorts)))
            logits = self._once(ENSEMBLE, self._of_ensemble)
            return TrainedModel(self, f"the ensemble of {name}", logits, self._arrays(votes), lambda *_: None)
        predict: Any = algorithm.central

        def of_central(arrays: _Arrays, x: jax.Array) -> jax.Array:
            return predict(self._context(arrays), arrays.server, x)

        def find(arrays: _Arrays, logits: Callable) -> PyTree:
            models = [self._layout.central, *(cohort.model for cohort in self._layout.cohorts)]
            return self._find(arrays.server, models, logits)

        return TrainedModel(
            self, f"the central model of {name}", self._once("central", of_central), self._arrays(), find
        )

    def personal(self, client: int) -> TrainedModel:
        """A client's own model. Raises InputError for a method that has none, and for a client that is not there."""
        name, clients = self._settings.algorithm_title, len(self._ids)
        if self._algorithm.personal is None:
            raise InputError(f"clients of {name} have no model of their own; use result.central")
        try:
            number = operator.index(client)
        except TypeError:
            number = -1
        if not 0 <= number < clients:
            raise InputError(f"result.personal({client!r}): expected the id of a client, 0 to {clients - 1}")
        row = int(np.flatnonzero(self._ids == number)[0])
        cohort = next(j for j, part in enumerate(self._layout.slices) if part.start <= row < part.stop)
        model = self._layout.cohorts[cohort].model
        states = self._state().clients[cohort]
        at = int(self._storages[cohort].row(np.asarray(row - self._layout.slices[cohort].start)))
        state = jax.tree.map(lambda x: x[at], states)

        def of_client(arrays: _Arrays, x: jax.Array) -> jax.Array:
            state, client = arrays.clients
            return self._logits_of(cohort, arrays, state, client, x)

        def find(arrays: _Arrays, logits: Callable) -> PyTree:
            state, client = arrays.clients
            if (of := self._algorithm.params_of_client) is not None:
                return of(self._context(arrays, cohort, client), arrays.server, state)
            return self._find((state, arrays.server), [model], logits)

        arrays = self._arrays((state, np.int32(number)))
        return TrainedModel(
            self, f"the model of client {number} of {name}", self._once(cohort, of_client), arrays, find
        )

    def _once(self, of: Any, function: Callable) -> Callable:
        """Compiled once for the models of a kind."""
        return self._compiled.setdefault(of, jax.jit(function))

    def _state(self) -> State:
        """The state, read from the folder if it is nowhere else."""
        if self._kept.state is None:
            self._kept = self._kept._replace(state=self._read())
        assert self._kept.state is not None
        return self._kept.state

    def _read(self) -> State:
        if self._folder is None or jax.process_count() > 1:
            raise InputError(
                "models of a run on several hosts are not kept; give it an out folder, and that to fdjax.load in a "
                "process of its own"
            )
        checkpoints = Checkpoints(self._folder / FOLDER)
        record = checkpoints.record() if checkpoints.latest() == self._round else {"settings": {}}
        then, now, may_differ = record["settings"], self._settings.public(), self._settings.resumable
        if any(then.get(name) != value for name, value in now.items() if name not in may_differ):
            raise InputError(
                f"{self._folder} no longer has the checkpoint of round {self._round} of this run; fdjax.load reads "
                "what it has now"
            )
        by_rank = [Storage(cohort.size, 1, 1, cohort.size) for cohort in self._layout.cohorts]
        self._storages = tuple(storages_of(record) or by_rank)
        return checkpoints.read(self._like, self._storages)

    def _arrays(self, clients: PyTree = ()) -> _Arrays:
        state = self._state()
        return _Arrays(state.server, self._kept.hparams, self._kept.proxy, state.round, state.root, clients)

    def _context(self, arrays: _Arrays, cohort: int | None = None, client: Array | int = -1) -> Context:
        """The context that evaluations give: of a client, or of the server."""
        key = keys.stream(jax.random.wrap_key_data(jnp.asarray(arrays.root)), "evaluate", arrays.round)
        known: Any = types.SimpleNamespace(proxy=arrays.proxy)
        moment = Moment(known, arrays.hparams, jnp.asarray(arrays.round), key)
        if cohort is None:
            return context(moment, self._layout.central, key)
        return context(moment, self._layout.cohorts[cohort].model, keys.stream(key, "client", client), client, cohort)

    def _logits_of(self, cohort: int, arrays: _Arrays, state: PyTree, client: Array, x: jax.Array) -> jax.Array:
        personal: Any = self._algorithm.personal
        return personal(self._context(arrays, cohort, client), arrays.server, state, x)

    def _all_of(self, cohort: int) -> tuple[PyTree, Array, Array]:
        """States [C_j, ...] of a cohort's clients by rank, their ids, and whether they vote."""
        states, part = self._state().clients[cohort], self._layout.slices[cohort]
        by_rank = jax.tree.map(lambda x: self._storages[cohort].collect(np.asarray(x)), states)
        return by_rank, self._ids[part], self._votes[part].astype(np.float32)

    def _of_ensemble(self, arrays: _Arrays, x: jax.Array) -> jax.Array:
        """The mean of the softmax outputs of all clients that hold examples, as logits."""
        total, voters = jnp.float32(0), jnp.float32(0)
        for cohort, (states, ids, votes) in enumerate(arrays.clients):

            def add(sum_, row, cohort=cohort):
                state, client, vote = row
                return sum_ + vote * jax.nn.softmax(self._logits_of(cohort, arrays, state, client, x)), None

            first = jax.tree.map(lambda leaf: leaf[0], states)
            shape = jax.eval_shape(lambda first=first, ids=ids, j=cohort: self._logits_of(j, arrays, first, ids[0], x))
            total += lax.scan(add, jnp.zeros(shape.shape), (states, ids, votes))[0]
            voters += jnp.sum(votes)
        return jnp.log(jnp.maximum(total / jnp.maximum(voters, 1), _CERTAIN))

    def _drawn(self, shape: tuple[int, ...]) -> np.ndarray:
        """Inputs of the shape that are like the data's."""
        rng, tokens = np.random.default_rng(0), len(self._source.vocabulary)
        return rng.integers(0, tokens, shape, np.int32) if tokens else rng.normal(size=shape).astype(np.float32)

    def _find(self, tree: PyTree, models: Sequence[Model], logits: Callable) -> PyTree | None:
        """The part of a tree that is params of one of the models and gives the same logits; None if no part does."""
        x = self._drawn((4, *self._source.train_x.shape[1:]))
        expected = np.asarray(logits(x))
        for model in models:
            like = jax.eval_shape(model.init, jax.random.key(0))
            for part in _parts(tree):
                if _alike(part, like):
                    found = np.asarray(model.apply(part, x))
                    most = np.max(np.abs(expected), initial=1.0)
                    if np.allclose(found, expected, rtol=0, atol=_CLOSE * most, equal_nan=True):
                        return part
        return None


def _tokens(x: np.ndarray, number: int) -> np.ndarray:
    """x as tokens. Raises InputError unless they are such."""
    if x.dtype.kind not in "ui" or x.min() < 0 or x.max() >= number:
        raise InputError(
            f"predict: {x.dtype} from {x.min():g} to {x.max():g}; expected tokens, whole numbers from 0 to {number - 1}"
        )
    return x.astype(np.int32)


def _parts(tree: PyTree) -> Iterator[PyTree]:
    """A tree and every tree within."""
    yield tree
    level = jax.tree_util.default_registry.flatten_one_level(tree)
    for part in () if level is None else level[0]:
        yield from _parts(part)


def _alike(tree: PyTree, like: PyTree) -> bool:
    """Whether a tree has the structure and the shapes of another."""
    return jax.tree.structure(tree) == jax.tree.structure(like) and all(
        np.shape(a) == b.shape for a, b in zip(*map(jax.tree.leaves, (tree, like)), strict=True)
    )
