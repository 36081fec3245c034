"""Processes that stand for hosts."""

import os
import socket
import subprocess
import sys

import programs


def begin(folder, *command, devices=1):
    paths = programs.ROOT, programs.ROOT / "tests", programs.ROOT / "tests" / "engine"
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_NUM_CPU_DEVICES": str(devices), "XLA_FLAGS": programs.quick(os.environ.get("XLA_FLAGS", "")),
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }  # fmt: skip
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *command], cwd=programs.ROOT, env=environment, stdout=pipe, stderr=pipe, text=True
    )


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def finish(*processes):
    """(exit code, stdout, stderr) of each."""
    return [(p.returncode, *said) for p, said in [(p, p.communicate(timeout=600)) for p in processes]]
