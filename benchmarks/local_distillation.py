"""Local distillation of global knowledge where few clients take part: accuracy, forgetting, bytes, rounds to a target.

    python -m benchmarks.local_distillation --data_dir=...        # a quarter of MNIST; ten minutes on two cores
    python -m benchmarks.local_distillation --dataset=mnist_sample --train_fraction=1 --proxy_size=500 \
        --target_accuracy=0.8

Lee et al. (2022), FedNTD, have MNIST and CIFAR-10 among 100 clients of which 10 % take part, E = 5, B = 50, SGD with
0.01 and momentum 0.9, and 200 rounds, by shards or Dirichlet. Here a 2NN learns a quarter of MNIST by Dirichlet(0.1),
40 rounds. Every row is a method with its own defaults, but for what `ROWS` says.

Of one seed all methods start from the same weights, hold out the same proxy data, which two of them use, share out the
same private data, and draw the same participants: differences are taken seed by seed.

Forgetting is F = mean over classes c of max_{t < T} A_c^t - A_c^T, where A_c^t is the accuracy of the central model on
the test examples of class c at evaluation t. It moves with the last round's participants, so that the mean over the
evaluations of the last half, each taken for T, stands in the table, as it does for accuracy.
"""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import cases
from fdjax.data.holdings import from_counts
from fdjax.errors import InputError
from fdjax.exchange.traffic import count_bytes
from fdjax.run import experiment, program, report, settings
from fdjax.run.derived import forgetting, rounds_to
from fdjax.types import Federation


class Row(NamedTuple):
    """A method, and what is not its default."""

    label: str
    algorithm: str
    chosen: tuple[tuple[str, Any], ...] = ()


ROWS = (
    Row("FedAvg", "fedavg"),
    Row("FedProx", "fedprox"),
    Row("FedNTD", "fedntd"),
    Row("FedLSD", "fedlsd"),
    Row("FedGKD", "fedgkd"),
    Row("FedGKD, cached", "fedgkd", (("history", "cached"),)),
    Row("FedMLB", "fedmlb"),
    Row("FedMLB, 0.3 and 3", "fedmlb", (("hybrid_weight", 0.3), ("distill_weight", 3.0))),
    Row("FedSSD", "fedssd"),
    Row("FedCAD", "fedcad"),
    Row("FML, the meme", "fml"),
    Row("FedKD, the mentee", "fedkd"),
)


class Learned(NamedTuple):
    """One run, evaluation by evaluation; the first is before any training."""

    rounds: list[float]
    accuracy: np.ndarray  # [E]
    by_class: np.ndarray  # [E, K]
    sent: np.ndarray  # [E] bytes of all clients, both ways, until then
    up: float  # bytes of one participant in a round, the mean
    down: float
    seconds: float

    @property
    def half(self) -> int:
        """The first evaluation of the last half."""
        return len(self.rounds) // 2

    def settled(self) -> float:
        """Accuracy, the mean over the last half of the evaluations."""
        return float(self.accuracy[self.half :].mean())

    def forgotten(self) -> float:
        """F, the mean over those."""
        return float(np.mean(forgetting(self.by_class)[self.half :]))


def main() -> None:
    given, began = flags.FLAGS, time.perf_counter()
    if given.rounds < 2 * given.eval_every:
        raise InputError(f"--rounds={given.rounds}: expected at least two evaluations, each --eval_every rounds")
    out = report.prepare(given.out, overwrite=given.overwrite)
    learned: dict[str, list[Learned]] = {}
    for row in ROWS:
        for seed in range(given.seed, given.seed + given.seeds):
            print(f"{row.label}, seed {seed}: {given.rounds} rounds", flush=True)
            names = cases.without_others(row.algorithm) | dict(row.chosen)
            made = settings.from_flags(**names, algorithm=row.algorithm, seed=seed)
            learned.setdefault(row.label, []).append(_learn(made))
    curves = [(name, runs[0].rounds, (100 * np.mean([r.accuracy for r in runs], 0)).tolist()) for name, runs in
              learned.items()]  # fmt: skip
    title = f"{given.dataset}, {given.num_clients} clients, {_split(given)}, {100 * given.participation:g} % in a round"
    report.draw_curves(out / "curves.png", [("central model", "round", "accuracy, %", curves)], title)
    runs = {name: [_as_json(run) for run in runs] for name, runs in learned.items()}
    spent = f"seeds {given.seed} to {given.seed + given.seeds - 1}; {time.perf_counter() - began:.0f} s of the wall"
    cases.write_runs(out, "benchmarks.local_distillation", _table(learned, given), runs, spent)


