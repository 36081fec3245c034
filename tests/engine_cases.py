"""Small federations for the engine's tests, and the papers' equations for logistic regression in NumPy, float64.

What is drawn (participants, the order of a client's examples) is asked of the keys as the engine asks them; what is
computed from it is written from the papers alone.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fdjax import keys, models
from fdjax.algorithms import ALGORITHMS
from fdjax.data.federation import federate
from fdjax.data.holdings import from_counts
from fdjax.engine import lift
from fdjax.engine import simulation as simulation_module
from fdjax.engine.layout import Layout
from fdjax.method import Task, Training
from fdjax.types import Cohort, Source

FEATURES, CLASSES, TESTS = 6, 4, 37
COUNTS = (7, 0, 1, 12, 5, 3, 9)  # an empty client, one with a single example, and more than one batch of 4 for most
PARTICIPANTS = 5
PROXIES, PER_ROUND = 11, 6  # proxy examples, labelled; how many of them a round uses
NEEDS = {("dsfl", "era_beta"): {"aggregation": "enhanced_era"}}  # hparams that only some choice makes use of
_LONGEST = 64


def mesh(devices=1):
    return lift.make_mesh(jax.devices()[:devices])


@functools.cache
def model(name="mclr", shape=(FEATURES,)):
    """`mclr`, `2nn` of width 5, `wide`, a 2nn of width 9, `cnn` of images, or `five`, with a class too many."""
    kind, options = {
        "2nn": ("2nn", {"width": 5}),
        "wide": ("2nn", {"width": 9}),
        "cnn": ("fedgen_cnn", {}),
        "five": ("mclr", {}),
    }.get(name, (name, {}))
    return models.build(kind, shape, CLASSES + (name == "five"), **options)._replace(name=name)


def source(examples, seed=0, shape=(FEATURES,)):
    """Float features with labels in order, so that neighbouring examples share a label and most clients lack some."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(CLASSES, *shape))

    def draw(size):
        y = np.sort(np.arange(size) % CLASSES)
        return (centers[y] + rng.normal(size=(size, *shape))).astype(np.float32), y.astype(np.int32)

    return Source("blobs", *draw(examples), *draw(TESTS), CLASSES, mean=(0.25,), std=(1.5,))


@functools.cache
def federation(counts=COUNTS, devices=1, cohort_sizes=None, seed=0, shape=(FEATURES,)):
    """Clients that hold `counts` neighbouring examples each, and 0 to 6 test examples of their own."""
    test = from_counts(np.random.default_rng(seed).permutation(TESTS), np.arange(len(counts)) % 7)
    blobs = source(max(sum(counts), sum(COUNTS)), seed, shape)
    train = from_counts(np.arange(len(blobs.train_y)), np.asarray(counts))
    other = source(PROXIES, seed + 100, shape)
    proxy = other.train_x[:, ::-1], other.train_y  # of another distribution than the clients' examples
    return federate(blobs, train, test, cohort_sizes or (len(counts),), mesh(devices), proxy)


def replicated(x, federation):
    """x beside the arrays of a federation, or a simulation would be compiled anew for it."""
    return jax.device_put(x, federation.client.sharding)


@functools.cache
def training(batch_size, **options):
    return Training(batch_size, lambda learning_rate, round: optax.sgd(learning_rate, **options))


def task(batch_size=4, cohorts=(("mclr", 7),), options=(), per_round=PER_ROUND, shape=(FEATURES,)):
    """What a method is built for: logistic regression for a central model."""
    return Task(
        model=model("mclr", shape),  # the same object as the clients', where they have it too
        models=tuple(model(kind, shape) for kind, _ in cohorts),
        training=training(batch_size),
        distilling=training(batch_size)._replace(distils=True),
        serving=training(batch_size)._replace(distils=True),
        sizes=tuple(size for _, size in cohorts),
        classes=CLASSES,
        largest=_LONGEST,
        proxy_size=PROXIES,
        proxy_per_round=per_round,
        options=dict(options),
        inputs=shape,
    )


