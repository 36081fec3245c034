"""Table 1 of FedAvg (McMahan et al. 2017): rounds until the 2NN reaches 97 % on MNIST, 100 clients, E = 1.

    python -m benchmarks.fedavg_table1 --data_dir=... --cells=iid:10:0.1

A cell is partition:batch size:C (iid or shards; 0 is B = infinity). As in the paper the learning rate is tuned for each
cell on a grid, and a curve is made monotone and interpolated to find the round at which it crosses the target. The
paper does not say how it scaled inputs: here to [0, 1] (--standardize: to mean 0 and std 1, which needs fewer rounds).
The row C = 0 (one client) and the CNN half of the table are left out; cells other than iid:10 need more than the
default 150 rounds.
"""

from absl import flags

from benchmarks import cases
from fdjax.errors import InputError
from fdjax.run import program, report, settings
from fdjax.run.derived import rounds_to
from fdjax.run.runner import Result

PUBLISHED = {
    ("iid", 0): {0.1: 1474, 0.2: 1658},
    ("iid", 10): {0.1: 87, 0.2: 77, 0.5: 75, 1.0: 70},
    ("shards", 0): {0.1: 1796, 0.2: 1528},
    ("shards", 10): {0.1: 664, 0.2: 619, 0.5: 443, 1.0: 380},
}


def main() -> None:
    given = flags.FLAGS
    out = report.prepare(given.out, overwrite=given.overwrite)
    grid = {}
    for name in given.cells:
        partition, batch_size, fraction = _parse(name)
        for rate in given.learning_rates:
            grid[name, rate] = [
                settings.from_flags(
                    algorithm="fedavg",
                    partition=partition,
                    batch_size=batch_size,
                    participation=fraction,
                    learning_rate=_number(rate),
                    seed=given.seed + i,
                )
                for i in range(given.seeds)
            ]
    results = cases.run_seeds({f"{cell}, learning rate {rate}": seeds for (cell, rate), seeds in grid.items()}, out)
    by_key = dict(zip(grid, results.values(), strict=True))
    panels: list[report.Panel] = [
        (cell, "round", "central accuracy, %", [
            (f"learning rate {rate}", *cases.mean_curve(by_key[cell, rate], "central_accuracy"))
            for rate in given.learning_rates
        ])
        for cell in given.cells
    ]  # fmt: skip
    report.draw_curves(out / "curves.png", panels, f"FedAvg, {given.model} on {given.dataset}: partition, batch, C")
    cases.write(out, "benchmarks.fedavg_table1", _table(by_key), results)


def _parse(name: str) -> tuple[str, int, float]:
    try:
        partition, batch_size, fraction = name.split(":")
        key, share = (partition, int(batch_size)), float(fraction)
        PUBLISHED[key][share]
    except (ValueError, KeyError):
        known = ", ".join(f"{p}:{b}:{c:g}" for (p, b), row in PUBLISHED.items() for c in row)
        raise InputError(f"--cells: {name!r} is no cell of Table 1; its cells are {known}") from None
    return *key, share


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--learning_rates: {text!r} is not a number") from None


def _table(results: dict[tuple[str, str], list[Result]]) -> str:
    given = flags.FLAGS
    lines = []
    for cell in given.cells:
        partition, batch_size, fraction = _parse(cell)
        published = PUBLISHED[partition, batch_size][fraction]
        needed = {
            rate: [
                rounds_to(r.evaluations["round"], r.evaluations["central_accuracy"], given.target_accuracy)
                for r in results[cell, rate]
            ]
            for rate in given.learning_rates
        }
        for rate, values in needed.items():
            reached = [v for v in values if v is not None]
            mean = sum(reached) / len(reached) if len(reached) == len(values) else None
            runs = results[cell, rate]
            lines.append(
                (
                    partition,
                    batch_size or "inf",
                    f"{fraction:g}",
                    rate,
                    published,
                    f"{mean:.1f}" if mean else f"not in {given.rounds}",
                    f"{mean / published - 1:+.0%}" if mean else "",
                    cases.cell(runs, "central_accuracy", given.rounds),
                    f"{sum(r.seconds - r.compile_seconds for r in runs) / len(runs):.0f}",
                )
            )
    headers = ("partition", "B", "C", "learning rate", "rounds, published", "rounds", "difference",
               f"accuracy after {given.rounds}", "s")  # fmt: skip
    note = (
        f"Rounds to {100 * given.target_accuracy:g} % of the central model on the full test set; mean of "
        f"{given.seeds} seed(s). {given.model}, {given.dataset}, "
        f"{given.num_clients} clients, E = {given.local_epochs or 1:g}, "
        f"inputs {'standardised' if given.standardize else 'in [0, 1]'}."
    )
    return f"{report.table(lines, headers)}\n\n{note}"


if __name__ == "__main__":
    flags.DEFINE_list("cells", ["iid:10:0.1"], "cells of the table as partition:batch:C")
    flags.DEFINE_list("learning_rates", ["0.03", "0.05", "0.1", "0.2"], "the grid on which every cell is tuned")
    flags.DEFINE_float("target_accuracy", 0.97, "accuracy to reach", lower_bound=0.0, upper_bound=1.0)
    flags.DEFINE_integer("seeds", 1, "number of seeds, from --seed on", lower_bound=1)
    settings.define_flags(
        skip=("algorithm", "partition", "batch_size", "participation", "learning_rate", "models"),
        dataset="mnist", num_clients=100, rounds=150, standardize=False,
    )  # fmt: skip
    program.define_output_flags("runs/fedavg_table1")
    program.start(main)
