"""How fast clients train, beside peers that do the same work in the same minutes.

    python -m benchmarks.speed --suite=cnn1 --peers=torch,fedjax,pfl --repeats=5
    python -m benchmarks.speed --suite=all --against=/path/to/another/checkout --repeats=15

A round: every client trains by SGD from the same weights on batches of its own, and the trained weights are averaged.
fdjax runs it as the simulator does, one compiled call of `fdjax.engine.simulation`. A peer is a worker process that
stays alive and answers with times, so that repeats interleave and a busy machine is busy for all. All are given the
same first weights and the same batches in the same order, and must end at the same weights. Ratios are peer over fdjax,
of neighbouring repeats: above 1, fdjax is faster. Compile time and peak memory are apart.

With --against the fdjax of another checkout is timed instead of peers: see `benchmarks.speed_checkouts`.
--suite=methods is about our own methods: see `benchmarks.speed_methods`.
"""

import datetime
import gc
import json
import os
import pathlib
import statistics
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import speed_checkouts, speed_methods, speed_suites
from benchmarks.peers import PEERS, Peer, peak_bytes, reset_peak
from benchmarks.speed_suites import SUITES, Case, Fdjax, Suite, make_work
from fdjax import runtime
from fdjax.engine import lift
from fdjax.errors import InputError, unknown
from fdjax.exchange.traffic import size as byte_count
from fdjax.run import report

FLAGS = flags.FLAGS
flags.DEFINE_list("suite", ["cnn1"], f"what to time: all, methods, or some of {', '.join(SUITES)}")
flags.DEFINE_list("methods", [], "of --suite=methods: names or files of methods; empty for all of ours")
flags.DEFINE_list("peers", list(PEERS), "peers to time beside fdjax; empty for none")
flags.DEFINE_string("peer_python", ".venv-bench/bin/python", "the peers' interpreter (make bench-venv)")
flags.DEFINE_string("against", None, "another checkout of fdjax to be compared with, in the place of peers")
flags.DEFINE_integer("compilations", 5, "timed compilations of each checkout (--against)", lower_bound=1)
flags.DEFINE_integer("repeats", 5, "timed repeats of each, interleaved", lower_bound=1)
flags.DEFINE_integer("clients", 0, "clients a round; 0 for the suite's own number", lower_bound=0)
flags.DEFINE_integer("steps", 0, "SGD steps a client; 0 for the suite's own number", lower_bound=0)
flags.DEFINE_integer("chunk", 0, "clients that fdjax vmaps together; 0 for its own choice", lower_bound=0)
flags.DEFINE_integer("devices", 0, "host devices of fdjax; 0 for one a core", lower_bound=0)
flags.DEFINE_boolean("smoke", False, "a tiny case of each suite, one repeat: whether it runs, not how fast")
flags.DEFINE_string("out", "runs/speed", "folder; each suite writes into speed_<suite> there")

LOSS_TOLERANCE = 1e-3  # relative
WEIGHTS_TOLERANCE = 1e-2  # of the way that the round moved; see benchmarks/README.md for what rounding can do
GROWTH = 0.1  # of an upload: temporary memory that one more client may cost


class Verdict(NamedTuple):
    """One measured number with its spread, and the target that it should meet."""

    suite: str
    case: str
    measure: str
    values: list[float]
    target: float | None = None
    at_least: bool = True
    unit: str = "x"

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        median = statistics.median(self.values)
        return median >= self.target if self.at_least else median <= self.target

    def row(self) -> list[str]:
        target = "" if self.target is None else f"{'>=' if self.at_least else '<='} {self.target:g} {self.unit}"
        met = {None: "", True: "yes", False: "no"}[self.met]
        return [self.suite, self.case, self.measure, f"{spread(self.values)} {self.unit}", target, met]


def spread(values: list[float]) -> str:
    median = f"{statistics.median(values):.3g}"
    return f"{median} [{min(values):.3g}-{max(values):.3g}]" if len(values) > 1 else median


def gemm_gflops(repeats: int = 7) -> float:
    """GFLOP/s of the fastest of `repeats` float32 products of square matrices."""
    size = 256 if FLAGS.smoke else 8192 if jax.default_backend() == "gpu" else 2048
    a = jnp.ones((size, size))
    product = jax.jit(jnp.matmul).lower(a, a).compile()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(product(a, a))
        taken.append(time.perf_counter() - start)
    return 2 * size**3 / min(taken) / 1e9