def simulation(
    name, *, chunk=3, devices=1, participants=(PARTICIPANTS,), batch_size=4, cohorts=(("mclr", 7),), options=None,
    per_round=PER_ROUND, shape=(FEATURES,), **more,
):  # fmt: skip
    """A registered algorithm and its simulation, compiled only once; `more` fields of Layout."""
    chosen = ALGORITHMS[name].choices(options or {})
    made = chunk, devices, participants, batch_size, cohorts, tuple(sorted(chosen.items())), per_round, shape
    return _simulation(name, *made, tuple(sorted(more.items())))


@functools.cache
def _simulation(name, chunk, devices, participants, batch_size, cohorts, options, per_round, shape, more):
    made = task(batch_size, cohorts, options, per_round, shape)
    if ALGORITHMS[name].split:  # clients of a hidden layer of 5 units, and a second one in the head
        made = made._replace(model=models.build("mclr", (5,), CLASSES), models=(model("2nn"),) * len(cohorts))
    algorithm = ALGORITHMS[name].algorithm(made)
    return algorithm, bind(algorithm, made, participants, chunk=chunk, devices=devices, **dict(more))


def bind(algorithm, task, participants, *, chunk=3, devices=1, kind="shard_map", ordered=False, **more):
    """The simulation of an algorithm; `more` fields of Layout."""
    members = tuple(Cohort(member, size) for member, size in zip(task.models, task.sizes, strict=True))
    lifting = lift.Lifting(kind, mesh(devices), chunk, ordered=ordered)
    layout = Layout(task.model, members, participants, lifting, **{"eval_batch": 10} | more)
    return simulation_module.simulation(algorithm, layout)


def hparams_of(method, **given):
    """The hparams of a method's name; quick ones where nothing is given."""
    known = ALGORITHMS[method].hparams
    usual = {"learning_rate": 0.3, "local_epochs": 2, "server_steps": 20}  # hundreds of Adam's steps amplify rounding
    return ALGORITHMS[method].resolve({name: v for name, v in usual.items() if name in known} | given)


def begin(simulation, federation, hparams, seed=0):
    """The state before the first round: what `init` and, if there is one, `setup` leave."""
    state = simulation.init(seed, federation)
    return simulation.setup(state, federation, hparams)[0] if simulation.setup else state


def all_finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(tree)))


# What the engine draws.


@jax.jit
def _order(key, count):
    return keys.shuffle(key, count)(jnp.arange(_LONGEST))


def epoch_order(key, epoch, count):
    """The positions of a client's examples in the order in which epoch `epoch` of `local.fit` visits them."""
    assert count <= _LONGEST
    return np.asarray(_order(keys.stream(jax.random.fold_in(key, epoch), "shuffle"), count))[:count]


def round_key(seed, number):
    return keys.stream(jax.random.key(seed), "round", number)


def participants_of(key, clients, size, cohort=0):
    """Rows of the federation that take part in the round of `key`."""
    if size == clients:
        return np.arange(clients)
    return np.sort(keys.shuffle(keys.stream(key, "participants", cohort), clients)(jnp.arange(size)))


# What the papers say.


