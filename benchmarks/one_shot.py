"""What one round gives: matched averaging, two ways of distilling an ensemble, and plain averaging.

    python -m benchmarks.one_shot                                                        # the embedded MNIST sample
    python -m benchmarks.one_shot --dataset=cifar10 --data_dir=... --model=niid_cnn --train_fraction=0.2

Ten clients of Dirichlet(0.5) train once, and share what they learned once. FedMA and FedAD begin with nets of different
starts, as their papers have it; FedAvg and FedDF with one. FedAD and FedDF distil on proxy data without labels, which
are held out of the training data of all. The ensemble, whose nets stay where they are here, is what distillation aims
at. Bytes are those of one client, up and down, in the round.
"""

from typing import Any, NamedTuple

import numpy as np
from absl import flags

from benchmarks import cases
from fdjax.run import program, report, settings
from fdjax.run.runner import Result


class Row(NamedTuple):
    """A method, its options, and which accuracy is the method's."""

    algorithm: str
    options: dict[str, str]
    metric: str = "central_accuracy"


ROWS = {
    "local": Row("local", {}, "local_accuracy"),
    "FedAvg": Row("fedavg", {}),
    "FedMA": Row("fedma", {}),
    "FedDF": Row("feddf", {}),
    "FedAD": Row("fedad", {}),
    "ensemble": Row("ensemble", {}),
}


def main() -> None:
    given = flags.FLAGS
    out = report.prepare(given.out, overwrite=given.overwrite)
    named = {label: [_settings(row, given.seed + i) for i in range(given.seeds)] for label, row in ROWS.items()}
    results = cases.run_seeds(named, out)
    _draw(out / "accuracy.png", results)
    cases.write(out, "benchmarks.one_shot", _table(results), results)


def _settings(row: Row, seed: int) -> settings.Settings:
    return settings.from_flags(
        **cases.without_others(row.algorithm) | row.options,
        algorithm=row.algorithm, seed=seed, rounds=1, local_eval="full",
    )  # fmt: skip


def _final(label: str, runs: list[Result]) -> np.ndarray:
    """Accuracy after the round, in percent: [seeds]."""
    return 100 * np.array([run.evaluations[ROWS[label].metric][-1] for run in runs])


def _megabytes(run: Result) -> tuple[float, float]:
    """Of one client, up and down."""
    clients = sum(run.traffic.sizes)
    up, down = (run.rounds[way][-1] / clients / 1e6 for way in ("bytes_up", "bytes_down"))
    return up, down


def _table(results: dict[str, list[Result]]) -> str:
    lines = []
    for label, runs in results.items():
        found = _final(label, runs)
        up, down = np.mean([_megabytes(run) for run in runs], axis=0)
        lines.append((
            label,
            " / ".join(f"{value:.1f}" for value in found),
            f"{found.mean():.1f}",
            f"{up:.3f}",
            f"{down:.3f}",
        ))  # fmt: skip
    used = results["FedAvg"][0].settings
    matched, taught = (results[name][0].settings.public() for name in ("FedMA", "FedAD"))
    note = (
        f"Test accuracy after one round of {used.public()['local_epochs']:g} epochs, seeds {used.seed} to "
        f"{used.seed + len(results['FedAvg']) - 1}: of the mean client for local, of all clients' mean output for the "
        f"ensemble, else of the central model ({used.model}). {used.proxy_size} proxy examples. FedMA's clients have "
        f"{matched['client_width']:.0%} of the units of the others' net, its common net may have as many as that one. "
        f"FedAD's student learns for {taught['distill_epochs']:g} epochs."
    )
    headers = ("", "accuracy, %, of each seed", "mean", "MB up", "MB down")
    return f"{report.table(lines, headers)}\n\n{note}"


def _draw(path: Any, results: dict[str, list[Result]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for x, (label, runs) in enumerate(results.items()):
        found = _final(label, runs)
        axis.bar(x, found.mean(), color="tab:blue", alpha=0.6)
        axis.plot([x] * len(found), found, "k.", markersize=5)
    axis.set_xticks(range(len(results)), list(results))
    used = results["FedAvg"][0].settings
    axis.set(ylabel="accuracy, %", ylim=(0, 100))
    axis.set_title(f"{used.dataset}, one round of {used.num_clients} clients; dots: seeds", fontsize="medium")
    report.save_figure(path, figure)


if __name__ == "__main__":
    flags.DEFINE_integer("seeds", 3, "number of seeds, from --seed on", lower_bound=1)
    settings.define_flags(
        skip=("algorithm", "rounds", "local_eval"), dataset="mnist_sample", partition="dirichlet_a", alpha=0.5,
        num_clients=10, batch_size=32, local_epochs=10, learning_rate=0.05, proxy="held_out", proxy_size=500,
        client_width=0.75,
    )  # fmt: skip
    program.define_output_flags("runs/one_shot")
    program.start(main)
