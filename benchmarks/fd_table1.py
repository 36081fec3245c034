"""Table 1 of FD (Jeong et al. 2018): accuracy and payload of FD and FL on MNIST, 2 to 10 devices.

    python -m benchmarks.fd_table1 --preset=quick
    python -m benchmarks.fd_table1 --preset=paper --data_dir=...

Every device has 2,000 random images, of three labels only five each; B = 64, 250 iterations a round, 16 rounds. FD's
accuracy is the mean over the devices of their own models, FL's (FedAvg's) that of the central model, both on the full
test set; the paper does not say whose FD's is. Payload is what one device sends and receives in 16 rounds, in bits,
counted from the arrays that are sent.

FAug (`--algorithm=faug`) is not run here: its rows are the paper's alone. Ours, where the paper is silent: plain SGD,
its learning rate, gamma, inputs standardised, no image on two devices, drawn from all 60,000 (the paper: from 55,000).
An iteration count is met by the nearest number of whole epochs, at least one. Our net has biases and the paper's count
has none. The quick preset has the embedded sample, 500 images a device and about 24 iterations.
"""

from typing import NamedTuple

import jax
import numpy as np
from absl import flags

from benchmarks import cases
from fdjax.algorithms import ALGORITHMS
from fdjax.errors import InputError
from fdjax.models import own as nets
from fdjax.run import loading, program, report, settings
from fdjax.run.runner import Result

ROUNDS = 16  # of the published payload


class Row(NamedTuple):
    """A method of the table, as published: accuracy in % by number of devices, bits."""

    label: str
    accuracy: dict[int, float]
    bits: int


PUBLISHED = {
    "fd": Row("FD", {2: 72.30, 4: 73.04, 6: 69.51, 8: 68.39, 10: 75.24}, 102_400),
    "fedavg": Row("FL", {2: 80.77, 4: 86.84, 6: 87.38, 8: 88.78, 10: 90.60}, 1_228_439_552),
    "fd+faug": Row("FD + FAug", {2: 84.64, 4: 85.26, 6: 84.98, 8: 84.80, 10: 86.42}, 47_989_120),
    "fl+faug": Row("FL + FAug", {2: 91.11, 4: 86.54, 6: 89.56, 8: 91.01, 10: 92.59}, 1_276_326_272),
}
MEASURES = {"fd": ("local_accuracy", "mean of the devices"), "fedavg": ("central_accuracy", "central model")}
PRESETS = {
    "quick": {"dataset": "mnist_sample", "clients": ["2", "4"], "samples": 500, "iterations": 24},
    "paper": {"dataset": "mnist", "clients": ["2", "4", "6", "8", "10"], "samples": 2000, "iterations": 250},
}


class Devices(NamedTuple):
    """What some number of devices hold, and how long they train on it."""

    images: tuple[int, ...]
    epochs: int
    iterations: tuple[int, ...]
    parameters: int
    biases: int


def main() -> None:
    given = flags.FLAGS
    counts = [_count(text) for text in given.clients or PRESETS[given.preset]["clients"]]
    for name in given.methods:
        if name not in MEASURES:
            raise InputError(f"--methods: {name!r} is not run here; known: {', '.join(MEASURES)}")
    out = report.prepare(given.out or f"runs/fd_table1_{given.preset}", overwrite=given.overwrite)
    devices = {count: _devices(_settings("fedavg", count, 1)) for count in counts}
    grid = {
        (name, count): [_settings(name, count, devices[count].epochs)] for count in counts for name in given.methods
    }
    named = {f"{PUBLISHED[name].label}, {count} devices": runs for (name, count), runs in grid.items()}
    results = dict(zip(grid, (runs[0] for runs in cases.run_seeds(named, out).values()), strict=True))
    used = next(iter(results.values())).settings
    title = f"FD, Table 1: {used.dataset}, {used.model_title}"
    report.draw_curves(out / "curves.png", [_panel(count, results) for count in counts], title)
    text = f"{_table(results, devices)}\n\n{_notes(results, devices)}"
    cases.write(out, "benchmarks.fd_table1", text, {name: [r] for name, r in zip(named, results.values(), strict=True)})


