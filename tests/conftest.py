"""Settings that must be in place before JAX starts, and what every test may ask for."""

import gc
import itertools
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import jax
import numpy as np
import programs
import pytest

_given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = programs.quick(_given)

import fdjax  # sets XLA flags, which count only before JAX starts
import fdjax.engine.compiling  # noqa: F401  asks the flags for a level of optimisation

jax.config.update("jax_num_cpu_devices", 4)  # so that every lifting meets more than one device
jax.devices()  # XLA reads its flags now, and processes that tests start compile as in use
os.environ["XLA_FLAGS"] = _given
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tracing makes many objects and little garbage: a tenth of the time of tests was the search for it.
gc.freeze()
gc.set_threshold(50_000, 20, 100)

# Compilation makes any first example slow; the same examples every time keep a failure reproducible.
hypothesis.settings.register_profile("fdjax", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("fdjax")


@pytest.fixture
def rng() -> np.random.Generator:
    """A NumPy generator, the same for every test."""
    return np.random.default_rng(0)


_MAPS, _since = pathlib.Path("/proc/self/maps"), itertools.count(1)


def pytest_runtest_teardown(item, nextitem):
    """Forget what was compiled before a process has the 65,530 memory maps that Linux allows, which XLA dies of.

    Rather between files, for tests of one share what is compiled; and not between tests of one method's contract, which
    say that nothing is compiled anew.
    """
    global _since
    about = [(each.path, each.callspec.params.get("name")) for each in (item, nextitem) if hasattr(each, "callspec")]
    goes_on = nextitem is not None and item.path == nextitem.path
    if (len(about) == 2 and about[0] == about[1] and about[0][1]) or (goes_on and next(_since) < 10):
        return
    _since = itertools.count(1)
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > (40_000 if goes_on else 20_000):
        jax.clear_caches()
