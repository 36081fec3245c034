"""The suites of benchmarks.speed: what is timed, against which targets, and fdjax's side of it."""

import functools
import time
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fdjax import keys, models
from fdjax.algorithms import ALGORITHMS
from fdjax.data.federation import federate, replicated
from fdjax.engine import lift, plan
from fdjax.engine.layout import Layout
from fdjax.engine.simulation import simulation
from fdjax.method import Task, Training
from fdjax.models.layers import Conv, max_pool
from fdjax.types import Cohort, Examples, Holdings, Model, Source

CLASSES = 10
LEARNING_RATE = 0.05
DISTILL = {"temperature": 3.0, "weight": 0.5}  # traced in fdjax
POOL = 20_000  # examples that the clients of the scale suite share
IMAGE = (28, 28, 1)
EVERYONE = ("torch", "fedjax", "pfl")


class Case(NamedTuple):
    """One row: `clients` of `steps` batches each."""

    model: str
    batch: int
    clients: int
    steps: int
    padding: str | None = None  # of the models that have the option
    shape: tuple[int, ...] = IMAGE
    algorithm: str = "fedavg"
    shared: bool = False  # clients hold examples of one pool, so that data do not grow with clients
    sizes: str = "equal"  # examples of the clients: one of SIZES; steps are then a mean
    participants: int = 0  # of the round, drawn uniformly; 0 for all clients

    def __str__(self) -> str:
        sizes = "" if self.sizes == "equal" else self.sizes
        drawn = f"{self.participants} of " if self.participants else ""
        work = f"{drawn}{self.clients}x{self.steps}"
        return " ".join(filter(None, (self.model, self.padding, f"B={self.batch}", work, sizes)))


class Suite(NamedTuple):
    cases: tuple[Case, ...]
    peers: tuple[str, ...] = EVERYONE  # who has a side of it
    targets: dict[str, float] = {}  # noqa: RUF012  peer -> times faster than it
    gemm: float | None = None  # share of the machine's GEMM peak
    flat: float | None = None  # slowest over fastest client step of its cases
    ragged: float | None = None  # a client step of its other cases over one of its first


