"""What an evaluation tests between, so that it stays in proportion to the training: chosen on the host, before the run.

Work is counted in forward passes of one example, as a test has them.
"""

from typing import NamedTuple

import numpy as np

from fdjax.types import Array

SHARE = 0.25  # of the time, at most, that evaluations between take, as far as work says it
PASSES = 2.5  # of an example that is trained on: three products where a test has one; 2.45 for a 2NN on a CPU
LEAST = 100  # examples of a subsample; fewer say little about a model
OVERHEAD = 20  # of a step of a test, in examples: measured on a CPU, between logistic regression (75) and a 2NN (0)


class Work(NamedTuple):
    """What a run trains and tests, as far as the choice depends on it."""

    trained: float  # examples of all clients between two evaluations, each as often as it is trained on
    rounds: int  # between two evaluations
    own: Array  # [C] examples of each client's own test part; zeros if they are not tested
    central: int  # examples that the central model is tested on, and those of a validation split
    examples: int  # M, of the test set


class Tests(NamedTuple):
    """On how many examples of the test set personal models are tested."""

    between: int
    last: int  # at the last evaluation: all of them, M
    why: str  # in words; empty where there is nothing to choose


def batch_of(own: Array, most: int, *, whole: bool) -> int:
    """Examples of a step of clients' tests, at most `most`: from a coarse grid, the one that makes least of padding.

    With `whole` they are tested on the test set too, of which LEAST examples at least.
    """
    sizes = np.asarray(own)
    sizes = np.concatenate([sizes[sizes > 0], np.full(len(sizes) if whole else 0, LEAST)])
    return min(_up_to(most), key=lambda batch: (_padded(sizes, batch, OVERHEAD), -batch))


def choose(kind: str, work: Work, batch: int) -> Tests:
    """The tests of personal models for a kind of --local_eval: all, or (auto) as many as keep to SHARE of the time."""
    M, C = work.examples, len(work.own)
    if kind != "auto":
        text = {"full": f"on all {M:,} test examples", "own": "on their own test parts alone", "none": "on nothing"}
        return Tests(M, M, f"personal models are tested {text[kind]}")
    training = PASSES * work.trained
    others = work.central + _padded(np.asarray(work.own), batch)

    def testing(examples: int) -> float:
        return others + C * _padded(np.asarray([examples]), batch)

    budget = training * SHARE / (1 - SHARE)
    fitting = [n for n in (*_up_to(M, LEAST), M) if testing(n) <= budget]
    if M in fitting:
        return Tests(M, M, f"personal models are tested on all {M:,} test examples")
    between = max(fitting, default=min(LEAST, M))
    why = f"personal models are tested on {between:,} of {M:,} test examples, on all at the end"
    if (rounds := testing(M) / max(training / work.rounds, 1)) >= 1:
        why += f" (the work of {rounds:.2g} rounds)"
    if not fitting:
        share = testing(between) / (testing(between) + training)
        why += f"; evaluations take about {share:.0%} of the time: a larger --eval_every or --local_eval=own takes less"
    return Tests(between, M, why)


def _up_to(most: int, least: int = 10) -> list[int]:
    """10, 20, 50, 100 ... from `least` on and below `most`, or `most` alone where there are none."""
    grid = [digit * 10**power for power in range(10) for digit in (1, 2, 5)]
    return [n for n in grid if least <= n < most] + [most]


def _padded(sizes: np.ndarray, batch: int, overhead: int = 0) -> float:
    """Examples of whole batches, and what their steps cost beside them."""
    return float(np.sum(-(-sizes // batch)) * (batch + overhead))
