"""Figure 1 of FedProx (Li et al. 2020): synthetic(1, 1) with 0, 50 and 90 % stragglers.

    python -m benchmarks.fedprox_stragglers

FedAvg drops its stragglers, who do part of their epochs; FedProx takes what they did, with mu = 0 and with mu = 1, the
best of the paper's grid. The paper shows curves of the training loss (Figure 1) and of the test accuracy (appendix) and
prints no number but one: at 90 % stragglers FedProx is 22 % absolute above FedAvg in the mean over its data sets.

The paper's setting: 30 devices of which 10 take part, B = 10, E = 20, SGD with 0.01, logistic regression, 200 rounds; a
straggler does 1 to E - 1 epochs at random. Ours: the loss shown is that of the test set.
"""

from typing import NamedTuple

import numpy as np
from absl import flags

from benchmarks import cases
from fdjax.run import program, report, settings
from fdjax.run.runner import Result


class Row(NamedTuple):
    """A method of the figure: its mu, and what becomes of its stragglers."""

    label: str
    mu: float
    work: str


ROWS = (
    Row("FedAvg, stragglers dropped", 0.0, "drop"),
    Row("FedProx, mu = 0, part of the work", 0.0, "partial"),
    Row("FedProx, mu = 1, part of the work", 1.0, "partial"),
)
SHARES = (0.0, 0.5, 0.9)


def main() -> None:
    given = flags.FLAGS
    out = report.prepare(given.out, overwrite=given.overwrite)
    named = {
        _name(row, share): [
            settings.from_flags(
                algorithm="fedprox",
                dataset="synthetic",
                seed=given.seed + i,
                mu=row.mu,
                stragglers=share,
                straggler_work=row.work,
            )
            for i in range(given.seeds)
        ]
        for share in SHARES
        for row in ROWS
        if share or row.work == "partial"  # without stragglers FedAvg is FedProx with mu = 0
    }
    results = cases.run_seeds(named, out)
    panels: list[report.Panel] = [
        (f"{share:.0%} stragglers", "round", metric.replace("_", " "), _curves(results, share, metric))
        for metric in ("central_accuracy", "central_loss")
        for share in SHARES
    ]
    report.draw_curves(out / "curves.png", panels, f"synthetic({given.alpha:g}, {given.beta:g}), logistic regression")
    cases.write(out, "benchmarks.fedprox_stragglers", _table(results), results)


def _name(row: Row, share: float) -> str:
    return f"{row.label}, {share:.0%}"


def _of(results: dict[str, list[Result]], row: Row, share: float) -> list[Result]:
    same = row._replace(label=ROWS[1].label, work="partial") if not share and row.work == "drop" else row
    return results.get(_name(row, share)) or results[_name(same, share)]


def _curves(results: dict[str, list[Result]], share: float, metric: str) -> list[report.Curve]:
    return [
        (
            row.label,
            _of(results, row, share)[0].evaluations["round"],
            np.mean([r.evaluations[metric] for r in _of(results, row, share)], axis=0).tolist(),
        )
        for row in ROWS
    ]


def _table(results: dict[str, list[Result]]) -> str:
    lines = []
    for row in ROWS:
        line: list[str] = [row.label]
        for share in SHARES:
            runs = _of(results, row, share)
            last = [np.mean(r.evaluations["central_accuracy"][-10:]) for r in runs]
            losses = [np.mean(r.evaluations["central_loss"][-10:]) for r in runs]
            line += [report.percent(*report.spread(last)), f"{np.mean(losses):.3f}"]
        lines.append(line)
    headers = ("", *(text for share in SHARES for text in (f"{share:.0%} stragglers: accuracy, %", "loss")))
    note = (
        "Test accuracy and loss of the central model, means of the last ten evaluations of "
        f"{flags.FLAGS.rounds} rounds over {flags.FLAGS.seeds} seed(s), each with devices of its own, mean ± std. The "
        "paper's order: each row above the one before it, by more the more stragglers there are."
    )
    return f"{report.table(lines, headers)}\n\n{note}"


if __name__ == "__main__":
    flags.DEFINE_integer("seeds", 5, "number of seeds, from --seed on; each draws its own devices", lower_bound=1)
    settings.define_flags(
        skip=("algorithm", "dataset", "stragglers", "straggler_work", "mu"), model="mclr", alpha=1.0, beta=1.0,
        batch_size=10, local_epochs=20, learning_rate=0.01, num_clients=30, participation=1 / 3, rounds=200,
        eval_every=5,
    )  # fmt: skip
    program.define_output_flags("runs/fedprox_stragglers")
    program.start(main)
