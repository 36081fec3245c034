"""Which of the params a training changes, by their paths, and an optimiser that keeps to these."""

import fnmatch
from collections.abc import Callable
from typing import Any

import jax
import optax

from fdjax.errors import InputError
from fdjax.types import STATISTICS, PyTree

Paths = Callable[[str], bool]  # whether the params at a path, such as "Dense_0/kernel", are among those meant


def path_of(keys: Any) -> str:
    """The path of a leaf as it is written in patterns, e.g. "Dense_0/kernel"."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def is_statistic(path: str) -> bool:
    """Whether a path leads to a running statistic of BatchNorm."""
    return STATISTICS in path.split("/")


def paths_read(function: Callable[..., Any], params: PyTree, *inputs: Any) -> set[str]:
    """The paths of those of `params` that `function(params, *inputs)` makes use of, such as a head's. Shapes do."""
    trace = jax.make_jaxpr(function)(params, *inputs).jaxpr
    needed = {id(variable) for variable in trace.outvars}
    for equation in reversed(trace.eqns):
        if any(id(variable) in needed for variable in equation.outvars):
            needed |= {id(variable) for variable in equation.invars}
    leaves = jax.tree.leaves_with_path(params)
    return {path_of(keys) for (keys, _), v in zip(leaves, trace.invars, strict=False) if id(v) in needed}


def paths(patterns: str) -> Paths:
    """The paths that comma-separated patterns mean, e.g. "Dense_0/*,*bias"; one that begins with ! takes paths away.

    `*` stands for any text, slashes too. If the first pattern takes away, all others are meant.
    """
    parts = _parts(patterns)

    def meant(path: str) -> bool:
        found = parts[0].startswith("!")
        for part in parts:
            if fnmatch.fnmatchcase(path, part.removeprefix("!")):
                found = not part.startswith("!")
        return found

    return meant


def _parts(patterns: str) -> list[str]:
    return [part.strip() for part in patterns.split(",") if part.strip()]


def check_patterns(flag: str, patterns: str, params: PyTree) -> None:
    """Raises InputError if a pattern meets no parameter of `params` (shapes do), or if all of them mean none."""
    known = [path_of(keys) for keys, _ in jax.tree.leaves_with_path(params)]
    listed = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
    parts = [part.removeprefix("!") for part in _parts(patterns)]
    for part in parts:
        if not any(fnmatch.fnmatchcase(path, part) for path in known):
            raise InputError(f"--{flag}={patterns}: {part!r} meets none of the model's parameters, which are {listed}")
    if not parts or not any(map(paths(patterns), known)):
        raise InputError(f"--{flag}={patterns} means none of the model's parameters, which are {listed}")


def on_trained(
    optimizer: optax.GradientTransformation,
    params: PyTree,
    trained: Paths | None = None,
) -> optax.GradientTransformation:
    """The optimiser for the trained params alone.

    Statistics of BatchNorm, whose gradient is by construction their change, take it as it is; all others stay. The
    optimiser has state, and clips by the norm, of the trained params alone.
    """
    labels = labels_of(params, trained)
    if {*jax.tree.leaves(labels)} - {"trained"}:
        of_label = {"trained": optimizer, "frozen": optax.set_to_zero(), "statistics": optax.scale(-1.0)}
        optimizer = optax.partition(of_label, labels)  # pyright: ignore[reportArgumentType]
    return optimizer


def labels_of(params: PyTree, trained: Paths | None = None) -> PyTree:
    """What becomes of each leaf: "trained", "frozen", or "statistics"."""

    def label(keys, _):
        path = path_of(keys)
        if is_statistic(path):
            return "statistics"
        return "trained" if trained is None or trained(path) else "frozen"

    return jax.tree_util.tree_map_with_path(label, params)
