"""The models of a run: what they predict is what was tested, from the result itself and from the run's folder."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import programs
import pytest
from choices import some
from own_cases import METHOD, NET, method_file
from run_cases import SMALL

import fdjax
from fdjax.errors import InputError
from fdjax.run.record import Recording

TWO = SMALL | {"rounds": 2}
IMAGES = {"train_fraction": 0.05, "num_clients": 4, "model": "2nn", "rounds": 1}
DATA = 'fdjax.data.load("synthetic", num_clients=4, samples_per_client=20, seed=0)'


def run(**named):
    return fdjax.run(progress=False, **TWO | named)


def accuracy(model, source):
    return np.mean(model.predict(source.test_x).argmax(1) == source.test_y)


@pytest.fixture(scope="module")
def source():
    return fdjax.data.load("synthetic", num_clients=4, samples_per_client=20, seed=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run on three devices, of clients whose states are dealt to them, and its folder."""
    out = tmp_path_factory.mktemp("saved")
    return out, run(algorithm="feddistill", devices=3, out=out)


CASES = [(algorithm, devices) for algorithm in ("fedavg", "feddistill", "ensemble") for devices in (1, 3)]


@pytest.mark.parametrize(("algorithm", "devices"), some(CASES, ("ensemble", 1), ("feddistill", 3)))
def test_predictions_are_what_was_tested(source, saved, algorithm, devices):
    """Before: the models of a run could not be had."""
    made = (algorithm, devices) == ("feddistill", 3)
    result = saved[1] if made else run(algorithm=algorithm, devices=devices)
    assert accuracy(result.central, source) == pytest.approx(result.final["central_accuracy"], abs=1e-6)
    if algorithm != "fedavg":
        found = [accuracy(result.personal(client), source) for client in range(4)]
        np.testing.assert_allclose(found, result.clients["local_accuracy"], atol=1e-6)


@pytest.mark.exhaustive
def test_models_of_several_architectures(source):
    result = run(algorithm="feddistill", models="2nn:2,mclr:2", devices=2)
    found = [accuracy(result.personal(client), source) for client in range(4)]
    np.testing.assert_allclose(found, result.clients["local_accuracy"], atol=1e-6)
    assert {len(result.personal(client).params) for client in (0, 1)} == {3}
    assert {len(result.personal(client).params) for client in (2, 3)} == {1}


def test_images_are_taken_as_the_data_set_has_them():
    result = fdjax.run(progress=False, devices=1, **IMAGES)
    images = fdjax.data.load("mnist_sample").test_x[:5]
    logits = result.central.predict(images)
    assert (logits.shape, images.dtype) == ((5, 10), np.uint8)
    np.testing.assert_array_equal(result.central.predict(images.astype(int)), logits)
    np.testing.assert_allclose(result.central.predict(images / 255), logits, rtol=1e-4, atol=1e-5)
    for bad, message in (
        (
            images[0],
            r"predict: inputs of shape \(28, 28, 1\) and type uint8; expected numbers \[N, 28, 28, 1\], as mnis",
        ),
        (images[:0], r"predict: inputs of shape \(0, 28, 28, 1\)"),
        (images.astype(int) + 1, "predict: pixels from 1 to 256; expected whole numbers from 0 to 255, or floats"),
        (
            images.astype(float),
            r"predict: pixels from 0 to 255; expected whole numbers from 0 to 255, or floats in \[0, 1",
        ),
        (images.astype(str), "predict: inputs of shape .* and type <U"),
    ):
        with pytest.raises(InputError, match=message):
            result.central.predict(bad)


def test_features_are_no_pixels(source):
    """Whole numbers of features were divided by 255."""
    result = run(algorithm="fedavg")
    x = np.arange(240).reshape(4, 60) % 2
    logits = result.central.predict(x.astype(np.float32))
    np.testing.assert_array_equal(result.central.predict(x.astype(np.uint8)), logits)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A run of a user's method and net, and its folder."""
    out = tmp_path_factory.mktemp("own")
    return out, run(algorithm=str(METHOD), model=NET, out=out)


def test_params_are_those_of_the_net(source, saved, own):
    _, feddistill = saved
    built = fdjax.models.build("mclr", (60,), 10)
    for model in (feddistill.central, feddistill.personal(3)):
        assert jax.tree.structure(model.params) == jax.tree.structure(jax.eval_shape(built.init, jax.random.key(0)))
        x = (source.test_x - np.asarray(source.mean)) / np.asarray(source.std)
        np.testing.assert_allclose(built.apply(model.params, x), model.predict(source.test_x), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"^the ensemble of ensemble is not the params of one net alone; use its pred"):
        _ = run(algorithm="ensemble").central.params
    found = [leaf.shape for leaf in jax.tree.leaves(own[1].central.params)]
    net = fdjax.models.own.build(own[1].settings.model, (60,), 10)
    expected = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(net.init, jax.random.key(0)))]
    assert found == expected  # of a server that keeps a velocity of the same shapes beside them


