"""What is kept of a run: a record that grows superstep by superstep and survives JSON, and the result made of it."""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from fdjax.client.metric import flattened
from fdjax.data import count_labels
from fdjax.engine import proportion
from fdjax.engine.layout import NonFinite, Report
from fdjax.engine.new_clients import never_train
from fdjax.errors import InputError
from fdjax.exchange.traffic import Sizes, Traffic, count_bytes
from fdjax.run import client_history, metrics
from fdjax.run.accounting import Ledger, accounted, spent_on_its_own
from fdjax.run.derived import add_forgetting
from fdjax.run.experiment import Experiment
from fdjax.run.frames import frame_of
from fdjax.run.settings import Settings
from fdjax.run.stopping import reason_to_stop, still_stopped
from fdjax.run.trained_model import Trained, TrainedModel

_COUNTED = ("epsilon", "bytes_up", "bytes_down", "nonfinite_clients", "participants", "senders")
# of rounds, beside the metrics of the method
_MOST_LABELS = 1_000_000  # counts of labels that a result holds


Record = dict[str, Any]  # histories by name under "rounds", "evaluations" ..., see `empty_record`


class Result(NamedTuple):
    """What a run gives: histories by name, the last value of every client, bytes and seconds."""

    settings: Settings
    rounds: dict[str, list[float]]
    # of every round: metrics of training (NaN where nobody trained), cumulative bytes_up and bytes_down, those of the
    # set-up among them, how many `participants` received and how many of them, the `senders`, sent, and the `epsilon`
    # that a private run has spent by then
    evaluations: dict[str, list[float]]
    # of every evaluation; "round" says after how many rounds, the first after none, and "local_examples" on how many
    # examples of the test set personal models (and an ensemble of them) were tested
    clients: dict[str, list[float]]
    # of every client in order of ids, at the last evaluation; NaN for one that has no test example
    traffic: Traffic
    seconds: float  # wall, all parts of a resumed run together
    compile_seconds: float  # of which compilation
    setup: dict[str, float]  # bytes_up and bytes_down of the set-up, and its metrics; {} for a method without one
    holdings: Mapping[str, list[Any]] = MappingProxyType({})
    # of every client in order of ids: what the means over clients are made of, see `holdings_of`
    trained: Trained | None = None  # the models, where they are kept
    privacy: Mapping[str, Any] = MappingProxyType({})
    # of a private run: epsilon, delta, the relation that these are about, accountant, noise_multiplier and clip; and
    # "parts", the same of what the method makes private by itself
    client_evaluations: Mapping[str, np.ndarray] = MappingProxyType({})
    # [E, C] float32: of every evaluation the values of every client in order of ids, of which `clients` has the last;
    # {} without --client_history, and where these are too many
    stopped: Mapping[str, Any] = MappingProxyType({})
    # of a run that ended before its last round by its own rules: "round", "rule" (accuracy, bytes, patience) and "why"
    classes: tuple[str, ...] = ()  # [K] what the data call each label; () where they are 0, 1, ... in the data too

    @property
    def round(self) -> int:
        """Rounds done, which are fewer than the settings' if the run was stopped."""
        return len(self.rounds["bytes_up"])

    @property
    def ended(self) -> bool:
        """Whether the run did all its rounds, or ended by its own rules, and was not interrupted."""
        return bool(self.stopped) or self.round == self.settings.rounds

    @property
    def central(self) -> TrainedModel:
        """The central model as it was trained; of a method that tests an ensemble, that. Raises InputError without one.

        `result.central.predict(images)` gives logits [N, K] of inputs in the form of the data set.
        """
        return self._models().central()

    def personal(self, client: int) -> TrainedModel:
        """The model of one client, by its id. Raises InputError for a method whose clients have none of their own."""
        return self._models().personal(client)

    def frame(self, of: str = "evaluations") -> Any:
        """A pandas DataFrame: a row for each of the "evaluations", or "rounds", or of "clients" at each evaluation.

        result.frame().plot(x="round", y="central_accuracy")
        result.frame(of="clients").groupby("round")["own_accuracy"].describe()

        Columns are `seed`, `round` (and `client`) and the metrics; evaluations also have the cumulative bytes_up and
        bytes_down. Raises InputError where pandas is not installed, and for a table that there is not.
        """
        return frame_of(self, of)

    def _models(self) -> Trained:
        if self.trained is None:
            raise InputError(
                "this result keeps no models, as those of a batch of trials do not; give its settings to fdjax.run"
            )
        return self.trained

    @property
    def final(self) -> dict[str, float]:
        """The last evaluation (not the best one)."""
        return {name: values[-1] for name, values in self.evaluations.items()}


