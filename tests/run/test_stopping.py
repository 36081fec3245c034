"""Runs that end before their last round: which rule ends them when, alone, in a batch, and when they are resumed."""

import math

import numpy as np
import pytest
from run_cases import SMALL

import fdjax
from fdjax.errors import InputError
from fdjax.run import runner, seeds, settings, summary
from fdjax.run.stopping import reason_to_stop

SIX = SMALL | {"rounds": 6, "learning_rate": 0.05}
SPLIT = {"validation_fraction": 0.2}


def run(out=None, resume=False, **named):
    return runner.run(settings.make(**SIX | named), out, resume=resume, progress=False)


@pytest.fixture(scope="module")
def whole():
    return run()


def record(values, metric="central_accuracy", up=(), down=(), setup=0.0):
    evaluations = {"round": [*range(len(values))], metric: [*values]}
    return {
        "evaluations": evaluations,
        "rounds": {"bytes_up": [*up], "bytes_down": [*down]},
        "setup": {"bytes_up": setup},
    }


def first_stop(values, rule, metric="central_accuracy"):
    """The evaluation at which a run with these values ends, asked after each of them but the first."""
    chosen = settings.make(stop_metric=metric, **rule)
    ends = [
        e for e in range(1, len(values)) if reason_to_stop(chosen, record(values[: e + 1], metric), "central_accuracy")
    ]
    return ends[0] if ends else None


def patience_by_hand(values, patience, min_delta):
    """Written from the definition: count what was no better, one evaluation after another."""
    best, waited = None, 0
    for e, value in enumerate(values):
        if not math.isnan(value) and (best is None or value - best > min_delta):
            best, waited = value, 0
        else:
            waited += e > 0
        if e and waited >= patience:
            return e
    return None


def test_patience_counts_as_its_definition_does():
    rng = np.random.default_rng(0)
    for _ in range(200):
        values = rng.integers(0, 8, 12) / 8  # exact, and with ties
        values[rng.random(12) < 0.1] = math.nan
        patience, least = int(rng.integers(1, 5)), float(rng.integers(0, 3)) / 8
        assert first_stop(values.tolist(), {"patience": patience, "min_delta": least}) == patience_by_hand(
            values.tolist(), patience, least
        )


def test_a_loss_has_to_fall():
    values = [3.0, 2.0, 2.5, 2.1, 1.9]
    assert first_stop(values, {"patience": 2}, "central_loss") == 3
    assert first_stop(values, {"patience": 3}, "central_loss") is None


def test_what_is_not_a_number_reaches_nothing():
    assert first_stop([math.nan] * 3, {"stop_at_accuracy": 0.5}) is None
    assert first_stop([math.nan] * 4, {"patience": 3}) == 3


def test_bytes_of_the_set_up_count():
    chosen = settings.make(stop_at_bytes=100)
    assert not reason_to_stop(chosen, record([0, 0], up=[30], down=[30], setup=39), "central_accuracy")
    found = reason_to_stop(chosen, record([0, 0], up=[30], down=[30], setup=40), "central_accuracy")
    assert (found["round"], found["rule"]) == (1, "bytes")


def test_a_run_ends_at_the_first_evaluation_that_reaches_the_accuracy(whole):
    values = whole.evaluations["central_accuracy"]
    target = sorted({*values[1:]})[1]
    end = next(e for e in range(1, 7) if values[e] >= target)
    assert 0 < end < 6
    result = run(stop_at_accuracy=target)
    assert result.round == end == result.stopped["round"]
    assert result.stopped["rule"] == "accuracy"
    assert result.evaluations["central_accuracy"] == values[: end + 1]
    assert result.rounds["train_loss"] == whole.rounds["train_loss"][:end]
    assert not whole.stopped
    assert whole.ended
    assert result.ended


def test_bytes_end_a_run_after_the_round_that_reaches_them(whole):
    sent = np.add(whole.rounds["bytes_up"], whole.rounds["bytes_down"])
    assert run(stop_at_bytes=float(sent[2])).round == 3
    assert run(stop_at_bytes=float(sent[2]) + 1).round == 4
    assert not run(stop_at_bytes=float(sent[-1]) + 1).stopped


def test_a_goal_that_is_never_reached_compiles_and_changes_nothing(whole):
    result = run(stop_at_accuracy=1.0, stop_at_bytes=1e15)
    assert (result.rounds, result.evaluations) == (whole.rounds, whole.evaluations)


