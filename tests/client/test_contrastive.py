"""SimCLR: its loss against NumPy, and what it changes."""

import functools

import chex
import engine_cases as cases
import jax
import jax.numpy as jnp
import numpy as np

from fdjax.client import contrastive

T = 0.7


def test_nt_xent_is_its_equation():
    z = np.random.default_rng(0).normal(size=(2, 5, 3))
    flat, total = z.reshape(10, 3), 0.0
    for i in range(10):
        j = (i + 5) % 10

        def s(k, i=i):
            return flat[i] @ flat[k] / np.linalg.norm(flat[i]) / np.linalg.norm(flat[k])

        total += -np.log(np.exp(s(j) / T) / sum(np.exp(s(k) / T) for k in range(10) if k != i))
    np.testing.assert_allclose(contrastive.nt_xent(np.float32(z), T), total / 10, rtol=1e-5)


def test_features_of_nothing_have_a_gradient():
    z = jnp.zeros((2, 3, 4)).at[0, 0].set(1.0)
    assert cases.all_finite(jax.grad(lambda z: contrastive.nt_xent(z, T))(z))


def test_views_differ_and_keep_what_they_show():
    pictures = jax.random.normal(jax.random.key(0), (3, 12, 12, 1)) + 3
    for x in (pictures, pictures.reshape(3, -1)):
        one, other = (np.asarray(contrastive.view(jax.random.key(seed), x)) for seed in (1, 2))
        assert one.shape == x.shape
        assert np.abs(one - other).max() > 1
    shown = one != 0
    assert 0.7 < shown.mean() < 0.9
    np.testing.assert_array_equal(one[shown], np.asarray(x)[shown])


@functools.cache
def pretraining(trained):
    """(params, steps) -> (params, loss), compiled."""
    model, proxy = cases.model("2nn"), cases.federation().proxy
    given = {"learning_rate": 3e-3, "batch_size": 64, "trained": trained}
    return jax.jit(
        lambda params, steps: contrastive.pretrain(
            model.features, params, proxy, jax.random.key(1), steps=steps, **given
        )
    )


def pretrained(steps, trained=None):
    params = jax.jit(cases.model("2nn").init)(jax.random.key(0))
    return params, *jax.device_get(pretraining(trained)(params, steps))


def test_training_makes_views_alike_and_leaves_the_head():
    before, after, loss = pretrained(150)
    _, _, at_first = pretrained(1)
    assert loss < at_first - 0.2, (loss, at_first)
    head = "Dense_2"
    chex.assert_trees_all_equal(after[head], jax.device_get(before[head]))
    for name in before.keys() - {head}:
        assert np.abs(after[name]["kernel"] - before[name]["kernel"]).max() > 0.01


def test_params_that_are_not_trained_stay():
    before, after, _ = pretrained(3, trained=lambda path: path.startswith("Dense_1"))
    chex.assert_trees_all_equal(after["Dense_0"], jax.device_get(before["Dense_0"]))
    assert np.abs(after["Dense_1"]["kernel"] - before["Dense_1"]["kernel"]).max() > 1e-4
