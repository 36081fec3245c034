"""Figure 2 of FedMD (Li & Wang 2019): each party before and during collaboration, and with everybody's data pooled.

    python -m benchmarks.fedmd_figure2 --data_dir=... --writers=mnist_writers.npz
    python -m benchmarks.fedmd_figure2                     # without the writers: a few labels of the embedded sample

The paper has ten parties, each with a net of its own; public MNIST and private FEMNIST letters, public CIFAR-10 and
private subclasses of CIFAR-100. It prints curves and says that collaboration gains about 20 % on average. Here the
public data are a part of MNIST and the private ones the digits of one MNIST writer each, which stand for FEMNIST; they
are tested on all the test writers, as the paper's parties on all of FEMNIST. Public and private labels are the same ten
digits, so transfer learning already knows what is tested: less is left to be gained than in the paper.

    transfer    after transfer learning (public, then private data): the paper's dashed line
    alone       R rounds of private training without a consensus: FedMD with digest_learning_rate = 0
    FedMD       after R rounds, each of which communicates, digests the consensus and revisits the private data
    pooled      transfer learning with everybody's private data in the place of the party's own: its upper bound

The quick preset has small nets; the paper preset has FedMD's own ten, 5,000 of 20,000 public examples a round and
batches of 5, and wants a GPU. Adam at 0.001 and the epochs of transfer learning are the paper's. Ours: B = 10, all of
1,000 public examples a round, no early stopping.

Missing for CIFAR-10 -> CIFAR-100, and for the letters: proxy data with labels of their own beside the private ones, and
the choice of subclasses. --dataset=cifar10 --partition=dirichlet_a --alpha=... --models=fedmd_cifar_0:1,... runs the
nets on one label set. There are no checkpoints.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from benchmarks import cases
from fdjax.data.holdings import from_counts
from fdjax.errors import InputError
from fdjax.run import program, report, settings
from fdjax.run.experiment import build, traffic_of
from fdjax.run.record import Recording, Result, clock
from fdjax.types import Holdings

SMALL = "niid_cnn:3,fedgen_cnn:3,2nn:2,mclr:2"
ZOO = ",".join(f"fedmd_mnist_{i}:1" for i in range(10))
PRESETS = {
    "quick": {
        "models": SMALL,
        "rounds": 15,
        "batch_size": 10,
        "distill_batch_size": 128,
        "proxy_size": 1000,
        "proxy_per_round": 0,
    },
    "paper": {
        "models": ZOO,
        "rounds": 20,
        "batch_size": 5,
        "distill_batch_size": 256,
        "proxy_size": 20000,
        "proxy_per_round": 5000,
    },
}
LABELS = 3  # of a party, where there are no writers


class Party(NamedTuple):
    """Accuracy of one party on the full test set, one entry a seed."""

    model: str
    rounds: np.ndarray  # [evaluations]: 0 ... R
    fedmd: np.ndarray  # [seeds, evaluations]
    alone: np.ndarray  # the same without a consensus
    pooled: np.ndarray  # [seeds]


def main() -> None:
    given = flags.FLAGS
    if given.resume:
        raise InputError("--resume: this program keeps no checkpoints; begin again with --overwrite")
    models, made = _settings()
    out = report.prepare(given.out or f"runs/fedmd_figure2_{given.preset}", overwrite=given.overwrite)
    if (out / "results.json").exists() and not given.overwrite:
        raise InputError(f"{out} holds results already; use --overwrite to begin again or another --out")
    if made["partition"] == "labels" and given.partition is None:
        print(f"no --writers: {made['labels_per_client']} labels a party of {made['dataset']} stand in for writers")
    kinds = {"FedMD": {}, "alone": {"digest_learning_rate": 0.0}, "pooled": {}}
    results: dict[str, list[Result]] = {kind: [] for kind in kinds}
    curves: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
    for seed in range(given.seed, given.seed + given.seeds):
        for kind, change in kinds.items():
            chosen = settings.from_flags(**made | change, seed=seed)
            print(f"{kind}, seed {seed}", flush=True)
            result, accuracy = follow(chosen, pooled=kind == "pooled")
            results[kind].append(result)
            curves[kind].append(accuracy)
    stacked = {kind: np.stack(values) for kind, values in curves.items()}  # [seeds, evaluations, parties]
    rounds = results["FedMD"][0].evaluations["round"]
    parties = [
        Party(model, np.array(rounds), stacked["FedMD"][:, :, i], stacked["alone"][:, :, i], stacked["pooled"][:, 0, i])
        for i, model in enumerate(models)
    ]
    draw(out / "curves.png", parties, _what(results["FedMD"][0].settings))
    more = {"parties": [p._asdict() | {n: getattr(p, n).tolist() for n in Party._fields[1:]} for p in parties]}
    cases.write(out, "benchmarks.fedmd_figure2", _text(parties, results), results, more)


def _settings() -> tuple[list[str], dict[str, Any]]:
    """The parties' models, and the overrides that all runs have in common."""
    given = flags.FLAGS
    made: dict[str, Any] = {n: v for n, v in PRESETS[given.preset].items() if given[n].value is None}
    cohorts = settings.cohorts_of(given.models or made["models"])
    made |= {"algorithm": "fedmd", "num_clients": sum(size for _, size in cohorts)}
    made["dataset"] = given.dataset or ("mnist" if given.writers else "mnist_sample")
    made["partition"] = given.partition or ("writer" if given.writers else "labels")
    if made["partition"] == "labels" and given.labels_per_client is None:
        made["labels_per_client"] = LABELS
    return [name for name, size in cohorts for _ in range(size)], made


