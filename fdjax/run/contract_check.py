"""The contract that every method keeps, checked on a small federation: `fdjax.check_method("my.py")`.

It costs three compilations of the method's superstep: the reference (one device, chunks of three clients), two devices
with chunks of two, and a single participant. All else uses the reference, or shapes alone.
"""

import contextlib
import functools
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fdjax import own
from fdjax.client.trained import path_of
from fdjax.contract import ENSEMBLE, HParams
from fdjax.engine.layout import Report, State
from fdjax.errors import InputError
from fdjax.method import HParam
from fdjax.run.checkpoint import Checkpoints
from fdjax.run.contract_case import CLIENTS, ROUNDS, SPARSE, Case, begin, placed
from fdjax.runtime import use_all_cores
from fdjax.types import Federation, PyTree

LIFTINGS = (  # beside those of the three compilations: lifting, chunk, devices
    ("vmap", 3, 1), ("chunk", 3, 1), ("shard_map", 2, 4), ("pmap", 2, 2), ("loop", 1, 1),
)  # fmt: skip
_CLOSE, _LEAST = 1e-5, 1e-6  # relative and absolute difference of equal numbers; the least of different ones


class BrokenContractError(InputError):
    """A method does not keep the contract: which check failed, and how, in one line."""


class Outcome(NamedTuple):
    """A state and metrics [R] after ROUNDS rounds, and an evaluation, on the host."""

    state: State
    metrics: dict[str, np.ndarray]
    scalars: dict[str, np.ndarray]
    clients: dict[str, np.ndarray]


class Kept(NamedTuple):
    """What `check_method` found; as text, a line."""

    method: str
    checks: tuple[str, ...]
    left_out: tuple[str, ...]  # which need more devices than there are
    seconds: float

    def __str__(self) -> str:
        left_out = f"; not checked: {', '.join(self.left_out)}" if self.left_out else ""
        return f"{self.method} keeps the contract: {len(self.checks)} checks in {self.seconds:.0f} s{left_out}"


def check_method(
    method: Any,
    *,
    hparams: Mapping[str, float] | None = None,
    options: Mapping[str, str] | None = None,
    unused: Collection[str] = (),
    every_lifting: bool = False,
    **fields: Any,
) -> Kept:
    """Check that a method keeps the contract of `fdjax.contract`.

    Args:
      method: a `Method`, the file of one (my.py, my.py:NAME), or the name of one of ours.
      hparams: values in place of the defaults: few steps make it quick.
      options: static choices of the method.
      unused: hparams that change nothing in two rounds with these options, and rightly so.
      every_lifting: also vmap, chunk, shard_map, pmap and loop, which takes three times as long.
      **fields: settings in place of those of the small federation, such as model or dataset.

    Returns:
      What was checked, which prints as a line.

    Raises:
      BrokenContractError: at the first check that fails; its message says which one, and how.
    """
    use_all_cores()
    began, done, left_out = time.perf_counter(), [], []
    contract = Contract(method, hparams=hparams, options=options, unused=unused, **fields)
    for name, needed, check in contract.checks(every_lifting):
        if needed > jax.device_count():
            left_out.append(name)
            continue
        with _named(contract.name, name):
            check()
        done.append(name)
    return Kept(contract.name, tuple(done), tuple(left_out), time.perf_counter() - began)


@contextlib.contextmanager
def _named(method: str, check: str) -> Iterator[None]:
    """A failure inside says whose it is, and of which check."""
    try:
        yield
    except InputError as error:
        raise BrokenContractError(f"{method} breaks the contract, {check}: {error}") from error
    except Exception as error:
        raise BrokenContractError(f"{method} breaks the contract, {check}: {own.told(error)}") from error


