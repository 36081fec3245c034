"""Table I of FedDistill (Jiang, Shan, Zhang 2020): MNIST, CNN1, B = 128, learning rate 0.01, five clients.

    python -m benchmarks.feddistill_table1 --preset=quick
    python -m benchmarks.feddistill_table1 --preset=paper --dataset=mnist --data_dir=...

Rows are (N global rounds, E local epochs); each is run on the split that the paper states (two labels a client) and on
an IID one, because the published 97 to 99 % after ten rounds look like the latter. The report says which is nearer.

Ours, where the paper is silent: VALID padding of CNN1 (--padding), plain SGD, inputs standardised, everyone takes part
in every round. "Local" is the personal model Gamma_i, on the full test set and on a part with the client's own labels;
FedAvg has no personal model, so its clients use the central one. The quick preset is the table's first row, on 3,600
images in batches of 32, because batches of 128 would leave nine steps an epoch: about two minutes on two cores. With
--rows=10x1,20x1 it also gives the second row, in about three.
"""

from typing import NamedTuple

import numpy as np
from absl import flags

from benchmarks import cases
from fdjax.errors import InputError
from fdjax.run import program, report, settings
from fdjax.run.runner import Result


class Row(NamedTuple):
    """A row of the table; accuracies as published."""

    rounds: int
    epochs: int
    fedavg: float
    local: float
    central: float


PUBLISHED = (
    Row(10, 1, 97.30, 98.41, 97.48),
    Row(20, 1, 98.49, 98.89, 98.69),
    Row(10, 5, 97.60, 98.52, 98.26),
    Row(50, 1, 98.82, 99.09, 98.70),
)
PARTITIONS = {"jiang": "two labels a client", "iid": "IID"}
ALGORITHMS = {"fedavg": "FedAvg", "feddistill": "FedDistill"}
PRESETS = {
    "quick": {"dataset": "mnist_sample", "rows": ["10x1"], "batch_size": 32, "seeds": 1, "fraction": 0.6},
    "paper": {
        "dataset": "mnist",
        "rows": ["10x1", "20x1", "10x5", "50x1"],
        "batch_size": 128,
        "seeds": 3,
        "fraction": 1.0,
    },
}


def main() -> None:
    given = flags.FLAGS
    preset = PRESETS[given.preset]
    rows = _rows(given.rows or preset["rows"])
    out = report.prepare(given.out or f"runs/feddistill_table1_{given.preset}", overwrite=given.overwrite)
    grid = {}
    for partition in PARTITIONS:
        for algorithm in ALGORITHMS:
            for epochs in sorted({row.epochs for row in rows}):
                rounds = sorted({row.rounds for row in rows if row.epochs == epochs})
                theirs = {} if algorithm == "feddistill" else cases.without_distillation()
                grid[partition, algorithm, epochs] = [
                    settings.from_flags(
                        dataset=given.dataset or preset["dataset"],
                        algorithm=algorithm,
                        partition=partition,
                        local_epochs=epochs,
                        rounds=rounds[-1],
                        batch_size=given.batch_size or preset["batch_size"],
                        seed=given.seed + i,
                        train_fraction=min(given.train_fraction, preset["fraction"]),
                        **theirs,
                    )
                    for i in range(given.seeds or preset["seeds"])
                ]
                cases.check_rounds(rounds)
    named = {f"{ALGORITHMS[a]}, {PARTITIONS[p]}, E={e}": seeds for (p, a, e), seeds in grid.items()}
    results = cases.run_seeds(named, out)
    by_key = dict(zip(grid, results.values(), strict=True))
    panels = [_panel(partition, by_key) for partition in PARTITIONS]
    report.draw_curves(out / "curves.png", panels, f"FedDistill, Table I: {_setting(by_key)}")
    cases.write(out, "benchmarks.feddistill_table1", _table(rows, by_key) + "\n\n" + _verdict(rows, by_key), results)


def _rows(names: list[str]) -> list[Row]:
    known = {f"{row.rounds}x{row.epochs}": row for row in PUBLISHED}
    for name in names:
        if name not in known:
            raise InputError(
                f"--rows={','.join(names)}: {name!r} is no row of Table I; its rows are {', '.join(known)}"
            )
    return [known[name] for name in names]


