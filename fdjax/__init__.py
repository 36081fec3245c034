"""fdjax: federated distillation, simulated in JAX.

A method is written for one client; the engine runs it for thousands in one compiled step.

    import fdjax

    result = fdjax.run(algorithm="feddistill", dataset="synthetic", model="mclr", temperature=2.0, rounds=20)
    result.final["central_accuracy"]
    result.central.predict(x)  # logits; result.personal(3) is the model of client 3
    fdjax.run_seeds([0, 1, 2], algorithm="feddistill")  # three results, of one compiled batch
    fdjax.load("runs/x")  # the result of a run in a folder

Everything below is loaded at its first use, so that importing fdjax stays quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fdjax.runtime import work_around_xla_cpu

if TYPE_CHECKING:
    from fdjax import algorithms, data, keys, models
    from fdjax.client import losses
    from fdjax.client.metric import Metric
    from fdjax.contract import (
        ENSEMBLE,
        Algorithm,
        Broadcast,
        Context,
        Exchange,
        Received,
        Reduction,
        Stack,
        Upload,
    )
    from fdjax.data.arrays import from_arrays
    from fdjax.data.frames import from_frame
    from fdjax.data.texts import from_texts
    from fdjax.errors import DataWarning, InputError
    from fdjax.exchange import reductions
    from fdjax.method import HParam, Method, Task, Training
    from fdjax.run.contract_check import BrokenContractError, check_method
    from fdjax.run.loggers import Progress
    from fdjax.run.logs import CallbackError
    from fdjax.run.runner import InterruptedRun, Result
    from fdjax.run.runner import start as run
    from fdjax.run.seeds import start as run_seeds
    from fdjax.run.settings import Settings
    from fdjax.run.settings import make as settings
    from fdjax.run.stored import load
    from fdjax.run.summary import summary

__version__ = "0.2.0"  # the only place; setup.cfg reads it

__all__ = [
    "ENSEMBLE", "Algorithm", "Broadcast", "BrokenContractError", "CallbackError", "Context", "DataWarning",
    "Exchange", "HParam", "InputError", "InterruptedRun", "Method", "Metric", "Progress", "Received", "Reduction",
    "Result", "Settings", "Stack", "Task", "Training", "Upload", "algorithms", "check_method", "data", "from_arrays",
    "from_frame", "from_texts", "keys", "load", "losses", "models", "reductions", "run", "run_seeds", "settings",
    "summary",
]  # fmt: skip

_MODULES = {
    "algorithms": "fdjax.algorithms",
    "data": "fdjax.data",
    "keys": "fdjax.keys",
    "losses": "fdjax.client.losses",
    "models": "fdjax.models",
    "reductions": "fdjax.exchange.reductions",
    "run": "fdjax.run",  # a package that can be called
}
_ATTRIBUTES = {
    **dict.fromkeys(("HParam", "Method", "Task", "Training"), "fdjax.method"),
    **dict.fromkeys(("InterruptedRun", "Result"), "fdjax.run.runner"),
    **dict.fromkeys(("Settings", "settings"), "fdjax.run.settings"),
    "CallbackError": "fdjax.run.logs",
    "Progress": "fdjax.run.loggers",
    **dict.fromkeys(("DataWarning", "InputError"), "fdjax.errors"),
    "Metric": "fdjax.client.metric",
    "from_arrays": "fdjax.data.arrays",
    "from_frame": "fdjax.data.frames",
    "from_texts": "fdjax.data.texts",
    "load": "fdjax.run.stored",
    "summary": "fdjax.run.summary",
    "run_seeds": "fdjax.run.seeds",
    **dict.fromkeys(("BrokenContractError", "check_method"), "fdjax.run.contract_check"),
    **dict.fromkeys(
        ("ENSEMBLE", "Algorithm", "Broadcast", "Context", "Exchange", "Received", "Reduction", "Stack", "Upload"),
        "fdjax.contract",
    ),
}
_OTHER_NAMES = {"settings": "make", "run_seeds": "start"}  # where a name is another one in its module


def __getattr__(name: str) -> Any:
    """A public name, from where it is defined."""
    if name in _MODULES:
        value = importlib.import_module(_MODULES[name])
    elif name in _ATTRIBUTES:
        value = getattr(importlib.import_module(_ATTRIBUTES[name]), _OTHER_NAMES.get(name, name))
    else:
        raise AttributeError(f"module 'fdjax' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


work_around_xla_cpu()
