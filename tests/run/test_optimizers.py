"""Optimisers, schedules and stages of training as their settings build them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_cases import run

from fdjax.errors import InputError
from fdjax.run import settings
from fdjax.run.optimizers import OPTIMIZERS, build_optimizer, ends_with_rounds, factor, optimizer_of, plateau
from fdjax.run.training import trainings

DSFL = {"algorithm": "dsfl", "proxy": "held_out"}
PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]])}


def steps(numbers, count=3, rounds=10, rate=0.1, round=0):
    """The params after some steps down the slope of |w|^2 / 2."""
    optimizer = build_optimizer(optimizer_of(settings.make(**numbers)), rounds)(jnp.float32(rate), jnp.int32(round))
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(count):
        update, state = optimizer.update(params, state, params)
        params = jax.tree.map(jnp.add, params, update)
    return np.asarray(params["w"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_goes_down(name):
    before, after = np.asarray(PARAMS["w"]), steps({"optimizer": name}, rate=0.01)
    assert np.isfinite(after).all()
    assert np.linalg.norm(after) < np.linalg.norm(before)


def test_nesterov_momentum():
    """u <- 0.9 u + g;  w <- w - 0.1 (0.9 u + g)."""
    w, u = np.array(PARAMS["w"], np.float64), 0.0
    for _ in range(3):
        g = w
        u = 0.9 * u + g
        w = w - 0.1 * (0.9 * u + g)
    np.testing.assert_allclose(steps({"momentum": 0.9, "nesterov": True}), w, rtol=1e-5)


def adam(beta1, beta2, epsilon, amsgrad=False, decay=0.0, decoupled=0.0):
    w, m, v, most = np.array(PARAMS["w"], np.float64), 0.0, 0.0, 0.0
    for t in range(1, 4):
        g = w + decay * w
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        unbiased = v / (1 - beta2**t)
        most = np.maximum(most, unbiased)
        step = m / (1 - beta1**t) / (np.sqrt(most if amsgrad else unbiased) + epsilon)
        w = w - 0.1 * (step + decoupled * w)
    return w


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"optimizer": "adam"}, adam(0.9, 0.999, 1e-8)),
        ({"optimizer": "adam", "beta1": 0.5, "beta2": 0.9, "epsilon": 0.1}, adam(0.5, 0.9, 0.1)),
        ({"optimizer": "adam", "beta1": 0.0}, adam(0.0, 0.999, 1e-8)),
        ({"optimizer": "amsgrad", "beta2": 0.5}, adam(0.9, 0.5, 1e-8, amsgrad=True)),
        ({"optimizer": "adam", "weight_decay": 0.3}, adam(0.9, 0.999, 1e-8, decay=0.3)),
        ({"optimizer": "adamw", "weight_decay": 0.3}, adam(0.9, 0.999, 1e-8, decoupled=0.3)),
    ],
)
def test_adam(given, expected):
    np.testing.assert_allclose(steps(given), expected, rtol=1e-4)


def test_clipping():
    w = np.array(PARAMS["w"], np.float64)
    by_norm = w - 0.1 * w * 0.5 / np.linalg.norm(w)
    np.testing.assert_allclose(steps({"clip_norm": 0.5}, 1), by_norm, rtol=1e-5)
    np.testing.assert_allclose(steps({"clip_value": 0.7}, 1), w - 0.1 * np.clip(w, -0.7, 0.7), rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, lambda t: 1.0),
        ({"schedule": "step", "decay": 0.5, "decay_every": 3}, lambda t: 0.5 ** (t // 3)),
        ({"schedule": "exponential", "decay": 0.9}, lambda t: 0.9**t),
        ({"schedule": "exponential", "decay": 0.9, "decay_every": 4}, lambda t: 0.9 ** (t / 4)),
        ({"schedule": "cosine"}, lambda t: 0.5 * (1 + np.cos(np.pi * t / 10))),
        ({"schedule": "cosine", "schedule_length": 5}, lambda t: 0.5 * (1 + np.cos(np.pi * min(t / 5, 1)))),
        ({"warmup": 4}, lambda t: min((t + 1) / 4, 1.0)),
        (
            {"warmup": 2, "schedule": "cosine"},
            lambda t: (t + 1) / 2 if t < 2 else 0.5 * (1 + np.cos(np.pi * (t - 2) / 8)),
        ),
        (
            {"warmup": 3, "schedule": "exponential", "decay": 0.5},
            lambda t: (t + 1) / 3 if t < 3 else 0.5 ** (t - 3),
        ),
    ],
)
@pytest.mark.parametrize("every", ["round", "step"])
def test_schedules(given, expected, every):
    """Of ten rounds; by rounds for all steps of one, by steps for each."""
    more = {"schedule_length": 10} if given.get("schedule") == "cosine" and every == "step" else {}
    given = more | given | ({"schedule_every": every} if given else {})  # which a constant rate does not use
    of_t = factor(optimizer_of(settings.make(**given)), 10)
    np.testing.assert_allclose([of_t(t) for t in range(10)], [expected(t) for t in range(10)], rtol=1e-5, atol=1e-6)
    w = np.array(PARAMS["w"], np.float64)
    for step in range(3):
        w = w - 0.1 * expected(step if every == "step" else 4) * w
    np.testing.assert_allclose(steps(given, round=4), w, rtol=1e-5)


def test_a_plateau_lowers_the_rates():
    losses = [3.0, 2.0, 2.5, 2.0, 1.9, 2.0, 2.0, 2.0, 2.0, 1.0]
    scales = [plateau(losses[:n], 0.5, 2) for n in range(len(losses) + 1)]
    assert scales == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]


def test_stages():
    """What a stage leaves open is the clients', but not what belongs to an optimiser that it has no more."""
    given = settings.make(
        optimizer="sgd", momentum=0.9, clip_norm=5.0, distill_optimizer="adam", schedule="constant",
        algorithm="dsfl", proxy="held_out",
    )  # fmt: skip
    clients, on_proxy, at_server = (optimizer_of(given, stage) for stage in ("", "distill_", "server_"))
    assert (on_proxy.optimizer, on_proxy.momentum, on_proxy.clip_norm) == ("adam", 0.0, 5.0)
    assert at_server == clients
    assert [t.name for t in trainings(given, None)] == ["client", "distill", "client"]
    assert [t.name for t in trainings(settings.make(), None)] == ["client"] * 3


