"""A round of FedAvg with any loss, in NumPy and float64: gradients are differences of that loss.

A net is dense layers with ReLU between them (`mclr` has one, `2nn` three); a loss is written from the paper, of what
the net in training gives.
"""

import engine_cases as cases
import jax
import numpy as np

from fdjax import keys
from fdjax.algorithms import ALGORITHMS

K, BATCH, EPOCHS, RATE = cases.CLASSES, 4, 2, 0.1
_STEP = 1e-5


def simulation(name, options=None, net="mclr"):
    """The method's simulation for a central model `net`."""
    if net == "mclr":
        return cases.simulation(name, per_round=cases.PROXIES, options=options)[1]
    chosen = ALGORITHMS[name].choices(options or {})
    task = cases.task(per_round=cases.PROXIES, options=chosen)._replace(model=cases.model(net))
    task = task._replace(models=(task.model,))
    return cases.bind(ALGORITHMS[name].algorithm(task), task, (cases.PARTICIPANTS,))


def simulated(name, rounds, made=None, **hparams):
    """The first state, the last one, and the report of a simulation, by default that of the method as it is."""
    made, federation = made or simulation(name), cases.federation()
    given = cases.hparams_of(name, learning_rate=RATE, local_epochs=EPOCHS, **hparams)
    start = jax.device_get(made.init(0, federation))
    return start, *jax.device_get(made.run(made.init(0, federation), federation, given, rounds))


def layers_of(params):
    """[(W, b)] in float64."""
    dense = [params[f"Dense_{i}"] for i in range(len(params))]
    return [tuple(np.array(layer[name], np.float64) for name in ("kernel", "bias")) for layer in dense]


def params_of(layers):
    return {f"Dense_{i}": {"kernel": W, "bias": b} for i, (W, b) in enumerate(layers)}


def forward(layers, h, first=0):
    """What each of the layers from `first` on gives; the last one gives logits."""
    given = []
    for i in range(first, len(layers)):
        W, b = layers[i]
        h = h @ W + b
        h = h if i == len(layers) - 1 else np.maximum(h, 0)
        given.append(h)
    return given


def logits(layers, x):
    return forward(layers, x)[-1]


def gradient(value, layers):
    """Central differences, array by array."""
    found = []
    for layer in layers:
        for array in layer:
            slope = np.zeros_like(array)
            for place in np.ndindex(array.shape):
                here, both = array[place], []
                for sign in (1, -1):
                    array[place] = here + sign * _STEP
                    both.append(value())
                array[place] = here
                slope[place] = (both[0] - both[1]) / (2 * _STEP)
            found.append(slope)
    return found


def trained(start, x, y, key, loss):
    """The client's net after EPOCHS epochs of SGD, the last epoch's mean loss, and (z, y) of each step.

    `loss(layers, x, y)` gives the losses [B] of a batch.
    """
    layers, seen, means = [tuple(a.copy() for a in layer) for layer in start], [], []
    for epoch in range(EPOCHS):
        order, means = cases.epoch_order(key, epoch, len(y)), []
        for first in range(0, len(y), BATCH):
            b = order[first : first + BATCH]
            value = lambda b=b: loss(layers, x[b], y[b]).mean()  # noqa: E731
            seen.append((logits(layers, x[b]), y[b]))
            means.append(value())
            slopes = gradient(value, layers)
            for array, slope in zip((a for layer in layers for a in layer), slopes, strict=True):
                array -= RATE * slope
    return layers, np.mean(means), seen


def participants(number):
    """(key of the client, id, x, y) of the participants of a round that hold examples."""
    key, clients = cases.round_key(0, number), cases.clients_of(cases.federation())
    chosen = [clients[row] for row in cases.participants_of(key, len(clients), cases.PARTICIPANTS)]
    return [(keys.stream(key, "client", i), i, x, y) for i, x, y in chosen if len(y)]


def averaged(uploads, weights):
    """sum_k (n_k / n) w_k."""
    return layers_of(cases.weighted_average([params_of(upload) for upload in uploads], weights))


def fedavg_round(server, number, loss):
    """FedAvg's round with another loss: (server, mean loss, what each participant saw)."""
    uploads, means, weights, seen = [], [], [], []
    for key, _, x, y in participants(number):
        upload, mean, of_client = trained(server, x, y, key, loss)
        for into, value in ((uploads, upload), (means, mean), (weights, len(y)), (seen, of_client)):
            into.append(value)
    return averaged(uploads, weights), np.average(means, weights=weights), seen


def proxy():
    """(x, y) of the proxy data, as a model sees them."""
    examples = jax.device_get(cases.federation().proxy)
    return (examples.x.astype(np.float64) - 0.25) / 1.5, examples.y