def empty_record() -> Record:
    """What is kept of a run before its set-up."""
    return {"setup": {}, "rounds": {}, "evaluations": {}, "clients": {}, "seconds": 0.0, "compile_seconds": 0.0}


class Recording:
    """The record of a run while it grows; what needs attention is said as a warning that begins with `who`."""

    def __init__(
        self, experiment: Experiment, traffic: Traffic, record: Record | None = None, who: str = "", beside: int = 1
    ):
        """`beside`: how many records grow at once, which share the room for clients' values."""
        self.record = record or empty_record()
        self._experiment, self._traffic, self._who = experiment, traffic, who
        self._beside, self._keeps_clients = beside, experiment.settings.client_history
        self._told = set[str]()  # metrics whose values were not numbers

    @property
    def settings(self) -> Settings:
        """Those of the run."""
        return self._experiment.settings

    @property
    def tests(self) -> proportion.Tests:
        """On how many examples personal models are tested."""
        return self._experiment.tests

    @property
    def ledger(self) -> Ledger | None:
        """What there is to account for, if the run is private."""
        return self._experiment.ledger

    @property
    def stopped(self) -> dict[str, Any]:
        """After which round the run ended by its own rules, by which rule and why; {} if it did not."""
        return {name: value for name, value in self.record.get("stopped", {}).items() if name != "settings"}

    def stop_if_due(self) -> bool:
        """Whether the run ends here by its own rules, which is kept on record then."""
        settings, evaluations = self.settings, self.record["evaluations"]
        if still_stopped(settings, self.record):
            return True
        self.record.pop("stopped", None)
        if found := reason_to_stop(settings, self.record, f"{kind_of(evaluations)}_accuracy"):
            self.record["stopped"] = found
        return bool(found)

    def add_setup(self, report: Report) -> None:
        """Keep what the set-up reports."""
        report, setup = jax.device_get(report), self._traffic.setup
        self.record["setup"] = _as_floats(self._metrics(report) | _sent(setup, report))
        if report.nonfinite.clients:
            names = [cohorts[0].exchange for cohorts in setup]
            exchange = f", exchange {names[int(report.nonfinite.exchange)]}" if len(names) > 1 else ""
            self._warn_of_nonfinite(report.nonfinite, "something", f"in the set-up{exchange}")

    def add_superstep(self, done: int, report: Report, scalars: Any, clients: Any) -> None:
        """Keep what the rounds of a superstep report, and the evaluation after it."""
        report, scalars, clients = jax.device_get((report, scalars, clients))
        rounds = self.record["rounds"]
        bad = report.nonfinite.clients
        if bad.any() and not any(rounds.get("nonfinite_clients", [])):
            self._warn_of_first_nonfinite(report.nonfinite, done - len(bad))
        history = self._metrics(report) | _sent(self._traffic.round, report) | _who(report) | {"nonfinite_clients": bad}
        for name, values in history.items():
            rounds.setdefault(name, []).extend(np.asarray(values, float).tolist())
        self.add_evaluation(done, scalars, clients)

    def add_evaluation(self, done: int, scalars: Any, clients: Any) -> None:
        """Keep an evaluation after `done` rounds; after 0 it is of what the set-up leaves."""
        scalars, clients = jax.device_get((scalars, clients))
        scalars, clients = flattened(scalars, 0), flattened(clients, 1)
        evaluations = self.record["evaluations"]
        for name, value in {"round": done, **_as_floats(scalars)}.items():
            evaluations.setdefault(name, []).append(value)
        if metrics.forgets(self.settings.metrics):
            add_forgetting(evaluations)
        self._warn_of_divergence()
        last = {name: values[-1] for name, values in evaluations.items()}
        if unsound := metrics.unsound(self.settings.metrics, last, self._told):
            self._warn(f"{unsound} after round {done}")
        in_order_of_ids = np.argsort(np.asarray(self._experiment.federation.client))
        clients = {name: np.asarray(values)[in_order_of_ids] for name, values in clients.items()}
        self.record["clients"] = {name: np.asarray(values, float).tolist() for name, values in clients.items()}
        if self._keeps_clients:
            left = -(-max(self.settings.rounds - done, 0) // self.settings.eval_every)
            why = client_history.add(self.record, clients, left, self._beside)
            self._keeps_clients = not why
            if why:
                tqdm.write(f"{self._who}clients' values are kept of the last evaluation alone: {why}", file=sys.stderr)
        else:
            self.record.pop("client_evaluations", None)

    def replace_evaluation(self, done: int, scalars: Any, clients: Any) -> None:
        """Keep an evaluation in the place of the last one, which was of fewer examples."""
        evaluations = self.record["evaluations"]
        size = len(evaluations["round"])
        for values in (*evaluations.values(), *self.record.get("client_evaluations", {}).values()):
            del values[size - 1 :]
        self.add_evaluation(done, scalars, clients)

    def clients_at(self, evaluation: int) -> dict[str, list[float]]:
        """Values of every client at an evaluation; {} where they are not kept."""
        last = len(self.record["evaluations"]["round"]) - 1
        return dict(self.record["clients"]) if evaluation == last else client_history.at(self.record, evaluation)

    def histories(self) -> dict[str, list[float]]:
        """Of every round, as `Result.rounds` has them but for epsilon: bytes add up, from those of the set-up on."""
        rounds, setup = dict(self.record["rounds"]), self.record["setup"]
        for name in ("bytes_up", "bytes_down"):
            rounds[name] = (setup.get(name, 0.0) + np.cumsum(rounds.get(name, []))).tolist()
        return rounds

    def add_last(self, scalars: Any) -> None:
        """Add to the last evaluation what is done after it alone; NaN in the others."""
        evaluations = self.record["evaluations"]
        size = len(evaluations["round"])
        for name, value in _as_floats(jax.device_get(scalars)).items():
            before = evaluations.get(name, [])
            evaluations[name] = before + [math.nan] * (size - 1 - len(before)) + [value]

    def result(self, times: Mapping[str, float], trained: Trained | None = None) -> Result:
        """The result of the run as far as it went."""
        rounds, setup = self.histories(), self.record["setup"]
        settings, held = self._experiment.settings, np.asarray(self._experiment.holdings.count)
        rounds, privacy = accounted(settings, self._experiment.ledger, rounds)
        privacy |= spent_on_its_own(settings, self._experiment.algorithm, held)
        return Result(
            settings=settings,
            rounds=rounds,
            evaluations=self.record["evaluations"],
            clients=self.record["clients"],
            traffic=self._traffic,
            seconds=times["seconds"],
            compile_seconds=times["compile_seconds"],
            setup=setup,
            holdings=holdings_of(self._experiment),
            trained=trained,
            privacy=privacy,
            client_evaluations=client_history.unpack(self.record.get("client_evaluations", {})),
            stopped=self.stopped,
            classes=self._experiment.source.classes,
        )

    def _metrics(self, report: Report) -> dict[str, Any]:
        """The metrics of the method. Raises InputError for a name that is taken."""
        for name in _COUNTED:
            if name in report.metrics:
                method = self._experiment.algorithm.name
                raise InputError(f"{method} has a metric named {name!r}, which fdjax counts by itself; rename it")
        return dict(report.metrics)

    def _warn_of_first_nonfinite(self, nonfinite: NonFinite, rounds_before: int) -> None:
        """Say whose numbers stopped being finite first, in what, and when."""
        federation, hparams = self._experiment.federation, self._experiment.hparams
        first = int(np.argmax(nonfinite.clients > 0))
        at = jax.tree.map(lambda values: values[first], nonfinite)
        row = int(np.flatnonzero(np.asarray(federation.client) == at.client)[0])
        slices = self._experiment.layout.slices
        cohort = next(j for j, part in enumerate(slices) if part.start <= row < part.stop)
        exchanges = self._traffic.round
        exchange = f", exchange {exchanges[int(at.exchange)][cohort].exchange}" if len(exchanges) > 1 else ""
        what = self._experiment.simulation.leaf(federation, hparams, cohort, int(at.exchange), int(at.leaf))
        self._warn_of_nonfinite(at, what, f"in round {rounds_before + first + 1}{exchange}")

    def _warn_of_nonfinite(self, at: NonFinite, what: str, where: str) -> None:
        more = f" ({int(at.clients) - 1} more clients then)" if at.clients > 1 else ""
        advice = (
            "such clients are left out of the rounds in which it happens"
            if self._experiment.settings.drop_nonfinite
            else "nor is what the server computes from it; lower the learning rates, or leave such clients out by "
            "--drop_nonfinite"
        )
        self._warn(f"client {int(at.client)}: {what} is not finite {where}{more}; {advice}")

    def _warn_of_divergence(self) -> None:
        """Say that the loss is not finite, at the first evaluation where it is not."""
        evaluations = self.record["evaluations"]
        kind = kind_of(evaluations)
        losses = evaluations[f"{kind}_loss"]
        tested = np.isfinite(evaluations[f"{kind}_accuracy"][-1])
        if tested and not np.isfinite(losses[-1]) and (len(losses) == 1 or np.isfinite(losses[-2])):
            done = evaluations["round"][-1]
            self._warn(f"the {kind} loss is {losses[-1]} at round {done}: the run diverged; lower the learning rates")

    def _warn(self, text: str) -> None:
        tqdm.write(f"warning: {self._who}{text}", file=sys.stderr)


def kind_of(names: Collection[str]) -> str:
    """What of an evaluation stands for all of it: the first of these that is tested."""
    return next(kind for kind in ("central", "local", "own", "validation") if f"{kind}_accuracy" in names)


def holdings_of(experiment: Experiment) -> dict[str, list[Any]]:
    """Of each client in order of ids: `n_k`, its training examples, `test_examples` of its own test part, whether it
    `never_trains`, and `labels` [K], how many of its training examples have each (left out of a very large federation).

    The means over clients can be made of these: the uniform one is over clients with test examples that may train, the
    others weigh them by n_k or by test examples, and local ones are over clients that may train and have something to.
    """
    federation, classes = experiment.federation, experiment.source.num_classes
    in_order_of_ids = np.argsort(np.asarray(federation.client))
    held: dict[str, list[Any]] = {
        "n_k": np.asarray(experiment.holdings.count).tolist(),
        "test_examples": np.asarray(federation.test_holdings.count)[in_order_of_ids].tolist(),
        "never_trains": never_train(experiment.layout)[in_order_of_ids].tolist(),
    }
    if len(in_order_of_ids) * classes <= _MOST_LABELS:
        held["labels"] = count_labels(experiment.holdings, experiment.source.train_y, classes).tolist()
    return held


def _sent(sizes: tuple[tuple[Sizes, ...], ...], report: Report) -> dict[str, Any]:
    return {f"bytes_{way}": count for way, count in count_bytes(sizes, report.sent).items()}


def _who(report: Report) -> dict[str, Any]:
    """Participants that hold examples, so that they received, and those of them that sent."""
    first = report.sent[0]
    return {"participants": sum(s.participants for s in first), "senders": sum(s.senders for s in first)}


def _as_floats(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


class Clock:
    """Wall and compilation seconds, added to those of a resumed record."""

    def __init__(self):
        self.began = time.perf_counter()
        self.before, self.compiling_before = 0.0, 0.0
        self._spans: list[tuple[float, float]] = []  # of compilation, some of them in threads side by side
        self._retrieved: dict[int, float] = {}  # by thread: seconds that are in the next span, and compile nothing

    def listen(self, event: str, duration_secs: float, **_: Any) -> None:
        """A listener of JAX's events of compilation."""
        thread = threading.get_ident()
        if event in ("/jax/core/compile/backend_compile_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration"):
            now, compiling = time.perf_counter(), duration_secs - self._retrieved.pop(thread, 0.0)
            self._spans.append((now - max(compiling, 0.0), now))
        elif event == "/jax/compilation_cache/cache_retrieval_time_sec":
            self._retrieved[thread] = duration_secs

    @property
    def compiling(self) -> float:
        """Seconds in which something was compiled, those of two threads at once counted once."""
        self._spans, total = _merged(self._spans), 0.0
        for begin, end in self._spans:
            total += end - begin
        return total

    def start(self, record: Record) -> None:
        """Count on from the seconds of `record`."""
        self.before, self.compiling_before = record["seconds"], record["compile_seconds"]

    def stamp(self, record: Record) -> dict[str, Any]:
        """The record with the seconds until now."""
        seconds = self.before + time.perf_counter() - self.began
        return record | {"seconds": seconds, "compile_seconds": self.compiling_before + self.compiling}


def _merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same time as spans that do not overlap."""
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return merged


@contextlib.contextmanager
def clock() -> Iterator[Clock]:
    """Seconds from here on, of them those of compilation: `clock.stamp(record)`."""
    running = Clock()
    jax.monitoring.register_event_duration_secs_listener(running.listen)
    try:
        yield running
    finally:
        jax.monitoring.unregister_event_duration_listener(running.listen)
