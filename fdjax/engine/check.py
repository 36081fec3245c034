"""What a method's functions return, checked where it comes in: its type, structure, shapes and dtypes.

Checks happen while a round is traced, so they cost nothing when it runs. An error is one line: method, exchange,
function and file, what was returned, what was expected.
"""

import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fdjax.client.trained import path_of
from fdjax.contract import COMBINES, ENSEMBLE, SHARES, Algorithm, Broadcast, Exchange, Reduction, Upload
from fdjax.errors import InputError, a_kind, unknown
from fdjax.types import PyTree


def reductions_of(exchange: Exchange) -> dict[str, Reduction]:
    """The exchange's reductions by name; a single one has the name ""."""
    return {"": exchange.reduce} if isinstance(exchange.reduce, Reduction) else dict(exchange.reduce)


def check_algorithm(algorithm: Algorithm, classes: dict[str, int]) -> None:
    """Raises InputError for an algorithm that nobody could run or test; `classes` is K of each model in use."""
    if algorithm.central is None and algorithm.personal is None:
        raise InputError(f"{algorithm.name} names neither a central model nor personal ones: nothing can be tested")
    if algorithm.central is ENSEMBLE and algorithm.personal is None:
        raise InputError(f"{algorithm.name} tests an ensemble, but names no personal models that could vote")
    for name, exchanges in (("round", algorithm.round), ("setup", algorithm.setup)):
        if not isinstance(exchanges, tuple) or not all(isinstance(exchange, Exchange) for exchange in exchanges):
            raise InputError(f"{algorithm.name}: {name} is no tuple of exchanges; write {name}=(exchange,)")
    if not algorithm.round:
        raise InputError(f"{algorithm.name} has no exchange in a round; give at least one")
    for exchange in (*algorithm.setup, *algorithm.round):
        _check_exchange(f"{algorithm.name}, exchange {exchange.label}", exchange)
    if len({*classes.values()}) > 1:
        each = ", ".join(f"{model} {K}" for model, K in classes.items())
        raise InputError(f"models differ in their number of classes ({each}); build all for those of the data")


def _check_exchange(where: str, exchange: Exchange) -> None:
    for field in ("broadcast", "client", "server"):
        if not callable(getattr(exchange, field)):
            raise InputError(f"{where}: {field} is {a_kind(getattr(exchange, field))}, expected a function")
    if not isinstance(exchange.reduce, Reduction | dict):
        raise InputError(
            f"{where}: reduce is {a_kind(exchange.reduce)}, expected a Reduction or a "
            "dict of them, such as reductions.mean()"
        )
    for label, reduction in reductions_of(exchange).items():
        name = f"{where}: reduce" + (f"[{label!r}]" if label else "")
        if not isinstance(reduction, Reduction):
            raise InputError(f"{name} is {a_kind(reduction)}, expected a Reduction")
        if reduction.combine not in COMBINES:
            raise unknown(f"way to combine ({name})", reduction.combine, COMBINES)
    if exchange.shares and exchange.shares not in SHARES:
        raise unknown(f"kind of what is shared ({where})", exchange.shares, SHARES)


def check_logits(algorithm: Algorithm, field: str, logits: Any, x: jax.Array, classes: int) -> jax.Array:
    """Raises InputError unless a predictor returned logits [B, K]."""
    expected = len(x), classes
    if not hasattr(logits, "dtype") or logits.shape != expected or not jnp.issubdtype(logits.dtype, jnp.floating):
        found = _type(logits) if hasattr(logits, "dtype") else f"{a_kind(logits)}"
        place = place_of(getattr(algorithm, field))
        raise InputError(f"{algorithm.name}: {field}{place} returned {found}, expected logits float32{list(expected)}")
    return logits


