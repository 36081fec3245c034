"""The same run on any number of host devices."""

import jax
import numpy as np
import pytest

from fdjax.run import experiment, settings


@pytest.mark.parametrize("algorithm", ["fedavg", "feddistill"])
def test_ordered_sums_are_bitwise_the_same_run_on_any_number_of_devices(algorithm):
    def after(devices):
        chosen = settings.make(
            {"learning_rate": 0.05}, algorithm=algorithm, model="mclr", dataset="synthetic", num_clients=7, chunk=1,
            devices=devices, ordered_sums=True, participation=0.8, batch_size=10,
        )  # fmt: skip
        built = experiment.build(chosen)
        state = built.simulation.init(0, built.federation)
        return jax.device_get(built.simulation.run(state, built.federation, built.hparams, 2))

    one = after(1)
    for devices in (2, 4):
        jax.tree.map(np.testing.assert_array_equal, after(devices), one)
