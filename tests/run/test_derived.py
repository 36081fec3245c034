"""What follows from evaluations: what is better for a metric, rounds to a target, forgetting; without any run."""

import jax.numpy as jnp
import numpy as np
import pytest

from fdjax.client.metric import Metric
from fdjax.errors import InputError
from fdjax.run import derived, experiment, metrics, runner, settings, stopping

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


def test_forgetting_of_one_evaluation_after_another(rng):
    """As the definition has it, also where the last one is replaced, and where a resumed run begins in the middle."""
    A = rng.random((7, 3))
    A[rng.random((7, 3)) < 0.3] = NAN
    expected = [NAN]
    for t in range(1, 7):
        lost = [max(A[:t, c][~np.isnan(A[:t, c])], default=NAN) - A[t, c] for c in range(3)]
        known = [x for x in lost if not np.isnan(x)]
        expected.append(sum(known) / len(known) if known else NAN)
    found, adding = {}, derived.Forgetting()
    for t in range(7):
        adding = derived.Forgetting() if t == 4 else adding
        for values in (A[t] + 0.25, A[t]):
            for history in found.values():
                del history[t:]
            for c in range(3):
                found.setdefault(f"central_class_accuracy_{c}", []).append(values[c])
            adding.add(found)
    np.testing.assert_allclose(found["central_forgetting"], expected)
    np.testing.assert_allclose(derived.forgetting(A), expected)


MNIST = {"dataset": "mnist_sample", "num_clients": 5, "train_fraction": 0.05, "model": "mclr", "devices": 1}
COMPARED = [
    ({"algorithm": "local", "metrics": "forgetting"}, r"^--metrics=forgetting would compare clients' models on 100"),
    ({"algorithm": "local", "targets": "0.8"}, r"^--targets=0.8 would .* all [\d,]+ at the end \(--local_eval=auto\);"),
    ({"algorithm": "ensemble", "targets": "0.8", "metrics": "forgetting"}, r"^--metrics=forgetting and --targets=0.8 "),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), COMPARED, ids=[message[:30] for _, message in COMPARED])
def test_samples_that_are_not_compared(fields, message, monkeypatch):
    monkeypatch.setattr(runner, "_compile", None)  # nothing may be compiled before
    with pytest.raises(InputError, match=message) as error:
        runner.run(settings.make(**MNIST | fields), progress=False)
    assert "\n" not in str(error.value)
    derived.check_in_full(experiment.build(settings.make(**MNIST | fields, local_eval="full")))


@pytest.mark.parametrize("name", ["central_class_accuracy_0", "central_forgetting"])
def test_what_follows_from_evaluations_may_end_a_run(name):
    fields = {"patience": 2, "stop_metric": name, "metrics": "class_accuracy,forgetting"}
    stopping.check_watched(experiment.build(settings.make(**MNIST | fields)))


def test_the_central_model_is_tested_in_full():
    derived.check_in_full(experiment.build(settings.make(**MNIST, targets="0.8", metrics="forgetting")))
