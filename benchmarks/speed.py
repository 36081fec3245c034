"""How fast clients train, beside a peer that does the same work in the same minutes.

    python -m benchmarks.speed --suite=cnn1 --peers=torch --repeats=5

Every client of a round trains by SGD from the same weights on batches of its own, and the trained weights are summed.
fdjax runs the round as the simulator does: one compiled call of `lift.over_clients` around `local.fit`. A peer is a
worker process that stays alive and answers with times, so that repeats interleave and a busy machine is busy for both.
Both must end at the same losses. Ratios are of neighbouring repeats; compile time is apart.
"""

import datetime
import functools
import itertools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from tabulate import tabulate

from fdjax import keys, lift, local, losses, runtime
from fdjax.errors import InputError, unknown
from fdjax.models import build
from fdjax.types import Examples, Model

FLAGS = flags.FLAGS
flags.DEFINE_string("suite", "cnn1", "which of SUITES to time")
flags.DEFINE_list("peers", ["torch"], "peers to time beside fdjax; empty for none")
flags.DEFINE_string("peer_python", ".venv-bench/bin/python", "the peers' interpreter (make bench-venv)")
flags.DEFINE_integer("repeats", 5, "timed repeats of each, interleaved", lower_bound=1)
flags.DEFINE_integer("clients", 8, "clients a round", lower_bound=1)
flags.DEFINE_integer("steps", 0, "SGD steps a client; 0 for the suite's own number", lower_bound=0)
flags.DEFINE_list("batch", [], "batch sizes; empty for the suite's own")
flags.DEFINE_list("padding", [], "SAME, VALID; empty for the suite's own")
flags.DEFINE_integer("devices", 0, "host devices of fdjax; 0 for one a core", lower_bound=0)
flags.DEFINE_string("out", "runs/speed", "folder of the JSON record")

CLASSES = 10
LEARNING_RATE = 0.05
LOSS_TOLERANCE = 1e-3  # relative: float32 sums in another order, over a few steps
HERE = pathlib.Path(__file__).parent
PEERS = {"torch": HERE / "peers" / "torch_cnn.py"}


class Case(NamedTuple):
    """One row: a model and a batch size, `clients` times `steps`."""

    model: str
    batch: int
    clients: int
    steps: int
    options: dict[str, Any]
    shape: tuple[int, ...] = (28, 28, 1)

    def __str__(self) -> str:
        return " ".join([self.model, *map(str, self.options.values())])


class Suite(NamedTuple):
    model: str
    batch: tuple[int, ...]
    steps: int
    padding: tuple[str, ...] = ()  # of the models that have the option


SUITES = {
    "cnn1": Suite("cnn1", (32, 128), 5, ("SAME", "VALID")),
    "cnn-small": Suite("niid_cnn", (32,), 20),
    "mlp": Suite("2nn", (10,), 100),
}


def cases(suite: Suite) -> list[Case]:
    sizes = [int(size) for size in FLAGS.batch] or suite.batch
    paddings = suite.padding and (FLAGS.padding or suite.padding)
    options = [{"padding": padding} for padding in paddings] or [{}]
    steps = FLAGS.steps or suite.steps
    return [Case(suite.model, batch, FLAGS.clients, steps, o) for o, batch in itertools.product(options, sizes)]


class Work(NamedTuple):
    """What both sides are given: examples of noisy class patterns, the batches of each client, the first weights."""

    x: np.ndarray  # [N, H, W, c] uint8
    y: np.ndarray  # [N] int32
    params: Any
    batches: np.ndarray  # [C, steps, B] int32, rows of x