def _count(text: str) -> int:
    known = PUBLISHED["fd"].accuracy
    if not text.isdigit() or int(text) not in known:
        raise InputError(f"--clients: {text!r} is no column of Table 1; its columns are {', '.join(map(str, known))}")
    return int(text)


def _settings(algorithm: str, count: int, epochs: int) -> settings.Settings:
    given, preset = flags.FLAGS, PRESETS[flags.FLAGS.preset]
    return settings.from_flags(
        algorithm=algorithm,
        local_eval="full",
        dataset=given.dataset or preset["dataset"],
        partition="scarce",
        num_clients=count,
        samples_per_client=given.samples_per_client or preset["samples"],
        local_epochs=epochs,
        **cases.without_others(algorithm),
    )


def _devices(of: settings.Settings) -> Devices:
    source, holdings, _ = loading.load(of)
    wanted = flags.FLAGS.iterations or PRESETS[flags.FLAGS.preset]["iterations"]
    steps = -(-holdings.count // of.batch_size) if of.batch_size else np.ones_like(holdings.count)
    epochs = max(1, round(wanted / float(np.mean(steps))))
    net = nets.build(of.model, source.train_x.shape[1:], source.num_classes)
    leaves = jax.tree.leaves_with_path(jax.eval_shape(net.init, jax.random.key(0)))
    sizes = [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.size) for path, leaf in leaves]
    return Devices(
        tuple(sorted(holdings.count.tolist())),
        epochs,
        tuple(sorted((epochs * steps).tolist())),
        sum(size for _, size in sizes),
        sum(size for name, size in sizes if name.endswith("bias")),
    )


def bits(result: Result) -> float:
    """Bits that one device sends and receives in 16 rounds, from what all of them did in those that ran."""
    return 8 * ROUNDS * cases.bytes_a_round(result) / sum(result.traffic.participants)


def _range(values: tuple[int, ...]) -> str:
    return f"{values[0]:,}" if values[0] == values[-1] else f"{values[0]:,} to {values[-1]:,}"


def _table(results: dict[tuple[str, int], Result], devices: dict[int, Devices]) -> str:
    lines = []
    for name, row in PUBLISHED.items():
        for count, accuracy in row.accuracy.items():
            line = [row.label, count, f"{accuracy:.2f}"]
            if (result := results.get((name, count))) is not None:
                metric, whose = MEASURES[name]
                line += [
                    report.percent(result.final[metric]),
                    whose,
                    report.percent(result.final["own_accuracy"]),
                    f"{row.bits:,}",
                    f"{bits(result):,.12g}",
                    _range(devices[count].images),
                    _range(devices[count].iterations),
                    f"{result.seconds - result.compile_seconds:.0f}",
                ]
            else:
                line += ["not run", "", "", f"{row.bits:,}", "", "", "", ""]
            lines.append(line)
    headers = ("", "devices", "accuracy, published", "accuracy", "whose", "on own labels", "bits, published", "bits",
               "images a device", "iterations a round", "s")  # fmt: skip
    return report.table(lines, headers)


def _setting(result: Result) -> str:
    used = result.settings
    rate = used.public()["learning_rate"]
    images = f"{used.dataset}, {used.samples_per_client:,} images a device before three labels are cut to five"
    return f"{images}, {used.model_title}, B = {used.batch_size}, learning rate {rate:g}"


