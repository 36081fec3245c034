"""One small run for all files of this folder, and processes that keep what is compiled for it."""

import functools

from fdjax.run import experiment, runner, settings

# Clients, sizes, batches, devices and the length of supersteps are compiled in. A test changes them where it is about
# them; with other seeds, learning rates and rounds it finds compiled what another test has run.
SMALL = {
    "algorithm": "fedavg", "dataset": "synthetic", "num_clients": 4, "samples_per_client": 20, "model": "mclr",
    "batch_size": 8, "devices": 1, "partition_seed": 0, "rounds": 4,
}  # fmt: skip

# Users' processes keep the last eight simulations; these tests come back to the small one after dozens of others.
experiment._bind = functools.lru_cache(maxsize=64)(experiment._bind.__wrapped__)


def small(**fields):
    return settings.make(**SMALL | fields)


def run(out=None, *, resume=False, **fields):
    return runner.run(small(**fields), out, resume=resume, progress=False)