def test_which_schedules_end_with_the_rounds():
    assert not ends_with_rounds(settings.make(schedule="cosine", schedule_length=5))
    assert ends_with_rounds(settings.make(distill_schedule="cosine", algorithm="dsfl", proxy="held_out"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": "adam", "momentum": 0.9}, "--momentum=0.9: --optimizer=adam has none"),
        ({"beta1": 0.9}, "--beta1=0.9: --optimizer=sgd has none"),
        ({"beta1": 0.0}, "--beta1=0.0: --optimizer=sgd has none"),
        ({"distill_optimizer": "sign_sgd", "distill_epsilon": 0.1, **DSFL}, "--distill_optimizer=sign_sgd has none"),
        ({"nesterov": True}, "--nesterov needs --momentum above 0"),
        ({"schedule": "plateau"}, "give --validation_fraction"),
        ({"distill_schedule": "plateau", "validation_fraction": 0.1, **DSFL}, "give --schedule=plateau"),
        ({"schedule": "cosine", "schedule_every": "step"}, "needs --schedule_length"),
        ({"optimizer": "adamm"}, "did you mean 'adam'"),
        ({"distill_optimizer": "sdg", **DSFL}, "unknown optimizer 'sdg'"),
        ({"decay": 0.5}, "--decay=0.5 means nothing to --schedule=constant"),
        ({"schedule": "step", "schedule_length": 5}, "give --schedule=cosine"),
        ({"momentum": 1.5}, "below 1"),
        ({"schedule": "step", "decay": 2.0}, "at most 1"),
        ({"label_smoothing": 1.0}, "below 1"),
        ({"clip_norm": -1.0}, "at least 0"),
        ({"warmup": -1}, "at least 0"),
    ],
)  # fmt: skip
def test_what_cannot_work(given, message):
    with pytest.raises(InputError, match=message):
        settings.make(**given)


def test_a_plateau_in_a_run(tmp_path):
    """A learning rate so large that the loss rises is lowered; a resumed run goes on as it would have."""
    usual = {"validation_fraction": 0.2, "rounds": 6, "learning_rate": 20.0}
    given = usual | {"schedule": "plateau", "decay": 1e-3}
    whole = run(**given)
    run(tmp_path, **given | {"rounds": 3})
    resumed = run(tmp_path, resume=True, **given)
    assert resumed.evaluations == whole.evaluations
    losses = whole.evaluations["validation_loss"]
    assert plateau(losses[:-1], 0.5, 1) < 1
    constant = run(**usual)
    assert constant.evaluations["validation_loss"] != losses
