"""Losses against NumPy in float64."""

import engine_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fdjax.client import losses

SHAPES = [(5, 3), (1, 2), (2, 3, 10), (10,)]


def logits(shape, scale, seed=0):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def close(actual, expected, scale=1.0):
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-6 * max(scale, 1))


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 30.0, 1e4, 1e30])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cross_entropy(rng, shape, scale):
    z, y = logits(shape, scale), rng.integers(0, shape[-1], shape[:-1])
    close(losses.cross_entropy(z, jnp.asarray(y)), cases.cross_entropy(z, y))


@pytest.mark.parametrize("temperature", [0.1, 1.0, 2.0, 20.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kl_divergence(shape, scale, temperature):
    teacher, student = logits(shape, scale, 1), logits(shape, scale, 2)
    # Differences of logarithms: the error is that of the larger logarithm, about scale / T.
    close(
        losses.kl_divergence(teacher, student, temperature),
        cases.kl_divergence(teacher, student, temperature),
        scale / temperature,
    )


def test_kl_divergence_by_hand():
    # q = (3/4, 1/4), p = (1/2, 1/2): KL(q || p) = log 2 - H(q), and the other way round is another number.
    q, p = jnp.log(jnp.array([3.0, 1.0])), jnp.zeros(2)
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    close(losses.kl_divergence(q, p), np.log(2) - entropy)
    close(losses.kl_divergence(p, q), -np.log(2) - 0.5 * np.log(0.75 * 0.25))
    # At T = 2 the teacher is (sqrt 3, 1) / (1 + sqrt 3), and nothing multiplies by T^2.
    soft = np.sqrt([3, 1]) / (1 + np.sqrt(3))
    close(losses.kl_divergence(q, p, 2.0), np.log(2) + (soft * np.log(soft)).sum())


@pytest.mark.parametrize("temperature", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reverse_kl_divergence(shape, temperature):
    teacher, student = logits(shape, 1, 1), logits(shape, 1, 2)
    q, p = cases.softmax(teacher / np.float64(temperature)), cases.softmax(student / np.float64(temperature))
    close(losses.reverse_kl_divergence(teacher, student, temperature), (p * np.log(p / q)).sum(-1), 1 / temperature)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_soft_cross_entropy_and_entropy(shape, scale, temperature):
    target, student = cases.softmax(logits(shape, 1, 1)), logits(shape, scale, 2)
    log_p = cases.log_softmax(student / np.float64(temperature))
    cross = losses.soft_cross_entropy(np.float32(target), student, temperature)
    close(cross, -(target * log_p).sum(-1), scale / temperature)
    own = losses.entropy(np.float32(target))
    close(own, -(target * np.log(target)).sum(-1))
    divergence = losses.kl_divergence(np.float32(temperature * np.log(target)), student, temperature)
    np.testing.assert_allclose(cross - own, divergence, rtol=1e-4, atol=1e-5 * max(scale / temperature, 1))


def test_a_one_hot_target_is_a_label_without_entropy():
    z = logits((3, 4), 5.0)
    close(losses.soft_cross_entropy(np.eye(4, dtype=np.float32)[:3], z), losses.cross_entropy(z, jnp.arange(3)))
    value, slope = jax.value_and_grad(losses.entropy)(jnp.array([0.0, 1.0, 0.0]))
    assert value == 0
    assert jnp.isfinite(slope).all()
    close(losses.entropy(jnp.full(8, 1 / 8)), np.log(8))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errors_of_logits_are_means_over_classes(shape, scale):
    teacher, student = logits(shape, scale, 1), logits(shape, scale, 2)
    difference = teacher.astype(np.float64) - student
    close(losses.mean_absolute_error(teacher, student), np.abs(difference).mean(-1), scale)
    close(losses.mean_squared_error(teacher, student), (difference**2).mean(-1), scale**2)
    pull = jax.grad(lambda z: losses.mean_absolute_error(teacher, z).sum())(jnp.asarray(student))
    np.testing.assert_allclose(pull, -np.sign(difference) / shape[-1], rtol=1e-6)
    pull = jax.grad(lambda z: losses.mean_squared_error(teacher, z).sum())(jnp.asarray(student))
    np.testing.assert_allclose(pull, -2 * difference / shape[-1], rtol=1e-4, atol=1e-6 * scale)


def test_errors_of_logits_by_hand():
    teacher, student = jnp.array([1.0, 2.0, -3.0, 0.0]), jnp.array([1.0, 4.0, 3.0, 0.0])
    assert losses.mean_absolute_error(teacher, student) == 2  # (0 + 2 + 6 + 0) / 4
    assert losses.mean_squared_error(teacher, student) == 10  # (0 + 4 + 36 + 0) / 4


finite_logits = hnp.arrays(np.float32, (2, 5), elements=st.floats(-1e4, 1e4, width=32))


@given(z=finite_logits, temperature=st.floats(0.1, 100))
def test_kl_divergence_is_zero_for_equal_and_never_negative(z, temperature):
    teacher, student = z
    slack = 1e-6 * (1 + np.abs(z).max() / temperature)
    assert losses.kl_divergence(teacher, teacher, temperature) == 0
    assert losses.kl_divergence(teacher, student, temperature) >= -slack
    # Adding a constant to all logits changes no distribution.
    shifted = losses.kl_divergence(teacher + np.float32(8), student, temperature)
    np.testing.assert_allclose(shifted, losses.kl_divergence(teacher, student, temperature), rtol=1e-3, atol=1e-2)


small_logits = hnp.arrays(np.float32, (2, 5), elements=st.floats(-30, 30, width=32))


@given(z=small_logits, y=st.integers(0, 4), temperature=st.floats(0.5, 50))
def test_gradients(z, y, temperature):
    """d CE / dz = softmax(z) - e_y and d KL / d student = (softmax(student / T) - softmax(teacher / T)) / T."""
    teacher, student = z
    hard = jax.grad(losses.cross_entropy)(jnp.asarray(student), jnp.int32(y))
    np.testing.assert_allclose(hard, cases.softmax(student) - np.eye(5)[y], atol=1e-5)
    soft = jax.grad(losses.kl_divergence, argnums=1)(teacher, jnp.asarray(student), temperature)
    q, p = (cases.softmax(x.astype(np.float64) / temperature) for x in (teacher, student))
    np.testing.assert_allclose(soft, (p - q) / temperature, atol=3e-5 / temperature)
    # d CE(q, p) / d student is the same; d KL(p || q) / d student = p (log p/q - KL(p || q)) / T.
    cross = jax.grad(losses.soft_cross_entropy, argnums=1)(np.float32(q), jnp.asarray(student), temperature)
    np.testing.assert_allclose(cross, (p - q) / temperature, atol=3e-5 / temperature)
    back = jax.grad(losses.reverse_kl_divergence, argnums=1)(teacher, jnp.asarray(student), temperature)
    ratio = cases.log_softmax(student / np.float64(temperature)) - cases.log_softmax(teacher / np.float64(temperature))
    expected = p * (ratio - (p * ratio).sum()) / temperature
    np.testing.assert_allclose(back, expected, atol=2e-4 / temperature)


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_gradients_of_large_logits_are_finite(scale):
    teacher, student = logits((2, 7, 5), scale)
    hard = jax.grad(lambda z: losses.cross_entropy(z, jnp.zeros(7, int)).sum())(jnp.asarray(student))
    np.testing.assert_allclose(hard, cases.softmax(student) - np.eye(5)[0], atol=1e-5)
    soft = jax.grad(lambda z: losses.kl_divergence(teacher, z).sum())(jnp.asarray(student))
    np.testing.assert_allclose(soft, cases.softmax(student) - cases.softmax(teacher), atol=1e-5)


def test_correct_counts_the_first_of_equal_logits():
    z = jnp.array([[0.0, 2.0, 1.0], [3.0, 3.0, 0.0], [3.0, 3.0, 0.0], [-1.0, -2.0, -3.0]])
    np.testing.assert_array_equal(losses.correct(z, jnp.array([1, 0, 1, 2])), [1, 1, 0, 0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_diverged_model_is_right_about_nothing(bad):
    z = jnp.array([[bad, 0.0, 0.0], [0.0, bad, 0.0], [bad, bad, bad], [0.0, 1.0, 0.0]])
    for label in range(3):
        np.testing.assert_array_equal(losses.correct(z, jnp.full(4, label)), [0, 0, 0, label == 1])


@given(
    values=hnp.arrays(np.float32, 6, elements=st.floats(-100, 100, width=32)),
    weight=hnp.arrays(np.float32, 6, elements=st.floats(0, 100, width=32)),
)
def test_weighted_mean(values, weight):
    mass = weight.astype(np.float64).sum()
    expected = (values.astype(np.float64) @ weight) / mass if mass > 0 else 0.0
    scale = np.abs(values).max(initial=0)
    np.testing.assert_allclose(losses.weighted_mean(values, weight), expected, rtol=1e-5, atol=1e-5 * scale + 1e-30)


def test_weighted_mean_of_nothing_is_zero_and_has_no_gradient():
    gradient = jax.grad(lambda v: losses.weighted_mean(v, jnp.zeros(3)))(jnp.array([1.0, -2.0, 5.0]))
    assert losses.weighted_mean(jnp.array([1.0, -2.0, 5.0]), jnp.zeros(3)) == 0
    np.testing.assert_array_equal(gradient, np.zeros(3))