def time_case(case: Case, peers: list[Peer]) -> dict[str, Any]:
    """Interleaved milliseconds per client step of fdjax and of each peer, and what they agree on."""
    jax.clear_caches()  # what another case compiled is not this one's memory
    work = make_work(case)
    ours = Fdjax(case, work, lift.make_mesh(), FLAGS.chunk)
    runners = {"fdjax": ours} | {peer.name: peer for peer in peers}
    batches = ours.batches() if peers else None
    notes = {
        peer.name: peer.load(
            work.x, work.y, batches, ours.first.server, ours.teacher,
            lr=speed_suites.LEARNING_RATE, padding=case.padding or "VALID", device=jax.default_backend(),
            distill=speed_suites.DISTILL if case.algorithm == "feddistill" else None,
        )
        for peer in peers
    }  # fmt: skip
    pids = {"fdjax": os.getpid()} | {peer.name: peer.process.pid for peer in peers}
    gc.collect()
    for pid in pids.values():
        reset_peak(pid)
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(1 if FLAGS.smoke else FLAGS.repeats):
        for name, run in runners.items():
            times[name].append(1e3 * run() / work.steps)
    peaks = {name: peak_bytes(pid) for name, pid in pids.items()}
    ended = {peer.name: peer.params(ours.after) for peer in peers}
    return {
        "case": str(case),
        **{name: getattr(case, name) for name in ("model", "batch", "clients", "steps", "algorithm")},
        "chunk": ours.chunk,
        "narrow": ours.narrow,
        "compile_s": ours.compile_seconds,
        "ms_per_step": times,
        "times_faster": {name: [b / a for a, b in zip(times["fdjax"], times[name])] for name in ended},
        "gflops_per_step": ours.flops() / 1e9,
        "compiled_bytes": ours.memory,
        "upload_bytes": byte_count(ours.after),
        "peak_rss_bytes": peaks,
        "train_loss": float(ours.metrics["train_loss"][0]),
        "loss": {name: ours.loss(params) for name, params in ({"fdjax": ours.after} | ended).items()},
        "weights_differ": {name: ours.distance(params) for name, params in ended.items()},
        "notes": notes,
    }


def disagreeing(result: dict[str, Any]) -> list[str]:
    """The peers that did not end where fdjax did."""
    ours = result["loss"]["fdjax"]
    return [
        name
        for name, distance in result["weights_differ"].items()
        if not (distance < WEIGHTS_TOLERANCE and abs(result["loss"][name] / ours - 1) < LOSS_TOLERANCE)
    ]


def judge(name: str, suite: Suite, results: list[dict[str, Any]], peak: float) -> list[Verdict]:
    """What a suite's results say about its targets; a ratio without a target is told too."""
    verdicts = []
    for result in results:
        for peer, ratios in result["times_faster"].items():
            measure = f"{peer} time / fdjax time"
            verdicts.append(Verdict(name, result["case"], measure, ratios, suite.targets.get(peer)))
        if suite.gemm:
            share = [100e3 * result["gflops_per_step"] / ms / peak for ms in result["ms_per_step"]["fdjax"]]
            verdicts.append(Verdict(name, result["case"], "of GEMM peak", share, 100 * suite.gemm, unit="%"))
    if suite.ragged:
        even, *others = ([result["case"], result["ms_per_step"]["fdjax"]] for result in results)
        for case, times in others:
            ratios = [ragged / equal for ragged, equal in zip(times, even[1])]
            measure = "client step / one of clients of equal size"
            verdicts.append(Verdict(name, case, measure, ratios, suite.ragged, at_least=False))
    if suite.flat:
        repeats = zip(*(result["ms_per_step"]["fdjax"] for result in results))
        sizes = f"{results[0]['clients']} to {results[-1]['clients']} clients"
        slowest = [max(times) / min(times) for times in repeats]
        verdicts.append(Verdict(name, sizes, "slowest / fastest client step", slowest, suite.flat, at_least=False))
        small, large = results[-2:]
        grown = large["compiled_bytes"]["temp"] - small["compiled_bytes"]["temp"]
        upload = 100 * grown / (large["clients"] - small["clients"]) / small["upload_bytes"]
        measure = "of an upload: temporary memory of one more client"
        verdicts.append(Verdict(name, sizes, measure, [upload], 100 * GROWTH, at_least=False, unit="%"))
    return verdicts


