"""What methods refuse: settings, models and proxy data that cannot work, each with one line."""

import engine_cases as cases
import numpy as np
import pytest

from fdjax.data.federation import federate
from fdjax.errors import InputError
from fdjax.run import experiment, settings

FLOATS = {"dataset": "synthetic", "num_clients": 4, "samples_per_client": 20, "model": "mclr"}
NOISE = {"proxy": "noise", "proxy_size": 20}

BAD = [
    ({"algorithm": "fedmd"}, {}, "fedmd needs proxy data, with labels; give --proxy=held_out"),
    ({"algorithm": "cronus"}, {}, "cronus needs proxy data, whose labels it does not use"),
    ({"algorithm": "dsfl"}, {}, "dsfl needs proxy data, whose labels it does not use"),
    ({"algorithm": "fedmd", "proxy": "noise"}, {}, "fedmd needs labelled proxy data, but --proxy=noise has none of"),
    ({"algorithm": "dsfl", "proxy": "mnist_sample", "proxy_size": 9}, {}, "--proxy=mnist_sample has inputs (28, 28, "),
    ({"algorithm": "dsfl", "proxy": "noise", "options": {"aggregation": "mean"}}, {}, "unknown aggregation 'mean'"),
    ({"algorithm": "cronus", "proxy": "noise", "options": {"faulty": "0.5"}}, {}, "unknown faulty '0.5'"),
    ({"algorithm": "fd", "options": {"aggregation": "era"}}, {}, "unknown option of fd 'aggregation'"),
    ({"algorithm": "fd"}, {"gamma": -0.1}, "--gamma=-0.1: expected a finite number of at least 0"),
    ({"algorithm": "dsfl", "proxy": "noise"}, {"era_temperature": 0.0}, "--era_temperature=0.0: expected a finite num"),
    ({"algorithm": "dsfl", "proxy": "noise"}, {"era_beta": -1.0}, "--era_beta=-1.0: expected a finite number of at le"),
    ({"algorithm": "dsfl", "proxy": "noise"}, {"distill_epochs": 0}, "--distill_epochs=0: expected a whole number "),
    ({"algorithm": "fedaux"}, {}, "fedaux needs proxy data, whose labels it does not use; give --proxy=held_out"),
    ({"algorithm": "fedaux", "proxy": "noise"}, {"score_delta": 0.0}, "--score_delta=0.0: expected a number from 1e"),
    ({"algorithm": "fedaux", "proxy": "noise"}, {"score_epsilon": 0}, "--score_epsilon=0: expected a number from 0"),
    ({"algorithm": "fedaux", "proxy": "noise", "proxy_size": 2}, {}, "--proxy_size=2: parts of 0.2 and 0.8 have 0"),
    ({"algorithm": "ensemble", "local_eval": "own"}, {}, "ensemble tests an ensemble of personal models"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "hparams", "message"), BAD, ids=[message[:40] for *_, message in BAD])
def test_bad_input(fields, hparams, message):
    with pytest.raises(InputError) as error:
        experiment.build(settings.make(hparams, **FLOATS | ({"proxy_size": 20} if "proxy" in fields else {}) | fields))
    assert str(error.value).startswith(message)


def test_models_of_other_classes_are_refused():
    _, simulation = cases.simulation("fedmd", cohorts=(("mclr", 3), ("five", 4)), participants=(2, 2))
    with pytest.raises(InputError, match=r"^models differ in their number of classes \(mclr 4, five 5\); build all"):
        simulation.init(0, cases.federation(cohort_sizes=(3, 4)))


def test_proxy_data_of_another_shape_are_refused():
    blobs, other = cases.source(10), cases.source(5, shape=(3, 2))
    holdings = cases.from_counts(np.arange(10), np.asarray([10]))
    with pytest.raises(InputError, match=r"^proxy data have inputs \(3, 2\), but blobs has \(6,\); use proxy data of"):
        federate(blobs, holdings, holdings, (1,), cases.mesh(), (other.train_x, other.train_y))


def test_models_that_an_algorithm_does_not_use_are_refused():
    with pytest.raises(InputError, match="mclr"):
        experiment.build(settings.make(algorithm="fedavg", **FLOATS | {"model": "2nn", "models": "mclr:4"}))


def test_what_cannot_work_is_refused():
    with pytest.raises(InputError, match="drop_worst=on needs labelled proxy data"):
        experiment.build(settings.make(algorithm="feddf", **FLOATS | NOISE, options={"drop_worst": "on"}))
    with pytest.raises(InputError, match="models=gkt_edge:10"):
        experiment.build(settings.make(algorithm="fedgkt", dataset="mnist_sample"))
    with pytest.raises(InputError, match="features have one shape"):
        experiment.build(settings.make(algorithm="fedgkt", dataset="mnist_sample", models="2nn:5,gkt_edge:5"))
    with pytest.raises(InputError, match=r"server_steps=0\.5: expected a whole number"):
        settings.make({"server_steps": 0.5}, algorithm="feddf", proxy="noise")
    with pytest.raises(InputError, match="labelled proxy data"):
        experiment.build(settings.make(algorithm="fedgems", dataset="mnist_sample", proxy="noise", proxy_size=50))
