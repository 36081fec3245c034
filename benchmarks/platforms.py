"""Every method on a CPU and on an accelerator: do both give the same numbers?

    python -m benchmarks.platforms --platforms=cpu,cuda,cuda:highest --workers=8
    python -m benchmarks.platforms --platforms=cpu,cuda --model=cnn1 --methods=fedavg,feddistill

Each method runs on each platform in a process of its own, on one device, from one seed on the embedded MNIST sample:
the set-up and one round, after which the whole states are compared, and the other rounds, after which accuracies are.
A platform is a name of JAX's and, after a colon, a precision of matrix products (`jax_default_matmul_precision`).
Without one it is JAX's own choice, which on some devices has fewer digits than float32: a round then ends elsewhere by
more than rounding. The first platform is what the others are compared with.

How far apart: |a - b| / |b - b_0| over all floating point numbers of the state, server and clients, b_0 the state
before the set-up and b the first platform's after one round.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from benchmarks import cases
from fdjax.algorithms import ALGORITHMS
from fdjax.errors import InputError
from fdjax.run import experiment, methods, program, report, settings

FLAGS = flags.FLAGS
FIELDS = {
    "dataset": "mnist_sample", "partition": "shards", "num_clients": 10, "batch_size": 32, "proxy": "held_out",
    "proxy_size": 256, "devices": 1,
}  # fmt: skip
QUICK = {"learning_rate": 0.05, "local_epochs": 1}  # of methods that have them
METRICS = ("central_accuracy", "local_accuracy")


def main() -> None:
    if FLAGS.worker:
        _work(FLAGS.methods[0], Path(FLAGS.out))
        return
    names = [methods.resolve(name, settings.SETTINGS) for name in FLAGS.methods] or list(ALGORITHMS)
    if len(FLAGS.platforms) < 2:
        raise InputError("--platforms takes two or more to compare, such as cpu,cuda")
    out = report.prepare(FLAGS.out, overwrite=FLAGS.overwrite)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(FLAGS.workers) as pool:
        pairs = [(name, platform) for name in names for platform in FLAGS.platforms]
        until = time.monotonic() + (FLAGS.seconds or float("inf"))
        found = dict(zip(pairs, pool.map(lambda pair: _run(*pair, Path(folder), until), pairs), strict=True))
    told = {}
    for name in names:
        runs = [found[name, platform] for platform in FLAGS.platforms]
        if all(runs):
            told[name] = {
                platform: run["told"] | {"apart": _apart(runs[0], run)}
                for platform, run in zip(FLAGS.platforms, runs, strict=True)
            }
    if not told:
        raise InputError(f"--seconds={FLAGS.seconds} were over before any method had run; give more")
    devices = {platform: next(iter(told.values()))[platform].get("device") for platform in FLAGS.platforms}
    missing = [methods.title(name) for name in names if name not in told]
    left_out = f" There was no time for {', '.join(missing)}." if missing else ""
    text = f"{_table(told)}\n\n{_notes(devices)}{left_out}"
    cases.write_runs(out, "benchmarks.platforms", text, {}, "each run in a process of its own", {"methods": told})
    failed = [f"{name} on {platform}" for name in told for platform in told[name] if "failed" in told[name][platform]]
    if failed:
        raise InputError(f"failed: {', '.join(failed)}; the table says why")


def _work(name: str, folder: Path) -> None:
    """A method's rounds on the platform of this process; states and accuracies go into `folder`."""
    model, record, fields = FLAGS.model, methods.of(name), dict[str, Any](FIELDS)
    if record.split:
        fields |= {"models": f"{model}:{fields['num_clients']}", "model": "2nn"}
    else:
        fields["model"] = model
    hparams = {name: value for name, value in QUICK.items() if name in record.hparams}
    built = experiment.build(settings.make(hparams, algorithm=name, rounds=FLAGS.rounds, **fields))
    given, simulation = (built.federation, built.hparams), built.simulation
    state = simulation.init(0, built.federation)
    arrays = {"before": simulation.fetch(state)}
    if simulation.setup:
        state, _ = simulation.setup(state, *given)
    state, _ = simulation.run(state, *given, FLAGS.rounds, np.int32(1))
    arrays["after"] = simulation.fetch(state)
    state, _ = simulation.run(state, *given, FLAGS.rounds, np.int32(FLAGS.rounds - 1))
    scalars, _ = simulation.evaluate(state, *given)
    leaves = {f"{when}/{i}": leaf for when, state in arrays.items() for i, leaf in enumerate(_numbers(state))}
    np.savez(folder / "states.npz", **leaves)
    told = {metric: float(scalars[metric]) for metric in METRICS if metric in scalars}
    device = jax.devices()[0]
    (folder / "told.json").write_text(json.dumps(told | {"device": f"{device.device_kind} ({device.platform})"}))


