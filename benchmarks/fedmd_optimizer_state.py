"""FedMD with optimisers that start anew in every stage of every round, and with ones that are kept.

    python -m benchmarks.fedmd_optimizer_state

The authors' code (Li & Wang 2019) compiles each party's net once, so that Adam goes on through all rounds; the FedAvg
family starts its optimisers anew. A fresh Adam's first steps are as long as its learning rate in every direction, so it
matters how many steps a stage has: few, as by default, or hundreds. As measured kept is ahead in both, by less in the
latter.

Ten parties, nets of their own, hold three labels each of the embedded MNIST sample; public are 1,000 others of it.
Adam at 0.001 and transfer learning are the authors', the epochs of the revisit (the flag `--revisits`) 2 and many. The
gain is the mean accuracy of the parties on the full test set after the last round, less that after transfer learning.
"""

import numpy as np
from absl import flags

from benchmarks import cases
from fdjax.errors import InputError
from fdjax.run import program, report, settings
from fdjax.run.runner import Result

MODES = ("fresh", "kept")


def main() -> None:
    given = flags.FLAGS
    revisits = _revisits(given.revisits)
    out = report.prepare(given.out, overwrite=given.overwrite)
    named = {
        _name(mode, epochs): [
            settings.from_flags(
                algorithm="fedmd", optimizer_state=mode, local_epochs=epochs, seed=given.seed + i, local_eval="full"
            )
            for i in range(given.seeds)
        ]
        for epochs in revisits
        for mode in MODES
    }
    results = cases.run_seeds(named, out)
    panels: list[report.Panel] = [
        (
            f"{epochs} epochs of revisit", "round", "accuracy, %",
            [(mode, *cases.mean_curve(results[_name(mode, epochs)], "local_accuracy")) for mode in MODES],
        )
        for epochs in revisits
    ]  # fmt: skip
    report.draw_curves(out / "curves.png", panels, f"FedMD, ten parties, {given.optimizer}: mean of the parties")
    cases.write(out, "benchmarks.fedmd_optimizer_state", _table(results, revisits), results)


def _revisits(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1 or len({*found}) < len(found):
        raise InputError(f"--revisits={text}: expected different whole numbers of epochs, such as 2,50")
    return found


def _name(mode: str, epochs: int) -> str:
    return f"{mode}, {epochs} epochs"


def _table(results: dict[str, list[Result]], revisits: list[int]) -> str:
    lines = []
    for epochs in revisits:
        for mode in MODES:
            runs = results[_name(mode, epochs)]
            curve = 100 * np.array([run.evaluations["local_accuracy"] for run in runs])
            gain = curve[:, -1] - curve[:, 0]
            lines.append((
                str(epochs), mode,
                " / ".join(f"{value:.1f}" for value in curve[:, 0]),
                " / ".join(f"{value:.1f}" for value in curve[:, -1]),
                " / ".join(f"{value:+.1f}" for value in gain),
                f"{gain.mean():+.1f}",
            ))  # fmt: skip
    headers = ("epochs of revisit", "Adam", "after transfer learning, %, of each seed", "after the last round, %",
               "gain, points", "mean")  # fmt: skip
    used = results[_name(MODES[0], revisits[0])][0].settings
    hparams = used.public()
    note = (
        f"Mean accuracy of the parties on the full test set, seeds {used.seed} to {used.seed + flags.FLAGS.seeds - 1}, "
        f"{used.rounds} rounds; {used.optimizer} {hparams['learning_rate']:g}, B = {used.batch_size}, on public data "
        f"{used.distill_batch}, {hparams['digest_epochs']} epochs of digest over {used.proxy_size} public examples."
    )
    return f"{report.table(lines, headers)}\n\n{note}"


if __name__ == "__main__":
    flags.DEFINE_string("revisits", "2,50", "epochs of the revisit: few, many")
    flags.DEFINE_integer("seeds", 3, "number of seeds, from --seed on", lower_bound=1)
    settings.define_flags(
        skip=("algorithm", "optimizer_state", "local_epochs", "local_eval"),
        dataset="mnist_sample", train_fraction=0.3, partition="labels", labels_per_client=3, num_clients=10,
        models="2nn:5,mclr:5", proxy="held_out", proxy_size=1000, batch_size=10, distill_batch_size=128,
        optimizer="adam", learning_rate=1e-3, rounds=10, eval_every=5,
    )  # fmt: skip
    program.define_output_flags("runs/fedmd_optimizer_state")
    program.start(main)