def test_a_resumed_run_decides_as_if_it_had_never_stopped(tmp_path):
    rule = {"stop_metric": "central_loss", "patience": 3, "min_delta": 100.0}
    straight = run(**rule)
    assert straight.round == 3
    run(tmp_path, rounds=2, **rule)
    resumed = run(tmp_path, resume=True, **rule)
    assert resumed.stopped == straight.stopped
    assert resumed.evaluations == straight.evaluations
    again = run(tmp_path, resume=True, **rule)  # which is over
    assert again.stopped == straight.stopped
    assert again.rounds == straight.rounds
    assert fdjax.load(tmp_path).stopped == straight.stopped
    assert run(tmp_path, resume=True).round == 6  # without the rule it goes on
    assert not run(tmp_path, resume=True, stop_at_bytes=1.0).stopped  # all rounds are done, so that nothing stopped it


def test_the_last_evaluation_of_a_stopped_run_is_in_full(monkeypatch):
    """Of clients that have models of their own."""
    whole = run(algorithm="fd")
    build, M = runner.build, int(whole.final["local_examples"])

    def with_few_tests(chosen):
        built = build(chosen)
        return built._replace(tests=built.tests._replace(between=3))

    monkeypatch.setattr(runner, "build", with_few_tests)
    result = run(algorithm="fd", stop_at_bytes=whole.rounds["bytes_up"][1] + whole.rounds["bytes_down"][1])
    assert result.evaluations["local_examples"] == [3, 3, M]
    assert {len(values) for values in result.evaluations.values()} == {3}
    assert result.final == {name: values[2] for name, values in whole.evaluations.items()}


def test_seeds_of_a_batch_end_each_by_itself():
    """One of them at the second superstep, another at the third at the earliest; who watches sees those that end."""
    alone = [run(seed=seed).evaluations["central_loss"] for seed in range(3)]
    waits = {"stop_metric": "central_loss", "patience": 1, "min_delta": float(np.median([x[0] - x[1] for x in alone]))}
    ends = [patience_by_hand([-x for x in values], 1, waits["min_delta"]) or 6 for values in alone]
    assert 1 in ends
    assert {*ends} != {1}
    together = seeds.run_seeds(settings.make(**SIX | waits), [0, 1, 2], progress=False)
    assert [result.round for result in together] == ends
    for result, values in zip(together, alone, strict=True):
        assert result.stopped.get("round", 6) == result.round
        np.testing.assert_allclose(result.evaluations["central_loss"], values[: result.round + 1], rtol=1e-4)
    text = summary.summary(together)
    assert ", ".join(map(str, ends)) in text
    assert f"patience ({sum(end < 6 for end in ends)})" in text


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"stop_at_accuracy": 1.5}, "--stop_at_accuracy=1.5: expected a number from 0 to 1"),
        ({"stop_at_accuracy": "90%"}, "--stop_at_accuracy='90%': expected a number from 0 to 1"),
        ({"stop_at_bytes": -1.0}, "--stop_at_bytes=-1.0: expected a finite number of at least 0"),
        ({"stop_at_bytes": math.inf}, "--stop_at_bytes=inf: expected a finite number of at least 0"),
        ({"patience": 2.5}, "--patience=2.5: expected a whole number of at least 0"),
        ({"patience": 3}, "--patience=3 goes by the accuracy on a validation split, and there is none"),
        ({"patience": 3, "min_delta": -0.1, **SPLIT}, "--min_delta=-0.1: expected a finite number of at least 0"),
        ({"min_delta": 0.1}, "--min_delta=0.1: nothing waits for a better metric; give --patience too"),
        ({"stop_metric": "central_loss"}, "--stop_metric=central_loss: nothing goes by a metric; give --patience or"),
        ({"patience": 3, "stop_metric": "validation_accuracy"}, "there is no validation split"),
        ({"stop_at_accuracy": 0.9, "stop_metric": "central_loss"}, "which is better when it is smaller"),
        (
            {"patience": 3, "stop_metric": "central_class_accuracy", "metrics": "class_accuracy"},
            "central_class_accuracy_9'?",
        ),
        ({"patience": 3, "stop_metric": "central_acuracy"}, "did you mean 'central_accuracy'?"),
        ({"patience": 3, "stop_metric": "worst"}, "unknown --stop_metric 'worst'; known: central_accuracy"),
    ],
)
def test_rules_that_nothing_could_decide_are_told_in_one_line(given, told, monkeypatch):
    monkeypatch.setattr(runner, "_compile", None)  # nothing may be compiled before
    with pytest.raises(InputError) as error:
        run(**given)
    assert told in str(error.value)
    assert "\n" not in str(error.value)
