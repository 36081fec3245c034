"""Figure 3 of FedDistill (Jiang, Shan, Zhang 2020): synthetic(1, 1), logistic regression, accuracy over rounds.

    python -m benchmarks.feddistill_figure3

The paper shows one curve a method and claims that FedDistill is higher and converges faster at first; it prints no
number, and says nothing of clients, batch, learning rate, epochs or which accuracy. Ours: 30 devices and batches of 10
as Li et al. (2020), who made the data; learning rate 0.01, E = 1. The picture has the central model on the union of
the devices' test sets, the mean over devices of the central model on each one's own test set, and of FedDistill also
the personal models on theirs.

alpha changes nothing: it shifts all ten logits of a device alike (see fdjax.data.synthetic).
"""

import numpy as np
from absl import flags

from benchmarks import cases
from fdjax.run import program, report, settings
from fdjax.run.runner import Result

ALGORITHMS = {"fedavg": "FedAvg", "feddistill": "FedDistill"}


def main() -> None:
    given = flags.FLAGS
    out = report.prepare(given.out, overwrite=given.overwrite)
    named = {
        label: [
            settings.from_flags(
                algorithm=name,
                dataset="synthetic",
                seed=given.seed + i,
                **({} if name == "feddistill" else cases.without_distillation()),
            )
            for i in range(given.seeds)
        ]
        for name, label in ALGORITHMS.items()
    }
    cases.check_rounds(_shown())
    results = cases.run_seeds(named, out)
    panels: list[report.Panel] = [
        ("central model, all test data", "round", "accuracy, %", _curves(results, "central_accuracy")),
        ("each device's model, its own test data", "round", "mean accuracy, %", _curves(results, "own_accuracy")),
    ]
    report.draw_curves(out / "curves.png", panels, f"synthetic({given.alpha:g}, {given.beta:g}), logistic regression")
    cases.write(out, "benchmarks.feddistill_figure3", _table(results), results)


def _shown() -> list[int]:
    last = flags.FLAGS.rounds
    return sorted({max(1, last // 20), max(1, last // 5), last})


def _curves(results: dict[str, list[Result]], metric: str) -> list[report.Curve]:
    return [(label, *cases.mean_curve(runs, metric)) for label, runs in results.items()]


def _table(results: dict[str, list[Result]]) -> str:
    early = _shown()
    lines = []
    for label, runs in results.items():
        for metric, text in (
            ("central_accuracy", "central, all test data"),
            ("own_accuracy", "own model, own test data"),
        ):
            tail = [np.mean(r.evaluations[metric][1:][-10:]) for r in runs]  # the first is before any training
            lines.append(
                (label, text, *(cases.cell(runs, metric, r) for r in early), report.percent(*report.spread(tail)))
            )
    headers = ("", "accuracy, %", *(f"round {r}" for r in early), "mean of last 10 evaluations")
    own = "FedAvg's own model is the central one; FedDistill's is the personal teacher."
    return f"{report.table(lines, headers)}\n\n{flags.FLAGS.seeds} seed(s), mean ± std. {own}"


if __name__ == "__main__":
    flags.DEFINE_integer("seeds", 5, "number of seeds, from --seed on; each draws its own devices", lower_bound=1)
    settings.define_flags(
        skip=("algorithm", "dataset"), model="mclr", alpha=1.0, beta=1.0, batch_size=10, rounds=200, eval_every=1,
    )  # fmt: skip
    program.define_output_flags("runs/feddistill_figure3")
    program.start(main)
