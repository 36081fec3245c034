"""Several hosts: two real processes joined by jax.distributed, against one.

That every feature of the engine is the same on two hosts says `test_probe.py`.
"""

import json
import socket

import numpy as np
import pytest
from choices import some
from host_processes import begin, finish, free_port

import fdjax
from fdjax.engine import hosts
from fdjax.errors import InputError
from fdjax.run.checkpoint import Checkpoints

FLAGS = (
    "--algorithm=feddistill", "--dataset=synthetic", "--num_clients=7", "--model=mclr", "--eval_every=2", "--seed=3",
    "--samples_per_client=20", "--participation=0.8", "--checkpoint_every=2",
)  # fmt: skip


def start(folder, *flags, devices=1):
    return begin(folder, "-m", "fdjax", *FLAGS, *flags, devices=devices)


def together(folder, *flags, second=()):
    """Both processes' (exit code, stdout, stderr)."""
    cluster = (f"--coordinator=localhost:{free_port()}", "--num_processes=2")
    return finish(*(start(folder, *flags, *cluster, f"--process_id={i}", *(second if i else ())) for i in range(2)))


def numbers(folder):
    result = json.loads((folder / "results.json").read_text())["result"]
    timeless = ("rounds", "evaluations", "clients")
    return {f"{kind}/{name}": np.array(values) for kind in timeless for name, values in result[kind].items()}


@pytest.mark.exhaustive
@pytest.mark.parametrize("resumed", [False, True])
def test_two_processes_are_one_simulation(tmp_path, resumed):
    ((code, _, said),) = finish(start(tmp_path, "--rounds=4", f"--out={tmp_path}/one", devices=2))
    assert code == 0, said
    for rounds, resume in ((2, ()), (4, ("--resume",))) if resumed else ((4, ()),):
        first, second = together(tmp_path, f"--rounds={rounds}", f"--out={tmp_path}/two", *resume)
        assert (first[0], second[0]) == (0, 0), (first, second)
    assert "central accuracy" in first[1]
    assert "central accuracy" not in second[1]  # one of them speaks
    expected, found = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-5, err_msg=name)
    check_checkpoint(tmp_path / "two", found["clients/local_accuracy"])


def check_checkpoint(out, accuracies):
    """One process reads what both have written, and finds damage of what the second one wrote."""
    loaded, source = fdjax.load(out), fdjax.data.load("synthetic", num_clients=7, samples_per_client=20, seed=3)
    for client, accuracy in enumerate(accuracies):
        labels = loaded.personal(client).predict(source.test_x).argmax(1)
        np.testing.assert_allclose(np.mean(labels == source.test_y), accuracy, atol=1e-6)
    data = next((out / "checkpoints/4/state/ocdbt.process_1").rglob("d/*"))
    data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
    assert Checkpoints(out / "checkpoints").latest() == 2


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("--learning_rate=0.5", "--learning_rate is 0.01 on process 0 and 0.5 on process 1;"),
        *some([("--resume", "--resume is False on process 0 and True on process 1;")]),
    ],
)
def test_hosts_that_disagree_say_on_what(tmp_path, second, message):
    ends = together(tmp_path, "--rounds=2", f"--out={tmp_path}/out", second=(second,))
    for code, _, said in ends:
        assert code == 2, said
        assert said.splitlines()[-1].startswith(f"error: hosts disagree: {message}"), said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, 2, 0), "need --coordinator"),
        (("localhost:99", None, 0), "needs --num_processes"),
        (("localhost:99", 2, 2), "expected 0 to 1"),
        (("localhost:99", 0, 0), "--num_processes=0: expected at least 1"),
        (("localhost", 2, 1), "expected host:port"),
        (("localhost:70000", 2, 1), "expected host:port"),
    ],
)
def test_flags_that_do_not_fit_together(given, message):
    with pytest.raises(InputError, match=message):
        hosts.join(*given)


@pytest.mark.parametrize("host", ["localhost", "no-such-host.invalid"])
def test_a_coordinator_that_does_not_answer(monkeypatch, host):
    monkeypatch.setattr(hosts, "_SECONDS", 0.1)
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("localhost", 0))
        with pytest.raises(InputError, match=rf"^--coordinator={host}:\d+: no process 0 answers there \("):
            hosts.join(f"{host}:{taken.getsockname()[1]}", 2, 1)


def test_one_host_without_its_data_ends_all(monkeypatch):
    with pytest.raises(InputError, match="no such folder"), hosts.all_or_none():
        raise InputError("no such folder")
    monkeypatch.setattr(hosts, "any_of", lambda here: True)
    with pytest.raises(InputError, match="another host cannot go on"), hosts.all_or_none():
        pass


def test_one_host_needs_no_cluster():
    hosts.join(None, None, None)
    hosts.check_agreement({"seed": 1}, ())
    assert hosts.is_first()
    assert hosts.any_of(True)
    assert not hosts.any_of(False)
