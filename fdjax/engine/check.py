"""What a method's functions return, checked where it comes in: its type, structure, shapes and dtypes.

Checks happen while a round is traced, so they cost nothing when it runs. An error is one line: method, exchange,
function and file, what was returned, what was expected.
"""

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp

from fdjax.contract import COMBINES, ENSEMBLE, Algorithm, Broadcast, Exchange, Reduction, Upload
from fdjax.errors import InputError, unknown
from fdjax.types import PyTree


def name_of(exchange: Exchange) -> str:
    """The exchange's name, or that of its client function."""
    return exchange.name or getattr(exchange.client, "__name__", "exchange")


def reductions_of(exchange: Exchange) -> dict[str, Reduction]:
    """The exchange's reductions by name; a single one has the name ""."""
    return {"": exchange.reduce} if isinstance(exchange.reduce, Reduction) else dict(exchange.reduce)


def check_algorithm(algorithm: Algorithm, classes_of: Callable[[], dict[str, int]]) -> None:
    """Raises InputError for an algorithm that nobody could run or test; `classes_of` says K of each model in use."""
    if algorithm.central is None and algorithm.personal is None:
        raise InputError(f"{algorithm.name} names neither a central model nor personal ones: nothing can be tested")
    if algorithm.central is ENSEMBLE and algorithm.personal is None:
        raise InputError(f"{algorithm.name} tests an ensemble, but names no personal models that could vote")
    if not algorithm.round:
        raise InputError(f"{algorithm.name} has no exchange in a round; give at least one")
    for exchange in (*algorithm.setup, *algorithm.round):
        for label, reduction in reductions_of(exchange).items():
            where = f"{algorithm.name}, exchange {name_of(exchange)}: reduce" + (f"[{label!r}]" if label else "")
            if not isinstance(reduction, Reduction):
                raise InputError(f"{where} is a {type(reduction).__name__}, expected a Reduction or a dict of them")
            if reduction.combine not in COMBINES:
                raise unknown(f"way to combine ({where})", reduction.combine, COMBINES)
    classes = classes_of()
    if len({*classes.values()}) > 1:
        each = ", ".join(f"{model} {K}" for model, K in classes.items())
        raise InputError(f"models differ in their number of classes ({each}); build all for those of the data")


class Checker:
    """The checks of one exchange's functions."""

    def __init__(self, algorithm: Algorithm, exchange: Exchange):
        self._method, self._exchange = algorithm.name, exchange

    def _refuse(self, function: str, text: str) -> InputError:
        called = getattr(self._exchange, function, None)
        return InputError(
            f"{self._method}, exchange {name_of(self._exchange)}: {function}{place_of(called)} returned {text}"
        )

    def broadcast(self, result: Any, cohort: int, size: int) -> Broadcast:
        """A Broadcast whose own rows are as many as the cohort has clients."""
        if not isinstance(result, Broadcast):
            raise self._refuse("broadcast", f"a {type(result).__name__}, expected a Broadcast(shared, own)")
        for path, leaf in jax.tree.leaves_with_path(result.own):
            if jnp.ndim(leaf) < 1 or leaf.shape[0] != size:
                raise self._refuse(
                    "broadcast",
                    f"own rows{_at(path)} of shape {jnp.shape(leaf)} for cohort {cohort}, expected one row for each "
                    f"of its {size} clients: ({size}, ...); cut tables of all clients by task.ids(ctx.cohort)",
                )
        return result

    def client(self, result: Any, state: PyTree) -> tuple[PyTree, Upload, dict[str, jax.Array]]:
        """(state of the structure it had, Upload, metrics by name)."""
        if not (isinstance(result, tuple) and len(result) == 3 and isinstance(result[1], Upload)):
            raise self._refuse("client", f"{_described(result)}, expected (state, Upload(tree), metrics)")
        new, upload, metrics = result
        self._same("client", "state", new, state)
        for name, value in (("bytes", upload.bytes), ("bytes_received", upload.bytes_received)):
            if value is not None and jnp.shape(value):
                raise self._refuse("client", f"an Upload whose {name} has shape {jnp.shape(value)}, expected []")
        return new, upload, self._metrics("client", metrics)

    def server(self, result: Any, server: PyTree) -> tuple[PyTree, dict[str, jax.Array]]:
        """(server state of the structure it had, metrics by name)."""
        if not (isinstance(result, tuple) and len(result) == 2):
            raise self._refuse("server", f"{_described(result)}, expected (server state, metrics)")
        self._same("server", "state", result[0], server)
        return result[0], self._metrics("server", result[1])

    def _same(self, function: str, what: str, new: PyTree, old: PyTree) -> None:
        """Raises InputError unless `new` has the structure, shapes and dtypes of `old`."""
        try:
            chex.assert_trees_all_equal_structs(new, old)
        except AssertionError:
            raise self._refuse(
                function,
                f"a {what} of structure {_line(jax.tree.structure(new))}, expected what it was given: "
                f"{_line(jax.tree.structure(old))}",
            ) from None
        try:
            chex.assert_trees_all_equal_shapes_and_dtypes(new, old)
        except AssertionError:
            pairs = zip(jax.tree.leaves_with_path(new), jax.tree.leaves(old), strict=True)
            path, leaf, known = next((p, a, b) for (p, a), b in pairs if _type(a) != _type(b))
            raise self._refuse(
                function, f"a {what} whose leaf{_at(path)} is {_type(leaf)}, expected {_type(known)} as it was given"
            ) from None

    def _metrics(self, function: str, metrics: Any) -> dict[str, jax.Array]:
        if not isinstance(metrics, dict):
            raise self._refuse(function, f"metrics that are a {type(metrics).__name__}, expected a dict by name")
        for name, value in metrics.items():
            if jnp.shape(value):
                raise self._refuse(function, f"a metric {name!r} of shape {jnp.shape(value)}, expected one number")
        return {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}


def check_names(algorithm: Algorithm, exchanges: Iterable[dict[str, Any]]) -> None:
    """Raises InputError if two exchanges of a round, or clients and server, give metrics of one name."""
    seen: set[str] = set()
    for metrics in exchanges:
        if twice := seen & metrics.keys():
            raise InputError(f"{algorithm.name}: metric {min(twice)!r} is given twice in a round; name them apart")
        seen |= metrics.keys()


def place_of(function: Any) -> str:
    """Where a function was defined, as " (file:line)", if it can be told."""
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    return f" ({Path(code.co_filename).name}:{code.co_firstlineno})" if code else ""


def _described(result: Any) -> str:
    if isinstance(result, tuple):
        return f"({', '.join(type(x).__name__ for x in result)})"
    return f"a {type(result).__name__}"


def _type(leaf: Any) -> str:
    return f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"


def _at(path: Any) -> str:
    return f" {jax.tree_util.keystr(path, simple=True, separator='/')}" if path else ""


def _line(structure: Any) -> str:
    return " ".join(str(structure).removeprefix("PyTreeDef(").removesuffix(")").split())