SIZES = {
    "equal": lambda rng, clients, examples: np.full(clients, examples),
    "power law": lambda rng, clients, _: (0.9 * (rng.lognormal(4, 2, clients).astype(int) + 50)).astype(int),
    "Dirichlet(0.05)": lambda rng, clients, examples: sum(
        rng.multinomial(clients * examples // CLASSES, rng.dirichlet(np.full(clients, 0.05))) for _ in range(CLASSES)
    ),
}  # (rng, clients, examples) -> examples of each; the power law is synthetic(alpha, beta)'s

SUITES = {
    "logistic": Suite(
        (Case("mclr", 10, 1000, 20, shape=(60,)),),
        targets={"torch": 100, "fedjax": 20},
    ),
    "mlp": Suite((Case("2nn", 10, 100, 60),), targets={"torch": 5}),
    "cnn-small": Suite((Case("small_cnn", 10, 64, 5),), targets={"fedjax": 4, "pfl": 4}),
    "cnn1": Suite(
        tuple(Case("cnn1", batch, 8, 5, padding) for padding in ("SAME", "VALID") for batch in (32, 128)),
        targets={"torch": 1.2},
        gemm=0.7,
    ),
    "distill": Suite(
        tuple(Case("cnn1", 32, 8, 5, padding, algorithm="feddistill") for padding in ("SAME", "VALID")),
        peers=("torch",),
        targets={"torch": 1.2},
    ),
    "scale": Suite(
        tuple(Case("mclr", 10, 10**n, 20, shape=(60,), shared=True) for n in (2, 3, 4, 5)), peers=(), flat=1.2
    ),
    "sampled": Suite(
        tuple(Case("mclr", 10, 10**n, 20, shape=(60,), shared=True, participants=10) for n in (2, 3, 4, 5, 6)),
        peers=(),
        flat=1.5,
    ),
    "ragged": Suite(
        tuple(Case("mclr", 10, 1000, 33, shape=(60,), shared=True, sizes=sizes) for sizes in SIZES),
        peers=(),
        ragged=1.3,
    ),
    "gpu": Suite((Case("cnn1", 32, 1000, 5, "VALID"),), peers=("torch",), targets={"torch": 5}, gemm=0.4),
}


def smoke(suite: Suite) -> Suite:
    """One case, two clients, two steps of four: whether it runs, and not how fast."""
    if suite.ragged:
        return suite._replace(cases=tuple(case._replace(clients=10, steps=2) for case in suite.cases))
    sizes = (10, 40) if suite.flat else (2,)
    cases = [suite.cases[-1]._replace(batch=4, clients=clients, steps=2) for clients in sizes]
    return suite._replace(cases=tuple(cases))


class SmallCNN(nn.Module):
    """3x3 convolutions of 8 and 16 channels, each pooled, then the logits."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for features in (8, 16):
            x = nn.relu(max_pool(Conv(features)(x)))
        return nn.Dense(CLASSES)(x.reshape(x.shape[0], -1))


@functools.cache
def make_model(name: str, shape: tuple[int, ...], padding: str | None) -> Model:
    if name == "small_cnn":
        return models.from_linen(SmallCNN(), shape, name)
    return models.build(name, shape, CLASSES, **({"padding": padding} if padding else {}))


class Work(NamedTuple):
    """Examples of noisy class patterns, and who holds them."""

    x: np.ndarray  # [N, ...] uint8 images or float32
    y: np.ndarray  # [N] int32
    holdings: Holdings
    steps: int  # of all participants


def make_work(case: Case) -> Work:
    rng = np.random.default_rng(0)
    held = case.steps * case.batch
    count = np.asarray(SIZES[case.sizes](np.random.default_rng(1), case.clients, held), np.int32)
    total = int(count.sum())
    size = POOL if case.shared else total
    y = rng.integers(0, CLASSES, size).astype(np.int32)
    if len(case.shape) == 1:
        x = (rng.normal(size=(CLASSES, *case.shape))[y] + rng.normal(size=(size, *case.shape))).astype(np.float32)
    else:
        patterns = rng.integers(0, 256, (CLASSES, *case.shape), dtype=np.uint16)
        x = ((patterns[y] + rng.integers(0, 256, (size, *case.shape), dtype=np.uint16)) // 2).astype(np.uint8)
    if case.participants:  # neighbours in the pool, or the holdings of a million clients would fill the memory
        start = rng.integers(0, size - held, case.clients).astype(np.int32)
        return Work(x, y, Holdings(np.arange(size, dtype=np.int32), start, count), case.participants * case.steps)
    order = rng.integers(0, size, total).astype(np.int32) if case.shared else np.arange(total, dtype=np.int32)
    start = (np.cumsum(count) - count).astype(np.int32)
    return Work(x, y, Holdings(order, start, count), int(np.sum(-(-count // case.batch))))


class Fdjax:
    """A round of the simulator, as `python -m fdjax` runs it, compiled ahead."""

    def __init__(self, case: Case, work: Work, mesh: jax.sharding.Mesh, chunk: int = 0):
        self.case = case
        self.model = make_model(case.model, case.shape, case.padding)
        training = Training(case.batch, lambda learning_rate, round: optax.sgd(learning_rate))
        method = ALGORITHMS[case.algorithm]
        task = Task(self.model, (self.model,), (case.clients,), training, training, training, CLASSES)
        lifting = self._lifting(work, mesh, chunk)
        self.chunk, self.narrow = lifting.chunk, lifting.narrow
        layout = Layout(self.model, (Cohort(self.model, case.clients),), (case.participants or case.clients,), lifting)
        bound = simulation(method.algorithm(task), layout)
        source = Source("patterns", work.x, work.y, work.x[:1], work.y[:1], CLASSES)
        nothing = np.zeros(case.clients, np.int32)
        test = Holdings(np.zeros(1, np.int32), nothing, nothing)
        self.federation = federate(source, work.holdings, test, (case.clients,), mesh)
        given = DISTILL if case.algorithm == "feddistill" else {}
        hparams = method.resolve({"learning_rate": LEARNING_RATE} | given)
        if case.algorithm == "feddistill":  # a fixed teacher: no epoch, which is fewer than a run may ask for
            hparams["teacher_epochs"] = np.asarray(0, np.int32)
        self.hparams = jax.device_put(hparams, replicated(mesh))
        state = bound.init(0, self.federation)
        self.placement = jax.tree.map(lambda x: x.sharding, state)
        self.first = jax.tree.map(np.array, state)
        self.teacher = bound.fetch(state).clients[0] if case.algorithm == "feddistill" else None  # [C, ...]
        start = time.perf_counter()
        self.run = bound.run.lower(state, self.federation, self.hparams, 1).compile()
        self.compile_seconds = time.perf_counter() - start
        memory = self.run.memory_analysis()
        self.memory = {
            name: int(getattr(memory, f"{name}_size_in_bytes")) for name in ("temp", "argument", "output")
        }  # of one device
        self()

    def __call__(self) -> float:
        """Seconds of one round from the first state."""
        state = jax.block_until_ready(jax.device_put(self.first, self.placement))
        start = time.perf_counter()
        state, report = jax.block_until_ready(self.run(state, self.federation, self.hparams))
        seconds = time.perf_counter() - start
        self.after, self.metrics = jax.tree.map(np.asarray, (state.server, report.metrics))
        return seconds

    def _lifting(self, work: Work, mesh: jax.sharding.Mesh, chunk: int) -> lift.Lifting:
        """Chunks as a run chooses them, or as given."""
        steps = -(-work.holdings.count // self.case.batch)
        to_do = plan.Work((self.model,), (self.case.participants or self.case.clients,), (steps,))
        chosen = chunk or plan.automatic_chunk(to_do, mesh)
        return lift.Lifting("shard_map", mesh, chosen, () if chunk else plan.narrower(to_do, chosen, mesh))

    def batches(self) -> np.ndarray:
        """The examples of each client's batches `[C, steps, B]`, in the order in which the engine takes them."""
        case, holdings = self.case, self.federation.train_holdings
        root = keys.stream(jax.random.wrap_key_data(jnp.asarray(self.first.root)), "round", 0)

        def batches_of(client, start, count):
            key = keys.stream(root, "client", client)
            key = keys.stream(key, "student") if case.algorithm == "feddistill" else key
            shuffle = keys.shuffle(keys.stream(jax.random.fold_in(key, 0), "shuffle"), count)
            return start + shuffle(jnp.arange(case.steps * case.batch, dtype=jnp.int32))

        rows = jax.device_get((self.federation.client, holdings.start, holdings.count, holdings.order))
        position = np.asarray(jax.jit(jax.vmap(batches_of))(*rows[:3]))
        return rows[3][position].reshape(case.clients, case.steps, case.batch).astype(np.int32)

    def loss(self, params: Any, examples: int = 1000) -> float:
        """Mean cross-entropy of `params` on the first examples of all: where a round ended."""
        train: Examples = self.federation.train
        x = np.asarray(train.x[:examples]).astype(np.float32) * np.asarray(train.scale) + np.asarray(train.shift)
        y = np.asarray(train.y[:examples])
        log_p = np.asarray(jax.nn.log_softmax(jax.jit(self.model.apply)(params, x)))
        return float(-log_p[np.arange(len(y)), y].mean())

    def distance(self, params: Any) -> float:
        """How far `params` are from fdjax's after the round, as a share of how far the round moved."""

        def norm(a, b):
            return np.sqrt(sum(float(np.sum((p - q) ** 2)) for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b))))

        return float(norm(params, self.after) / norm(self.after, self.first.server))

    def flops(self) -> float:
        """Of one client step: three times the student's forward pass, gradients costing two more, and the teacher's.

        The first layer's input gradient is counted, although nobody computes it.
        """
        x = jax.ShapeDtypeStruct((self.case.batch, *self.case.shape), jnp.float32)
        with jax.default_device(jax.devices("cpu")[0]):  # lowered for a GPU there is no count
            cost = jax.jit(self.model.apply).lower(self.first.server, x).cost_analysis()
        return (4 if self.case.algorithm == "feddistill" else 3) * float(cost["flops"])
