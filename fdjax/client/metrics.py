"""The metrics that `--metrics` knows by name, with their definitions.

Of n tested examples, y_i is a label, z_i [K] are logits, p_i = softmax(z_i), and yhat_i is the place of the largest. An
example whose logits are not all finite, as after the loss diverged, is predicted as no class and has the lowest score
for every class; a calibration error is NaN then.
"""

import jax
import jax.numpy as jnp

from fdjax.client import losses
from fdjax.client.metric import Metric

CALIBRATION_BINS = 15
SCORE_BINS = 1024  # of the ROC curve
_SCALE = 8.0  # log-odds at which half of the bins on each side are used up


def _by_class(logits: jax.Array, y: jax.Array, weight: jax.Array) -> tuple[jax.Array, ...]:
    """Examples, correct ones and predictions of each class, [K] each."""
    K = logits.shape[-1]
    finite = jnp.all(jnp.isfinite(logits), -1)
    predicted = jax.nn.one_hot(jnp.argmax(logits, -1), K) * (weight * finite)[:, None]
    true = jax.nn.one_hot(y, K)
    return jnp.sum(true * weight[:, None], 0), jnp.sum(true * predicted, 0), jnp.sum(predicted, 0)


def _share(part: jax.Array, whole: jax.Array) -> jax.Array:
    """part / whole, NaN where there is nothing."""
    return part / jnp.where(whole > 0, whole, jnp.nan)


def _mean_where(values: jax.Array, there: jax.Array) -> jax.Array:
    return _share(jnp.sum(jnp.where(there, values, 0)), jnp.sum(there))


def _balanced_accuracy(sums: tuple[jax.Array, ...]) -> jax.Array:
    examples, correct, _ = sums
    return _mean_where(_share(correct, examples), examples > 0)


def _macro_f1(sums: tuple[jax.Array, ...]) -> jax.Array:
    examples, correct, predictions = sums
    return _mean_where(_share(2 * correct, examples + predictions), examples + predictions > 0)


def _inside(sums: tuple[jax.Array, ...], held: jax.Array) -> jax.Array:
    examples, correct, _ = sums
    return _share(jnp.sum(jnp.where(held > 0, correct, 0)), jnp.sum(jnp.where(held > 0, examples, 0)))


def _outside(sums: tuple[jax.Array, ...], held: jax.Array) -> jax.Array:
    return _inside(sums, jnp.where(held > 0, 0, 1))


def _calibration(logits: jax.Array, y: jax.Array, weight: jax.Array) -> tuple[jax.Array, ...]:
    """Examples, correct ones and confidences of each bin, [15] each."""
    confidence = jnp.max(jax.nn.softmax(logits), -1)
    place = jnp.ceil(jnp.nan_to_num(confidence) * CALIBRATION_BINS).astype(jnp.int32) - 1
    place = jax.nn.one_hot(jnp.clip(place, 0, CALIBRATION_BINS - 1), CALIBRATION_BINS) * weight[:, None]
    return jnp.sum(place, 0), losses.correct(logits, y) @ place, jnp.where(weight > 0, confidence, 0) @ place


def _expected_error(sums: tuple[jax.Array, ...]) -> jax.Array:
    examples, correct, confidence = sums
    return _share(jnp.sum(jnp.abs(correct - confidence)), jnp.sum(examples))


def score_bin(logits: jax.Array) -> jax.Array:
    """[B, K] int32: the bin of each class's log-odds s = log p_c / (1 - p_c), of u = s / (8 + |s|) in (-1, 1)."""
    top = jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[-1], dtype=bool)
    largest = jnp.max(logits, -1, keepdims=True)
    exponentials = jnp.exp(logits - largest)
    rest = jnp.sum(exponentials, -1, keepdims=True) - exponentials  # 1 or more, but for the largest, where it cancels
    beside_top = jax.nn.logsumexp(jnp.where(top, -jnp.inf, logits), -1, keepdims=True)
    odds = logits - jnp.where(top, beside_top, largest + jnp.log(jnp.where(top, 1, rest)))
    u = odds / (_SCALE + jnp.abs(odds))
    place = jnp.floor((u + 1) / 2 * SCORE_BINS)
    finite = jnp.all(jnp.isfinite(logits), -1)[:, None]
    return jnp.where(finite, jnp.clip(jnp.nan_to_num(place), 0, SCORE_BINS - 1), 0).astype(jnp.int32)


