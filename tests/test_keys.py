"""The key tree, and the shuffle that needs no memory."""

import itertools
import math
import re
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import fdjax
from fdjax import keys
from fdjax.engine.step import exchange_key

# The keys are fixed, so no test below is flaky: a hypothesis that is true fails none of them by chance once it passed.
LEAST_P = 1e-4


def permutations(size, draws, seed=0):
    """`draws` shuffles of `[0, size)`, one a row."""
    many = jax.random.split(jax.random.key(seed), draws)
    return np.asarray(jax.jit(jax.vmap(lambda key: keys.shuffle(key, size)(jnp.arange(size))))(many))


def p_uniform(counts):
    return stats.chisquare(np.ravel(counts)).pvalue


def test_every_small_count_is_permuted():
    @jax.jit
    @jax.vmap
    def many(key, count):
        return keys.shuffle(key, count)(jnp.arange(200))

    counts = np.tile(np.arange(1, 201), 5)
    orders = np.asarray(many(jax.random.split(jax.random.key(3), len(counts)), counts))
    for count, order in zip(counts, orders, strict=True):
        np.testing.assert_array_equal(np.sort(order[:count]), np.arange(count))


@pytest.mark.parametrize("count", [600, 60_000, 2**17, 1_000_003])
def test_large_counts_are_permuted(count):
    order = jax.jit(lambda key, n: keys.shuffle(key, n)(jnp.arange(count)))(jax.random.key(1), count)
    assert order.dtype == jnp.int32
    assert (np.bincount(order, minlength=count) == 1).all()
    # Neither the identity nor anything near it: a random permutation has one fixed point on average.
    assert (np.asarray(order) == np.arange(count)).sum() < 10
    assert abs(np.corrcoef(order, np.arange(count))[0, 1]) < 5 / np.sqrt(count)


def test_the_largest_count_does_not_overflow():
    count = 2**31 - 1
    position = jnp.asarray(np.r_[np.arange(50_000), np.arange(count - 50_000, count)], jnp.int32)
    draw = jax.jit(lambda key: keys.shuffle(key, count)(position))
    for seed in range(5):
        order = np.asarray(draw(jax.random.key(seed)))
        assert order.min() >= 0
        assert order.max() < count
        assert len(np.unique(order)) == len(position)


def test_no_examples_and_one():
    for count in (0, 1):  # a client without examples asks for nothing, but is traced beside those that do
        assert keys.shuffle(jax.random.key(0), count)(jnp.int32(0)) == 0


def test_all_permutations_of_few_are_equally_likely():
    for size in (2, 3, 4):
        _, seen = np.unique(permutations(size, 20_000), axis=0, return_counts=True)
        assert len(seen) == math.factorial(size)
        assert p_uniform(seen) > LEAST_P, (size, seen)


@pytest.mark.parametrize("size", [7, 50])
def test_everything_goes_everywhere_equally_often(size):
    orders = permutations(size, 20_000, seed=1)
    for position in range(size):
        seen = np.bincount(orders[:, position], minlength=size)
        assert p_uniform(seen) > LEAST_P / size, (position, seen)


def test_pairs_go_everywhere_equally_often():
    size = 6
    orders = permutations(size, 20_000, seed=2)
    for i, j in itertools.combinations(range(size), 2):
        seen = np.bincount(orders[:, i] * size + orders[:, j], minlength=size**2)
        apart = seen.reshape(size, size)[~np.eye(size, dtype=bool)]
        assert p_uniform(apart) > LEAST_P / size**2, (i, j, apart)


def test_neighbours_do_not_stay_neighbours():
    size = 50
    orders = permutations(size, 4000, seed=4)
    step = np.mod(np.diff(orders, axis=1), size)  # a shuffle that only rotates or mirrors repeats few differences
    assert p_uniform(np.bincount(step.ravel(), minlength=size)[1:]) > LEAST_P


