"""What happens to a run's files: no room, a folder in use, damaged checkpoints, an early stop, nothing to resume."""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import programs
import pytest
from run_cases import SMALL

import fdjax
from fdjax.errors import InputError
from fdjax.run import checkpoint, checksums, report, runner, saving, settings
from fdjax.run.lock import locked
from fdjax.run.record import Recording

FLAGS = [f"--{name}={value}" for name, value in SMALL.items()]


def small(rounds=4, **fields):
    return settings.make(**SMALL | {"rounds": rounds} | fields)


def run(chosen, out=None, **options):
    return runner.run(chosen, out, progress=False, **options)


def numbers(result):
    return result.rounds, result.evaluations, result.clients


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def unsaved(monkeypatch):
    """What is told as unsaved in this test alone."""
    monkeypatch.setattr(saving, "_unsaved", [])
    return saving.unsaved


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run with checkpoints of rounds 3 and 4, the newest two."""
    out = tmp_path_factory.mktemp("undisturbed")
    return out, run(small(), out, checkpoint_every=1)


# No room.


def test_a_run_without_room_for_checkpoints_gives_its_result(undisturbed, tmp_path, monkeypatch, capsys, unsaved):
    monkeypatch.setattr(checksums, "write", full)
    result = run(small(), tmp_path, checkpoint_every=1)
    assert numbers(result) == numbers(undisturbed[1])
    said = capsys.readouterr().err.splitlines()
    where = f"cannot be written to {tmp_path}: No space left on device"
    assert [line for line in said if line.startswith("warning")] == [
        f"warning: the checkpoint after round 1 {where}; the run goes on, and tries again"
    ]
    assert said[-1].startswith(f"error: the checkpoint after round 4 in {tmp_path} cannot be written: No space left")
    assert unsaved() == (f"the checkpoint after round 4 in {tmp_path}",)
    assert checkpoint.steps(tmp_path / "checkpoints") == []
    assert np.isfinite(result.central.predict(np.zeros((1, 60), np.float32))).all()


def test_a_save_that_failed_is_made_up_for(undisturbed, tmp_path, monkeypatch, unsaved):
    write, calls = checksums.write, []

    def sometimes(folder):
        calls.append(folder.name)
        full() if len(calls) in (1, 2, 4) else write(folder)

    monkeypatch.setattr(checksums, "write", sometimes)
    run(small(3), tmp_path, checkpoint_every=1)
    assert calls == ["1", "2", "3", "3"][: len(calls)]
    assert unsaved() == ()
    monkeypatch.undo()
    assert numbers(run(small(), tmp_path, resume=True)) == numbers(undisturbed[1])


def test_what_orbax_cannot_write_is_one_line(tmp_path, capsys, unsaved):
    """A limit on files' sizes, below what orbax writes, instead of a full disk."""
    with files_of_at_most(1000):
        result = run(small(2), tmp_path, checkpoint_every=1)
    assert result.round == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: the checkpoint after round 1 cannot be written to")
    assert "File too large" in warning
    assert error.startswith("error: the checkpoint after round 2 in")
    assert list((tmp_path / "checkpoints").glob("*")) == []