def _table(rows: list[Row], results: dict[tuple[str, str, int], list[Result]]) -> str:
    lines = []
    for row in rows:
        for algorithm, label in ALGORITHMS.items():
            published = (
                (f"{row.fedavg:.2f}",) * 2 if algorithm == "fedavg" else (f"{row.local:.2f}", f"{row.central:.2f}")
            )
            for partition, name in PARTITIONS.items():
                runs = results[partition, algorithm, row.epochs]
                measured = [
                    cases.cell(runs, m, row.rounds) for m in ("local_accuracy", "own_accuracy", "central_accuracy")
                ]
                sent = report.bytes_until(runs[0], row.rounds)
                seconds = np.mean([(r.seconds - r.compile_seconds) * row.rounds / r.settings.rounds for r in runs])
                lines.append(
                    (
                        label,
                        row.rounds,
                        row.epochs,
                        name,
                        *published,
                        *measured,
                        report.byte_size(sent),
                        f"{seconds:.0f}",
                    )
                )
    headers = ("", "N", "E", "partition", "local, published", "central, published", "local, full test",
               "local, own labels", "central", "bytes", "s")  # fmt: skip
    seeds = len(next(iter(results.values())))
    note = (
        f"Accuracy in %, after round N; mean ± std of {seeds} seeds"
        if seeds > 1
        else "Accuracy in %, after round N; one seed"
    )
    return (
        f"{report.table(lines, headers)}\n\n{note}. {_setting(results)}. The paper prints one value for FedAvg, "
        "which stands in both columns. Rows of the same E are one run. Seconds are without compilation."
    )


def _setting(results: dict[tuple[str, str, int], list[Result]]) -> str:
    used = next(iter(results.values()))[0].settings
    share = f" ({100 * used.train_fraction:g} % of it)" if used.train_fraction < 1 else ""
    rate = used.public()["learning_rate"]
    clients = f"{used.num_clients} clients, {used.model_title}, B = {used.batch_size}, learning rate {rate:g}"
    return f"{used.dataset}{share}, {clients}"


def _verdict(rows: list[Row], results: dict[tuple[str, str, int], list[Result]]) -> str:
    """Which split the published central figures are nearer to."""
    distance = {}
    for partition in PARTITIONS:
        gaps = [
            abs(
                100 * cases.at_round(results[partition, algorithm, row.epochs], "central_accuracy", row.rounds)[0]
                - figure
            )
            for row in rows
            for algorithm, figure in (("fedavg", row.fedavg), ("feddistill", row.central))
        ]
        distance[partition] = float(np.mean(gaps))
    parts = ", ".join(f"{gap:.1f} points on {PARTITIONS[partition]}" for partition, gap in distance.items())
    nearest = PARTITIONS[min(distance, key=distance.__getitem__)]
    used = next(iter(results.values()))[0].settings
    full = used.dataset == "mnist" and used.train_fraction == 1 and used.batch_size == 128
    caveat = "" if full else " (not the paper's setting, so this says little of the paper)"
    return f"Mean distance of the central accuracy from the published figures: {parts}. Nearer: {nearest}{caveat}."


def _panel(partition: str, results: dict[tuple[str, str, int], list[Result]]) -> report.Panel:
    curves = []
    for (p, algorithm, epochs), runs in results.items():
        if p == partition:
            curves.append(
                (f"{ALGORITHMS[algorithm]}, E={epochs}, central", *cases.mean_curve(runs, "central_accuracy"))
            )
            if algorithm == "feddistill":
                curves.append(
                    (f"{ALGORITHMS[algorithm]}, E={epochs}, local", *cases.mean_curve(runs, "local_accuracy"))
                )
    return PARTITIONS[partition], "round", "accuracy on the full test set, %", curves


if __name__ == "__main__":
    flags.DEFINE_enum(
        "preset", "quick", list(PRESETS), "quick: the first row in two minutes; paper: Table I at full size"
    )
    flags.DEFINE_list("rows", None, "rows as NxE, default the preset's; all: 10x1,20x1,10x5,50x1")
    flags.DEFINE_integer("seeds", 0, "number of seeds, from --seed on; 0: the preset's", lower_bound=0)
    flags.DEFINE_string("dataset", None, "data set; default: the preset's, mnist_sample or mnist")
    flags.DEFINE_integer("batch_size", None, "examples of a step; default: the preset's, 32 or 128", lower_bound=1)
    settings.define_flags(
        skip=("algorithm", "partition", "rounds", "local_epochs", "local_eval", "batch_size", "dataset"),
        num_clients=5, model="cnn1",
    )  # fmt: skip
    program.define_output_flags(None)
    program.start(main)
