"""What must be said to XLA before a device is first used."""

import os

import jax
from jaxlib.version import __version__ as jaxlib_version

_YNN = "--xla_cpu_experimental_ynn_fusion_type="


def work_around_ynn() -> None:
    """Keep XLA:CPU of jaxlib 0.10 from handing anything to YNNPACK, which there gives wrong numbers without a word.

    Sums over wide vmapped arrays: the summed cross-entropy of 100 logistic models on 500 examples is 14 % off for
    clients 65 to 99. Matrix products on two host devices at once: 14 of 20 runs of CNN1's training, batch 96, had wrong
    gradients, and none without YNNPACK. jaxlib 0.12 gives the right sums; it has not been tried for the products.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if jaxlib_version.startswith("0.10.") and _YNN not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_YNN}".strip()


def use_all_cores() -> None:
    """One host device a core, unless a number is set: XLA:CPU runs small work on one thread.

    Call it before the first use of a device.
    """
    if jax.config.jax_num_cpu_devices < 0:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
