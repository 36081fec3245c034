"""What depends on XLA's optimisations, such as where it gives wrong numbers but for `fdjax.runtime`.

`test_runtime.py` compiles it as in use.
"""

import engine_cases as cases
import jax
import numpy as np
from jax import lax

from fdjax import models
from fdjax.client import testing
from fdjax.client.data import whole
from fdjax.engine import lift
from fdjax.run import experiment, settings
from fdjax.types import Examples


def trainer(devices: int):
    """Gives the central CNN1 after one round of 4 clients of 750 images, batch 128."""
    chosen = settings.make(
        {"learning_rate": 0.05}, model="cnn1", padding="SAME", train_fraction=0.5, num_clients=4, batch_size=128,
        devices=devices,
    )  # fmt: skip
    built = experiment.build(chosen)

    def train():
        state = built.simulation.init(0, built.federation)
        return jax.tree.leaves(built.simulation.run(state, built.federation, built.hparams, 1)[0].server)

    return train


def test_large_kernels_are_right_beside_other_devices():
    # Without fdjax.runtime.work_around_xla_cpu, parameters are 1e-3 off and differ from run to run on jaxlib 0.10.
    expected, train = trainer(devices=1)(), trainer(devices=2)
    for _ in range(2):
        for one, two in zip(expected, train(), strict=True):
            np.testing.assert_allclose(two, one, rtol=0, atol=1e-5)


def test_sums_over_wide_chunks_are_right():
    """XLA:CPU of jaxlib 0.10 got the summed loss of 100 vmapped logistic models wrong by 7 % for clients 65 to 99.

    It hands the sum to YNNPACK, which `fdjax.runtime` turns off. One client after another it is right either way.
    """
    clients, size, features, classes, batch = 100, 5000, 60, 10, 500
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(size, features)).astype(np.float32), rng.integers(0, classes, size).astype(np.int32)
    examples = jax.device_put(Examples(x, y, np.float32([1.0]), np.float32([0.0])))
    W = rng.normal(size=(clients, features, classes)).astype(np.float32)
    b = rng.normal(size=(clients, classes)).astype(np.float32)
    apply = models.build("mclr", (features,), classes).apply

    def one(examples, row):
        return testing.test(lambda x: apply({"Dense_0": row}, x), whole(examples), batch), lift.Partials()

    rows = {"kernel": W, "bias": b}
    by_map = jax.jit(lambda shared, rows: lax.map(lambda row: one(shared, row)[0], rows))(examples, rows)
    z = x.astype(float) @ W[-1] + b[-1]
    np.testing.assert_allclose(by_map.loss[-1], cases.cross_entropy(z, y).sum(), rtol=1e-5)
    for chunk in (clients, 80):
        lifting = lift.Lifting("shard_map", lift.make_mesh(jax.devices()[:1]), chunk)
        by_vmap, _ = jax.jit(lambda shared, rows, by=lifting: lift.over_clients(one, shared, rows, by))(examples, rows)
        np.testing.assert_allclose(by_vmap.loss, by_map.loss, rtol=1e-5)
        np.testing.assert_array_equal(by_vmap.correct, by_map.correct)


def test_ordered_sums_are_bitwise_the_same_run_on_any_number_of_devices():
    def after(devices):
        chosen = settings.make(
            {"learning_rate": 0.05}, algorithm="fedavg", model="mclr", dataset="synthetic", num_clients=7, chunk=1,
            devices=devices, ordered_sums=True, participation=0.8, batch_size=10,
        )  # fmt: skip
        built = experiment.build(chosen)
        state = built.simulation.init(0, built.federation)
        state, report = built.simulation.run(state, built.federation, built.hparams, 2)
        return built.simulation.fetch(state), jax.device_get(report)

    alone = after(1)
    for devices in (2, 4):
        jax.tree.map(np.testing.assert_array_equal, after(devices), alone)
