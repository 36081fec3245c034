"""Losses on logits, one value an example; temperature, direction and reduction are always explicit.

Every function takes logits `[..., K]` and returns `[...]`, divergences and cross-entropies summed over the K classes
(torch's `batchmean`; its `mean` is 1/K of that). None multiplies by T^2: a method that wants the factor writes it, as
its paper does or does not. No gradient is stopped: a fixed teacher is the caller's to fix.
"""

import jax
import jax.numpy as jnp
import optax

from fdjax.types import Array


def cross_entropy(logits: Array, labels: Array, smoothing: float = 0.0) -> jax.Array:
    """CE(p, y) = -log softmax(z)_y, for labels `[...]` int32.

    With label smoothing s: CE = -sum_c ((1 - s) [c = y] + s / K) log softmax(z)_c. Source: Szegedy et al. (2016), 7.
    """
    target = jax.nn.one_hot(labels, logits.shape[-1])
    if smoothing:
        target = optax.smooth_labels(target, smoothing)
    return -jnp.sum(target * jax.nn.log_softmax(logits), axis=-1)


def kl_divergence(teacher: Array, student: Array, temperature: Array | float = 1.0) -> jax.Array:
    """KL(teacher || student) = sum_c q_c (log q_c - log p_c), q = softmax(teacher / T), p = softmax(student / T).

    Source: Hinton, Vinyals, Dean (2015), section 2.
    """
    log_q = jax.nn.log_softmax(teacher / temperature)
    log_p = jax.nn.log_softmax(student / temperature)
    return jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)


def reverse_kl_divergence(teacher: Array, student: Array, temperature: Array | float = 1.0) -> jax.Array:
    """KL(student || teacher) = sum_c p_c (log p_c - log q_c), q = softmax(teacher / T), p = softmax(student / T).

    Mode-seeking: the student's own entropy is in its gradient. Source: the Glasgow poster's L_S and L_T.
    """
    return kl_divergence(student, teacher, temperature)


def soft_cross_entropy(target: Array, student: Array, temperature: Array | float = 1.0) -> jax.Array:
    """CE(target, p) = -sum_c target_c log p_c, for probabilities `target` and p = softmax(student / T).

    T softens the student only. It is KL(target || p) plus `entropy(target)`: the same gradient for a fixed target.

    Source: Jeong et al. (2018), FD's regulariser; Itahara et al. (2021), DS-FL's distillation.
    """
    return -jnp.sum(target * jax.nn.log_softmax(student / temperature), axis=-1)


def others(logits: Array, labels: Array) -> jax.Array:
    """The logits of all classes but the label's, in order: `[..., K]` and labels `[...]` to `[..., K - 1]`.

    Source: Lee et al. (2022), FedNTD's not-true logits.
    """
    labels = jnp.asarray(labels)[..., None]
    before = jnp.arange(logits.shape[-1] - 1).reshape(*(1,) * (labels.ndim - 1), -1) < labels
    return jnp.where(before, logits[..., :-1], logits[..., 1:])


def entropy(probabilities: Array) -> jax.Array:
    """H(p) = -sum_c p_c log p_c in nats, with 0 log 0 = 0."""
    positive = probabilities > 0  # log sees no 0, whose gradient would be NaN
    return -jnp.sum(jnp.where(positive, probabilities * jnp.log(jnp.where(positive, probabilities, 1)), 0), axis=-1)


def mean_absolute_error(teacher: Array, student: Array) -> jax.Array:
    """(1/K) sum_c |teacher_c - student_c|, of logits as they are: the mean over classes, not their sum.

    Source: Li and Wang (2019), FedMD's digest, whose code asks Keras for "mean_absolute_error" of logits.
    """
    return jnp.mean(jnp.abs(teacher - student), axis=-1)


def mean_squared_error(teacher: Array, student: Array) -> jax.Array:
    """(1/K) sum_c (teacher_c - student_c)^2, of logits as they are: the mean over classes, not their sum.

    Serves embeddings as well. Source: FedGKD's MSE variant and FedProto's regulariser, in their code.
    """
    return jnp.mean(jnp.square(teacher - student), axis=-1)


def correct(logits: Array, labels: Array) -> jax.Array:
    """1.0 where the largest logit is the label's, else 0.0; 0.0 where logits are not finite, as after divergence."""
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    return (finite & (jnp.argmax(logits, axis=-1) == labels)).astype(jnp.float32)


def weighted_mean(values: Array, weight: Array) -> jax.Array:
    """sum_i w_i v_i / sum_i w_i, 0 without any weight."""
    mass = jnp.sum(weight)
    return jnp.sum(values * weight) / jnp.where(mass > 0, mass, 1.0)
