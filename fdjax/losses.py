"""Losses on logits, one value an example; temperature, direction and reduction are always explicit.

Every function takes logits `[..., K]` and returns `[...]`. None multiplies by T^2: a method that wants the factor
writes it, as its paper does or does not.
"""

import jax
import jax.numpy as jnp

from fdjax.types import Array


def cross_entropy(logits: Array, labels: Array) -> jax.Array:
    """CE(p, y) = -log softmax(z)_y, for labels `[...]` int32."""
    one_hot = jax.nn.one_hot(labels, logits.shape[-1])
    return -jnp.sum(one_hot * jax.nn.log_softmax(logits), axis=-1)


def kl_divergence(teacher: Array, student: Array, temperature: Array | float = 1.0) -> jax.Array:
    """KL(teacher || student) = sum_c q_c (log q_c - log p_c), q = softmax(teacher / T), p = softmax(student / T).

    Source: Hinton, Vinyals, Dean (2015), section 2. No gradient is stopped: a fixed teacher is the caller's to fix.
    """
    log_q = jax.nn.log_softmax(teacher / temperature)
    log_p = jax.nn.log_softmax(student / temperature)
    return jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)


def correct(logits: Array, labels: Array) -> jax.Array:
    """1.0 where the largest logit is the label's, else 0.0; 0.0 where logits are not finite, as after divergence."""
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    return (finite & (jnp.argmax(logits, axis=-1) == labels)).astype(jnp.float32)


def weighted_mean(values: Array, weight: Array) -> jax.Array:
    """sum_i w_i v_i / sum_i w_i, 0 without any weight."""
    mass = jnp.sum(weight)
    return jnp.sum(values * weight) / jnp.where(mass > 0, mass, 1.0)