def _learn(chosen: settings.Settings) -> Learned:
    """Carry out a run, and test each class by itself."""
    built = experiment.build(chosen)
    simulation, federation, hparams = built.simulation, built.federation, built.hparams
    tests, classes, traffic = _by_class(federation), built.source.num_classes, experiment.traffic_of(built)
    state = simulation.init(chosen.seed, federation)
    rounds: list[float] = [0]
    found, sent, began = [], {"up": [], "down": []}, time.perf_counter()
    found.append(simulation.evaluate(state, tests, hparams))
    while rounds[-1] < chosen.rounds:
        count = min(chosen.eval_every, chosen.rounds - int(rounds[-1]))
        state, done = simulation.run(state, federation, hparams, count)
        for way, of_rounds in count_bytes(traffic.round, jax.device_get(done.sent)).items():
            sent[way].append(np.sum(of_rounds[:count]))
        found.append(simulation.evaluate(state, tests, hparams))
        rounds.append(rounds[-1] + count)
    found = jax.device_get(found)
    up, down = (float(np.sum(sent[way])) / (chosen.rounds * sum(traffic.participants)) for way in ("up", "down"))
    return Learned(
        rounds,
        np.array([scalars["central_accuracy"] for scalars, _ in found]),
        np.array([clients["own_accuracy"][:classes] for _, clients in found]),
        np.cumsum([0.0, *np.add(sent["up"], sent["down"])]),
        up,
        down,
        time.perf_counter() - began,
    )


def _by_class(federation: Federation) -> Federation:
    """The same with one class's test examples for each of the first clients' own test part."""
    y = np.asarray(federation.test.y)
    parts = from_counts(np.argsort(y, kind="stable"), np.bincount(y, minlength=len(federation.client)))
    return federation._replace(test_holdings=jax.tree.map(jnp.asarray, parts))


def _as_json(run: Learned) -> dict[str, Any]:
    return {n: v.tolist() if isinstance(v, np.ndarray) else v for n, v in run._asdict().items()}


def _split(given: Any) -> str:
    return f"{given.partition}({given.alpha:g})" if given.alpha is not None else given.partition


def _table(learned: dict[str, list[Learned]], given: Any) -> str:
    base = np.array([run.settled() for run in learned[ROWS[0].label]])
    lines = []
    for name, runs in learned.items():
        settled = np.array([run.settled() for run in runs])
        reached = [rounds_to(run.rounds, run.accuracy.tolist(), given.target_accuracy) for run in runs]
        paid = [np.interp(at, run.rounds, run.sent) for at, run in zip(reached, runs, strict=True) if at is not None]
        lines.append((
            name,
            report.percent(*report.spread(settled)),
            " / ".join(f"{100 * value:+.1f}" for value in settled - base) if name != ROWS[0].label else "",
            report.percent(*report.spread([run.forgotten() for run in runs])),
            " / ".join("-" if at is None else f"{at:.1f}" for at in reached),
            report.byte_size(float(np.mean(paid))) if len(paid) == len(runs) else "-",
            f"{np.mean([run.up for run in runs]):,.0f}",
            f"{np.mean([run.down for run in runs]):,.0f}",
        ))  # fmt: skip
    headers = ("", "accuracy, %", "above FedAvg, points, of each seed", "forgetting, points",
               f"rounds to {given.target_accuracy:.0%}", "bytes until then", "bytes up", "bytes down")  # fmt: skip
    note = (
        f"Central model on the test set, means over the evaluations (every {given.eval_every} rounds) of the last half "
        f"of {given.rounds} rounds, mean and std over {given.seeds} seeds, paired. Bytes up and down are of one client "
        f"and round, those until the target of all clients, both ways. {given.dataset} ({given.train_fraction:g} of "
        f"it), less {given.proxy_size} proxy examples that FedSSD and FedCAD have at the server. {given.num_clients} "
        f"clients by {_split(given)}, {given.participation:g} of them in a round; {given.model}, B = "
        f"{given.batch_size}, E = {given.local_epochs:g}, rate {given.learning_rate:g}, momentum {given.momentum:g}."
    )
    return f"{report.table(lines, headers)}\n\n{note}"


if __name__ == "__main__":
    flags.DEFINE_integer("seeds", 3, "number of seeds, from --seed on", lower_bound=1)
    flags.DEFINE_float("target_accuracy", 0.85, "accuracy whose round is printed", lower_bound=0.0, upper_bound=1.0)
    flags.DEFINE_string("out", "runs/local_distillation", "folder for the table, results and picture")
    flags.DEFINE_boolean("overwrite", False, "begin again although --out holds a run")
    settings.define_flags(
        skip=("algorithm",), dataset="mnist", train_fraction=0.25, partition="dirichlet_a", alpha=0.1, min_size=1,
        num_clients=100, participation=0.1, batch_size=50, local_epochs=5, learning_rate=0.01, momentum=0.9, rounds=40,
        eval_every=2, local_eval="own", proxy="held_out", proxy_size=1000,
    )  # fmt: skip
    program.start(main)