def verdict_table(verdicts: list[Verdict]) -> str:
    headers = ["suite", "case", "measure", "median [min-max]", "target", "met"]
    return report.table([verdict.row() for verdict in verdicts], headers)


def detail_table(results: list[dict[str, Any]], peers: tuple[str, ...]) -> str:
    def megabytes(value):
        return "" if value is None else f"{value / 1e6:.0f}"

    def row(result):
        ours = result["ms_per_step"]["fdjax"]
        line = {
            "case": result["case"],
            "chunk": ", ".join(
                [*(f"{width} to {share:.1%}" for share, width in result["narrow"]), str(result["chunk"])]
            ),
            "compile s": f"{result['compile_s']:.1f}",
            "fdjax ms/step": spread(ours),
            "GFLOP/s": f"{1e3 * result['gflops_per_step'] / statistics.median(ours):.0f}",
            "temp MB": f"{result['compiled_bytes']['temp'] / 1e6:.1f}",
            "fdjax RSS MB": megabytes(result["peak_rss_bytes"]["fdjax"]),
        }
        for name in peers:
            note = result["notes"][name]
            line[f"{name} ms/step"] = f"{spread(result['ms_per_step'][name])}, {note}"
            line[f"{name} RSS MB"] = megabytes(result["peak_rss_bytes"][name])
            line[f"weights differ from {name}'s"] = f"{result['weights_differ'][name]:.0e}"
        return line

    rows = [row(result) for result in results]
    return report.table([list(line.values()) for line in rows], list(rows[0]))