@pytest.mark.parametrize("related", ["epochs", "clients", "rounds", "exchanges"])
def test_shuffles_of_related_keys_are_unrelated(related):
    size, draws = 8, 20_000

    @jax.jit
    @jax.vmap
    def two(number):
        root = jax.random.key(7)
        if related == "epochs":
            key = keys.stream(root, "client", number)
            pair = [keys.stream(jax.random.fold_in(key, epoch), "shuffle") for epoch in (0, 1)]
        elif related == "exchanges":
            key = keys.stream(root, "round", number)
            pair = [keys.stream(keys.stream(exchange_key(key, e), "client", 5), "shuffle") for e in (0, 1)]
        else:
            where = (lambda i: (5, number + i)) if related == "clients" else (lambda i: (number + i, 5))
            pair = [
                keys.stream(keys.stream(keys.stream(root, "round", r), "client", c), "shuffle")
                for r, c in (where(0), where(1))
            ]
        return [keys.shuffle(key, size)(jnp.arange(size)) for key in pair]

    first, second = map(np.asarray, two(np.arange(draws)))
    for position in (0, 3, size - 1):  # the place in one given the place in the other
        seen = np.bincount(first[:, position] * size + second[:, position], minlength=size**2)
        assert p_uniform(seen) > LEAST_P, seen
    # The relation itself, second after the inverse of first, is a random permutation, and another one every time.
    relation = np.take_along_axis(second, np.argsort(first, axis=1), axis=1)
    assert p_uniform(np.bincount(relation[:, 0] * size + relation[:, 1], minlength=size**2)[
        ~np.eye(size, dtype=bool).ravel()
    ]) > LEAST_P  # fmt: skip


def test_the_shuffle_is_that_of_its_key_alone():
    """The same under jit, vmap, another number of positions and one position at a time."""
    count = 13
    many = jax.random.split(jax.random.key(0), 4)
    whole = permutations(count, 4)
    for key, order in zip(many, whole, strict=True):
        shuffle = keys.shuffle(key, count)
        np.testing.assert_array_equal(shuffle(jnp.arange(5)), order[:5])
        np.testing.assert_array_equal([shuffle(jnp.int32(i)) for i in range(count)], order)
        np.testing.assert_array_equal(shuffle(jnp.arange(12).reshape(3, 4)), order[:12].reshape(3, 4))


def test_exchanges_of_a_round_have_keys_of_their_own_and_the_first_has_the_rounds():
    key = keys.stream(jax.random.key(0), "round", 2)
    data = [jax.random.key_data(exchange_key(key, number)).tolist() for number in range(4)]
    assert data[0] == jax.random.key_data(key).tolist()
    assert len({*map(tuple, data)}) == 4


def test_streams_differ_by_purpose_and_number():
    root = jax.random.key(0)
    streams = [
        keys.stream(root, purpose, *numbers)
        for purpose in ("client", "server", "round", "shuffle")
        for numbers in [(), *((i,) for i in range(5)), *((i, j) for i in range(5) for j in range(5))]
    ]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in [root, *streams]}) == len(streams) + 1
    draws = [jax.random.normal(key, (1000,)) for key in streams[:8]]
    assert np.abs(np.corrcoef(draws) - np.eye(8)).max() < 0.2


def test_purposes_of_the_package_do_not_collide():
    text = "\n".join(path.read_text() for path in Path(fdjax.__file__).parent.rglob("*.py"))
    purposes = set(re.findall(r'\b(?:stream|at)\((?:[^()]|\([^()]*\))*?"([\w ]+)"', text))
    assert {"client", "round", "exchange", "server", "server state", "shuffle", "participants", "augment"} <= purposes
    assert {"teacher", "student", "subset"} <= purposes  # of methods, by `Context.at`
    assert len({zlib.crc32(purpose.encode()) for purpose in purposes}) == len(purposes)


def test_a_stream_does_not_depend_on_who_asks_beside_it():
    key = keys.stream(jax.random.key(0), "round", 3)
    ids = jnp.array([4, 0, 99_999, 7])
    together = jax.jit(jax.vmap(lambda i: jax.random.key_data(keys.stream(key, "client", i))))(ids)
    for i, data in zip(ids, together, strict=True):
        np.testing.assert_array_equal(jax.random.key_data(keys.stream(key, "client", int(i))), data)
