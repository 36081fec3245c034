"""What must be said to XLA before a device is first used."""

import os
import warnings

import jax
from jax._src import xla_bridge  # no public function tells whether a backend has started
from jaxlib.version import __version__ as jaxlib_version

_YNN = "--xla_cpu_experimental_ynn_fusion_type="
_PASSES, _SPLIT = "--xla_disable_hlo_passes=", "cpu-parallel-task-assigner"
# Seconds that a device waits for the others at the sum of a round.
_PATIENCE = {
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=": 3600,
    "--xla_cpu_collective_call_terminate_timeout_seconds=": 7 * 86400,
    "--xla_cpu_collective_timeout_seconds=": 7 * 86400,
}


def work_around_xla_cpu() -> None:
    """Keep XLA:CPU of jaxlib 0.10 from wrong numbers, and from killing a run whose clients take long.

    Two optimisations give wrong numbers there without a word. Fusions handed to YNNPACK: the summed cross-entropy of
    100 vmapped logistic models on 500 examples is 14 % off for clients 65 to 99, on one device; jaxlib 0.12 is right.
    Kernels split over threads, while two host devices are busy: CNN1's parameters are 1e-3 off after one round of 8
    clients, and differ between runs; without the pass that splits them, runs are bitwise equal and within 1e-5 of one
    device. With a device a core the splitting gains nothing.

    A device that waits 40 seconds for another at the sum of a round ends the process: five clients of five epochs on
    two devices did. They wait for a week here, as one client's work may well take longer than another's.

    Other passes that XLA_FLAGS disables stay disabled; a choice of YNNPACK's fusions or of a timeout is left alone.
    """
    if not jaxlib_version.startswith("0.10."):
        return
    flags = os.environ.get("XLA_FLAGS", "").split()
    for name, value in {_YNN: "", **_PATIENCE}.items():
        if not any(flag.startswith(name) for flag in flags):
            flags.append(f"{name}{value}")
    disabled = next((flag for flag in reversed(flags) if flag.startswith(_PASSES)), _PASSES)  # the last one counts
    if _SPLIT not in disabled and xla_bridge.backends_are_initialized():
        warnings.warn(
            "JAX used a device before fdjax was imported, so known wrong numbers of jaxlib 0.10 on CPU cannot be "
            "prevented; import fdjax first",
            stacklevel=3,
        )
    if _SPLIT not in disabled:
        flags.append(f"{disabled},{_SPLIT}" if disabled != _PASSES else _PASSES + _SPLIT)
    os.environ["XLA_FLAGS"] = " ".join(flags)


def use_all_cores() -> None:
    """One host device a core, unless a number is set: XLA:CPU runs small work on one thread.

    Call it before the first use of a device; after it, nothing can be changed, and nothing is.
    """
    if xla_bridge.backends_are_initialized():
        return
    if jax.config.jax_num_cpu_devices < 0:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
