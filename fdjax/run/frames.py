"""Results as tables: pandas DataFrames, and one Parquet file of every number beside results.json."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from fdjax.engine import hosts
from fdjax.errors import InputError, unknown
from fdjax.run.saving import saving


def frame_of(result: Any, of: str) -> Any:
    """A pandas DataFrame of a result: see `Result.frame`."""
    if not isinstance(of, str) or of not in COLUMNS:
        raise unknown("table, frame(of=...)", of, COLUMNS)
    if importlib.util.find_spec("pandas") is None:
        raise InputError("result.frame needs the package pandas; pip install 'fdjax[frames]'")
    import pandas

    return pandas.DataFrame({"seed": result.settings.seed} | COLUMNS[of](result))


def _rounds(result: Any) -> dict[str, Any]:
    return {"round": np.arange(1, result.round + 1)} | {n: np.asarray(v, float) for n, v in result.rounds.items()}


def _evaluations(result: Any) -> dict[str, Any]:
    """With the bytes that all clients have sent and received by then."""
    at = np.asarray(result.evaluations["round"], int)
    sent = {
        way: np.concatenate([[result.setup.get(way, 0.0)], result.rounds[way]])[at]
        for way in ("bytes_up", "bytes_down")
    }
    values = {name: np.asarray(v, float) for name, v in result.evaluations.items() if name != "round"}
    return {"round": at} | sent | values


def _clients(result: Any) -> dict[str, Any]:
    """A row for each evaluation and client; of the last evaluation alone what is kept of no other."""
    rounds = np.asarray(result.evaluations["round"], int)
    histories = {name: np.asarray(v, float) for name, v in result.client_evaluations.items()}  # [E, C]
    last = {name: np.asarray(v, float) for name, v in result.clients.items() if name not in histories}  # [C]
    seen = min(map(len, histories.values()), default=0)
    if seen < len(rounds):  # the last evaluation follows on those that are kept
        rounds = np.concatenate([rounds[:seen], rounds[-1:]])
        histories = {name: np.vstack([values, result.clients[name]]) for name, values in histories.items()}
    clients = len(result.holdings.get("n_k", ())) or max((len(v) for v in last.values()), default=0)
    kept = len(rounds)

    def at_the_end(values: np.ndarray) -> np.ndarray:
        return np.concatenate([np.full((kept - 1) * clients, np.nan), values])

    return {
        "round": np.repeat(rounds, clients),
        "client": np.tile(np.arange(clients), kept),
        **{name: values.reshape(-1) for name, values in histories.items()},
        **{name: at_the_end(values) for name, values in last.items()},
    }


COLUMNS: Mapping[str, Callable[[Any], dict[str, Any]]] = MappingProxyType(
    {"evaluations": _evaluations, "rounds": _rounds, "clients": _clients}
)  # the columns of each table, [rows] by name


def write_parquet(path: Path, results: Sequence[Any]) -> None:
    """Every number of the results in one long table; of several hosts, the first writes. What cannot be is told.

    Columns: `seed`, `of` (evaluations, rounds or clients), `round`, `client` (null but for clients), `name`, `value`.
    """
    if not hosts.is_first():
        return
    import pyarrow as pa
    from pyarrow import parquet

    parts = [_long(pa, result, of) for result in results for of in COLUMNS]
    with saving(path) as temporary:
        parquet.write_table(pa.concat_tables(parts).unify_dictionaries(), temporary, compression="zstd")


def _long(pa: Any, result: Any, of: str) -> Any:
    columns = COLUMNS[of](result)
    rounds, client = columns.pop("round"), columns.pop("client", None)
    rows, names = len(rounds), [*columns]
    size = rows * len(names)

    def words(index: np.ndarray, values: Sequence[str]) -> Any:
        return pa.DictionaryArray.from_arrays(index.astype(np.int32), pa.array(values, pa.string()))

    return pa.table(
        {
            "seed": pa.array(np.full(size, result.settings.seed, np.int64)),
            "of": words(np.zeros(size), [of]),
            "round": pa.array(np.tile(rounds, len(names)).astype(np.int64)),
            "client": pa.nulls(size, pa.int64()) if client is None else pa.array(np.tile(client, len(names))),
            "name": words(np.repeat(np.arange(len(names)), rows), names),
            "value": pa.array(np.concatenate([*columns.values()]) if names else np.zeros(0)),
        }
    )  # fmt: skip
