"""What a user's own method raises, in one line: the method, the function, the exception, and where it was raised."""

import functools
from collections.abc import Callable
from typing import Any

from fdjax import own
from fdjax.contract import Algorithm, Exchange, Reduction
from fdjax.engine.check import place_of
from fdjax.errors import InputError, a_kind
from fdjax.method import Method, Task


def guarded(method: Method) -> Method:
    """The method, whose functions raise InputError for whatever exception they end in, from that exception."""
    build = method.build

    def checked(task: Task) -> Algorithm:
        algorithm = _guard(build, f"{method.name}: build")(task)
        if not isinstance(algorithm, Algorithm):
            where = f"{method.name}: build{place_of(build)}"
            raise InputError(f"{where} returned {a_kind(algorithm)}, expected a fdjax.Algorithm")
        return _guard_algorithm(algorithm, method.name)

    return method._replace(build=checked)


def _guard(function: Any, where: str) -> Any:
    """The function, which names itself in its errors; anything else is left for the checks of what it should be."""
    if not callable(function):
        return function

    @functools.wraps(function)
    def named(*args: Any, **more: Any) -> Any:
        try:
            return function(*args, **more)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{where}{place_of(function)} raised {own.told(error)}") from error

    return named


def _guard_fields(value: Any, fields: tuple[str, ...], where: str) -> Any:
    return value._replace(**{name: _guard(getattr(value, name), f"{where}: {name}") for name in fields})


def _guard_algorithm(algorithm: Algorithm, name: str) -> Algorithm:
    guarded: Algorithm = _guard_fields(algorithm, ("init_server", "init_client", "central", "personal"), name)
    each: Callable[[Any], Any] = functools.partial(_guard_exchange, name=name)
    for field in ("setup", "round"):
        exchanges = getattr(algorithm, field)
        if isinstance(exchanges, tuple):
            guarded = guarded._replace(**{field: tuple(map(each, exchanges))})
    return guarded


def _guard_exchange(exchange: Any, name: str) -> Any:
    if not isinstance(exchange, Exchange):
        return exchange
    where = f"{name}, exchange {exchange.label}"
    guarded: Exchange = _guard_fields(exchange, ("broadcast", "client", "server"), where)
    reduce = exchange.reduce
    if isinstance(reduce, Reduction):
        return guarded._replace(reduce=_guard_reduction(reduce, f"{where}: reduce"))
    if isinstance(reduce, dict):
        each = {label: _guard_reduction(one, f"{where}: reduce[{label!r}]") for label, one in reduce.items()}
        return guarded._replace(reduce=each)
    return guarded


def _guard_reduction(reduction: Any, where: str) -> Any:
    return _guard_fields(reduction, ("partial", "finish"), where) if isinstance(reduction, Reduction) else reduction