def _scores(logits: jax.Array, y: jax.Array, weight: jax.Array) -> jax.Array:
    """[K, 2, bins]: examples of other classes, and of this one, by the bin of their score."""
    K = logits.shape[-1]
    of_class = jax.nn.one_hot(y, K, dtype=jnp.int32)  # [B, K]
    labels = jnp.broadcast_to(jnp.arange(K), of_class.shape)
    room = jnp.zeros((K, 2, SCORE_BINS))
    return room.at[labels, of_class, score_bin(logits)].add(jnp.broadcast_to(weight[:, None], of_class.shape))


def _area(scores: jax.Array) -> jax.Array:
    others, own = scores[:, 0], scores[:, 1]  # [K, bins]
    below = jnp.cumsum(others, -1) - others
    size, other_size = jnp.sum(own, -1), jnp.sum(others, -1)
    areas = jnp.sum(_share(own, size[:, None]) * _share(below + others / 2, other_size[:, None]), -1)
    return _mean_where(areas, (size > 0) & (other_size > 0))


def jain_index(accuracy: jax.Array, tested: jax.Array) -> jax.Array:
    """(sum_k a_k)^2 / (C sum_k a_k^2), over the C tested clients; 1 if all have the same, NaN if all have 0."""
    a = jnp.where(tested, accuracy, 0)
    return _share(jnp.sum(a) ** 2, jnp.sum(tested) * jnp.sum(a**2))


FORGETTING = Metric(
    "forgetting", unit="%", better="lower",
    summary="mean over classes of the highest class_accuracy so far, less that of now; of mean accuracies of clients",
)  # fmt: skip
# It is of many evaluations, so that none of them measures it: see `fdjax.run.derived`.

METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "class_accuracy", sums=_by_class, finish=lambda sums: _share(sums[1], sums[0]), unit="%",
            summary="sum_i [yhat_i = y_i = c] / sum_i [y_i = c], by class; NaN for a class without a tested example",
        ),
        Metric(
            "balanced_accuracy", sums=_by_class, finish=_balanced_accuracy, unit="%",
            summary="mean of class_accuracy over the classes that have a tested example",
        ),
        Metric(
            "macro_f1", sums=_by_class, finish=_macro_f1, unit="%",
            summary="mean of 2 tp_c / (2 tp_c + fp_c + fn_c) over the classes that occur, as label or as prediction",
        ),
        Metric(
            "roc_auc", sums=_scores, finish=_area,
            summary="area under the ROC curve of p_c, class c against the rest, mean over the classes with both, so "
            "NaN where all examples are of one class; clients without a value are left out and counted. By 1,024 bins "
            "of log-odds: a pair in one bin counts 1/2, so it is off by at most half the share of such pairs",
        ),
        Metric(
            "calibration_error", sums=_calibration, finish=_expected_error, better="lower",
            summary="expected calibration error (Guo et al. 2017): sum_b n_b / n |accuracy_b - confidence_b|, 15 bins",
        ),
        Metric(
            "inside_accuracy", sums=_by_class, finish=_inside, holds=True, unit="%",
            summary="accuracy on tested examples of labels that the client holds in training; NaN without such",
        ),
        Metric(
            "outside_accuracy", sums=_by_class, finish=_outside, holds=True, unit="%",
            summary="accuracy on tested examples of labels that it does not hold; NaN without such",
        ),
        Metric(
            "jain_index", across=jain_index,
            summary="Jain's index of clients' own accuracies, (sum_k a_k)^2 / (C sum_k a_k^2): 1 if all are alike",
        ),
    )
}  # fmt: skip
