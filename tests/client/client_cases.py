"""A client that holds some of a few examples, and the surroundings of a call, for the tests of this folder."""

import engine_cases as cases
import jax
import numpy as np

from fdjax.client.data import ClientData
from fdjax.contract import Context
from fdjax.types import Examples

N, F, K = 60, cases.FEATURES, cases.CLASSES
MODEL = cases.model()


def data_of(count, start=11):
    """(data, x, y) of a client that holds `count` of N examples, in an order of its own, from `start` on."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(N, F)).astype(np.float32), rng.integers(0, K, N).astype(np.int32)
    examples = Examples(x, y, np.float32([1.0]), np.float32([0.0]))
    order = rng.permutation(N).astype(np.int32)
    held = order[start : start + count]
    data = jax.device_put(ClientData(examples, order, np.int32(start), np.int32(count)))
    return data, x[held].astype(float), y[held]


def context(key, learning_rate, round=0):
    """What a client's training reads."""
    return Context(MODEL, 0, np.int32(0), {"learning_rate": learning_rate}, round, key, None)
