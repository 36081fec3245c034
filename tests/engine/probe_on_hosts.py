"""Runs the probe on the devices of several processes: python probe_on_hosts.py OUT COORDINATOR NUMBER ID."""

import sys

import jax
import numpy as np

import fdjax  # noqa: F401  before a device is used
from fdjax.engine import hosts

if __name__ == "__main__":
    out, coordinator, number, process = sys.argv[1:]
    hosts.join(coordinator, int(number), int(process))
    import probe  # it asks for devices

    simulation, federation, hparams = probe.bind(chunk=1, devices=2)
    state, setup = simulation.setup(simulation.init(0, federation), federation, hparams)
    state, report = simulation.run(state, federation, hparams, 2)
    evaluation = simulation.evaluate(state, federation, hparams)
    numbers = jax.device_get(setup), simulation.fetch(state), *jax.device_get((report, evaluation))
    if hosts.is_first():
        np.savez(out, *jax.tree.leaves(numbers))
    hosts.wait()
