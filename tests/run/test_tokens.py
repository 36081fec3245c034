"""Runs on sequences of tokens: every method learns the next token, or says in a line why it cannot."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdjax
from fdjax.algorithms import ALGORITHMS
from fdjax.client import losses, private
from fdjax.engine.simulation import Simulation
from fdjax.errors import InputError
from fdjax.run import experiment, settings
from fdjax.types import Source

SPEECHES = str(Path(__file__).parents[1] / "own_files" / "speeches.json")
READING = {"dataset": SPEECHES, "length": 8, "stride": 6, "model": "char_lstm_small"}
TRAINING = {"algorithm": "fedavg", "learning_rate": 2.0, "batch_size": 16, "devices": 1}


@pytest.fixture(scope="module")
def result() -> fdjax.Result:
    return fdjax.run(**READING, **TRAINING, rounds=1, membership=True)


@pytest.fixture(scope="module")
def source() -> Source:
    return fdjax.data.load(SPEECHES, length=8, stride=6)


@pytest.mark.exhaustive
def test_it_learns_more_than_the_most_frequent_character(source):
    result = fdjax.run(**READING, **TRAINING, rounds=4, local_epochs=2, eval_every=4)
    most_frequent = np.bincount(source.test_y).max() / len(source.test_y)
    assert most_frequent < 0.2
    assert result.final["central_accuracy"] > most_frequent + 0.05


def test_owners_are_clients(result, source):
    assert source.owners[0].endswith("HELENA")
    assert len(result.clients["own_accuracy"]) == len(source.owners)


def test_predictions_are_of_tokens(result, source):
    found = result.central.predict(source.test_x).argmax(1)
    assert np.mean(found == source.test_y) == pytest.approx(result.final["central_accuracy"], abs=1e-6)
    assert "LSTMLayer_0" in result.central.params
    for bad in (source.test_x.astype(np.float32), source.test_x + 1000, source.test_x - 1):
        with pytest.raises(InputError, match="expected tokens, whole numbers from 0 to"):
            result.central.predict(bad)


def test_the_attack_on_membership_reads_tokens(result):
    assert 0.3 < np.nanmean(result.clients["central_auc"]) <= 1


@pytest.mark.exhaustive
def test_gradients_clipped_by_example_add_up(source):
    """Without a bound they are the gradient of the sum; with one, each has at most its norm."""
    model = fdjax.models.build("char_lstm", (8,), source.num_classes, fdjax.models.Features(99), width=5, layers=1)
    params = model.init(jax.random.key(0))
    x, y, weight = jnp.asarray(source.train_x[:9]), jnp.asarray(source.train_y[:9]), jnp.ones(9).at[8].set(0)

    def loss(params, x, y):
        return losses.cross_entropy(model.apply(params, x), y), ()

    @jax.jit
    def clipped(clip):
        return private.clipped_gradient(loss, params, x, y, weight, clip)[2]

    @jax.jit
    def of(counts):
        return jax.grad(lambda p: jnp.sum(counts * loss(p, x, y)[0]))(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), clipped(jnp.inf), of(weight))
    each = [of(jnp.zeros(9).at[i].set(1)) for i in range(8)]
    norms = [np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(slope))) for slope in each]
    total = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(clipped(0.01))))
    assert min(norms) > 0.01
    assert 0 < total <= 8 * 0.01 + 1e-6


def traced(algorithm: str, **fields) -> None:
    """A set-up and a round by their shapes alone, which costs no compilation."""
    built = experiment.build(settings.make(algorithm=algorithm, **READING | fields, batch_size=8, devices=1))
    pure: Simulation = built.simulation.pure
    state = jax.eval_shape(pure.init, 0, built.federation)
    if pure.setup is not None:
        state, _ = jax.eval_shape(pure.setup, state, built.federation, built.hparams)
    after, _ = jax.eval_shape(lambda *given: pure.run(*given, 1), state, built.federation, dict(built.hparams))
    assert jax.tree.structure(after) == jax.tree.structure(state)


REFUSED = {"fedaux", "fedftg", "fedzkt", "faug", "fedma"}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name not in REFUSED])
def test_every_method_takes_tokens(name):
    proxy = {"proxy": "held_out", "proxy_size": 20} if ALGORITHMS[name].proxy else {}
    split = {"model": "2nn", "models": "char_lstm_small:6"} if ALGORITHMS[name].split else {}
    traced(name, **proxy | split)


PROXY = {"proxy": "held_out", "proxy_size": 20}


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"model": "2nn"}, "model '2nn' takes numbers, but the data have tokens; choose of char_lstm"),
        ({"dataset": "mnist_sample", "length": None, "stride": None}, "takes tokens, but the data have numbers"),
        ({"dataset": "mnist_sample"}, "--length=8: --dataset=mnist_sample has no such option"),
        ({"algorithm": "fedzkt"}, "fedzkt makes, changes or compares inputs as numbers, but these are tokens"),
        ({"algorithm": "fedftg"}, "fedftg makes, changes or compares inputs"),
        ({"algorithm": "faug"}, "faug makes, changes or compares inputs"),
        ({"algorithm": "fedma"}, "needs a plain chain of layers"),
        ({"algorithm": "fedaux", **PROXY}, "fedaux with --pretraining=simclr makes.*choose another pretraining"),
        ({"algorithm": "dsfl", "selection": "clients", **PROXY}, "with --selection=clients makes.*another selection"),
        ({"augment": "rotate_crop"}, "needs images"),
        ({"algorithm": "dsfl", "proxy": "generated", "proxy_size": 20}, "makes images, but speeches has tokens"),
        ({"algorithm": "dsfl", "proxy": "mnist_sample"}, r"has inputs \(28, 28, 1\), but speeches has \(8,\)"),
        ({"dropout": 0.5}, "model 'char_lstm_small' has no dropout; leave it out, or choose of.*transformer"),
        ({"unit": "syllable"}, "unknown unit 'syllable'"),
        ({"length": 0}, "--length=0: expected a whole number of at least 1"),
        ({"test_by": "owner"}, "has no such option"),
    ],
)
def test_what_tokens_cannot_do_is_one_line(fields, error):
    with pytest.raises(InputError, match=error) as caught:
        experiment.build(settings.make(**READING | fields))
    assert "\n" not in str(caught.value)