def draw(path: pathlib.Path, verdicts: list[Verdict]) -> None:
    """A bar for each ratio, from min to max a whisker, its target a black line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [verdict for verdict in verdicts if verdict.unit == "x"]
    if not bars:
        return
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.36 * len(bars)), layout="constrained")
    for y, bar in enumerate(bars):
        median = statistics.median(bar.values)
        color = {None: "tab:gray", True: "tab:green", False: "tab:red"}[bar.met]
        axis.barh(y, median - 1, left=1, color=color, alpha=0.75)
        axis.plot([min(bar.values), max(bar.values)], [y, y], color="black", linewidth=1)
        if bar.target is not None:
            axis.plot([bar.target] * 2, [y - 0.42, y + 0.42], color="black", linewidth=2.5)
    axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(bars)), [f"{bar.case}: {bar.measure}" for bar in bars], fontsize="small")
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="ratio; whisker: min to max, thick line: target", title=bars[0].suite)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.tick_params(axis="x", which="both", labelsize="small")
    report.save_figure(path, figure)


def footer(about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in (about["versions"] | about["peers"]).items())
    return (
        f"`{about['command']}`\n\n{about['date']}; {about['device']}; {about['machine']}; {versions}; revision "
        f"{about['revision']}; GEMM peak {about['gemm_gflops']:.0f} GFLOP/s; {about['seconds']:.0f} s"
    )


def run_suite(name: str, peers: list[Peer]) -> tuple[list[Verdict], bool]:
    """Time a suite, print its tables, write its files: (verdicts, whether all ended at the same weights)."""
    suite = speed_suites.smoke(SUITES[name]) if FLAGS.smoke else SUITES[name]
    peers = [peer for peer in peers if peer.name in suite.peers]
    start = time.perf_counter()
    results, peaks = [], [gemm_gflops()]
    for case in suite.cases:
        clients = case.clients if suite.flat else FLAGS.clients or case.clients
        results.append(time_case(case._replace(clients=clients, steps=FLAGS.steps or case.steps), peers))
        peaks.append(gemm_gflops())
        print(f"{name}: {results[-1]['case']}, fdjax {spread(results[-1]['ms_per_step']['fdjax'])} ms/step", flush=True)
    about = report.environment() | {
        "command": " ".join(["python -m benchmarks.speed", *given_flags()]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "peers": {peer.name: peer.version for peer in peers},
        "gemm_gflops": max(peaks),
        "seconds": time.perf_counter() - start,
    }
    verdicts = judge(name, suite, results, max(peaks))
    details = detail_table(results, tuple(peer.name for peer in peers))
    text = "\n\n".join(filter(None, (verdict_table(verdicts) if verdicts else "", details, footer(about))))
    print(f"\n{text}\n", flush=True)
    out = report.prepare(pathlib.Path(FLAGS.out) / f"speed_{name}")
    report.write_text(out / "table.md", f"# benchmarks.speed: {name}\n\n{text}\n")
    told = [verdict._asdict() | {"met": verdict.met} for verdict in verdicts]
    report.write_json(out / "results.json", about | {"suite": name, "verdicts": told, "results": results})
    draw(out / "ratios.png", verdicts)
    wrong = [(result, peer) for result in results for peer in disagreeing(result)]
    for result, peer in wrong:
        told = json.dumps({key: result[key] for key in ("loss", "weights_differ")})
        print(f"{result['case']}: {peer} ended elsewhere than fdjax: {told}", file=sys.stderr)
    return verdicts, not wrong


def given_flags() -> list[str]:
    """The command line without folders, which mean nothing elsewhere."""
    return [flag for flag in sys.argv[1:] if not flag.lstrip("-").startswith(("out", "peer_python"))]


def chosen_suites() -> list[str]:
    for name in FLAGS.suite:
        if name != "all" and name not in SUITES:
            raise unknown("suite", name, [*SUITES, "all", "methods"])
    names = list(SUITES) if "all" in FLAGS.suite else FLAGS.suite
    backend = jax.default_backend()
    if "gpu" in names and backend != "gpu":
        if names == ["gpu"]:
            raise InputError(f"suite 'gpu' needs a GPU, but JAX's backend here is {backend!r}; choose another suite")
        print(f"gpu: skipped, JAX's backend here is {backend!r}", flush=True)
        names = [name for name in names if name != "gpu"]
    return names


def measure() -> int:
    if FLAGS.against:  # JAX runs in three processes then, none of which may take a GPU's memory for itself
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if "methods" in FLAGS.suite:
        if FLAGS.suite != ["methods"]:
            raise InputError("--suite=methods is a table of its own; leave the other suites out")
        repeats = 1 if FLAGS.smoke else FLAGS.repeats
        names = speed_methods.chosen(FLAGS.methods)
        speed_methods.measure(names, pathlib.Path(FLAGS.out), repeats, FLAGS.smoke)
        return 0
    names = chosen_suites()
    if FLAGS.against:
        return 0 if compared(names) else 1
    for name in FLAGS.peers:
        if name not in PEERS:
            raise unknown("peer", name, PEERS)
    used = [peer for peer in FLAGS.peers if any(peer in SUITES[name].peers for name in names)]
    peers: list[Peer] = []
    verdicts, agreed = [], True
    try:
        peers += (Peer(name, FLAGS.peer_python) for name in used)  # one by one: those begun are closed below
        for name in names:
            found, same = run_suite(name, peers)
            verdicts += found
            agreed &= same
    finally:
        for peer in peers:
            peer.close()
    if len(names) > 1:
        print(f"{verdict_table(verdicts)}\n")
    print(f"written: {', '.join(f'{FLAGS.out}/speed_{name}' for name in names)}: table.md, results.json, ratios.png")
    return 0 if agreed else 1


def compared(names: list[str]) -> bool:
    """This checkout against another one: whether both ended at the same weights."""
    same = speed_checkouts.compare(
        names,
        FLAGS.against,
        pathlib.Path(FLAGS.out),
        repeats=1 if FLAGS.smoke else FLAGS.repeats,
        compilations=1 if FLAGS.smoke else FLAGS.compilations,
        clients=FLAGS.clients,
        steps=FLAGS.steps,
        chunk=FLAGS.chunk,
        devices=FLAGS.devices,
        tiny=FLAGS.smoke,
    )
    if not same:
        print("the two checkouts ended at other weights: see weights_differ in results.json", file=sys.stderr)
    return same


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    if FLAGS.devices:
        jax.config.update("jax_num_cpu_devices", FLAGS.devices)
    runtime.use_all_cores()
    try:
        return measure()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    app.run(main)