def log_softmax(z):
    z = np.asarray(z, np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def softmax(z):
    return np.exp(log_softmax(z))


def cross_entropy(z, y):
    return -np.take_along_axis(log_softmax(z), np.asarray(y)[..., None], -1)[..., 0]


def kl_divergence(teacher, student, temperature=1.0):
    """sum_c q_c log(q_c / p_c), with q_c log q_c = 0 where q_c = 0."""
    log_q = log_softmax(np.asarray(teacher, np.float64) / temperature)
    log_p = log_softmax(np.asarray(student, np.float64) / temperature)
    return np.where(np.exp(log_q) > 0, np.exp(log_q) * (log_q - log_p), 0).sum(-1)


class Logistic:
    """z = x W + b by plain SGD with heavy-ball momentum (v <- m v + g, w <- w - eta v)."""

    def __init__(self, params):
        dense = params["Dense_0"]
        self.W, self.b = (np.array(dense[name], np.float64) for name in ("kernel", "bias"))

    def __call__(self, x):
        return x @ self.W + self.b

    def params(self):
        return {"Dense_0": {"kernel": self.W, "bias": self.b}}

    def fit(
        self, x, y, orders, batch_size, learning_rate, momentum=0.0, teacher=None, temperature=1.0, weight=0.0, mu=0.0
    ):
        """One epoch for each of `orders`, on batches of `batch_size` and what is left; returns the last epoch's loss.

        l = (1 - weight) CE(softmax(z), y) + weight T^2 KL(softmax(teacher / T) || softmax(z / T)), so
        dl/dz = (1 - weight) (softmax(z) - e_y) + weight T (softmax(z / T) - softmax(teacher / T)).
        With `mu`, (mu / 2) (|W - W_0|^2 + |b - b_0|^2) more in the slope, W_0 and b_0 those at the start.
        """
        T, W_0, b_0 = temperature, self.W, self.b
        velocity_W, velocity_b, means = np.zeros_like(self.W), np.zeros_like(self.b), []
        for order in orders:
            means = []
            for first in range(0, len(order), batch_size):
                batch = order[first : first + batch_size]
                z, hard = self(x[batch]), np.eye(len(self.b))[y[batch]]
                loss, slope = (1 - weight) * cross_entropy(z, y[batch]), (1 - weight) * (softmax(z) - hard)
                if teacher is not None:
                    soft = teacher(x[batch])
                    loss = loss + weight * T**2 * kl_divergence(soft, z, T)
                    slope = slope + weight * T * (softmax(z / T) - softmax(soft / T))
                means.append(loss.mean())
                velocity_W = momentum * velocity_W + x[batch].T @ slope / len(batch) + mu * (self.W - W_0)
                velocity_b = momentum * velocity_b + slope.mean(0) + mu * (self.b - b_0)
                self.W, self.b = self.W - learning_rate * velocity_W, self.b - learning_rate * velocity_b
        return np.mean(means) if means else 0.0


def clients_of(federation):
    """(id, x, y) of each row, x as a model sees it."""
    train = jax.device_get(federation.train)
    ids, (order, start, count) = jax.device_get((federation.client, federation.train_holdings))
    x = (train.x.astype(np.float64) - 0.25) / 1.5
    held = [order[low : low + n] for low, n in zip(start, count, strict=True)]
    return [(int(i), x[mine], train.y[mine]) for i, mine in zip(ids, held, strict=True)]


def weighted_average(params, weights):
    """sum_k (n_k / n) w_k."""
    return jax.tree.map(lambda *w: sum(n * x for n, x in zip(weights, w, strict=True)) / sum(weights), *params)


def fedavg_round(server, federation, key, *, participants, batch_size, epochs, learning_rate, mu=0.0):
    """McMahan et al. (2017), Algorithm 1; with `mu`, Li et al. (2020), equation 2. Returns (server, mean loss)."""
    clients, uploads, losses, weights = clients_of(federation), [], [], []
    for row in participants_of(key, len(clients), participants):
        i, x, y = clients[row]
        mine, local = Logistic(server), keys.stream(key, "client", i)
        orders = [epoch_order(local, e, len(y)) for e in range(epochs)]
        losses.append(mine.fit(x, y, orders, batch_size, learning_rate, mu=mu))
        uploads.append(mine.params())
        weights.append(len(y))
    return weighted_average(uploads, weights), np.average(losses, weights=weights)


def feddistill_round(
    server, teachers, federation, key, *, participants, batch_size, epochs, learning_rate, temperature, weight
):
    """Jiang et al. (2020), Algorithm 1, the teacher trained first. Returns (server, teachers, losses of both)."""
    clients, uploads, losses, weights, teachers = clients_of(federation), [], [], [], list(teachers)
    for row in participants_of(key, len(clients), participants):
        i, x, y = clients[row]
        local = keys.stream(key, "client", i)
        student, teacher = Logistic(server), Logistic(teachers[row])
        to_teach, to_learn = (
            [epoch_order(keys.stream(local, who), e, len(y)) for e in range(epochs)] for who in ("teacher", "student")
        )
        teacher_loss = teacher.fit(x, y, to_teach, batch_size, learning_rate)
        loss = student.fit(
            x, y, to_learn, batch_size, learning_rate, teacher=teacher, temperature=temperature, weight=weight
        )
        teachers[row] = teacher.params()
        uploads.append(student.params())
        losses.append((loss, teacher_loss))
        weights.append(len(y))
    return weighted_average(uploads, weights), teachers, np.average(losses, axis=0, weights=weights)