class Contract:
    """One method's checks: each returns, or raises `BrokenContractError`. Arguments are those of `check_method`."""

    def __init__(
        self,
        method: Any,
        *,
        hparams: Mapping[str, float] | None = None,
        options: Mapping[str, str] | None = None,
        unused: Collection[str] = (),
        **fields: Any,
    ):
        self.case, self._unused = Case(method, dict(hparams or {}), dict(options or {}), fields), unused
        self.name = self.case.method.name

    def checks(self, every_lifting: bool) -> Iterator[tuple[str, int, Callable[[], None]]]:
        """The name of each check, how many devices it needs, and the check."""
        for name in CHECKS:
            yield name, 2 if name == "is_the_same_on_two_devices" else 1, getattr(self, name)
        for counts in SPARSE:
            yield (
                f"survives_sparse_federations {counts}",
                1,
                functools.partial(self.survives_sparse_federations, counts),
            )
        for kind, chunk, devices in LIFTINGS if every_lifting else ():
            same = functools.partial(self.is_the_same_elsewhere, lifting=kind, chunk=chunk, devices=devices)
            yield f"is_the_same_under {kind}, chunk {chunk}, {devices} devices", devices, same

    @functools.cache  # noqa: B019
    def begun(self, seed: int = 0) -> State:
        """The state before the first round, on the host."""
        reference = self.case.built()
        return jax.device_get(begin(reference, reference.federation, seed))

    def run(self, seed: int = 0, federation: Federation | None = None, hparams: HParams | None = None) -> Outcome:
        """ROUNDS rounds of the reference, or with other data or hyperparameters."""
        built = self.case.built()
        if federation is None and hparams is None:
            state = placed(self.begun(seed), built.federation)
        else:
            state = begin(built, federation or built.federation, seed, hparams)
        federation, hparams = federation or built.federation, hparams or built.hparams
        state, report = built.simulation.run(state, federation, hparams, ROUNDS)
        return Outcome(*jax.device_get((state, report.metrics, *built.simulation.evaluate(state, federation, hparams))))

    @functools.cached_property
    def reference(self) -> Outcome:
        """What all else is compared with."""
        return self.run()

    def runs(self) -> None:
        """Two rounds and a test give finite numbers of the right shapes, and something is learned."""
        found, algorithm = self.reference, self.case.built().algorithm
        self._check_finite(found, "after two rounds")
        for name, values in found.metrics.items():
            _require(
                values.shape == (ROUNDS,), f"metric {name!r} has shape {values.shape}, expected one number a round"
            )
        for name, value in found.scalars.items():
            _require("accuracy" not in name or 0 <= value <= 1, f"{name} is {value}, which is no fraction")
        _require(
            ("central_accuracy" in found.scalars) == (algorithm.central is not None),
            "the tests have a central accuracy without a central model, or none with one",
        )
        before, after = self.begun(), found.state
        moved = _largest(before.server, after.server), _largest(before.clients, after.clients)
        _require(max(moved) > _LEAST, "two rounds changed neither the server nor a client: nothing is learned")
        if algorithm.central not in (None, ENSEMBLE):
            _require(moved[0] > _LEAST, "two rounds did not change the server, which has a central model")

    def is_the_same_elsewhere(self, **layout: Any) -> None:
        """The reference's start, carried on under another layout, ends where the reference ends."""
        built = self.case.built(**layout)
        start = built.simulation.place(self.begun())  # the same one, to save compiling `init` again
        state, report = built.simulation.run(start, built.federation, built.hparams, ROUNDS)
        expected = self.reference.state, self.reference.metrics
        _same((built.simulation.fetch(state), report.metrics), expected, "differs", _CLOSE)

    def is_the_same_on_two_devices(self) -> None:
        """Who runs beside whom changes nothing: a client's work depends on nothing but its arguments."""
        self.is_the_same_elsewhere(chunk=2, devices=2)

    def a_single_participant(self) -> None:
        """A round of one client gives finite numbers, and changes no other client."""
        built = self.case.built(participants=1, chunk=1)
        start = placed(self.begun(), built.federation)
        state, report = jax.device_get(built.simulation.run(start, built.federation, built.hparams, ROUNDS))
        _finite((state, report), "after two rounds of one participant")
        changed = changed_clients(self.begun(), state)
        _require(changed.sum() <= ROUNDS, f"{changed.sum()} clients changed in {ROUNDS} rounds of one participant")

    def is_the_same_every_time_and_another_with_another_seed(self) -> None:
        """Every number follows from the seed."""
        _same(self.run(), self.reference, "differs from run to run", 0.0)
        other = _largest(self.reference.state[:2], self.run(seed=1).state[:2])
        _require(other > _LEAST, "another seed gives the same numbers: no key is used")

    def every_hparam_is_used_and_a_new_value_compiles_nothing(self) -> None:
        """Hyperparameters are traced, and each changes what comes out."""
        usual = self.case.built().hparams
        options = self.case.method.choices(dict(self.case.built().settings.options))
        expected = _losses(self.reference)
        for name, record in self.case.method.hparams.items():
            option, *those = record.only or ("",)
            if name in self._unused or (option and options[option] not in those):
                continue
            value = np.asarray(another(record, float(usual[name])), usual[name].dtype)
            value = jax.device_put(value, usual[name].sharding)  # pyright: ignore[reportAttributeAccessIssue]
            with _no_tracing(f"another value of {name!r}"):
                found = _losses(self.run(hparams={**usual, name: value}))
            _require(np.isfinite(found).all(), f"{name}={value} gives losses that are not finite")
            _require(
                np.abs(found - expected).max() > _LEAST,
                f"hparam {name!r} changes nothing in two rounds; read ctx.hparams[{name!r}], or name it in unused=",
            )

    def another_partition_compiles_nothing(self) -> None:
        """Numbers of examples are traced too."""
        self.reference  # noqa: B018  compiled by now
        with _no_tracing("another partition"):
            other = self.case.federation((3, 9, 5, 12, 1, 0, 7))
            found = self.run(seed=3, federation=other)
        self._check_finite(found, "with other clients", other)

    def stays_on_the_device(self) -> None:
        """A superstep asks the host for nothing."""
        self.reference  # noqa: B018
        built = self.case.built()
        state = begin(built, built.federation, 0)
        with jax.transfer_guard("disallow"):
            state, report = built.simulation.run(state, built.federation, built.hparams, ROUNDS)
            built.simulation.evaluate(state, built.federation, built.hparams)
        _finite(report, "in a report")

    def survives_sparse_federations(self, counts: tuple[int, ...]) -> None:
        """Clients without examples, or with one, and labels that nobody holds, give finite numbers."""
        sparse = self.case.federation(counts)
        self._check_finite(self.run(federation=sparse), f"with clients of {counts} examples", sparse)

    def without_any_examples_the_server_stays(self) -> None:
        """A round in which nobody holds an example changes nothing."""
        nobody = self.case.federation((0,) * CLIENTS)
        before = jax.device_get(self.case.built().simulation.init(0, nobody))
        after = self.run(federation=nobody)
        _same(after.state[:2], before[:2], "changes although nobody holds an example", 0.0)
        self._check_finite(after, "where nobody holds an example", nobody)

    def _check_finite(self, found: Outcome, when: str, federation: Federation | None = None) -> None:
        """All is finite but metrics of a round in which nobody trained, and tests of clients that have no examples."""
        metrics = np.stack([np.asarray(values, float) for values in found.metrics.values()])
        trained = ~np.isnan(metrics).all(axis=0)
        _finite(found._replace(metrics={n: v[trained] for n, v in found.metrics.items()}, scalars={}, clients={}), when)
        tested = np.asarray((federation or self.case.built().federation).test_holdings.count) > 0
        _finite({name: values[tested] for name, values in found.clients.items()}, when)
        _finite({n: v for n, v in found.scalars.items() if trained.any() or n.startswith("central")}, when)

    def resumes_bitwise(self, folder: Path | None = None) -> None:
        """All that a method knows is in its state: a run that goes on from a checkpoint ends in the same bits."""
        with tempfile.TemporaryDirectory() as temporary:
            self._resume(folder or Path(temporary))

    def _resume(self, folder: Path) -> None:
        built = self.case.built()

        def two_rounds(state: State) -> State:
            return built.simulation.run(state, built.federation, built.hparams, ROUNDS)[0]

        at_once = jax.device_get(two_rounds(two_rounds(placed(self.begun(), built.federation))))
        with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
            checkpoints.save(two_rounds(placed(self.begun(), built.federation)), {"note": "half"})
        with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
            found = checkpoints.latest(), checkpoints.record()
            _require(found == (ROUNDS, {"note": "half"}), f"the checkpoint has {found}")
            restored = checkpoints.restore(built.simulation.init(99, built.federation))
        with _no_tracing("a resumed run"):
            resumed = jax.device_get(two_rounds(restored))
        _same(resumed, at_once, "is another one after a restart", 0.0)

    @functools.cached_property
    def traced(self) -> Any:
        """A superstep of one round, of shapes alone, in the lifting that any device has."""
        built = self.case.built(lifting="chunk")
        state = jax.eval_shape(built.simulation.pure.init, 0, built.federation)
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state, built.federation, dict(built.hparams))
        )
        superstep = jax.jit(lambda state, federation, hparams: built.simulation.pure.run(state, federation, hparams, 1))
        return superstep.trace(*shapes)

    def a_round_changes_no_shape_and_counts_its_bytes(self) -> None:
        """Shapes alone: a state is what it was, and what every participant sends and is sent can be told."""
        before, (after, report) = self.traced.in_avals[0][0], self.traced.out_info
        forms = [jax.tree.map(lambda x: (x.shape, x.dtype), state) for state in (before, after)]
        _require(forms[0] == forms[1], "a round changes the shape of a state")
        _require(isinstance(report, Report), "a round gives no report")
        built = self.case.built()
        built.simulation.traffic(built.federation, built.hparams)

    def a_superstep_is_lowered_for_other_devices(self) -> None:
        """It holds nothing that only a CPU has."""
        self.traced.lower(lowering_platforms=("cuda", "tpu"))


