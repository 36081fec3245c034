"""DS-FL (Itahara et al. 2021): ERA against SA, and both against FedAvg, accuracy over the bytes that were sent.

    python -m benchmarks.dsfl_era
    python -m benchmarks.dsfl_era --preset=paper --data_dir=... --fashion_dir=...

The paper's claim: sharpening the mean of the clients' outputs (ERA, entropy reduction) teaches more than the mean
itself (SA, simple aggregation), and both send far less than FedAvg. Its numbers were not to be had (see
`fdjax.algorithms.dsfl`), so nothing published stands beside ours. All methods run on one federation: the clients'
split, Dirichlet(0.1), is drawn after the open data were taken out, for FedAvg too, which does not use them.

Bytes are of all clients, up and down, and cumulative. A budget's accuracy is that of the last evaluation within it. The
server's model is tested, and so are the clients' own, whose mean is given; all have learned the round's targets by
then, as a round ends with the distillation of server and clients.

MNIST is the embedded sample, and Fashion-MNIST a tenth of it, unless --data_dir says where MNIST as tfds prepared it
is; then both are whole (--train_fraction for less). Fashion-MNIST is taken from --fashion_dir (IDX files), else from
--data_dir, else left out.

Ours: the 2NN, B = 50, learning rate 0.1, rounds, and the quick preset's 10 clients and one local epoch. The paper
preset has the 100 clients, open set of 10,000, 1,000 of it a round and five epochs of the laboratory's later code.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from benchmarks import cases
from fdjax.algorithms import ALGORITHMS
from fdjax.data import prepared
from fdjax.errors import InputError, unknown
from fdjax.run import program, report, settings
from fdjax.run.runner import Result

METHODS = {
    "era": ("DS-FL, ERA", "dsfl"),
    "sa": ("DS-FL, SA", "dsfl"),
    "enhanced_era": ("DS-FL, enhanced ERA", "dsfl"),
    "era_logits": ("DS-FL, ERA of logits", "dsfl"),
    "fedavg": ("FedAvg", "fedavg"),
}
NAMES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST"}
PRESETS = {
    "quick": {"num_clients": 10, "proxy_size": 1000, "proxy_per_round": 500, "local_epochs": 1.0, "rounds": 60},
    "paper": {"num_clients": 100, "proxy_size": 10000, "proxy_per_round": 1000, "local_epochs": 5.0, "rounds": 100},
}
SAMPLE = 0.1  # of Fashion-MNIST, beside the embedded sample of MNIST

Runs = dict[tuple[str, str], list[Result]]  # by data set and method


def sent(result: Result) -> list[float]:
    """Bytes up and down, of all clients until each evaluation."""
    return [report.bytes_until(result, int(r)) for r in result.evaluations["round"]]


def within(result: Result, metric: str, budget: float) -> float | None:
    """A metric at the last evaluation, after a round at least, for which at most `budget` bytes were sent, or None."""
    tested = zip(result.evaluations["round"], result.evaluations[metric], sent(result), strict=True)
    values = [value for round, value, bytes in tested if round and bytes <= budget]
    return values[-1] if values else None


def bytes_to(result: Result, metric: str, target: float) -> float | None:
    """Bytes until the first evaluation whose metric reaches `target`; None if none does."""
    return next((b for v, b in zip(result.evaluations[metric], sent(result), strict=True) if v >= target), None)


def main() -> None:
    given = flags.FLAGS
    for name in given.methods:
        if name not in METHODS:
            raise unknown("method", name, METHODS)
    budgets = [_positive("budgets", text) * 1e6 for text in given.budgets]
    targets = {name: _positive(f"target_{name}", str(given[f"target_{name}"].value)) for name in NAMES}
    out = report.prepare(given.out or f"runs/dsfl_era_{given.preset}", overwrite=given.overwrite)
    grid: dict[tuple[str, str], list[settings.Settings]] = {}
    for dataset, place in _datasets().items():
        for method in given.methods:
            grid[dataset, method] = [_settings(method, place, given.seed + i) for i in range(given.seeds)]
    named = {f"{NAMES[dataset]}, {METHODS[method][0]}": seeds for (dataset, method), seeds in grid.items()}
    results = cases.run_seeds(named, out)
    by_key = dict(zip(grid, results.values(), strict=True))
    for file, metric, whose in (
        ("curves", "central", "server's model"),
        ("clients", "local", "mean of clients' models"),
    ):
        panels = _panels(by_key, f"{metric}_accuracy")
        if panels:
            report.draw_curves(out / f"{file}.png", panels, whose, log_x=True)
    cases.write(out, "benchmarks.dsfl_era", _text(by_key, budgets, targets), results)


def _positive(flag: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise InputError(f"--{flag}: {text!r}, expected a number above 0")
    return value


def _datasets() -> dict[str, dict[str, Any]]:
    """Overrides that say where each data set is; one that is nowhere is left out, in one line."""
    given = flags.FLAGS
    whole = given.data_dir is not None or given.preset == "paper"
    places: dict[str, dict[str, Any]] = {}
    for name in given.datasets:
        if name == "mnist":
            places[name] = {"dataset": "mnist" if whole else "mnist_sample"}
        elif name == "fashion_mnist":
            fraction = {} if whole else {"train_fraction": SAMPLE * given.train_fraction}
            if given["fashion_dir"].present or Path(given.fashion_dir).is_dir():
                places[name] = {"dataset": "idx", "data_dir": given.fashion_dir} | fraction
                continue
            try:
                prepared.locate(name, given.data_dir)
                places[name] = {"dataset": name} | fraction
            except InputError as error:
                print(
                    f"Fashion-MNIST is left out: no --fashion_dir={given.fashion_dir} (apt-get install "
                    f"dataset-fashion-mnist), and {error}"
                )
        else:
            raise unknown("data set of --datasets", name, NAMES)
    if not places:
        raise InputError(f"--datasets={','.join(given.datasets)}: none of them is on this machine")
    return places


def _settings(method: str, place: dict[str, Any], seed: int) -> settings.Settings:
    given = flags.FLAGS
    preset = {n: v for n, v in PRESETS[given.preset].items() if given[n].value is None}
    algorithm = METHODS[method][1]
    if algorithm == "dsfl":
        preset["aggregation"] = method
    else:
        understood = ALGORITHMS[algorithm].hparams
        preset |= {name: None for name in ALGORITHMS["dsfl"].hparams if name not in understood}
        preset |= {"proxy_per_round": 0, "distill_batch_size": 0}  # its clients lack the same examples, and that is all
    return settings.from_flags(algorithm=algorithm, seed=seed, **place | preset)


def _text(results: Runs, budgets: Sequence[float], targets: dict[str, float]) -> str:
    parts = [_table(results, name, budgets, targets[name]) for name in dict.fromkeys(name for name, _ in results)]
    used = next(iter(results.values()))[0].settings
    hparams = next((runs[0].settings.public() for (_, m), runs in results.items() if m != "fedavg"), used.public())
    count = f"mean ± std of {flags.FLAGS.seeds} seeds" if flags.FLAGS.seeds > 1 else "one seed"
    distil = f", distilling {hparams['distill_epochs']:g}" if "distill_epochs" in hparams else ""
    note = (
        f"Accuracy in % on the test set, {count}; a cell is empty where a seed sends more by its first evaluation, or "
        f"never gets there; a run that ends below a budget shows its end. {used.num_clients} clients, "
        f"{used.partition_name}, alpha {used.alpha:g}, {used.model_title}, B = {used.batch_size}, {used.optimizer} "
        f"{hparams['learning_rate']:g}, local epochs {hparams['local_epochs']:g}{distil}; open data {used.proxy_size}, "
        f"{used.proxy_per_round or used.proxy_size} of them a round."
        + (f" ERA's T = {hparams['era_temperature']:g}." if "era_temperature" in hparams else "")
    )
    return "\n\n".join([*parts, note, *_verdicts(results)])


def _table(results: Runs, dataset: str, budgets: Sequence[float], target: float) -> str:
    lines = []
    for (name, method), runs in results.items():
        if name == dataset:
            reached = [bytes_to(r, "central_accuracy", target / 100) for r in runs]
            lines.append(
                (
                    METHODS[method][0],
                    report.byte_size(cases.bytes_a_round(runs[0])),
                    *(_mean([within(r, "central_accuracy", b) for r in runs]) for b in budgets),
                    cases.cell(runs, "central_accuracy", runs[0].settings.rounds),
                    cases.cell(runs, "local_accuracy", runs[0].settings.rounds) if method != "fedavg" else "",
                    report.byte_size(sent(runs[0])[-1]),
                    report.byte_size(float(np.mean(reached))) if None not in reached else "",
                    f"{np.mean([r.seconds - r.compile_seconds for r in runs]):.0f}",
                )
            )
    used = results[dataset, next(m for n, m in results if n == dataset)][0].settings
    headers = (NAMES[dataset], "bytes a round", *(f"server, {report.byte_size(b)}" for b in budgets),
               f"server, round {used.rounds}", "mean of clients", "bytes in all", f"bytes to {target:g} %",
               "s")  # fmt: skip
    share = f", {100 * used.train_fraction:g} % of it" if used.train_fraction < 1 else ""
    return f"{NAMES[dataset]} (`{used.dataset}`{share}):\n\n{report.table(lines, headers)}"


def _mean(values: list[float | None]) -> str:
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return ""
    return report.percent(*report.spread(known))


def _verdicts(results: Runs) -> list[str]:
    """ERA less SA at the end, seed by seed, and whether that is the paper's order."""
    lines = []
    for dataset in dict.fromkeys(name for name, _ in results):
        if (dataset, "era") in results and (dataset, "sa") in results:
            gaps = [
                100 * (era.final["central_accuracy"] - sa.final["central_accuracy"])
                for era, sa in zip(results[dataset, "era"], results[dataset, "sa"], strict=True)
            ]
            order = "as the paper claims" if min(gaps) > 0 else "against the paper" if max(gaps) < 0 else "undecided"
            seeds = ", ".join(f"{gap:+.2f}" for gap in gaps)
            lines.append(f"{NAMES[dataset]}: ERA less SA at the end, in points, seed by seed: {seeds}: {order}.")
    return lines