class Checker:
    """The checks of one exchange's functions, for clients of one cohort if it is given."""

    def __init__(self, algorithm: Algorithm, exchange: Exchange, cohort: int | None = None):
        self._method, self._exchange = algorithm.name, exchange
        self._cohort = "" if cohort is None else f" for cohort {cohort}"

    def _refuse(self, function: str, text: str, place: str | None = None) -> InputError:
        place = place_of(getattr(self._exchange, function, None)) if place is None else place
        where = f"{self._method}, exchange {self._exchange.label}{self._cohort}: {function}{place}"
        return InputError(f"{where} returned {text}")

    def _arrays(self, function: str, what: str, tree: PyTree) -> PyTree:
        """The tree with all leaves as arrays."""
        leaves, structure = jax.tree.flatten(tree)
        for leaf in leaves:
            if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float):
                raise self._refuse(function, f"{what} with {a_kind(leaf)} in it, expected arrays alone")
        return jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in leaves])

    def partial(self, label: str, reduction: Reduction, tree: PyTree) -> PyTree:
        """A partial, whose small whole numbers and truth values become int32: their sums would not fit."""
        name = f"reduce[{label!r}].partial" if label else "reduce.partial"
        tree = self._arrays(name, "a partial", tree)
        small = (jnp.bool_, jnp.int8, jnp.int16, jnp.uint8, jnp.uint16)
        if reduction.combine == "stack":
            return tree
        return jax.tree.map(lambda x: x.astype(jnp.int32) if x.dtype in small else x, tree)

    def same_partials(self, label: str, partials: Sequence[PyTree]) -> None:
        """Raises InputError if the cohorts' partials cannot be combined."""
        kinds = [jax.tree.structure(p) for p in partials], [[_type(x) for x in jax.tree.leaves(p)] for p in partials]
        for j in range(1, len(partials)):
            if any(kind[j] != kind[0] for kind in kinds):
                name = f"reduce[{label!r}]" if label else "reduce"
                raise InputError(
                    f"{self._method}, exchange {self._exchange.label}: the partials of {name} differ in shape between "
                    f"cohorts 0 and {j} ({_line(kinds[1][0])} and {_line(kinds[1][j])}); reduce them per_cohort"
                )

    def broadcast(self, result: Any, cohort: int, size: int) -> Broadcast:
        """A Broadcast whose own rows are as many as the cohort has clients."""
        if not isinstance(result, Broadcast):
            raise self._refuse("broadcast", f"{a_kind(result)}, expected a Broadcast(shared, own)")
        result = Broadcast(*(self._arrays("broadcast", name, tree) for name, tree in zip(result._fields, result)))
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
        new = self._same("client", "state", new, state)
        upload = upload._replace(tree=self._arrays("client", "an upload", upload.tree))
        for name, value in (("bytes", upload.bytes), ("bytes_received", upload.bytes_received)):
            if value is not None and jnp.shape(self._arrays("client", f"an Upload whose {name}", value)):
                raise self._refuse("client", f"an Upload whose {name} has shape {jnp.shape(value)}, expected []")
        return new, upload, self._metrics("client", metrics)

    def server(self, result: Any, server: PyTree) -> tuple[PyTree, dict[str, jax.Array]]:
        """(server state of the structure it had, metrics by name)."""
        if not (isinstance(result, tuple) and len(result) == 2):
            raise self._refuse("server", f"{_described(result)}, expected (server state, metrics)")
        return self._same("server", "state", result[0], server), self._metrics("server", result[1])

    def _same(self, function: str, what: str, new: PyTree, old: PyTree) -> PyTree:
        """`new`. Raises InputError unless it has the structure, shapes and dtypes of `old`."""
        new = self._arrays(function, f"a {what}", new)
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
        return new

    def _metrics(self, function: str, metrics: Any) -> dict[str, jax.Array]:
        if not isinstance(metrics, dict):
            raise self._refuse(function, f"metrics that are {a_kind(metrics)}, expected a dict by name")
        metrics = self._arrays(function, "metrics", metrics)
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
    return f"{a_kind(result)}"


def _type(leaf: Any) -> str:
    return f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"


def _at(path: Any) -> str:
    return f" {path_of(path)}" if path else ""


def _line(structure: Any) -> str:
    """Its text in one line."""
    return " ".join(str(structure).removeprefix("PyTreeDef(").removesuffix(")").split())
