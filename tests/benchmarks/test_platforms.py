"""benchmarks.platforms: how far apart two runs are."""

import numpy as np
import pytest

from benchmarks import platforms


def run_of(before, after):
    return {"states": {"before/0": np.float32(before), "after/0": np.float32(after)}}


def test_apart_is_a_share_of_the_way_that_the_reference_went():
    reference = run_of([0, 0], [3, 4])
    assert platforms._apart(reference, run_of([0, 0], [3, 4.5])) == pytest.approx(0.1)
    assert platforms._apart(reference, reference) == 0
    assert platforms._apart(reference, {"states": None}) is None