def make_work(case: Case, model: Model) -> Work:
    rng = np.random.default_rng(0)
    held = case.steps * case.batch
    y = rng.integers(0, CLASSES, case.clients * held).astype(np.int32)
    patterns = rng.integers(0, 256, (CLASSES, *case.shape))
    x = ((patterns[y] + rng.integers(0, 256, (len(y), *case.shape))) // 2).astype(np.uint8)
    positions = jnp.arange(held)
    shuffled = [epoch_shuffle(client, held)(positions) + client * held for client in range(case.clients)]
    batches = np.stack(shuffled).astype(np.int32).reshape(case.clients, case.steps, case.batch)
    return Work(x, y, jax.jit(model.init)(jax.random.key(0)), batches)


def epoch_shuffle(client: jax.Array | int, count: int) -> keys.Shuffle:
    """The order in which `local.fit` goes through a client's examples, so that peers can take the same batches."""
    return keys.shuffle(keys.stream(jax.random.fold_in(client_key(client), 0), "shuffle"), count)


def client_key(client: jax.Array | int) -> jax.Array:
    return keys.stream(jax.random.key(0), "client", client)


class Fdjax:
    """The round as the simulator runs it, compiled ahead."""

    def __init__(self, case: Case, model: Model, work: Work):
        mesh = lift.make_mesh()
        held = case.steps * case.batch
        training = local.Training(case.batch, lambda hparams: optax.sgd(hparams["lr"]))

        def one(shared, row):
            params, examples, order, epochs = shared
            data = local.ClientData(examples, order, row["start"], row["count"])

            def loss(params, x, y):
                return losses.cross_entropy(model.apply(params, x), y)

            key = client_key(row["client"])
            params, mean = local.fit(training, loss, params, data, {"lr": LEARNING_RATE}, key, epochs=epochs)
            return mean, params

        client = jnp.arange(case.clients, dtype=jnp.int32)
        rows = {"client": client, "start": client * held, "count": jnp.full_like(client, held)}
        scale = np.full(1, 1 / 255, np.float32)
        examples = Examples(work.x, work.y, scale, np.zeros(1, np.float32))
        order = np.arange(len(work.y), dtype=np.int32)
        args = (work.params, examples, order, np.int32(1)), rows
        specs = (jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec())
        self.args = jax.device_put(args, tuple(jax.sharding.NamedSharding(mesh, spec) for spec in specs))
        start = time.perf_counter()
        step = jax.jit(functools.partial(lift.over_clients, one, chunk=1, mesh=mesh))
        self.run = step.lower(*self.args).compile()
        self.compile_seconds = time.perf_counter() - start
        self()

    def __call__(self) -> tuple[float, np.ndarray]:
        """Seconds of one round, and the clients' mean losses."""
        start = time.perf_counter()
        loss, total = jax.block_until_ready(self.run(*self.args))
        seconds = time.perf_counter() - start
        del total
        return seconds, np.asarray(loss)


class Peer:
    """A worker process that takes one JSON request a line and answers with one."""

    def __init__(self, name: str, python: str):
        if name not in PEERS:
            raise unknown("peer", name, PEERS)
        if not pathlib.Path(python).exists():
            raise InputError(f"no interpreter for peer {name!r} at {python}; run `make bench-venv`, or pass --peers=")
        self.name = name
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([python, PEERS[name]], stdin=pipe, stdout=pipe, text=True)
        self.version = self.ask(do="version")["version"]

    def ask(self, **request) -> dict[str, Any]:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        answer = stdout.readline()
        if not answer:
            raise InputError(f"peer {self.name!r} died: its own message is above; `make bench-venv` may mend it")
        return json.loads(answer)

    def load(self, case: Case, work: Work) -> None:
        leaves = {
            jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(leaf)
            for p, leaf in jax.tree.leaves_with_path(work.params)
        }
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "work.npz")
            np.savez(path, x=work.x, y=work.y, batches=work.batches, **leaves)
            self.ask(do="load", path=path, model=case.model, lr=LEARNING_RATE, **case.options)

    def __call__(self) -> tuple[float, np.ndarray]:
        answer = self.ask(do="run")
        return answer["seconds"], np.asarray(answer["loss"])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def gemm_peak(size: int = 2048, repeats: int = 7) -> float:
    """GFLOP/s of the fastest of `repeats` float32 products."""
    a = jnp.ones((size, size))
    product = jax.jit(jnp.matmul).lower(a, a).compile()
    return 2 * size**3 / min(seconds(lambda: jax.block_until_ready(product(a, a))) for _ in range(repeats)) / 1e9