@contextlib.contextmanager
def files_of_at_most(size):
    """A limit on what this process writes from the first superstep on."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    add = Recording.add_superstep

    def limit_and_add(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        return add(*args)

    try:
        Recording.add_superstep = limit_and_add
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
        Recording.add_superstep = add


@pytest.mark.parametrize("name", ["curves.png", "table.md", "results.json", "results.parquet"])
def test_a_file_that_cannot_be_written_is_told_and_the_others_are_there(tmp_path, capfd, unsaved, name):
    from fdjax.__main__ import leave

    result = run(small(1))
    (tmp_path / name).mkdir()
    (tmp_path / name / "in the way").touch()
    leave(tmp_path, [result])
    said = capfd.readouterr()
    assert "central accuracy" in said.out
    assert said.err.startswith(f"error: {tmp_path / name} cannot be written: Is a directory; make room there or")
    others = {"table.md", "results.json", "results.parquet", "curves.png"} - {name}
    assert all((tmp_path / other).is_file() for other in others)
    assert {path.name for path in tmp_path.iterdir()} == others | {name}
    assert not any(f" {name}" in line for line in said.out.splitlines()[-1:])
    assert unsaved() == (str(tmp_path / name),)


def test_a_program_without_room_prints_its_table_and_fails(tmp_path):
    """Before: a traceback of orbax, and nothing of what had been computed."""
    with files_of_at_most(500):
        done = programs.run_here("fdjax", *FLAGS, f"--out={tmp_path}")
    assert done.returncode == 1, done.stderr
    assert "central accuracy" in done.stdout
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 6  # the checkpoint, the metrics, the table, the results in two forms and the curves


# A folder in use.


def test_a_folder_in_use_is_refused(tmp_path):
    with locked(tmp_path):
        with pytest.raises(InputError, match=rf"^{tmp_path} is in use by process {os.getpid()} on .*; wait until"):
            run(small(), tmp_path)
        (tmp_path / "checkpoints").mkdir()
        with pytest.raises(InputError, match="is in use"):
            report.prepare(tmp_path, overwrite=True)
        assert (tmp_path / "checkpoints").is_dir()
    report.prepare(tmp_path, overwrite=True)
    assert run(small(1), tmp_path).round == 1
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", ".lock", "metrics.csv"}


def test_a_dead_process_holds_no_folder(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from fdjax.run.lock import locked
with locked(Path({str(tmp_path)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=programs.ROOT, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / ".lock").exists()
    with locked(tmp_path):
        pass


def test_a_file_system_without_locks_is_used_all_the_same(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with locked(tmp_path):
        pass
    assert capsys.readouterr().err.startswith(f"warning: {tmp_path} cannot be locked (No locks available);")


def test_of_two_programs_with_one_folder_one_is_refused(tmp_path):
    """Before: tracebacks, and in three of four tries a process that never ended."""
    command, pipe = (
        [sys.executable, "-m", "fdjax", *FLAGS, f"--out={tmp_path}", "--checkpoint_every=1"],
        subprocess.PIPE,
    )
    both = [
        subprocess.Popen(command, cwd=programs.ROOT, env=programs.environment(), stdout=pipe, stderr=pipe, text=True)
        for _ in range(2)
    ]
    ends = [(p.communicate(timeout=600), p.returncode) for p in both]
    codes = sorted(code for _, code in ends)
    assert codes == [0, 2], ends
    ((_, refused),) = (said for said, code in ends if code == 2)
    assert len(refused.splitlines()) == 1
    assert f"{tmp_path} is in use by process" in refused or "holds 4 rounds already" in refused


# Damage.


def damage_of(folder, flip):
    """A function that damages each file of a checkpoint in turn, and says which."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if flip and content:
            middle = len(content) // 2
            yield path, content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        elif not flip:
            yield path, content[: len(content) // 2] if content else None


@pytest.mark.parametrize("flip", [True, False])
def test_damage_of_any_file_is_found(undisturbed, tmp_path, flip):
    """One byte that is flipped, or half of the file that is gone, or all of it where it is empty."""
    shutil.copytree(undisturbed[0], tmp_path, dirs_exist_ok=True)
    folder, tried = tmp_path / "checkpoints", 0
    for path, damaged in damage_of(folder / "4", flip):
        content = path.read_bytes()
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        found = checkpoint.Checkpoints(folder)
        assert found.latest() == 3, path
        assert list(found.damaged) == [4]
        path.write_bytes(content)
        tried += 1
    assert tried > 10
    assert checkpoint.Checkpoints(folder).latest() == 4


@pytest.mark.parametrize("kind", ["flipped", "missing", "more"])
def test_a_run_goes_on_from_the_newest_that_is_whole(undisturbed, tmp_path, capsys, kind):
    """Before: tracebacks, or other numbers in silence."""
    shutil.copytree(undisturbed[0], tmp_path, dirs_exist_ok=True)
    data = max((tmp_path / "checkpoints/4/state").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = data.read_bytes()
    if kind == "more":
        data.with_name("more").write_bytes(content)
    else:
        data.unlink()
    if kind == "flipped":
        data.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    result = run(small(), tmp_path, resume=True)
    assert numbers(result) == numbers(undisturbed[1])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"warning: damaged checkpoints in {tmp_path} (that of round 4: state/")
    assert said[0].endswith("that of round 3 is whole; the next save removes the damaged ones")
    assert checkpoint.Checkpoints(tmp_path / "checkpoints").latest() == 4  # once more, and whole


def test_where_no_checkpoint_is_whole_it_says_what_to_do(undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path, dirs_exist_ok=True)
    for step in (3, 4):
        (tmp_path / f"checkpoints/{step}/record/metadata").unlink()
    for refused in (lambda: run(small(), tmp_path, resume=True), lambda: fdjax.load(tmp_path)):
        with pytest.raises(InputError, match=rf"^no checkpoint in {tmp_path} is whole .*begin anew with --ov") as error:
            refused()
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="holds 4 rounds already"):
        run(small(), tmp_path)
    report.prepare(tmp_path, overwrite=True)
    assert run(small(1), tmp_path).round == 1