def everything_for_everyone(holdings: Holdings) -> Holdings:
    """Holdings of the same parties, each of which holds what all of them hold."""
    order, parties = np.asarray(holdings.order), len(holdings.count)
    return from_counts(np.tile(order, parties), np.full(parties, len(order)))


def follow(chosen: settings.Settings, *, pooled: bool = False) -> tuple[Result, np.ndarray]:
    """A run, and the accuracy [evaluations, parties] on the full test set: after transfer learning, then `eval_every`.

    Transfer learning is the method's set-up, and round 0 of the evaluations. Pooled parties stop after it.
    """
    with clock() as time_spent:
        experiment = build(chosen, everything_for_everyone if pooled else None)
        simulation, federation, hparams = experiment.simulation, experiment.federation, experiment.hparams
        recording = Recording(experiment, traffic_of(experiment))
        assert simulation.setup is not None
        state, report_of_setup = simulation.setup(simulation.init(chosen.seed, federation), federation, hparams)
        recording.add_setup(report_of_setup)
        in_order_of_ids = np.argsort(np.asarray(federation.client))
        evaluation = jax.device_get(simulation.evaluate(state, federation, hparams))
        recording.add_evaluation(0, *evaluation)
        accuracy = [evaluation[1]["local_accuracy"][in_order_of_ids]]
        last = 0 if pooled else chosen.rounds
        for done in tqdm(range(0, last, chosen.eval_every), unit="evaluation", leave=False, disable=pooled):
            rounds = min(chosen.eval_every, last - done)
            state, report_of_rounds = simulation.run(state, federation, hparams, rounds)
            evaluation = jax.device_get(simulation.evaluate(state, federation, hparams))
            recording.add_superstep(done + rounds, report_of_rounds, *evaluation)
            accuracy.append(evaluation[1]["local_accuracy"][in_order_of_ids])
        result = recording.result(time_spent.stamp(recording.record))
    return result, np.stack(accuracy).astype(float)


def _what(used: settings.Settings) -> str:
    private = {
        "writer": "private: the digits of one MNIST writer each (in the place of FEMNIST)",
        "labels": f"private: {used.labels_per_client} labels each (in the place of writers)",
    }.get(used.partition_name, f"private: {used.partition_name}")
    return f"FedMD on {used.dataset}; public: {used.proxy_size} examples of it; {private}"


def _cell(values: np.ndarray) -> str:
    return report.percent(float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None)


def _bytes(run: Result, way: str) -> str:
    """What one party sends or receives in a round: of all of them the same, as arrays say it."""
    sizes = run.traffic.per_participant(way)
    assert sizes is not None
    return report.byte_size(sizes[0])


