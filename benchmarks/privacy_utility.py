"""What privacy costs and hides: accuracy, epsilon, AUC of a membership attack and bytes, noise after noise.

    python -m benchmarks.privacy_utility                            # the embedded MNIST; minutes on two cores
    python -m benchmarks.privacy_utility --dataset=mnist --data_dir=...

FedAvg, FD, DS-FL and FedMD on one federation of 100 clients, who all lack the same held-out examples. Of each method
the noises, and seeds, are the trials of one compiled batch. The first noise, 0, is the method as it is, without a clip.

What is private differs, so epsilons of two kinds do not compare:
- client: what a client adds to a sum is clipped, the sum noised; the server is trusted, so its sums are attacked
- example: DP-SGD; all that leaves a client is attacked
- example, given the models: FD's means alone. Its models stay with the clients, and train without noise. They are
  attacked as a bound on what could leave

Attacks are those of `fdjax.engine.membership`: 0.5 is a guess. Clips were chosen by eye, near the norms of what is sent
without any noise, and not tuned; which is a look at the data that epsilon does not count.
"""

from typing import Any, NamedTuple

import numpy as np
from absl import flags

from benchmarks import cases
from fdjax.errors import InputError
from fdjax.run import program, report, settings
from fdjax.run.batch import batch, experiments
from fdjax.run.record import Result, clock


class Row(NamedTuple):
    """A method, what of it is private, and the clip."""

    label: str
    algorithm: str
    privacy: str
    clip: float


ROWS = (
    Row("FedAvg, client", "fedavg", "client", 1.0),
    Row("FedAvg, example", "fedavg", "example", 1.0),
    Row("FD, example given the models", "fd", "means", 1.0),
    Row("DS-FL, client", "dsfl", "client", 20.0),
    Row("DS-FL, example", "dsfl", "example", 1.0),
    Row("FedMD, client", "fedmd", "client", 200.0),
)
AUCS = {"central_auc": "central model", "local_auc": "own models", "upload_auc": "one upload",
        "consensus_auc": "consensus"}  # fmt: skip
SHARED = ("central_auc", "upload_auc", "consensus_auc")  # what leaves a client, or is made of what does

Cell = list[Result]  # of one noise, a result for each seed


def main() -> None:
    given = flags.FLAGS
    noises = [_noise(text) for text in given.noises]
    out = report.prepare(given.out, overwrite=given.overwrite)
    cells = {row: _run(row, noises) for row in ROWS}
    report.draw_curves(out / "curves.png", _panels(cells), _title(), log_x=True)
    results = {
        f"{row.label}, noise {z:g}": cell for row, each in cells.items() for z, cell in zip(noises, each, strict=True)
    }
    cases.write(out, "benchmarks.privacy_utility", _table(cells), results)


