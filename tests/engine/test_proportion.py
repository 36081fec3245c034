"""How many examples personal models are tested on, and in what batches, from the work of a run."""

import numpy as np
import pytest

from fdjax.engine import proportion
from fdjax.engine.proportion import batch_of, choose

MNIST = proportion.Work(trained=60_000.0, rounds=1, own=np.full(100, 100), central=0, examples=10_000)


def test_evaluation_between_takes_a_quarter_of_the_work():
    """100 clients on MNIST, one epoch: 150,000 passes of training, of which a third is 50,000 of tests."""
    tests = choose("auto", MNIST, 100)
    assert (tests.between, tests.last) == (200, 10_000)  # 100 * 200, and 10,000 on own parts
    assert (
        tests.why
        == "personal models are tested on 200 of 10,000 test examples, on all at the end (the work of 6.7 rounds)"
    )
    assert choose("auto", MNIST._replace(central=30_000), 100).between == 100
    assert choose("auto", MNIST._replace(trained=600_000.0, rounds=10), 100).between == 2_000


@pytest.mark.parametrize("trained", [0.0, 3e3, 1e5, 1e6, 1e9])
@pytest.mark.parametrize("clients", [1, 7, 1000])
def test_no_more_than_asked_for_and_no_fewer_than_say_something(trained, clients):
    work = proportion.Work(trained, 1, np.full(clients, 3), 50, 730)
    tests = choose("auto", work, 20)
    assert proportion.LEAST <= tests.between <= tests.last == 730
    passes = 50 + clients * (20 + -(-tests.between // 20) * 20)
    assert passes <= proportion.PASSES * trained / 3 or tests.between == proportion.LEAST
    assert ("of the time" in tests.why) == (passes > proportion.PASSES * trained / 3)


def test_a_test_set_smaller_than_a_subsample_is_tested_in_full():
    assert choose("auto", MNIST._replace(trained=1.0, examples=37), 10)[:2] == (37, 37)


@pytest.mark.parametrize("kind", ["full", "own", "none"])
def test_what_is_asked_for_is_not_chosen(kind):
    tests = choose(kind, MNIST._replace(trained=1.0), 100)
    assert tests.between == tests.last == 10_000


def test_the_batch_follows_the_parts():
    rng = np.random.default_rng(0)
    assert batch_of(np.full(100, 100), 500, whole=False) == 100  # and not 128, or 500
    assert batch_of(np.full(10, 1000), 500, whole=False) == 500
    assert batch_of(np.zeros(5, int), 500, whole=False) == 500
    assert batch_of(np.asarray([3]), 2, whole=True) == 2
    for _ in range(20):
        own, most = rng.integers(0, 300, 30), int(rng.integers(1, 700))
        batch = batch_of(own, most, whole=False)
        costs = {b: sum(-(-n // b) * (b + proportion.OVERHEAD) for n in own) for b in (10, 20, 50, 100, 200, 500, most)}
        assert batch <= most
        assert costs[batch] == min(cost for b, cost in costs.items() if b <= most)


def test_like_partitions_share_a_batch():
    rng = np.random.default_rng(0)
    assert len({batch_of(rng.multinomial(10_000, np.full(100, 0.01)), 500, whole=True) for _ in range(30)}) == 1
