"""Starts that a test draws by itself, whatever a method would begin with, and clients whose momentum is kept.

v <- m v + g, w <- w - eta v, with one v for each client and stage, from round to round.
"""

import engine_cases as cases
import jax
import numpy as np
import optax

from fdjax.algorithms import ALGORITHMS
from fdjax.client.optimizers import with_kept_optimizers
from fdjax.method import Training

MOMENTUM, FIRST_ROUND, BATCH = 0.8, 3, 4


def training(batch_size, name):
    return Training(batch_size, lambda rate, round: optax.sgd(rate, momentum=MOMENTUM), name=name)


def simulation(name, options=None, **of_task):
    """The method with kept momentum, one for a client's own examples and one for proxy data; `of_task`: of its Task."""
    method = ALGORITHMS[name]
    task = cases.task(options=method.choices(options or {}))._replace(
        training=training(BATCH, "client"), distilling=training(BATCH, "distill"), serving=training(BATCH, "server")
    )
    task = task._replace(**of_task)
    algorithm = with_kept_optimizers(method.algorithm(task), task)
    return cases.bind(algorithm, task, (cases.PARTICIPANTS,))


def drawn(simulation, federation, seed=5):
    """A state with numbers of NumPy's in every leaf of floats, momentum too, some rounds after the first."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        assert leaf.dtype == np.float32, leaf
        return rng.normal(size=leaf.shape).astype(np.float32) / 2

    def place(tree):
        return cases.replicated(jax.tree.map(draw, tree), federation)

    like = simulation.init(0, federation)
    server = like.server._replace(state=like.server.state, optimizers=place(like.server.optimizers))
    round_number = cases.replicated(np.int32(FIRST_ROUND), federation)
    return like._replace(server=server, clients=place(like.clients), round=round_number), place


class Moving:
    """A client's model, and the velocities of its stages, in float64."""

    def __init__(self, params, velocities):
        self.model = cases.Logistic(params)
        self.velocities = {name: cases.Logistic(trace) for name, trace in velocities.items()}

    def descend(self, stage, x, loss_and_slope, orders, rate, mu=0.0, batch_size=BATCH):
        """Epochs of the stage; `loss_and_slope(z, batch)` gives losses and dl/dz. The mean losses of each epoch."""
        v, w, first, means = self.velocities[stage], self.model, cases.Logistic(self.model.params()), []
        for order in orders:
            of_epoch = []
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                loss, slope = loss_and_slope(w(x[batch]), batch)
                v.W = MOMENTUM * v.W + x[batch].T @ slope / len(batch) + mu * (w.W - first.W)
                v.b = MOMENTUM * v.b + slope.mean(0) + mu * (w.b - first.b)
                w.W, w.b = w.W - rate * v.W, w.b - rate * v.b
                of_epoch.append(loss.mean())
            means.append(np.mean(of_epoch))
        return means

    def until_flat(self, stage, x, loss_and_slope, key, epochs, patience, rate):
        """Epochs that end after `patience` of them without a mean loss 0.001 below the least; how many they were."""
        least, flat = np.inf, 0
        for epoch in range(epochs):
            (mean,) = self.descend(stage, x, loss_and_slope, [cases.epoch_order(key, epoch, len(x))], rate)
            least, flat = (mean, 0) if mean < least - 1e-3 else (least, flat + 1)
            if flat == patience:
                return epoch + 1
        return epochs

    def restart(self, params):
        """Another model, with the velocities of before."""
        self.model = cases.Logistic(params)


def clients_of(clients):
    """One `Moving` for each row of a cohort's states: kept params, where there are any, and traces."""
    at = jax.device_get(clients[0])
    traces = {name: state[0].trace for name, state in at.optimizers.items()}
    rows = range(len(cases.COUNTS))
    rowed = [{name: jax.tree.map(lambda leaf, i=i: leaf[i], trace) for name, trace in traces.items()} for i in rows]
    params = [jax.tree.map(lambda leaf, i=i: leaf[i], at.state) if at.state else rowed[i]["client"] for i in rows]
    return [Moving(*pair) for pair in zip(params, rowed, strict=True)]


def hard(y, classes=cases.CLASSES):
    """Cross-entropy to labels, and its slope."""
    target = np.eye(classes)[y]

    def loss_and_slope(z, batch):
        return -(target[batch] * cases.log_softmax(z)).sum(-1), cases.softmax(z) - target[batch]

    return loss_and_slope
