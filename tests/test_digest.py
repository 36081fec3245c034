"""Values of one content have one digest, in any process; others another, as far as that can be told."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdjax import digest

SCALE = 2.0
VALUES = """
import functools
import flax.linen as nn
import jax
import numpy as np
SCALE = 2.0
def times(k):
    def f(x, y={"b": 1, "a": (2, None)}):
        return SCALE * k * helper(x)
    return f
def helper(x):
    return [i + 1 for i in x]
class Net(nn.Module):
    width: int = 3
    act: object = nn.relu
    @nn.compact
    def __call__(self, x):
        return self.act(nn.Dense(self.width)(x))
VALUES = (times(1), times(np.arange(3)), Net, Net(4), jax.jit(times(2)), functools.partial(times(1), 3), {3, 1, 2})
"""


def run(text):
    scope = {"__name__": "somebodys"}
    exec(text, scope)  # noqa: S102
    return scope["VALUES"]


def test_the_same_in_another_process():
    code = VALUES + "from fdjax import digest\nprint(*(digest.of(value) for value in VALUES), sep='\\n')"
    found = [
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, cwd=Path(__file__).parents[1],
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert found[0] == found[1]
    lines = found[0].splitlines()
    assert len({*lines}) == len(lines) == 7
    assert all("True" in line for line in lines)


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ("SCALE = 2.0", "SCALE = 3.0", (False, False, True, True, False, False, True)),
        ("i + 1", "i + 2", (False, False, True, True, False, False, True)),
        ('"b": 1, "a": (2, None)', '"b": 1, "a": (3, None)', (False, False, True, True, False, False, True)),
        ("nn.Dense(self.width)", "nn.Dense(1 + self.width)", (True, True, False, False, True, True, True)),
        ("width: int = 3", "width: int = 5", (True, True, False, False, True, True, True)),
        ("def helper", "\n# a comment\ndef helper", (True,) * 7),
    ],
)
def test_code_counts_and_comments_do_not(before, after, same):
    assert before in VALUES
    pairs = zip(run(VALUES), run(VALUES.replace(before, after)), strict=True)
    assert tuple(digest.of(one) == digest.of(other) for one, other in pairs) == same


def test_what_cannot_be_told_is_said():
    with open(os.devnull) as nothing:
        assert not digest.of(lambda: nothing)[1]
    assert not digest.of(iter([1]))[1]
    for value in (
        lambda: jnp,
        nn.relu,
        nn.Dense(3),
        jax.random.key(0),
        jnp.ones(3),
        np.float32,
        functools.partial(max),
    ):
        assert digest.of(value)[1]


def test_recursion_ends():
    def f(x):
        return f(x) if x else g(x)

    def g(x):
        return f(x)

    loop = [1]
    loop.append(loop)
    assert digest.of(f)[1]
    assert digest.of(loop)[1]
