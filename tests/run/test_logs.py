"""What runs tell while they run: the same numbers to every logger, nothing twice, and no result lost to any of them."""

import csv
import json
import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import run_cases

import fdjax
from fdjax.errors import InputError
from fdjax.run import loggers, logs, report, runner, saving, seeds, settings

FIVE = run_cases.SMALL | {"rounds": 5, "eval_every": 2}
NOBODY = logs.Told()


def run(out=None, resume=False, told=NOBODY, **named):
    return runner.run(settings.make(**FIVE | named), out, resume=resume, progress=False, told=told)


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def events_of(folder):
    """{tag: {step: value}} of the scalars in the event files of a folder: TFRecords of protobufs."""
    from tensorboardX.proto.event_pb2 import Event

    found, texts = {}, []
    for path in folder.glob("events.out.tfevents.*"):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    assert event.step not in found.setdefault(value.tag, {}), f"{value.tag} at {event.step} twice"
                    found[value.tag][event.step] = value.simple_value
                else:
                    texts.append(value.tag)
    return found, texts


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A run with everything on, its folder, and what its callback was called with."""
    pytest.importorskip("tensorboardX")
    out, called = tmp_path_factory.mktemp("logged"), []
    result = run(out, told=logs.Told(tensorboard=True, callback=called.append))
    report.write_json(out / "results.json", {"result": report.result_dict(result)})
    return out, result, called


def check_csv(path, result, json_of_it):
    """Every number of results.json is in the file, exactly, and no other."""
    rows = rows_of(path)
    assert [int(row["round"]) for row in rows] == list(range(result.round + 1))
    told = 0
    for name, values in json_of_it["rounds"].items():
        for number, value in enumerate(values, 1):
            assert rows[number][name] == ("" if value is None else repr(value)), (name, number)
            told += value is not None
    at = [int(r) for r in json_of_it["evaluations"]["round"]]
    for name, values in json_of_it["evaluations"].items():
        for number, value in zip(at, values, strict=True):
            if name != "round" and value is not None:
                assert float(rows[number][name]) == value, (name, number)
                told += 1
    assert told == sum(cell != "" for row in rows for name, cell in row.items() if name != "round")


def check_events(folder, json_of_it):
    """Every number of results.json is an event, as float32, and no other is."""
    found, texts = events_of(folder)
    assert texts == ["settings/text_summary"]
    expected = {f"rounds/{n}": dict(enumerate(values, 1)) for n, values in json_of_it["rounds"].items()}
    at = [int(r) for r in json_of_it["evaluations"]["round"]]
    expected |= {
        f"evaluations/{n}": dict(zip(at, values, strict=True))
        for n, values in json_of_it["evaluations"].items()
        if n != "round"
    }
    assert {tag: sorted(steps) for tag, steps in found.items()} == {tag: sorted(e) for tag, e in expected.items()}
    for tag, steps in found.items():
        for step, value in steps.items():
            assert np.float32(math.nan if expected[tag][step] is None else expected[tag][step]) == pytest.approx(
                value, rel=0, abs=0, nan_ok=True
            )


def test_csv_events_and_results_hold_the_same_numbers(logged):
    out, result, _ = logged
    told = json.loads((out / "results.json").read_text())["result"]
    check_csv(out / "metrics.csv", result, told)
    check_events(out / "tensorboard", told)


def test_a_callback_gets_every_evaluation(logged):
    _, result, called = logged
    assert all(isinstance(progress, fdjax.Progress) for progress in called)
    assert [progress.round for progress in called] == result.evaluations["round"] == [0, 2, 4, 5]
    for i, progress in enumerate(called):
        assert progress.evaluation == {name: values[i] for name, values in result.evaluations.items()}
    assert called[0].rounds == {}
    assert called[0].bytes_up == 0.0
    together = {name: [v for progress in called[1:] for v in progress.rounds[name]] for name in called[1].rounds}
    assert together == result.rounds
    assert [p.bytes_down for p in called[1:]] == [result.rounds["bytes_down"][p.round - 1] for p in called[1:]]
    assert called[-1].clients == result.clients
    assert not called[-1].stopped
    assert called[-1].settings == result.settings


def test_a_resumed_run_leaves_the_same_files(logged, tmp_path):
    out, _, _ = logged
    called = []
    run(tmp_path, rounds=4, told=logs.Told(tensorboard=True))
    path = tmp_path / "metrics.csv"
    path.write_text(path.read_text() + "5,1.0\n")  # as of a process that was killed after its last checkpoint
    run(tmp_path, resume=True, told=logs.Told(tensorboard=True, callback=called.append))
    assert path.read_text() == (out / "metrics.csv").read_text()
    assert events_of(tmp_path / "tensorboard") == events_of(out / "tensorboard")
    assert [progress.round for progress in called] == [5]  # it has had the others


def test_several_seeds_are_rows_and_runs_of_their_own(tmp_path):
    """Also where the callback ends them, in the last superstep but one."""
    pytest.importorskip("tensorboardX")
    called = []

    def stumble(progress):
        called.append(progress)
        if progress.round == 4:
            raise RuntimeError("enough")

    told = logs.Told(tensorboard=True, callback=stumble)
    with pytest.raises(fdjax.CallbackError, match=r"RuntimeError: enough \(test_logs.py:\d+\) after round 4") as error:
        seeds.run_seeds(settings.make(**FIVE), [3, 1], progress=False, told=told, out=tmp_path)
    assert [(result.settings.seed, result.round) for result in error.value.results] == [(3, 4), (1, 4)]
    rows = rows_of(tmp_path / "metrics.csv")
    for result in error.value.results:
        seed = result.settings.seed
        mine = [row for row in rows if row["seed"] == str(seed)]
        assert [float(row["train_loss"]) for row in mine[1:]] == result.rounds["train_loss"]
        found, _ = events_of(tmp_path / "tensorboard" / f"seed_{seed}")
        assert [*found["evaluations/central_loss"]] == result.evaluations["round"] == [0, 2, 4]
    assert [(p.settings.seed, p.round) for p in called] == [(3, 0), (1, 0), (3, 2), (1, 2), (3, 4)]


def test_a_callback_that_raises_is_one_line_and_loses_nothing(logged, tmp_path):
    _, result, _ = logged

    def stumble(progress):
        if progress.round == 4:
            print({}["nothing"])

    with pytest.raises(fdjax.CallbackError) as error:
        run(tmp_path, told=logs.Told(callback=stumble))
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith("callback (test_logs.py:")
    assert "raised KeyError: 'nothing'" in text
    assert "after round 4" in text
    assert str(tmp_path) in text
    assert error.value.result.rounds["train_loss"] == result.rounds["train_loss"][:4]
    assert [int(row["round"]) for row in rows_of(tmp_path / "metrics.csv")] == [0, 1, 2, 3, 4]
    assert run(tmp_path, resume=True).evaluations == result.evaluations


def test_a_callback_may_fail_before_the_first_round():
    with pytest.raises(fdjax.CallbackError, match="ZeroDivisionError") as error:
        run(told=logs.Told(callback=lambda progress: 1 / progress.round))
    assert error.value.result.round == 0
    assert len(error.value.result.evaluations["central_loss"]) == 1


def test_loggers_that_fail_are_told_once_and_cost_no_result(logged, tmp_path, capsys, monkeypatch):
    _, result, _ = logged
    monkeypatch.setattr(saving, "_unsaved", [])
    (tmp_path / "metrics.csv").mkdir()  # nothing can be written in its place
    (tmp_path / "tensorboard").write_text("a file where a folder should be")
    assert run(tmp_path, told=logs.Told(tensorboard=True)).evaluations == result.evaluations
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2
    assert all("the run goes on" in line for line in warnings)
    assert [Path(what).name for what in saving.unsaved()] == ["metrics.csv", "TensorBoard's events"]


def test_a_disk_that_was_full_for_a_while_leaves_no_gap(logged, tmp_path, capsys, monkeypatch):
    out, _, _ = logged
    monkeypatch.setattr(saving, "_unsaved", [])
    replacing, calls = loggers.replacing, []

    def full(path):
        calls.append(path)
        if len(calls) < 3:
            raise OSError(28, "No space left on device")
        return replacing(path)

    monkeypatch.setattr(loggers, "replacing", full)
    run(tmp_path)
    assert (tmp_path / "metrics.csv").read_text() == (out / "metrics.csv").read_text()
    assert capsys.readouterr().err.count("No space left on device; the run goes on") == 1
    assert saving.unsaved() == ()


def test_a_file_of_a_full_device_is_told(tmp_path):
    """/dev/full refuses every byte, at the append: a run of the program ends with its results, and exit code 1."""
    if not os.path.exists("/dev/full"):
        pytest.skip("this machine has no /dev/full")
    logger = loggers.CsvLogger(tmp_path / "metrics.csv", False)
    progress = loggers.Progress(settings.make(**FIVE), 0, {}, {"central_loss": 1.0}, {}, 0.0, 0.0, {})
    logger.write(progress)
    (tmp_path / "metrics.csv").unlink()
    (tmp_path / "metrics.csv").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        logger.write(progress)
    assert not logger.whole
    logger.close()  # by way of another file, for which there is room
    assert logger.whole
    assert len(rows_of(tmp_path / "metrics.csv")) == 2


def test_wandb_offline(tmp_path):
    pytest.importorskip("wandb")
    result = run(tmp_path, told=logs.Told(wandb=True), rounds=2, eval_every=1)
    (run_folder,) = (tmp_path / "wandb").glob("offline-run-*")
    summary = run_folder / "files" / "wandb-summary.json"
    assert [*run_folder.glob("*.wandb")]
    if summary.exists():
        assert json.loads(summary.read_text())["rounds/train_loss"] == result.rounds["train_loss"][-1]


BAD = [
    ({"tensorboard": True}, "tensorboard=True writes to the folder of the run; give out as well"),
    ({"wandb": True}, "wandb=True writes to the folder of the run; give out as well"),
    ({"tensorboard": "yes", "out": "x"}, "tensorboard='yes': expected True or False"),
    ({"wandb": 1, "out": "x"}, "wandb=1: expected True or False"),
    ({"callback": "print"}, "callback='print': expected a function of a fdjax.Progress"),
    ({"callback": [print]}, "expected a function of a fdjax.Progress"),
]


@pytest.mark.parametrize(("given", "told"), BAD)
def test_what_cannot_be_told_is_said_in_one_line(given, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "build", None)  # before any data are loaded
    with pytest.raises(InputError) as error:
        fdjax.run(**FIVE, **given)
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_is_told_before_anything_is_built(name, package, tmp_path, monkeypatch):
    find = logs.importlib.util.find_spec
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda n: None if n == package else find(n))
    with pytest.raises(InputError, match=rf"--{name} needs the package {package}; pip install 'fdjax\[{name}\]'"):
        fdjax.run(**FIVE, out=tmp_path, **{name: True})