def _panels(results: Runs, metric: str) -> list[report.Panel]:
    panels: list[report.Panel] = []
    for dataset in dict.fromkeys(name for name, _ in results):
        curves = [
            (METHODS[method][0], [b / 1e6 for b in sent(runs[0])], cases.mean_curve(runs, metric)[1])
            for (name, method), runs in results.items()
            if name == dataset and not (metric == "local_accuracy" and method == "fedavg")
        ]
        if curves:
            panels.append((NAMES[dataset], "MB sent, up and down, all clients", "accuracy, %", curves))
    return panels


if __name__ == "__main__":
    flags.DEFINE_enum("preset", "quick", list(PRESETS), "quick: minutes; paper: 100 clients, full data, for a GPU")
    flags.DEFINE_list("methods", ["era", "sa", "fedavg"], f"which: {', '.join(METHODS)}")
    flags.DEFINE_list("datasets", list(NAMES), f"which: {', '.join(NAMES)}")
    flags.DEFINE_string(
        "fashion_dir", "/usr/share/datasets/fashion-mnist", "folder of Fashion-MNIST's IDX files, by default Debian's"
    )
    flags.DEFINE_list("budgets", ["2", "20", "200"], "MB at which accuracy is read off")
    flags.DEFINE_float("target_mnist", 70.0, "accuracy in %, to which bytes are counted")
    flags.DEFINE_float("target_fashion_mnist", 50.0, "the same of Fashion-MNIST")
    flags.DEFINE_integer("seeds", 3, "number of seeds, from --seed on", lower_bound=1)
    settings.define_flags(
        skip=("algorithm", "aggregation", "dataset", "models"),
        partition="dirichlet_a", alpha=0.1, model="2nn", batch_size=50, learning_rate=0.1, proxy="held_out",
        local_eval="full",
        **dict.fromkeys(PRESETS["quick"]),
    )  # fmt: skip
    program.define_output_flags(None)
    program.start(main)