def _notes(results: dict[tuple[str, int], Result], devices: dict[int, Devices]) -> str:
    first = next(iter(results.values()))
    used = first.settings
    parts = [
        f"Accuracy in % on the full test set after {used.rounds} rounds, one seed. {_setting(first)}. "
        "Own labels: on a part of the test set with the device's own labels, mean of the devices. Bits are of one "
        "device, both ways, in 16 rounds. Seconds are without compilation. FAug is not run here: its rows are "
        "published."
    ]
    for name in MEASURES:
        runs = {count: result for (n, count), result in results.items() if n == name}
        parts += dict.fromkeys(_payload(name, result, devices[count]) for count, result in runs.items())
    cut = []
    if used.dataset != "mnist":
        cut.append(f"{used.dataset} in place of MNIST")
    if used.samples_per_client != 2000:
        cut.append(f"{used.samples_per_client:,} images a device in place of 2,000")
    if any(not 200 <= np.mean(d.iterations) <= 300 for d in devices.values()):
        cut.append(f"{_range(tuple(sorted(sum((d.iterations for d in devices.values()), ()))))} iterations, not 250")
    if used.rounds != ROUNDS:
        cut.append(f"{used.rounds} rounds in place of {ROUNDS}")
    if used.batch_size != 64:
        cut.append(f"B = {used.batch_size} in place of 64")
    if used.model != "fd_cnn":
        cut.append(f"{used.model_title} in place of the paper's net")
    for name in MEASURES:
        absent = [str(count) for count in PUBLISHED[name].accuracy if (name, count) not in results]
        cut += [f"{PUBLISHED[name].label} with {', '.join(absent)} devices not run"] if absent else []
    parts.append(f"Cut from the paper's setting: {'; '.join(cut)}." if cut else "The paper's setting, uncut.")
    return "\n\n".join(parts)


def _payload(name: str, result: Result, devices: Devices) -> str:
    label, published, ours = PUBLISHED[name].label, PUBLISHED[name].bits, bits(result)
    if ours == published:
        return f"{label}'s payload is the published one exactly."
    if name == "fd":
        return f"{label}'s payload is {ours:,.12g} bits, not the published {published:,}."
    P, biases = devices.parameters, devices.biases
    without = ours - 2 * ROUNDS * 32 * biases
    verdict = "the published figure exactly" if without == published else f"the paper's net comes to {published:,}"
    counted = f"{P:,} parameters, of them {biases:,} biases, which the paper does not count"
    return f"{label}'s payload is {ours:,.12g} bits: {counted}. Without biases it is {without:,.12g} bits; {verdict}."


def _panel(count: int, results: dict[tuple[str, int], Result]) -> report.Panel:
    curves = []
    for name, (metric, whose) in MEASURES.items():
        if (result := results.get((name, count))) is not None:
            label = PUBLISHED[name].label
            curves.append((f"{label}, {whose}", *cases.mean_curve([result], metric)))
            curves.append((f"{label}, published (16 rounds)", [1, ROUNDS], [PUBLISHED[name].accuracy[count]] * 2))
    return f"{count} devices", "round", "accuracy on the full test set, %", curves


if __name__ == "__main__":
    flags.DEFINE_enum("preset", "quick", list(PRESETS), "quick: the embedded sample in minutes; paper: the whole table")
    flags.DEFINE_list("clients", None, "numbers of devices; default the preset's: 2,4 or 2,4,6,8,10")
    flags.DEFINE_list("methods", list(MEASURES), f"rows to run, of {', '.join(MEASURES)}")
    flags.DEFINE_integer("iterations", None, "steps of a round; default the preset's: 24 or 250", lower_bound=1)
    flags.DEFINE_integer("samples_per_client", None, "images of a device before three labels are cut to five; "
                         "default the preset's: 500 or 2000", lower_bound=1)  # fmt: skip
    flags.DEFINE_string("dataset", None, "data set; default: the preset's, mnist_sample or mnist")
    unused = {n for method in ALGORITHMS.values() for n in (*method.hparams, *method.options)}
    unused -= {"learning_rate", "gamma"}
    settings.define_flags(
        skip=("algorithm", "partition", "num_clients", "samples_per_client", "dataset", "models", "participation",
              "local_eval", *unused),
        rounds=ROUNDS, batch_size=64, model="fd_cnn", eval_every=4, learning_rate=0.01,
    )  # fmt: skip
    program.define_output_flags(None)
    program.start(main)