def _noise(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise InputError(f"--noises: {text!r}, expected numbers of at least 0")
    return value


def _run(row: Row, noises: list[float]) -> list[Cell]:
    """Results by noise and seed, of one batch."""
    given = flags.FLAGS
    fixed: dict[str, Any] = cases.without_others(row.algorithm) | {
        "algorithm": row.algorithm,
        "privacy": row.privacy,
        "membership": True,
    }
    made = [
        settings.from_flags(**fixed, seed=given.seed + i, noise_multiplier=z, clip=row.clip if z else None)
        for z in noises
        for i in range(given.seeds)
    ]
    print(f"{row.label}: {len(made)} trials of {given.rounds} rounds", flush=True)
    with clock() as time_spent:
        trials = experiments(made)
        results = batch(trials, len(trials)).run(trials, lambda done, records: ())
        share = {name: seconds / len(results) for name, seconds in time_spent.stamp({}).items()}
    results = [result._replace(**share) for result in results]  # seconds of a trial are its part of the batch's
    return [results[i : i + given.seeds] for i in range(0, len(results), given.seeds)]


def _a_round(result: Result, way: str) -> float:
    """Bytes of one client."""
    return float(np.mean(report.bytes_of_one_client(result, way)))


def _kind(cell: Cell) -> str:
    return "central" if "central_accuracy" in cell[0].final else "local"


def _mean(cell: Cell, name: str) -> float | None:
    """Over seeds, of the last evaluation; None for what is not there."""
    return float(np.mean([r.final[name] for r in cell])) if name in cell[0].final else None


def _shared(cell: Cell) -> float | None:
    """The largest AUC of what leaves a client."""
    return max((auc for auc in (_mean(cell, name) for name in SHARED) if auc is not None), default=None)


def _panels(cells: dict[Row, list[Cell]]) -> list[report.Panel]:
    """Over epsilon, which without noise is infinite: that value stands in the legend."""

    def curves(of: Any, form: str) -> list[report.Curve]:
        drawn: list[report.Curve] = []
        for row, each in cells.items():
            spent = [(cell[0].privacy["epsilon"], cell) for cell in each if of(cell) is not None]
            points = [(epsilon, of(cell)) for epsilon, cell in spent if np.isfinite(epsilon)]
            plain = [of(cell) for epsilon, cell in spent if not np.isfinite(epsilon)]
            if points:
                label = row.label + (f" (plain {plain[0]:{form}})" if plain else "")
                drawn.append((label, *map(list, zip(*points, strict=True))))  # pyright: ignore
            else:  # in no legend, but so every row has its colour
                drawn.append(("_", [np.nan], [np.nan]))
        return drawn

    return [
        ("accuracy", "epsilon", "%", curves(lambda cell: 100 * (_mean(cell, f"{_kind(cell)}_accuracy") or 0), ".1f")),
        ("attack on what is shared, the best one", "epsilon", "AUC", curves(_shared, ".3f")),
        ("attack on clients' own models", "epsilon", "AUC", curves(lambda cell: _mean(cell, "local_auc"), ".3f")),
    ]


def _title() -> str:
    given = flags.FLAGS
    return f"{given.dataset}, {given.num_clients} clients, {given.model}, {given.rounds} rounds, delta {given.delta:g}"


def _table(cells: dict[Row, list[Cell]]) -> str:
    lines = []
    for row, each in cells.items():
        for cell in each:
            spent, accuracy = cell[0].privacy, f"{_kind(cell)}_accuracy"
            aucs = [_mean(cell, name) for name in AUCS]
            lines.append((
                row.label,
                f"{spent['noise_multiplier']:g}",
                f"{spent['epsilon']:.3g}" if np.isfinite(spent["epsilon"]) else "∞",
                report.percent(*report.spread([r.final[accuracy] for r in cell])),
                "central" if _kind(cell) == "central" else "mean of clients",
                *(f"{auc:.3f}" if auc is not None else "" for auc in aucs),
                *(report.byte_size(_a_round(cell[0], way)) for way in ("up", "down")),
                report.byte_size(report.bytes_until(cell[0], cell[0].round)),
            ))  # fmt: skip
    aucs = [f"AUC, {what}" for what in AUCS.values()]
    headers = ("method, private", "noise", "epsilon", "accuracy, %", "whose", *aucs, "up a round",
               "down a round", "bytes in all")  # fmt: skip
    used = next(iter(cells.values()))[0][0].settings
    relations = "; ".join(f"{row.label}: {each[-1][0].privacy['relation']}" for row, each in cells.items())
    clips = ", ".join(f"{row.label} {row.clip:g}" for row in cells)
    count = f"mean ± std of {flags.FLAGS.seeds} seeds" if flags.FLAGS.seeds > 1 else "one seed"
    note = (
        f"Test accuracy and AUCs after {used.rounds} rounds, {count} from {flags.FLAGS.seed} on. Epsilon at delta "
        f"{used.delta:g} ({used.accountant}); {relations}. Clips, with noise: {clips}. {used.num_clients} clients, "
        f"{used.partition_name}, {used.model_title}, B = {used.batch_size}; {used.proxy_size} held-out examples. An "
        "AUC of 0.5 is a guess; a cell is empty where there is nothing to attack: of FD's means any two examples of a "
        "label are alike, and a trusted server sees no single upload. Uploads of outputs are attacked on as many "
        "candidates as there are held-out examples, of all clients together."
    )
    return f"{report.table(lines, headers)}\n\n{note}"


if __name__ == "__main__":
    flags.DEFINE_list("noises", ["0", "1", "2", "4", "8"], "noise multipliers, trials of one batch")
    flags.DEFINE_integer("seeds", 1, "number of seeds, from --seed on", lower_bound=1)
    settings.define_flags(
        skip=("algorithm", "privacy", "clip", "noise_multiplier", "target_epsilon", "count_noise_multiplier",
              "membership"),
        dataset="mnist_sample", num_clients=100, model="mclr", batch_size=10, local_epochs=5, learning_rate=0.05,
        rounds=20, eval_every=20, proxy="held_out", proxy_size=500, partition_seed=0,
    )  # fmt: skip
    flags.DEFINE_string("out", "runs/privacy_utility", "folder for the table, results and the picture")
    flags.DEFINE_boolean("overwrite", False, "write over what --out holds")
    program.start(main)
