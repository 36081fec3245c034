"""One simulation of any method.

    fdjax --algorithm=feddistill --dataset=synthetic --alpha=1 --beta=1 --model=mclr --rounds=50

Prints a table of what came out and writes table.md, results.json, results.parquet, curves.png and checkpoints under
--out, also after Ctrl-C, of the rounds until then, and metrics.csv while it runs. Every setting is a flag below;
--flagfile reads them from a file.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from fdjax import data
from fdjax.errors import InputError
from fdjax.run import loading, program, report, settings
from fdjax.run.checkpoint import FOLDER, steps
from fdjax.run.frames import write_parquet
from fdjax.run.lock import locked
from fdjax.run.logs import METRICS, Told
from fdjax.run.runner import InterruptedRun, Result, run
from fdjax.run.saving import saving, unsaved
from fdjax.run.seeds import run_seeds
from fdjax.run.summary import draw, summary


def main() -> None:
    """Run what the flags say, print the table and write the files."""
    given = flags.FLAGS
    chosen = settings.from_flags()
    if given.coordinator and not given.out:
        raise InputError("several hosts need one --out: give the same folder, on a shared file system, to all of them")
    if given.seeds is not None:
        _check_seeds()
    told = Told(given.tensorboard, given.wandb)
    out = report.prepare(given.out or new_folder(chosen), overwrite=given.overwrite, resume=given.resume)
    if given.draw_partition:
        source, holdings, _ = loading.load(chosen)
        with saving(out / "partition.png") as path:
            data.draw_partition(
                holdings, source.train_y, source.num_classes, path, chosen.partition_title, source.classes
            )
    try:
        if given.seeds is not None:
            with locked(out):
                results = run_seeds(chosen, [int(text) for text in given.seeds], told=told, out=out)
        else:
            more = {"profile": given.profile, "resume": given.resume, "checkpoint_every": given.checkpoint_every}
            results = [run(chosen, out, told=told, **more)]
    except InterruptedRun as stop:
        if stop.results:
            leave(out, stop.results)
        raise
    leave(out, results)


def _check_seeds() -> None:
    """Raises InputError for --seeds that are no numbers, and beside what they do not go with."""
    given = flags.FLAGS
    if not given.seeds or not all(text.strip().isdecimal() for text in given.seeds):
        raise InputError(f"--seeds={','.join(given.seeds)}: expected whole numbers, such as 0,1,2")
    for name in ("seed", "resume", "checkpoint_every", "profile"):
        if given[name].present:
            raise InputError(f"--seeds and --{name} exclude each other: seeds are one batch, without either")
    if given.out and not given.overwrite and (rounds := steps(Path(given.out).expanduser() / FOLDER)):
        raise InputError(
            f"{given.out} holds {max(rounds)} rounds of a run; use --overwrite to begin anew, or another --out"
        )


def leave(out: Path, results: Sequence[Result]) -> None:
    """Print the table and write the files; what cannot be written is told."""
    ended = [result for result in results if result.ended]
    # Of seeds that were all interrupted, those that came as far as the first.
    shown = ended or [result for result in results if result.round == results[0].round]
    before, text = unsaved(), summary(shown)
    if stopped := [f"{r.settings.seed} (round {r.round})" for r in results if r not in shown]:
        text += f"\n\nLeft out, as they were interrupted: seeds {', '.join(stopped)}."
    print(text, flush=True)
    told = [report.result_dict(result) for result in results]
    named = {"result": told[0]} if len(told) == 1 else {"results": told}
    report.write_text(out / "table.md", text + "\n")
    report.write_json(out / "results.json", report.environment() | named)
    draw(out / "curves.png", shown)
    write_parquet(out / "results.parquet", results)
    missing = {Path(what).name for what in unsaved()[len(before) :]}
    here = [METRICS] if (out / METRICS).is_file() else []
    written = [
        name for name in ("table.md", "results.json", "results.parquet", "curves.png", *here) if name not in missing
    ]
    if written:
        print(f"\nwritten: {out}/{', '.join(written)}")


def new_folder(chosen: settings.Settings) -> Path:
    """A folder under runs/, another for each of the processes that start in one second."""
    dataset, partition = (name.partition("@")[0].replace("/", "-") for name in (chosen.dataset, chosen.partition_name))
    return Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{chosen.method.name}-{dataset}-{partition}-{os.getpid()}"


def command() -> None:
    """`fdjax`, or `python -m fdjax`."""
    flags.DEFINE_boolean("draw_partition", False, "also draw who holds which labels, as partition.png")
    flags.DEFINE_list("seeds", None, "several seeds, such as 0,1,2, as one batch, in place of --seed: mean and std")
    flags.DEFINE_boolean("tensorboard", False, "also write events for TensorBoard, to the folder tensorboard in --out")
    flags.DEFINE_boolean("wandb", False, "also write an offline run of Weights & Biases, to the folder wandb in --out")
    flags.DEFINE_boolean(
        "profile",
        False,
        "also trace the second superstep to the folder profile in --out, for Perfetto and TensorBoard",
    )
    settings.define_flags()
    program.define_output_flags(None)
    program.define_host_flags()
    program.start(main)


if __name__ == "__main__":
    command()
