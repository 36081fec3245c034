"""Another checkout of fdjax: its own `benchmarks.speed_suites` makes the work of a case and times a round of it.

    python checkout_worker.py /path/to/checkout

The code here is this checkout's, but whatever it imports of fdjax and of benchmarks is the other one's. So it uses only
what every checkout has: `Case`, `make_work`, `Fdjax` and `make_mesh`. No data are handed over: checkouts draw the same.
Times are pairs of seconds: on the wall, and of the processor, which a busy machine changes less.
"""

import importlib
import pathlib
import subprocess
import sys
import time
import types

import jax
import numpy as np
from worker import serve

CHECKOUT = pathlib.Path(sys.argv[1]).resolve()
LEAST = 0.2  # seconds of rounds in a repeat
sys.path.insert(0, str(CHECKOUT))

speed_suites = importlib.import_module("benchmarks.speed_suites")
fdjax = importlib.import_module("fdjax")
runtime = importlib.import_module("fdjax.runtime")


def clock():
    """Seconds [2]: on the wall, and of the processor."""
    return np.array([time.perf_counter(), time.process_time()])


def make_mesh():
    """All devices, as the checkout's engine arranges them; its module had another place once."""
    for name in ("fdjax.engine.lift", "fdjax.lift"):
        try:
            return importlib.import_module(name).make_mesh()
        except ModuleNotFoundError:
            continue
    raise ModuleNotFoundError(f"no module lift in the fdjax of {CHECKOUT}")


class Checkout:
    """One case at a time."""

    def version(self, devices):
        if CHECKOUT not in pathlib.Path(fdjax.__file__).resolve().parents:
            raise ImportError(f"fdjax comes from {fdjax.__file__}, not from {CHECKOUT}")
        if devices:
            jax.config.update("jax_num_cpu_devices", devices)
        runtime.use_all_cores()
        jax.config.update("jax_enable_compilation_cache", False)
        speed_suites.time = types.SimpleNamespace(perf_counter=clock)  # both clocks wherever it reads one
        command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        revision = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        return {"version": f"{revision or 'no revision'}, jax {jax.__version__}"}

    def load(self, case, chunk):
        known = {name: tuple(value) if isinstance(value, list) else value for name, value in case.items()}
        # What another checkout has no field for must be of no importance to this case.
        known = {name: value for name, value in known.items() if value or name in speed_suites.Case._fields}
        self.case, self.chunk, self.mesh = speed_suites.Case(**known), chunk, make_mesh()
        self.work = speed_suites.make_work(self.case)
        self.compile()
        widths = [f"{width} to {share:.1%}" for share, width in self.built.narrow]
        return {"chunk": ", ".join([*widths, str(self.built.chunk)]), "temp_bytes": self.built.memory["temp"]}

    def compile(self):
        """Trace, lower and compile the superstep with nothing left of what was compiled before."""
        jax.clear_caches()
        self.built = speed_suites.Fdjax(self.case, self.work, self.mesh, self.chunk)
        return {"seconds": self.built.compile_seconds.tolist()}

    def run(self):
        """The fastest of as many rounds as fill a repeat."""
        rounds = [self.built()]
        while np.sum(rounds, axis=0)[0] < LEAST:
            rounds.append(self.built())
        return {"seconds": np.min(rounds, axis=0).tolist()}

    def save(self, path):
        found = {"first": self.built.first.server, "after": self.built.after}
        leaves = jax.tree.leaves_with_path(found)
        np.savez(path, **{jax.tree_util.keystr(name, simple=True, separator="/"): leaf for name, leaf in leaves})


if __name__ == "__main__":
    serve(Checkout())
