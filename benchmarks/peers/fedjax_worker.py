"""fedjax: its own FedAvg (`fedjax.algorithms.fed_avg`) on its jit backend, one client's step after another."""

import time
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from worker import layers, serve, under

jax.tree_map, jnp.NINF = jax.tree_util.tree_map, -jnp.inf  # gone from JAX since fedjax 0.0.17 was released

import fedjax  # noqa: E402
from fedjax.algorithms import fed_avg  # noqa: E402


def apply(params, x, padding):
    """Logits of the net whose weights `params` are: convolutions, the first two pooled, then dense layers."""
    x = x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x
    convs = [name for name in layers(params) if name.startswith("Conv")]
    for index, name in enumerate(convs):
        x = lax.conv_general_dilated(
            x, params[f"{name}/kernel"], (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = x + params[f"{name}/bias"]
        x = jax.nn.relu(max_pool(x) if index < 2 else x)
    x = x.reshape(x.shape[0], -1)
    for name in (n for n in layers(params) if n.startswith("Dense")):
        x = x @ params[f"{name}/kernel"] + params[f"{name}/bias"]
        last = name == layers(params)[-1]
        x = x if last else jax.nn.relu(x)
    return x


def max_pool(x):
    """2x2; a maximum over a reshape, whose gradient XLA:CPU computes faster than that of reduce_window."""
    batch, height, width, channels = x.shape
    rows, columns = height // 2, width // 2
    return x[:, : 2 * rows, : 2 * columns].reshape(batch, rows, 2, columns, 2, channels).max((2, 4))


class FedAvg:
    def version(self):
        return {"version": f"{metadata.version('fedjax')} with jax {jax.__version__}"}

    def load(self, path, lr, padding, device, distill):
        data = np.load(path)
        self.first = jax.tree.map(jnp.asarray, under(data, "params"))
        clients, steps, batch = data["batches"].shape

        def loss(params, batch, rng):
            return jnp.mean(fedjax.metrics.unreduced_cross_entropy_loss(batch["y"], apply(params, batch["x"], padding)))

        fedjax.set_for_each_client_backend("jit")
        self.algorithm = fed_avg.federated_averaging(
            jax.grad(loss),
            fedjax.optimizers.sgd(lr),
            fedjax.optimizers.sgd(1.0),
            # The examples of a client lie in the order of its batches.
            fedjax.ShuffleRepeatBatchHParams(batch_size=batch, num_steps=steps, skip_shuffle=True),
        )
        x, y = data["x"], data["y"]
        keys = jax.random.split(jax.random.key(0), clients)
        self.clients = [
            (str(c), fedjax.ClientDataset({"x": x[rows.ravel()], "y": y[rows.ravel()]}), keys[c])
            for c, rows in enumerate(data["batches"])
        ]
        self.run()
        return {"note": "jit backend"}

    def run(self):
        start = time.perf_counter()
        state, _ = self.algorithm.apply(self.algorithm.init(self.first), self.clients)
        self.mean = jax.block_until_ready(state.params)
        return {"seconds": time.perf_counter() - start}

    def save(self, path):
        np.savez(path, **{name: np.asarray(value) for name, value in self.mean.items()})


if __name__ == "__main__":
    serve(FedAvg())
