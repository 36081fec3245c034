"""What a client trains on: examples by position, with targets, side by side and one after another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from client_cases import K, data_of

from fdjax.client.data import ClientData, Paired, Ragged, Targets, batches, whole
from fdjax.types import Examples


def test_examples_are_scaled_as_they_are_taken(rng):
    images = rng.integers(0, 256, (6, 4, 3, 2)).astype(np.uint8)
    scale, shift = np.float32([1 / 255, 2 / 255]), np.float32([-0.5, 0.25])
    examples = jax.device_put(Examples(images, np.arange(6, dtype=np.int32), scale, shift))
    data = ClientData(examples, jnp.array([5, 3, 1, 0]), jnp.int32(1), jnp.int32(3))
    x, y = data.take(jnp.array([2, 0, 1]))
    assert x.dtype == jnp.float32
    np.testing.assert_array_equal(y, [0, 3, 1])
    np.testing.assert_allclose(x, images[[0, 3, 1]].astype(float) * scale + shift, atol=1e-6)


def test_targets_stand_in_for_labels(rng):
    """Of the examples that are named, in the order of their names."""
    data, _, _ = data_of(0)
    ids = jnp.array([7, 2, 40])
    soft = rng.dirichlet(np.ones(K), 3).astype(np.float32)
    targets = Targets(data.examples, ids, {"soft": soft})
    assert targets.count == 3
    x, taken = targets.take(jnp.array([2, 0]))
    np.testing.assert_array_equal(x, data.examples.x[jnp.array([40, 7])])
    np.testing.assert_array_equal(taken["soft"], soft[[2, 0]])


def test_paired_values_keep_to_their_examples():
    data, x, y = data_of(5)
    paired = Paired(data, jnp.arange(8) * 10)  # longer than the client's data, as for the largest of many clients
    assert paired.count == 5
    taken, (labels, values) = paired.take(jnp.array([4, 1]))
    np.testing.assert_allclose(taken, x[[4, 1]], rtol=1e-6)
    np.testing.assert_array_equal(labels, y[[4, 1]])
    np.testing.assert_array_equal(values, [40, 10])


@pytest.mark.parametrize("counts", [(2, 0, 3), (0, 3, 0), (3, 3, 3)], ids=str)
def test_ragged_rows_are_one_set_of_examples(counts):
    """No position meets the padding, and an empty row has none."""
    x = np.arange(9).reshape(3, 3, 1) * np.ones(2)
    data = Ragged(jnp.asarray(x), (jnp.arange(9).reshape(3, 3),), jnp.cumsum(jnp.array(counts)))
    assert data.count == sum(counts)
    expected = [3 * row + column for row, count in enumerate(counts) for column in range(count)]
    taken, (targets,) = data.take(jnp.arange(sum(counts)))
    np.testing.assert_array_equal(targets, expected)
    np.testing.assert_array_equal(taken[:, 1], expected)
    rows, columns = data.find(jnp.arange(sum(counts)))
    np.testing.assert_array_equal(3 * rows + columns, expected)


def test_the_whole_is_every_example_once():
    data, _, _ = data_of(0)
    everything = whole(data.examples)
    assert everything.count == 60
    np.testing.assert_array_equal(everything.take(jnp.arange(60))[1], data.examples.y)


@pytest.mark.parametrize(("count", "steps"), [(0, 0), (1, 1), (4, 1), (5, 1), (6, 2), (10, 2), (11, 3)])
def test_batches(count, steps):
    assert batches(count, 5) == steps
