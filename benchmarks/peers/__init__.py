"""Other simulators, each in a worker process of its own environment; this side of them imports none.

Another checkout of fdjax is such a worker too, in the environment of this one.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import jax
import numpy as np

from fdjax.errors import InputError, unknown

HERE = pathlib.Path(__file__).parent
PEERS = {name: HERE / f"{name}_worker.py" for name in ("torch", "fedjax", "pfl")}


class Worker:
    """A process that takes one JSON request a line and answers with one, so that timed repeats can interleave."""

    def __init__(self, name: str, command: list[str | pathlib.Path], remedy: str):
        self.name, self._remedy = name, remedy
        # Without the flags that fdjax gives to XLA: a worker runs as its own users run it.
        environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            answer = stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise InputError(f"peer {self.name!r} died: its own message is above; {self._remedy}")
        return json.loads(answer)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Peer(Worker):
    """Another simulator, which is handed the work."""

    def __init__(self, name: str, python: str):
        if name not in PEERS:
            raise unknown("peer", name, PEERS)
        if not pathlib.Path(python).exists():
            raise InputError(f"no interpreter for peer {name!r} at {python}; run `make bench-venv`, or pass --peers=")
        super().__init__(name, [python, PEERS[name]], "`make bench-venv` may mend it")
        self.version = self.ask(do="version")["version"]

    def load(self, x, y, batches, params: Any, teacher: Any | None, **options: Any) -> str:
        """Hand over the work; the peer warms up and says how it will run."""
        arrays = named("params", params) | ({} if teacher is None else named("teacher", teacher))
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "work.npz")
            np.savez(path, x=x, y=y, batches=batches, **arrays)
            return self.ask(do="load", path=path, **options)["note"]

    def __call__(self) -> float:
        """Seconds of one round."""
        return self.ask(do="run")["seconds"]

    def params(self, like: Any) -> Any:
        """The averaged parameters after the last round, as a pytree like `like`."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "params.npz")
            self.ask(do="save", path=path)
            with np.load(path) as data:
                leaves = [data[name.removeprefix("params/")] for name in named("params", like)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)


class Checkout(Worker):
    """The fdjax of a checkout, which makes the work by itself."""

    def __init__(self, path: pathlib.Path, devices: int = 0):
        if not (path / "benchmarks" / "speed_suites.py").exists():
            raise InputError(f"--against={path}: no checkout of fdjax, for it has no benchmarks/speed_suites.py")
        super().__init__(str(path), [sys.executable, HERE / "checkout_worker.py", path], "does its fdjax run at all?")
        self.version = f"{path}, {self.ask(do='version', devices=devices)['version']}"


def named(prefix: str, tree: Any) -> dict[str, np.ndarray]:
    """The leaves of nested dicts by name: prefix/Dense_0/kernel."""
    return {
        f"{prefix}/{jax.tree_util.keystr(path, simple=True, separator='/')}": np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def reset_peak(pid: int) -> None:
    """Begin to measure the process's peak memory anew (Linux)."""
    with contextlib.suppress(OSError):
        pathlib.Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_bytes(pid: int) -> int | None:
    """Peak resident memory of a process since `reset_peak`; None where the system does not say."""
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:")), None)