def test_what_a_method_has_not_is_one_line():
    for algorithm, ask, message in (
        ("local", lambda r: r.central, r"^local has no central model; use result.personal\(client\)$"),
        ("fedavg", lambda r: r.personal(0), r"^clients of fedavg have no model of their own; use result.central$"),
        ("local", lambda r: r.personal(5), r"^result.personal\(5\): expected the id of a client, 0 to 3$"),
        ("local", lambda r: r.personal("a"), r"^result.personal\('a'\): expected the id of a client, 0 to 3$"),
    ):
        with pytest.raises(InputError, match=message):
            ask(run(algorithm=algorithm, rounds=1))


def test_another_run_finds_the_devices_empty(source, tmp_path):
    """What a result keeps is in its folder, or goes to the host, when the next run begins."""
    for out in (tmp_path, None):
        result = run(algorithm="local", out=out)
        before = result.personal(1).predict(source.test_x)
        run(algorithm="fedavg", rounds=1)
        kept = result.trained._kept
        assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(kept))
        assert (kept.state is None) == (out is not None)
        np.testing.assert_array_equal(result.personal(1).predict(source.test_x), before)
    result = run(algorithm="local", out=tmp_path, rounds=3, resume=True)
    shutil.rmtree(tmp_path / "checkpoints")
    result.personal(1)
    result.trained.leave_devices()
    with pytest.raises(InputError, match=r"no longer has the checkpoint of round 3 of this run; fdjax.load reads what"):
        result.personal(1)


# From a folder.


def test_a_folder_gives_the_result(source, saved):
    out, result = saved
    loaded = fdjax.load(str(out))
    for name in ("settings", "rounds", "evaluations", "clients", "traffic", "setup", "holdings", "final", "round"):
        assert getattr(loaded, name) == getattr(result, name), name
    assert 0 < loaded.compile_seconds < loaded.seconds
    np.testing.assert_array_equal(loaded.central.predict(source.test_x), result.central.predict(source.test_x))
    for client in range(4):
        expected = result.personal(client).predict(source.test_x)
        np.testing.assert_array_equal(loaded.personal(client).predict(source.test_x), expected)


@pytest.mark.parametrize("devices", some([1, 2], 2))
def test_a_folder_is_read_on_any_number_of_devices(saved, tmp_path, devices):
    out, result = saved
    code = f"""
import fdjax, jax, json
result = fdjax.load({str(out)!r})
source = {DATA}
models = [result.central, *(result.personal(client) for client in range(4))]
found = [float((m.predict(source.test_x).argmax(1) == source.test_y).mean()) for m in models]
print(json.dumps([jax.device_count(), *found]))
"""
    environment = programs.environment() | {"JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=programs.ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    count, *found = json.loads(done.stdout)
    assert count == devices
    expected = [result.final["central_accuracy"], *result.clients["local_accuracy"]]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_run_that_was_stopped(source, tmp_path, monkeypatch):
    add = Recording.add_superstep

    def add_and_stop(recording, done, *more):
        add(recording, done, *more)
        if done == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Recording, "add_superstep", add_and_stop)
    with pytest.raises(fdjax.InterruptedRun) as stop:
        run(algorithm="fedavg", out=tmp_path)
    loaded = fdjax.load(tmp_path)
    assert loaded.round == 1
    assert accuracy(loaded.central, source) == pytest.approx(loaded.final["central_accuracy"], abs=1e-6)
    expected = stop.value.result.central.predict(source.test_x)
    np.testing.assert_array_equal(loaded.central.predict(source.test_x), expected)


def test_a_method_and_a_net_of_ones_own(source, own):
    out, result = own
    loaded = fdjax.load(out)
    assert loaded.settings == result.settings
    assert accuracy(loaded.central, source) == pytest.approx(result.final["central_accuracy"], abs=1e-6)


def test_a_method_that_has_changed_or_is_not_its_files_first(source, tmp_path):
    path = method_file(tmp_path, more="import dataclasses")
    Path(path).write_text(Path(path).read_text() + "\nOTHER = METHOD._replace(name='other')\n")
    result = run(algorithm=f"{path}:OTHER", out=tmp_path / "run", rounds=1)
    found = accuracy(fdjax.load(tmp_path / "run").central, source)
    assert found == pytest.approx(result.final["central_accuracy"], abs=1e-6)
    method_file(tmp_path, scale="0.5", more="OTHER = None")
    with pytest.raises(InputError, match=r"was run with algorithm=other@\w+, not mine@\w+; fdjax.load needs the meth"):
        fdjax.load(tmp_path / "run")


def test_what_cannot_be_loaded_is_one_line(saved, tmp_path):
    out, _ = saved
    with pytest.raises(InputError, match=rf"^fdjax.load: {tmp_path} holds no checkpoint of a run; give the --out of a"):
        fdjax.load(tmp_path)
    with pytest.raises(InputError, match=r"^fdjax.load\(3\): expected the folder of a run$"):
        fdjax.load(3)
    (tmp_path / "results.json").touch()
    with pytest.raises(InputError, match=r"holds no checkpoint of a run; of several seeds no models are kept:"):
        fdjax.load(tmp_path)
    above = tmp_path / "above"
    shutil.copytree(out, above / "run")
    with pytest.raises(InputError, match=rf"^fdjax.load: {above} holds no .*; there are runs in {above}/run$"):
        fdjax.load(above)
    with pytest.raises(InputError, match=rf"^{out} was run with seed=0, not 3; fdjax.load needs the method, nets and"):
        fdjax.load(out, seed=3)