# An early stop, and nothing to resume.


def test_a_stop_leaves_what_there_is(undisturbed, tmp_path, monkeypatch, capsys):
    """Before: a checkpoint, and neither table nor results."""
    from fdjax.__main__ import leave

    add = Recording.add_superstep

    def add_and_stop(recording, done, *more):
        add(recording, done, *more)
        if done == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Recording, "add_superstep", add_and_stop)
    with pytest.raises(fdjax.InterruptedRun) as stop:
        run(small(), tmp_path)
    result = stop.value.result
    assert result.round == 2
    assert result.evaluations["round"] == [0, 1, 2]
    expected = {name: values[:2] for name, values in undisturbed[1].rounds.items()}
    assert result.rounds == expected
    leave(tmp_path, [result])
    assert "round 2 of 4, stopped" in (tmp_path / "table.md").read_text()
    content = json.loads((tmp_path / "results.json").read_text())["result"]
    assert (content["round"], content["settings"]["rounds"]) == (2, 4)
    assert content["rounds"]["bytes_up"] == expected["bytes_up"]
    assert (tmp_path / "curves.png").is_file()
    assert "round 2 of 4" in capsys.readouterr().out


def test_nothing_to_resume_is_refused_with_what_could_be(undisturbed, tmp_path, monkeypatch):
    """Before: a new run began."""
    monkeypatch.setattr(runner, "build", lambda _: pytest.fail("built although refused"))
    with pytest.raises(InputError, match=r"^.*/x holds no checkpoint to resume; nor does anything beside it; with"):
        run(small(), tmp_path / "x", resume=True)
    shutil.copytree(undisturbed[0], tmp_path / "other")
    with pytest.raises(InputError, match=rf"^{tmp_path}/x holds no checkpoint .*; {tmp_path}/other could be resumed;"):
        run(small(), tmp_path / "x", resume=True)
    assert not (tmp_path / "x").exists()
    with pytest.raises(InputError, match="resume=True needs the folder"):
        run(small(), resume=True)


def test_a_program_refuses_to_resume_nothing(undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path / "runs" / "a run")
    result = programs.run_here("fdjax", f"--out={tmp_path}/runs/b", "--resume")
    message = f"error: {tmp_path}/runs/b holds no checkpoint to resume; {tmp_path}/runs/a run could be resumed;"
    assert result.returncode == 2
    assert result.stderr.startswith(message)
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "runs/b").exists()
