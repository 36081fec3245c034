"""benchmarks.speed --suite=methods: what a round of each method costs, beside the arithmetic that it asks for.

    python -m benchmarks.speed --suite=methods --repeats=7
    python -m benchmarks.speed --suite=methods --methods=fedntd,fedgkd

All methods have one federation, clients of equal size, one host device (clients share out over several, servers do
not) and their own defaults. Time and floating point operations are of a round after the first one, without set-up,
tests and compilation; repeats of FedAvg and of the method interleave.
The operations are those that the round executes, counted by `benchmarks.arithmetic`: a method that repeats a teacher's
forward pass in vain has a high count, one that computes badly a time above its count. What is no floating point
arithmetic (assignment, sorting, gathering, random bits) is in the time alone.
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.arithmetic import flops
from fdjax.algorithms import ALGORITHMS
from fdjax.errors import InputError
from fdjax.run import experiment, methods, report, settings

REFERENCE, TARGET = "fedavg", 1.3
FIELDS = {
    "dataset": "mnist_sample", "partition": "iid", "num_clients": 20, "model": "2nn", "batch_size": 32,
    "proxy": "held_out", "proxy_size": 256, "rounds": 1, "devices": 1,
}  # fmt: skip
TINY = {"dataset": "synthetic", "samples_per_client": 20, "num_clients": 4, "model": "mclr", "proxy_size": 10}
QUICK = {"learning_rate": 0.05, "local_epochs": 5}  # of methods that have them


class Method:
    """A method's round, compiled, from the state after its first one."""

    def __init__(self, name: str, tiny: bool):
        record = methods.of(name)
        fields: dict[str, Any] = FIELDS | (TINY if tiny else {})
        if record.split:
            fields |= {"models": f"{'mclr' if tiny else '2nn'}:{fields['num_clients']}", "model": "2nn"}
        hparams = {n: value for n, value in QUICK.items() if n in record.hparams}
        built = experiment.build(settings.make(hparams, algorithm=name, **fields))
        alone = experiment.build(settings.make(hparams, algorithm=name, **fields, lifting="chunk"))
        self.given: tuple[Any, Any] = built.federation, built.hparams
        simulation: Any = built.simulation
        state = simulation.init(0, built.federation)
        self.placement = jax.tree.map(lambda x: x.sharding, state)
        if simulation.setup:
            state, _ = simulation.setup(state, *self.given)
        began = time.perf_counter()
        self.run = simulation.run.lower(state, *self.given, 1, np.int32(0)).compile()
        self.compile_seconds = time.perf_counter() - began
        state, _ = self.run(state, *self.given, np.int32(1))
        self.first = jax.device_get(state)
        counted = alone.simulation.place(simulation.fetch(state)), alone.federation, alone.hparams
        self.flops = flops(lambda *given: alone.simulation.pure.run(*given, 1), *counted)
        self.seconds()

    def seconds(self) -> float:
        """Of one round."""
        state = jax.block_until_ready(jax.device_put(self.first, self.placement))
        began = time.perf_counter()
        jax.block_until_ready(self.run(state, *self.given, np.int32(1)))
        return time.perf_counter() - began


def measure(names: list[str], out: Path, repeats: int, tiny: bool) -> None:
    """Time the methods, print their table and write it."""
    reference = Method(REFERENCE, tiny)
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            method = reference if name == REFERENCE else Method(name, tiny)
        except InputError as error:
            print(f"{name}: left out: {error}", file=sys.stderr, flush=True)
            continue
        pairs = [(reference.seconds(), method.seconds()) for _ in range(repeats)]
        operations, times = method.flops / reference.flops, [theirs / ours for ours, theirs in pairs]
        rows[name] = {
            "operations": method.flops,
            "seconds": [theirs for _, theirs in pairs],
            "operations_of_fedavgs": operations,
            "time_of_fedavgs": times,
            "time_over_operations": [t / operations for t in times],
            "compile_seconds": method.compile_seconds,
        }
        print(f"{name}: {_spread(times)} x FedAvg's time, {operations:.2f} x its operations", flush=True)
        jax.clear_caches()
    environment = report.environment()
    text = f"{_table(rows)}\n\n{_foot(environment, repeats)}"
    print(f"\n{text}\n")
    folder = report.prepare(out / "speed_methods")
    report.write_text(folder / "table.md", f"# benchmarks.speed: methods\n\n{text}\n")
    report.write_json(folder / "results.json", environment | {"settings": FIELDS | QUICK, "methods": rows})
    print(f"written: {folder}: table.md, results.json")


def chosen(names: list[str]) -> list[str]:
    """Names of methods as given, or all that have clients."""
    return [methods.resolve(name, settings.SETTINGS) for name in names] or [
        name for name, method in ALGORITHMS.items() if not method.pooled
    ]


def _table(rows: dict[str, dict[str, Any]]) -> str:
    headers = [
        "method",
        "ms a round",
        "time / FedAvg's",
        "operations / FedAvg's",
        "time / operations",
        f"<= {TARGET}",
        "compile s",
    ]
    lines = [
        [
            methods.title(name),
            f"{1e3 * statistics.median(row['seconds']):.1f}",
            _spread(row["time_of_fedavgs"]),
            f"{row['operations_of_fedavgs']:.2f}",
            _spread(row["time_over_operations"]),
            "yes" if statistics.median(row["time_over_operations"]) <= TARGET else "no",
            f"{row['compile_seconds']:.1f}",
        ]
        for name, row in rows.items()
    ]
    return report.table(lines, headers)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}-{max(values):.2f}]"


def _foot(environment: dict[str, Any], repeats: int) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    return (
        f"`python -m benchmarks.speed --suite=methods --repeats={repeats}`\n\n"
        f"Median [least-greatest] of {repeats} repeats. {environment['device']}; {environment['machine']}; {versions}; "
        f"revision {environment['revision']}."
    )