def seconds(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def training_flops(model: Model, params: Any, case: Case) -> float:
    """Three times the forward pass of one batch: the gradients of a product cost two more of its size."""
    x = jax.ShapeDtypeStruct((case.batch, *case.shape), jnp.float32)
    (cost,) = [jax.jit(model.apply).lower(params, x).cost_analysis()]
    return 3 * float(cost["flops"])


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}-{max(values):.{digits}f}]"


def time_case(case: Case, peers: list[Peer]) -> dict[str, Any]:
    """Interleaved milliseconds per client step of fdjax and of each peer."""
    model = build(case.model, case.shape, CLASSES, **case.options)
    work = make_work(case, model)
    ours = Fdjax(case, model, work)
    runners = {"fdjax": ours} | {peer.name: peer for peer in peers}
    for peer in peers:
        peer.load(case, work)
        peer()
    times: dict[str, list[float]] = {name: [] for name in runners}
    loss = {}
    for _ in range(FLAGS.repeats):
        for name, run in runners.items():
            taken, loss[name] = run()
            times[name].append(1e3 * taken / (case.clients * case.steps))
    difference = {peer.name: float(np.max(np.abs(loss[peer.name] / loss["fdjax"] - 1))) for peer in peers}
    return {
        "case": str(case),
        "batch": case.batch,
        "clients": case.clients,
        "steps": case.steps,
        "compile_s": ours.compile_seconds,
        "ms_per_step": times,
        "gflops_per_step": training_flops(model, work.params, case) / 1e9,
        "ratio": {peer.name: [a / b for a, b in zip(times["fdjax"], times[peer.name])] for peer in peers},
        "loss": {name: value.tolist() for name, value in loss.items()},
        "loss_difference": difference,
    }


def row(result: dict[str, Any], peers: list[Peer]) -> dict[str, Any]:
    ours = result["ms_per_step"]["fdjax"]
    columns = {
        "case": result["case"],
        "batch": result["batch"],
        "compile s": f"{result['compile_s']:.1f}",
        "fdjax ms/step": spread(ours),
        "GFLOP/s": f"{1e3 * result['gflops_per_step'] / statistics.median(ours):.0f}",
    }
    for peer in peers:
        name = peer.name
        columns[f"{name} ms/step"] = spread(result["ms_per_step"][name])
        columns[f"fdjax / {name}"] = spread(result["ratio"][name])
        columns["loss differs by"] = f"{result['loss_difference'][name]:.0e}"
    return columns


def machine(peers: list[Peer], peak: float) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "devices": jax.device_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        **{peer.name: peer.version for peer in peers},
        "gemm_gflops": peak,
    }


def measure() -> int:
    if FLAGS.suite not in SUITES:
        raise unknown("suite", FLAGS.suite, SUITES)
    peers = [Peer(name, FLAGS.peer_python) for name in FLAGS.peers]
    results = []
    peaks = [gemm_peak()]
    for case in cases(SUITES[FLAGS.suite]):
        results.append(time_case(case, peers))
        peaks.append(gemm_peak())
        print(", ".join(f"{k} {v}" for k, v in row(results[-1], peers).items()), file=sys.stderr)
    about = machine(peers, max(peaks))
    print(tabulate([row(result, peers) for result in results], headers="keys", disable_numparse=True))
    print(
        ", ".join(
            f"{name} {value:.0f}" if name == "gemm_gflops" else f"{name} {value}" for name, value in about.items()
        )
    )
    out = pathlib.Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    record = out / f"speed_{FLAGS.suite}.json"
    record.write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n")
    print(f"wrote {record}")
    for peer in peers:
        peer.close()
    wrong = [r for r in results for d in r["loss_difference"].values() if not d < LOSS_TOLERANCE]
    for result in wrong:
        print(f"losses differ: {result['case']} batch {result['batch']}: {result['loss_difference']}", file=sys.stderr)
    return 1 if wrong else 0


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
