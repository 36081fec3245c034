"""Programs keep their compiled code: the second start of a command compiles nothing."""

import json
import os
import subprocess
import sys

import programs
import pytest

from fdjax.run import program

# The program, which then writes how often JAX looked for compiled code, found it and had to write it.
COUNTING = """
import collections, json, runpy, sys
import jax
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.rpartition("/")[2]]))
module, out, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
finally:
    with open(out, "w") as file:
        json.dump(counts, file)
"""
SMALL = (
    "--dataset=synthetic", "--num_clients=3", "--samples_per_client=10", "--model=mclr", "--rounds=1", "--devices=1",
    "--overwrite",
)  # fmt: skip


def start(tmp_path, module, *flags):
    """The program's stderr, and the events of JAX's compilation cache."""
    out = tmp_path / "counts.json"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": programs.quick(os.environ.get("XLA_FLAGS", ""))}
    command = [sys.executable, "-c", COUNTING, module, str(out), *flags]
    done = subprocess.run(command, cwd=programs.ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stderr, json.loads(out.read_text())


@pytest.mark.parametrize("algorithm", [pytest.param("feddistill", marks=pytest.mark.exhaustive), "fedavg"])
def test_the_second_start_compiles_nothing(algorithm, tmp_path):
    cache = tmp_path / "cache"
    flags = (*SMALL, f"--algorithm={algorithm}", f"--compile_cache={cache}", f"--out={tmp_path}/out")
    stderr, first = start(tmp_path, "fdjax", *flags)
    written = sorted(file.name for file in cache.iterdir())
    assert first["cache_misses"] > 0, stderr
    assert len(written) >= first["cache_misses"]
    stderr, second = start(tmp_path, "fdjax", *flags)
    assert second.get("cache_misses", 0) == 0, stderr
    assert second["cache_hits"] == second["compile_requests_use_cache"], stderr
    assert sorted(file.name for file in cache.iterdir()) == written


@pytest.mark.exhaustive
def test_an_empty_folder_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    stderr, counts = start(tmp_path, "fdjax", *SMALL, "--compile_cache=", f"--out={tmp_path}/out")
    assert not {"cache_hits", "cache_misses"} & counts.keys(), stderr
    assert not (tmp_path / ".cache" / "fdjax").exists()


def test_a_folder_that_cannot_be_written_to_is_a_warning(tmp_path, monkeypatch, capsys):
    given = {}
    monkeypatch.setattr(program.jax.config, "update", given.__setitem__)
    (tmp_path / "file").touch()
    program.keep_compiled_code(f"{tmp_path}/file/x")
    assert capsys.readouterr().err == (
        f"warning: --compile_cache={tmp_path}/file/x: Not a directory; compiled code is not kept, give another folder\n"
    )
    assert given["jax_compilation_cache_dir"] is None
