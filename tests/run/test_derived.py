"""What follows from evaluations: what is better for a metric, rounds to a target, forgetting; without any run."""

import jax.numpy as jnp
import numpy as np
import pytest

from fdjax.client.metric import Metric
from fdjax.errors import InputError
from fdjax.run import derived, metrics

DISTANCE = Metric("distance", per_example=lambda z, y: jnp.abs(z[:, 0]), better="lower")
MY_LOSS = Metric("my_loss", per_example=lambda z, y: z[:, 0])  # whose author says that higher is better
HELD = metrics.resolve([DISTANCE, MY_LOSS, "class_accuracy"])
BETTER = [
    ("central_distance", "lower"), ("own_distance", "lower"), ("central_my_loss", "higher"), ("central_loss", "lower"),
    ("central_class_accuracy_2", "higher"), ("local_forgetting", "lower"), ("client_std", "lower"),
    ("own_calibration_error", "lower"), ("central_roc_auc", "higher"), ("central_auc", ""), ("worst_client", "higher"),
    ("own_accuracy_weighted", "higher"), ("new_accuracy_tuned", "higher"), ("local_examples", ""),
    ("own_distance_undefined", ""), ("client_distance", ""),
]  # fmt: skip


@pytest.mark.parametrize(("name", "better"), BETTER)
def test_what_is_better(name, better):
    """As settings hold the metrics, and as results.json describes them to who has not their files."""
    for asked in (HELD, metrics.described(HELD)):
        assert metrics.better(name, asked) == better
        assert metrics.falls(name, asked) == (better == "lower")


def test_a_metric_that_nobody_describes_goes_by_its_name():
    assert metrics.better("central_distance", None) == ""
    assert metrics.falls("central_my_loss", None)


NAN = float("nan")


@pytest.mark.parametrize(
    ("values", "target", "round"),
    [([0.1, 0.5, 0.7], 0.6, 3.0), ([0.1, 0.5, 0.4], 0.6, None), ([0.6, 0.1, 0.2], 0.5, 0), ([0.2, 0.1, 0.4], 0.3, 3.0),
     ([0.2, NAN, 0.4], 0.4, 4.0), ([NAN, 0.5, 0.6], 0.4, 2.0), ([-3.0, -2.0, -1.0], -1.5, 3.0)],
)  # fmt: skip
def test_rounds_to(values, target, round):
    """A loss that falls reaches its target when its negative would."""
    for sign in (1, -1):
        found = derived.rounds_to([0, 2, 4], [sign * value for value in values], sign * target, falls=sign < 0)
        assert found == pytest.approx(round) if round is not None else found is None


def test_a_loss_that_was_infinite():
    assert derived.rounds_to([0, 2, 4], [np.inf, 3.0, 1.0], 2.0, falls=True) == 3.0
    assert derived.rounds_to([0, 2, 4], [np.inf, 3.0, 1.0], 3.5, falls=True) == 2.0


def test_targets_of_what_is_no_accuracy():
    assert derived.resolve("2.5, 0.5", accuracies=False) == "2.5,0.5"
    assert derived.resolve([-1.0], accuracies=False) == "-1"


@pytest.mark.parametrize("given", ["inf", "2,2", "", "low", [True]])
def test_targets_that_are_none(given):
    with pytest.raises(InputError, match=r"^--targets=.*: expected finite numbers, each another, e.g. 1.5,0.5$"):
        derived.resolve(given, accuracies=False)


def test_forgetting_of_classes_that_were_not_tested():
    A = [[0.5, NAN, NAN], [0.9, 0.2, NAN], [0.6, NAN, NAN], [0.8, 0.1, NAN]]
    np.testing.assert_allclose(derived.forgetting(A), [NAN, -0.4, 0.3, (0.1 + 0.1) / 2])
