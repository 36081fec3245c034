"""Operations as a program executes them, against counts made by hand."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from benchmarks import speed_methods
from benchmarks.arithmetic import flops

A, B = jnp.ones((4, 5)), jnp.ones((5, 6))
PRODUCT = 2 * 4 * 5 * 6


def test_products_and_what_is_done_to_each_number():
    assert flops(jnp.matmul, A, B) == PRODUCT
    assert flops(lambda a, b: jnp.exp(a @ b).sum(), A, B) == PRODUCT + 24 + 24
    assert flops(lambda n: n * 3 + n, jnp.arange(7)) == 0  # integers


def test_a_convolution():
    x, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))
    layout = ("NHWC", "HWIO", "NHWC")
    found = flops(lambda x, k: lax.conv_general_dilated(x, k, (1, 1), "VALID", dimension_numbers=layout), x, kernel)
    assert found == 2 * (2 * 6 * 6 * 5) * (3 * 3 * 3)


def test_a_gradient_costs_a_product_more():
    """But for the first layer, of whose input none is made."""
    second = 2 * 4 * 6 * 7
    value = jax.value_and_grad(lambda w: (A @ w @ jnp.ones((6, 7))).sum())
    assert flops(value, B) == 2 * PRODUCT + 2 * second + 28  # the second layer's weights are fixed


def powers(turns):
    return lax.fori_loop(0, turns, lambda _, x: x @ jnp.ones((5, 5)), A)


def test_a_loop_counts_as_often_as_it_runs():
    for turns in (0, 1, 7):
        assert flops(powers, turns) == turns * 2 * 4 * 5 * 5
    assert flops(lambda x: lax.scan(lambda c, _: (c @ jnp.ones((5, 5)), c), x, length=3)[0], A) == 3 * 200


def test_lanes_of_a_loop_run_as_long_as_the_longest_and_keep_their_own_ends():
    turns = jnp.array([1, 3, 0])
    assert flops(lambda n: jax.vmap(powers)(n), turns) == 3 * 3 * 200
    by_values = lambda n: lax.fori_loop(0, n.astype(int), lambda _, x: x * 2.0, n)  # noqa: E731
    again = lambda n: powers(jax.vmap(by_values)(n).sum().astype(int))  # noqa: E731  1 * 2 + 2 * 4 = 10 turns
    assert flops(again, jnp.array([1.0, 2.0])) == 10 * 200 + 2 * 2 + 2  # two lanes of two turns, and their sum


def test_a_branch_costs_what_is_taken():
    for x, cost in ((1.0, PRODUCT + 20), (-1.0, PRODUCT)):
        assert flops(lambda x: lax.cond(x > 0, lambda: (A + 1) @ B, lambda: A @ B), x) == cost


@pytest.mark.exhaustive
def test_methods_are_timed_and_counted(tmp_path):
    speed_methods.measure(["fedavg", "fedprox"], tmp_path, repeats=1, tiny=True)
    folder = tmp_path / "speed_methods"
    rows = json.loads((folder / "results.json").read_text())["methods"]
    assert "| fedprox" in (folder / "table.md").read_text()
    assert rows["fedavg"]["operations_of_fedavgs"] == 1
    # Every step of 32 examples or fewer pulls 610 weights back: a difference, a product, a sum.
    assert 1 < rows["fedprox"]["operations_of_fedavgs"] < 1.2
