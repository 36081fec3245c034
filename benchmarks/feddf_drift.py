"""FedDF and FedAvg where clients drift: long local training on very unlike data, paired.

    python -m benchmarks.feddf_drift --data_dir=...             # a quarter of MNIST; minutes on two cores
    python -m benchmarks.feddf_drift --dataset=mnist_sample --train_fraction=1 --proxy_size=1000    # without any files

Lin et al. (2020) have CIFAR-10 and ResNet-8, 20 clients of which 40 % take part, E = 40, B = 64, SGD with 0.1: with
Dirichlet(0.1) FedDF needs 39 rounds to 75 %, FedAvg several hundred. Here a 2NN learns digits in ten rounds of E = 20.

Of one seed all methods start from the same weights, hold out the same proxy data, of which FedAvg makes no use, share
out the same private data, and draw the same participants: differences are taken seed by seed.
"""

from typing import NamedTuple

import numpy as np
from absl import flags

from benchmarks import cases
from fdjax.run import program, report, settings
from fdjax.run.runner import Result


class Row(NamedTuple):
    """A method, and how it chooses the best student."""

    label: str
    algorithm: str
    selection: str | None = None


ROWS = (
    Row("FedAvg", "fedavg"),
    Row("FedDF, by validation accuracy", "feddf", "accuracy"),
    Row("FedDF, by the KL to the teachers", "feddf", "kl"),
)


def main() -> None:
    given = flags.FLAGS
    out = report.prepare(given.out, overwrite=given.overwrite)
    named = {
        row.label: [
            settings.from_flags(
                **cases.without_others(row.algorithm) | ({"model_selection": row.selection} if row.selection else {}),
                algorithm=row.algorithm,
                seed=given.seed + i,
            )
            for i in range(given.seeds)
        ]
        for row in ROWS
    }
    results = cases.run_seeds(named, out)
    curves: list[report.Curve] = [
        (row.label, *cases.mean_curve(results[row.label], "central_accuracy")) for row in ROWS
    ]
    title = (
        f"{given.dataset}, {given.num_clients} clients, {given.partition}({given.alpha:g}), E = {given.local_epochs:g}"
    )
    report.draw_curves(out / "curves.png", [("central model", "round", "accuracy, %", curves)], title)
    cases.write(out, "benchmarks.feddf_drift", _table(results), results)


def _final(runs: list[Result]) -> np.ndarray:
    """Accuracy of the central model after the last round, in percent: [seeds]."""
    return 100 * np.array([run.evaluations["central_accuracy"][-1] for run in runs])


def _table(results: dict[str, list[Result]]) -> str:
    base = _final(results[ROWS[0].label])
    lines = []
    for row in ROWS:
        runs, final = results[row.label], _final(results[row.label])
        lead, found = final - base, [run.rounds.get("best_step") for run in runs]
        better = [np.mean(np.array(steps) > 0) for steps in found if steps is not None]
        lines.append((
            row.label,
            " / ".join(f"{value:.1f}" for value in final),
            f"{final.mean():.1f}",
            " / ".join(f"{value:+.1f}" for value in lead) if runs[0].settings.algorithm != "fedavg" else "",
            f"{np.mean(better):.0%}" if better else "",
        ))  # fmt: skip
    headers = ("", "accuracy, %, of each seed", "mean", "above FedAvg, points, of each seed",
               "rounds with a student better than the average")  # fmt: skip
    used = results[ROWS[1].label][0].settings
    hparams = used.public()
    note = (
        f"Test accuracy of the central model after {used.rounds} rounds, seeds {used.seed} to "
        f"{used.seed + len(base) - 1}, paired: of one seed all start from the same weights and share out the same "
        f"private data, less the same {used.proxy_size} proxy examples. Server: batches of {used.distill_batch}, up to "
        f"{hparams['server_steps']} steps, patience {hparams['server_patience']}."
    )
    return f"{report.table(lines, headers)}\n\n{note}"


if __name__ == "__main__":
    flags.DEFINE_integer("seeds", 3, "number of seeds, from --seed on", lower_bound=1)
    settings.define_flags(
        skip=("algorithm", "model_selection"), dataset="mnist", train_fraction=0.25, partition="dirichlet_a", alpha=0.1,
        num_clients=20, participation=0.4, batch_size=64, local_epochs=20, learning_rate=0.1, rounds=10,
        proxy="held_out", proxy_size=3000,
    )  # fmt: skip
    program.define_output_flags("runs/feddf_drift")
    program.start(main)
