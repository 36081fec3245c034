"""One simulation of any method.

    python -m fdjax --algorithm=feddistill --dataset=synthetic --alpha=1 --beta=1 --model=mclr --rounds=50

Prints a table of what came out and writes table.md, results.json, curves.png and checkpoints under --out, also after
Ctrl-C, of the rounds until then. Every setting is a flag below; --flagfile reads them from a file.
"""

import os
import time
from pathlib import Path

from absl import flags

from fdjax import data
from fdjax.errors import InputError
from fdjax.run import loading, program, report, settings
from fdjax.run.runner import InterruptedRun, Result, run
from fdjax.run.saving import saving, unsaved


def main() -> None:
    """Run what the flags say, print the table and write the files."""
    given = flags.FLAGS
    chosen = settings.from_flags()
    if given.coordinator and not given.out:
        raise InputError("several hosts need one --out: give the same folder, on a shared file system, to all of them")
    out = report.prepare(given.out or new_folder(chosen), overwrite=given.overwrite, resume=given.resume)
    if given.draw_partition:
        source, holdings, _ = loading.load(chosen)
        with saving(out / "partition.png") as path:
            data.draw_partition(holdings, source.train_y, source.num_classes, path, chosen.partition_name)
    try:
        result = run(chosen, out, resume=given.resume, checkpoint_every=given.checkpoint_every)
    except InterruptedRun as stop:
        if stop.result is not None:
            leave(out, stop.result)
        raise
    leave(out, result)


def leave(out: Path, result: Result) -> None:
    """Print the table and write the files; what cannot be written is told."""
    before, text = unsaved(), summary(result)
    print(text, flush=True)
    report.write_text(out / "table.md", text + "\n")
    report.write_json(out / "results.json", report.environment() | {"result": report.result_dict(result)})
    draw(out / "curves.png", result)
    missing = {Path(what).name for what in unsaved()[len(before) :]}
    written = [name for name in ("table.md", "results.json", "curves.png") if name not in missing]
    if written:
        print(f"\nwritten: {out}/{', '.join(written)}")


def new_folder(chosen: settings.Settings) -> Path:
    """A folder under runs/, another for each of the processes that start in one second."""
    dataset, when = chosen.dataset.replace("/", "-"), time.strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{when}-{chosen.method.name}-{dataset}-{chosen.partition_name}-{os.getpid()}"


def summary(result: Result) -> str:
    """The last evaluation, bytes and seconds as a table."""
    final, tested = result.final, result.evaluations.get("local_examples", [])
    names = {
        "central_accuracy": "central accuracy, %",
        "local_accuracy": f"mean local accuracy, {_examples(result)} test examples, %",
        "own_accuracy": "mean accuracy on clients' own test parts, uniform, %",
        "own_accuracy_weighted": "the same, weighted by n_k, %",
        "own_accuracy_by_test_size": "the same, weighted by test examples, %",
        "worst_client": "worst client, own test part, %",
        "quantile_10": "10 % quantile of clients, %",
        "client_std": "std across clients, %",
        "new_accuracy": "new clients as they are, own test part, %",
        "new_accuracy_tuned": "new clients after fine-tuning, own test part, %",
        "validation_accuracy": "accuracy on the validation split, %",
    }
    between = ", ".join(f"{n:,.0f}" for n in sorted({*tested[:-1]})) if len({*tested}) > 1 else ""
    rows = [(text, report.percent(final[name])) for name, text in names.items() if name in final]
    rows += [
        *((f"{kind} loss", f"{final[f'{kind}_loss']:.4f}") for kind in ("central", "local") if f"{kind}_loss" in final),
        *([("test examples for local accuracy at evaluations before", between)] if between else []),
        ("bytes up, of one client a round", _of_one_client(result, "up")),
        ("bytes down, to one client a round", _of_one_client(result, "down")),
        *(
            (f"bytes {way} of the set-up, all clients", report.byte_size(result.setup[f"bytes_{way}"]))
            for way in ("up", "down")
            if result.setup.get(f"bytes_{way}")
        ),
        ("bytes of the whole run", report.byte_size(result.rounds["bytes_up"][-1] + result.rounds["bytes_down"][-1])),
        ("seconds, of which compilation", f"{result.seconds:.1f}, {result.compile_seconds:.1f}"),
    ]
    chosen = result.settings
    return report.table(
        rows, (f"{chosen.algorithm_title}, {chosen.dataset}, {chosen.partition_name}", f"round {_rounds(result)}")
    )


def _rounds(result: Result) -> str:
    """Rounds done, and of how many where the run was stopped."""
    asked = result.settings.rounds
    return f"{result.round} of {asked}, stopped" if result.round < asked else f"{asked}"


def _examples(result: Result) -> str:
    """On how many examples personal models were tested at the last evaluation."""
    return f"{result.final.get('local_examples', 0):,.0f}"


def _of_one_client(result: Result, way: str) -> str:
    """Bytes of each cohort's clients, or their mean."""
    sent = report.bytes_of_one_client(result, way)
    if isinstance(sent, tuple):
        return ", ".join(map(report.byte_size, sent))
    return f"{report.byte_size(sent)} in the mean"


def draw(path: Path, result: Result) -> None:
    """Accuracy over rounds and over bytes."""
    evaluations = result.evaluations
    shown = ("central_accuracy", "local_accuracy", "own_accuracy", "worst_client", "validation_accuracy")
    names = [name for name in shown[:-1] if name in evaluations] or [shown[-1]]
    curves = [(n.replace("_", " "), evaluations["round"], [100 * v for v in evaluations[n]]) for n in names]
    sent = [report.bytes_until(result, int(r)) / 1e6 for r in evaluations["round"]]
    over_bytes = [(label, sent, values) for label, _, values in curves[:1]]
    losses = [
        (n.replace("_", " "), list(range(1, len(v) + 1)), v) for n, v in result.rounds.items() if n.endswith("loss")
    ]
    panels: list[report.Panel] = [
        ("accuracy", "round", "%", curves),
        ("communication", "MB up and down", "%", over_bytes),
        ("training loss", "round", "", losses),
    ]
    title = f"{result.settings.algorithm_title}, {result.settings.dataset}, {result.settings.partition_name}"
    if result.round < result.settings.rounds:
        title += f", round {_rounds(result)}"
    report.draw_curves(path, panels, title)


if __name__ == "__main__":
    flags.DEFINE_boolean("draw_partition", False, "also draw who holds which labels, as partition.png")
    settings.define_flags()
    program.define_output_flags(None)
    program.define_host_flags()
    program.start(main)
