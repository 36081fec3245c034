"""What is kept of a run whose method has a set-up and two exchanges a round: bytes, metrics, warnings."""

import jax.numpy as jnp
import numpy as np
import pytest

from fdjax import __main__ as command
from fdjax.algorithms import ALGORITHMS
from fdjax.contract import Algorithm, Broadcast, Exchange, Upload
from fdjax.errors import InputError
from fdjax.exchange import reductions
from fdjax.method import HParam, Method
from fdjax.run import report, runner, settings
from fdjax.run.batch import batch, experiments

CLIENTS, P = 5, 4 * 610  # bytes of the parameters of logistic regression
SMALL = {
    "algorithm": "two_phases", "dataset": "synthetic", "num_clients": CLIENTS, "samples_per_client": 20,
    "model": "mclr", "participation": 0.6, "rounds": 4, "devices": 1,
}  # fmt: skip


def two_phases(metric="seen"):
    """The first exchange sends parameters; in the second, client 3 sends no number from some round on."""

    def build(task):
        def count(ctx, received, state, data):
            return state, Upload({"count": jnp.asarray(data.count)}), {"examples": jnp.asarray(data.count, jnp.float32)}

        def learn(ctx, received, state, data):
            return state, Upload(received.shared), {metric: jnp.float32(1)}

        def look(ctx, received, state, data):
            bad = (ctx.client == 3) & (ctx.round >= ctx.hparams["bad_from"])
            shift = jnp.where(bad, jnp.nan, 0.0)
            return state, Upload({"shift": shift}, bytes=jnp.float32(3)), {}

        return Algorithm(
            name="two_phases",
            init_server=lambda ctx, params: params,
            init_client=lambda ctx, params: (),
            setup=(Exchange(lambda ctx, s: Broadcast(()), count, reductions.nothing(), lambda ctx, s, _: (s, {})),),
            round=(
                Exchange(
                    lambda ctx, server: Broadcast(server), learn, reductions.weighted_mean(), lambda ctx, s, m: (m, {})
                ),
                Exchange(lambda ctx, s: Broadcast(()), look, reductions.weighted_mean(), lambda ctx, s, m: (s, {})),
            ),
            central=lambda ctx, server, x: task.model.apply(server, x),
        )

    return Method("two_phases", "for tests", build, {"learning_rate": HParam(0.1), "bad_from": HParam(99)})


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(ALGORITHMS, "two_phases", two_phases())


def run(out=None, hparams=(), **fields):
    return runner.run(settings.make(dict(hparams), **SMALL | fields), out, progress=False)


def check_bytes(result, participants=3):
    size = np.dtype(np.int32).itemsize
    assert result.setup["bytes_up"] == CLIENTS * size  # of all clients, participants or not
    assert result.setup["bytes_down"] == 0
    assert result.rounds["bytes_up"] == [CLIENTS * size + r * participants * (P + 3) for r in range(1, 5)]
    assert result.rounds["bytes_down"] == [r * participants * P for r in range(1, 5)]


def test_the_set_up_is_counted_and_told(tmp_path, capsys):
    result = run()
    check_bytes(result)
    assert result.setup["examples"] > 0
    written = report.result_dict(result)
    assert written["setup"] == result.setup
    assert written["bytes_per_participant"] == {"up": float(P + 3), "down": (P,)}
    table = command.summary([result])
    assert "| bytes up of the set-up, all clients" in table
    assert "bytes down of the set-up" not in table
    assert capsys.readouterr().err == ""


def test_a_resumed_run_remembers_its_set_up(tmp_path):
    run(tmp_path, rounds=2)
    chosen = settings.make(**SMALL)
    result = runner.run(chosen, tmp_path, resume=True, progress=False)
    check_bytes(result)
    assert result.setup == run().setup


def test_the_first_numbers_that_are_not_finite_are_named(capsys):
    result = run(hparams={"bad_from": 1}, participation=1.0, drop_nonfinite=True)
    assert capsys.readouterr().err == (
        "warning: client 3: upload/shift is not finite in round 2, exchange look; such clients are left out of the "
        "rounds in which it happens\n"
    )
    assert result.rounds["nonfinite_clients"] == [0, 1, 1, 1]


def test_trials_of_a_batch_count_their_set_up_and_those_that_diverge_are_named(capsys):
    chosen = [settings.make({"bad_from": start}, **SMALL | {"participation": 1.0}) for start in (0, 99, 2)]
    ready = experiments(chosen)
    for result in batch(ready, 3, devices=1).run(ready, lambda done, records: ()):
        check_bytes(result, participants=CLIENTS)
    said = capsys.readouterr().err.splitlines()
    assert [line.split(";")[0] for line in said] == [
        "warning: trial 0: client 3: upload/shift is not finite in round 1, exchange look",
        "warning: trial 2: client 3: upload/shift is not finite in round 3, exchange look",
    ]
    assert "leave such clients out by --drop_nonfinite" in said[0]


def test_a_metric_may_not_have_the_name_of_what_is_counted(monkeypatch):
    monkeypatch.setitem(ALGORITHMS, "two_phases", two_phases("bytes_up"))
    with pytest.raises(InputError, match="two_phases has a metric named 'bytes_up', which fdjax counts by itself"):
        run(seed=1, eval_batch=7)