def _text(parties: list[Party], results: dict[str, list[Result]]) -> str:
    """The table of gains, and the mean one beside the paper's."""
    run = results["FedMD"][0]
    used, last = run.settings, run.settings.rounds
    columns = [
        (p.fedmd[:, 0], p.alone[:, -1], p.fedmd[:, -1], p.fedmd[:, -1] - p.fedmd[:, 0], p.pooled) for p in parties
    ]
    lines = [(str(i), p.model, *map(_cell, columns[i])) for i, p in enumerate(parties)]
    mean = [np.mean([column[j] for column in columns], axis=0) for j in range(5)]
    lines.append(("mean", "", *map(_cell, mean)))
    headers = ("party", "model", "transfer", f"alone, {last} rounds", f"FedMD, {last} rounds", "FedMD less transfer",
               "pooled")  # fmt: skip
    before, alone, after, gain, pooled = (float(values.mean()) for values in mean)
    hparams = used.public()
    count = f"mean ± std of {len(mean[0])} seeds" if len(mean[0]) > 1 else "one seed"
    return "\n\n".join(
        [
            report.table(lines, headers),
            f"Accuracy in % on the full test set, {count}. {_what(used)}; {used.proxy_per_round or used.proxy_size} "
            f"public examples a round. {used.optimizer} {hparams['learning_rate']:g}, B = {used.batch_size}, public "
            f"{used.distill_batch_size or used.batch_size}; epochs: public {hparams['pretrain_epochs']:g}, private "
            f"{hparams['private_epochs']:g}, revisit {hparams['local_epochs']:g}, digest {hparams['digest_epochs']:g}. "
            f"A party sends {_bytes(run, 'up')} and receives {_bytes(run, 'down')} a round.",
            f"Mean gain over transfer learning: {100 * gain:+.2f} points, {gain / before:+.1%} of it; over as much "
            f"private training alone: {100 * (after - alone):+.2f} points. The paper says about 20 % on average, on "
            f"harder tasks. Pooled data are {100 * (pooled - after):+.2f} points from FedMD.",
        ]
    )


def draw(path: Path, parties: list[Party], title: str) -> None:
    """A panel a party: curves over rounds, the dashed line where they begin and the dash-dotted one of pooled data."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    wide = min(5, len(parties))
    high = -(-len(parties) // wide)
    size = (2.6 * wide + 0.4, 2.3 * high + 0.9)
    figure, axes = plt.subplots(high, wide, figsize=size, layout="constrained", squeeze=False, sharex=True, sharey=True)
    for i, axis in enumerate(axes.flat):
        if i >= len(parties):
            axis.set_visible(False)
            continue
        party, colour = parties[i], f"C{i % 10}"
        axis.axhline(
            100 * party.fedmd[:, 0].mean(), color="0.4", linestyle="--", linewidth=1, label="transfer learning"
        )
        axis.axhline(100 * party.pooled.mean(), color="0.4", linestyle="-.", linewidth=1, label="pooled data")
        axis.plot(party.rounds, 100 * party.alone.mean(0), color="0.6", linewidth=1.2, label="alone")
        axis.plot(party.rounds, 100 * party.fedmd.mean(0), color=colour, linewidth=1.8, label="FedMD")
        axis.set_title(f"party {i}: {party.model}", fontsize="small")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        if i + wide >= len(parties):
            axis.set_xlabel("round", fontsize="small")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    handles[-1] = plt.Line2D([], [], color="black", linewidth=1.8)
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    figure.supylabel("accuracy on the full test set, %", fontsize="small")
    figure.suptitle(title, fontsize="medium")
    report.save_figure(path, figure)


if __name__ == "__main__":
    flags.DEFINE_enum("preset", "quick", list(PRESETS), "quick: small nets, minutes; paper: FedMD's nets, for a GPU")
    flags.DEFINE_string("dataset", None, "data set; default: mnist with --writers, else mnist_sample")
    flags.DEFINE_integer("seeds", 3, "number of seeds, from --seed on", lower_bound=1)
    settings.define_flags(
        skip=("algorithm", "dataset", "num_clients", "local_eval"),
        eval_every=3, optimizer="adam", learning_rate=0.001, proxy="held_out", **dict.fromkeys(PRESETS["quick"]),
    )  # fmt: skip
    program.define_output_flags(None)
    program.start(main)
