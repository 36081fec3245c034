"""How much clients of a group learn from each other, instead of from labels: weights, and mixtures of predictions.

Equations are ours; the methods that use them, `group_distillation` and `group_distillation_proxy`, have them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fdjax.client import losses
from fdjax.contract import HParams
from fdjax.method import HParam
from fdjax.types import Array

_MOST = 0.9
DIVERGENCES = {"reverse": losses.reverse_kl_divergence, "forward": losses.kl_divergence}  # (other, oneself)
WEIGHTS = {
    "alpha_max": HParam(1.0, high=2 * _MOST, help="twice alpha, a student's weight of soft labels, at equal losses"),
    "beta_max": HParam(1.0, high=2 * _MOST, help="twice beta, a teacher's weight of soft labels, at equal losses"),
    "kappa": HParam(1.0, help="how much alpha and beta follow the difference of losses"),
    "memory": HParam(0.5, high=0.99, help="what is kept of the losses, and revenues, of the rounds before"),
}


class Weights(NamedTuple):
    """How strongly clients learn from others."""

    alpha: Array  # [C]: as a student, from teacher and peers together
    beta: Array  # [C]: as a teacher, from its students
    rho: Array  # []: the peers' part of alpha
    worth: Array  # [C, C]: of a peer [., C] for a client [C, .]


def soft_weight(most: Array, kappa: Array, own: Array, other: Array) -> jax.Array:
    """The weight of another's soft labels: the larger, the more one's `own` loss is above the `other`'s."""
    return jnp.minimum(most * jax.nn.sigmoid(kappa * (own - other)), _MOST)


def average(old: Array, new: Array, known: Array, decay: Array) -> jax.Array:
    """The exponential average of numbers of which the first is not averaged with anything."""
    return jnp.where(known, decay * old + (1 - decay) * new, new)


def soft_weights(hparams: HParams, teacher: jax.Array, ce: jax.Array, known: jax.Array) -> tuple[jax.Array, jax.Array]:
    """alpha and beta [C] by the losses `ce` [C] of clients and their teachers, and of clients and their students' mean.

    Where the loss of the other side is not `known` [C] it counts as the same.
    """
    students = is_student(teacher, known)
    of_students = jnp.sum(students * ce[None], -1) / jnp.maximum(jnp.sum(students, -1), 1)
    of_students = jnp.where(jnp.any(students, -1), of_students, ce)
    of_teacher = jnp.where(known[teacher], ce[teacher], ce)
    kappa = hparams["kappa"]
    return soft_weight(hparams["alpha_max"], kappa, ce, of_teacher), soft_weight(
        hparams["beta_max"], kappa, ce, of_students
    )


def has_teacher(teacher: jax.Array) -> jax.Array:
    """Whether clients [C] have another one for a teacher."""
    return teacher != jnp.arange(len(teacher))


def is_teacher(teacher: jax.Array, present: Array) -> jax.Array:
    """Whether the client [., C], if `present` [C], is the teacher of the client [C, .]."""
    taught = (teacher[:, None] == jnp.arange(len(teacher))[None]) & has_teacher(teacher)[:, None]
    return taught & jnp.asarray(present)[None]


def is_student(teacher: jax.Array, present: Array) -> jax.Array:
    """Whether the client [., C], if `present` [C], is a student of the client [C, .]."""
    return is_teacher(teacher, jnp.ones(len(teacher), bool)).T & jnp.asarray(present)[None]


def is_peer(teacher: jax.Array, present: Array) -> jax.Array:
    """Whether the client [., C], if `present` [C], has the same teacher as the client [C, .]."""
    alike = (teacher[:, None] == teacher[None]) & ~jnp.eye(len(teacher), dtype=bool)
    return alike & has_teacher(teacher)[:, None] & has_teacher(teacher)[None] & jnp.asarray(present)[None]


def influence(teacher: jax.Array, present: Array, weights: Weights) -> jax.Array:
    """How much each client [C, .] learns from each other one [., C]; what is left of 1 is for its own labels.

    As a student alpha: (1 - rho) from its teacher, rho from its peers by their worth. Where the teacher, or every peer,
    is absent, the others have all of alpha, so rho does not hold. As a teacher beta, from its students alike. Who is
    both does half of each.
    """
    above = (1 - weights.rho) * is_teacher(teacher, present)
    beside = weights.rho * _shares(is_peer(teacher, present) * weights.worth)
    as_student, as_teacher = _shares(above + beside), _shares(is_student(teacher, present).astype(jnp.float32))
    number = sum(jnp.any(part > 0, -1).astype(jnp.float32) for part in (as_student, as_teacher))
    total = jnp.asarray(weights.alpha)[:, None] * as_student + jnp.asarray(weights.beta)[:, None] * as_teacher
    return total / jnp.maximum(number, 1)[:, None]


def _shares(rows: Array) -> jax.Array:
    total = jnp.sum(rows, -1, keepdims=True)
    return jnp.asarray(rows) / jnp.where(total > 0, total, 1)


def mixture(divergence: str, weights: jax.Array, logits: jax.Array) -> jax.Array:
    """Logits [S, N, K] of mixtures, by the rows of `weights` [S, C], of p = softmax of `logits` [C, N, K].

    For sum_j w_j KL(p_i || p_j) it is the geometric mean, for sum_j w_j KL(p_j || p_i) the arithmetic one: the
    divergence from it, times sum_j w_j, has the same gradient. A row of zeros has some finite mixture.
    """
    log_p, shares = jax.nn.log_softmax(logits), _shares(weights)
    if divergence == "reverse":
        return jnp.tensordot(shares, log_p, 1)
    return jnp.log(jnp.maximum(jnp.tensordot(shares, jnp.exp(log_p), 1), 1e-30))