CHECKS = (
    "runs", "is_the_same_on_two_devices", "a_single_participant",
    "is_the_same_every_time_and_another_with_another_seed", "every_hparam_is_used_and_a_new_value_compiles_nothing",
    "another_partition_compiles_nothing", "stays_on_the_device", "without_any_examples_the_server_stays",
    "resumes_bitwise", "a_round_changes_no_shape_and_counts_its_bytes", "a_superstep_is_lowered_for_other_devices",
)  # fmt: skip


def another(record: HParam, value: float) -> float:
    """Another value of a hyperparameter, in its range: half as much, or one more."""
    tried = [value + 1, value - 1] if record.integer else [0.5 * value, 2 * value, value + 0.5, value - 0.5]
    for other in tried:
        with contextlib.suppress(InputError):
            if other != value:
                return record.check("value", other)
    return value


def changed_clients(before: State, after: State) -> np.ndarray:
    """[C] bool: whose state differs anywhere, cohort after cohort."""
    return np.concatenate(
        [
            np.any(
                [(a != b).reshape(len(a), -1).any(axis=1) for a, b in zip(*map(jax.tree.leaves, both), strict=True)]
                or [np.zeros(1, bool)],
                axis=0,
            )
            for both in zip(before.clients, after.clients, strict=True)
        ]
    )