def _numbers(state: Any) -> list[np.ndarray]:
    """The floating point leaves of server and clients."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves((state.server, state.clients))]
    return [leaf for leaf in leaves if np.issubdtype(leaf.dtype, np.floating)]


def _run(name: str, platform: str, folder: Path, until: float) -> dict[str, Any]:
    """A method on a platform, in a process of its own: what it told, and its states by name; empty if time is over."""
    if time.monotonic() > until:
        return {}
    out = folder / f"{platform}-{name}".replace(":", "-")
    out.mkdir()
    backend, _, precision = platform.partition(":")
    environment = os.environ | {"JAX_PLATFORMS": backend, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    environment |= {"JAX_DEFAULT_MATMUL_PRECISION": precision} if precision else {}
    command = [sys.executable, "-m", "benchmarks.platforms", "--worker", f"--methods={name}", f"--out={out}",
               f"--model={FLAGS.model}", f"--rounds={FLAGS.rounds}"]  # fmt: skip
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ended.returncode:
        lines = ended.stderr.strip().splitlines()
        why = next((line for line in reversed(lines) if "rror: " in line), [*lines, "no message"][-1])[:300]
        print(f"{name} on {platform} failed: {why}", file=sys.stderr, flush=True)
        return {"told": {"failed": why}, "states": None}
    told = json.loads((out / "told.json").read_text())
    print(f"{name} on {platform}: {told}", flush=True)
    with np.load(out / "states.npz") as states:
        return {"told": told, "states": dict(states)}


def _apart(reference: dict[str, Any], run: dict[str, Any]) -> float | None:
    """|a - b| / |b - b_0|, b the reference's state after a round."""
    ours, theirs = run["states"], reference["states"]
    if ours is None or theirs is None:
        return None
    after = [name for name in theirs if name.startswith("after/")]
    difference, way = (
        sum(float(np.sum(np.square(np.float64(a[name]) - b))) for name, a, b in terms)
        for terms in (
            [(name, ours, theirs[name]) for name in after],
            [(name, theirs, theirs[name.replace("after", "before")]) for name in after],
        )
    )
    return float(np.sqrt(difference / way)) if way else float(difference > 0)


def _table(told: dict[str, dict[str, dict[str, Any]]]) -> str:
    reference, *others = FLAGS.platforms
    headers = ["method", *(f"{platform}: apart after a round" for platform in others)]
    headers += [f"{platform}: accuracy after {FLAGS.rounds}" for platform in FLAGS.platforms]
    lines = []
    for name, by_platform in told.items():
        apart = [_or_failed(by_platform[platform], "apart", "{:.0e}") for platform in others]
        metric = next((metric for metric in METRICS if metric in by_platform[reference]), METRICS[0])
        accuracy = [_or_failed(by_platform[platform], metric, "{:.2%}") for platform in FLAGS.platforms]
        lines.append([methods.title(name), *apart, *accuracy])
    return report.table(lines, headers)


def _or_failed(run: dict[str, Any], value: str, form: str) -> str:
    return "failed" if "failed" in run else "" if run.get(value) is None else form.format(run[value])


def _notes(devices: dict[str, str]) -> str:
    listed = ", ".join(f"{platform} is {device}" for platform, device in devices.items())
    where = f"{FIELDS['dataset']}, {FIELDS['num_clients']} clients, {FIELDS['partition']}, {FLAGS.model}, one seed"
    return (
        f"{where}; {listed}. Apart: |a - b| / |b - b_0| over the states of server and clients after the set-up and one "
        "round, b the first platform's and b_0 the state before. Accuracy is of the central model, or the mean of "
        "clients where there is none."
    )


if __name__ == "__main__":
    flags.DEFINE_list("platforms", ["cpu", "cuda"], "what to compare, the reference first: NAME or NAME:PRECISION")
    flags.DEFINE_list("methods", [], "names of methods; empty for all")
    flags.DEFINE_string("model", "2nn", "the clients' model")
    flags.DEFINE_integer("rounds", 3, "rounds of each run", lower_bound=2)
    flags.DEFINE_integer("workers", 2, "processes at a time", lower_bound=1)
    flags.DEFINE_float("seconds", 0.0, "after which no further run begins; 0 for no limit", lower_bound=0.0)
    flags.DEFINE_boolean("worker", False, "this process is one of them")
    program.define_output_flags("runs/platforms")
    program.start(main)
