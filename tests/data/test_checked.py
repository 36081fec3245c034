"""A data set that clients cannot learn from is refused in one line, wherever it comes in."""

import numpy as np
import pytest

from fdjax import data
from fdjax.data import synthetic
from fdjax.data.federation import federate
from fdjax.engine.lift import make_mesh
from fdjax.errors import InputError

GOOD = synthetic.synthetic(num_clients=3, samples_per_client=20)  # 54 training and 6 test examples of 60 features


def with_nan(x):
    x = x.copy()
    x[[17, 30], 5] = np.nan
    return x


BAD = [
    ({"train_y": np.where(np.arange(54) == 3, 10, GOOD.train_y)}, "labels reach from 2 to 10, expected 0 to"),
    ({"test_y": GOOD.test_y - 20}, "test labels reach from -"),
    ({"train_y": GOOD.train_y.astype(float)}, "train labels have shape (54,) and dtype float64; expected [N] integers"),
    ({"train_y": GOOD.train_y[:, None]}, "train labels have shape (54, 1)"),
    ({"train_y": GOOD.train_y[:-1]}, "train inputs are 54, but labels 53; give a label for each"),
    ({"test_x": GOOD.test_x[:4]}, "test inputs are 4, but labels 6"),
    ({"train_x": with_nan(GOOD.train_x)}, "train inputs are not finite in 2 of 54 examples, the first at 17; mend or"),
    ({"test_x": np.full_like(GOOD.test_x, np.inf)}, "test inputs are not finite in 6 of 6 examples, the first at 0"),
    ({"train_x": GOOD.train_x.astype(float)}, "train inputs are float64; expected uint8 for images"),
    ({"train_x": GOOD.train_x[:, 0]}, "train inputs have shape (54,), expected [N, ...]"),
    ({"test_x": GOOD.test_x[:, :59]}, "test inputs have shape (6, 59), expected [N, ...] as the train"),
    ({"test_x": GOOD.test_x[:0], "test_y": GOOD.test_y[:0]}, "has no test examples; give at least one"),
    ({"num_classes": 1}, "num_classes=1; expected 2 or more"),
    ({"train_owner": GOOD.train_owner[:-1]}, "train owners have shape (53,), expected (54,), one a label"),
    ({"validation": (GOOD.test_x, GOOD.test_y[:3])}, "validation inputs are 6, but labels 3"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_a_bad_source_is_told_in_one_line(changes, message):
    source = GOOD._replace(**changes)
    with pytest.raises(InputError) as error:
        data.checked(source)
    assert str(error.value).startswith("synthetic(1,1)")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    holdings = data.partition("natural", GOOD.train_y, None, 0, owner=GOOD.train_owner, num_classes=10)
    with pytest.raises(InputError):
        federate(source, holdings, holdings, (3,), make_mesh(None))


def test_a_good_source_is_itself():
    assert data.checked(GOOD) is GOOD
    assert data.checked(data.load("mnist_sample")).num_classes == 10


def test_a_federation_that_does_not_fit_into_memory():
    """It was a traceback of NumPy after ten seconds."""
    with pytest.raises(
        InputError, match=r"synthetic of num_clients=1000000000 with 453 examples each.* takes 1.1.+05 GB"
    ):
        synthetic.synthetic(num_clients=10**9)