def _losses(outcome: Outcome) -> np.ndarray:
    return np.array([v for name, v in sorted(outcome.scalars.items()) if name in ("central_loss", "local_loss")])


def _require(condition: Any, otherwise: str) -> None:
    if not condition:
        raise BrokenContractError(otherwise)


def _finite(tree: PyTree, when: str) -> None:
    for path, leaf in jax.tree.leaves_with_path(jax.device_get(tree)):
        _require(np.isfinite(leaf).all(), f"{_name(path)} is not finite {when}")


def _same(found: PyTree, expected: PyTree, otherwise: str, tolerance: float) -> None:
    """Raises BrokenContractError, which names the leaf, unless all numbers are equal up to a tolerance."""
    pairs = zip(jax.tree.leaves_with_path(jax.device_get(found)), jax.tree.leaves(expected), strict=True)
    for (path, leaf), known in pairs:
        if not np.allclose(leaf, known, rtol=tolerance, atol=tolerance, equal_nan=True):
            raise BrokenContractError(
                f"{_name(path)} {otherwise}, by up to {np.abs(leaf * 1.0 - known * 1.0).max():.2g}"
            )


def _name(path: Any) -> str:
    """The place of a leaf."""
    return path_of(path)


def _largest(before: PyTree, after: PyTree) -> float:
    """The largest difference of two numbers in the same place."""
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return max((float(np.abs(a * 1.0 - b * 1.0).max()) for a, b in pairs if a.size), default=0.0)


@contextlib.contextmanager
def _no_tracing(what: str) -> Iterator[None]:
    """Raises BrokenContractError if anything is traced inside, and so compiled."""
    try:
        with jax.no_tracing():
            yield
    except RuntimeError as error:
        if "tracing" not in str(error):
            raise
        raise BrokenContractError(f"{what} is compiled anew: something depends on it before the round runs") from error
