"""Every client's values at every evaluation, as records keep them: float32, compressed, as text that survives JSON."""

import base64
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

MOST = 4_000_000  # values that a record keeps, 21 MB of text at most; a checkpoint has all of it


def pack(values: np.ndarray) -> str:
    """The values [C] of one evaluation."""
    return base64.b64encode(zlib.compress(np.asarray(values, "<f4").tobytes(), 1)).decode()


def unpack(history: Mapping[str, list[str]]) -> dict[str, np.ndarray]:
    """The values [E, C] float32 by name, of those that were packed one evaluation after another."""
    return {
        name: np.stack([np.frombuffer(zlib.decompress(base64.b64decode(row)), "<f4") for row in rows])
        for name, rows in history.items()
    }


def kept(record: Mapping[str, Any]) -> int:
    """Of how many evaluations, the first ones, a record keeps the values."""
    return min(map(len, record.get("client_evaluations", {}).values()), default=0)


def at(record: Mapping[str, Any], evaluation: int) -> dict[str, list[float]]:
    """The values of every client by name at an evaluation; {} where they are not kept."""
    history = record.get("client_evaluations", {}) if evaluation < kept(record) else {}
    found = unpack({name: rows[evaluation : evaluation + 1] for name, rows in history.items()})
    return {name: values[0].astype(float).tolist() for name, values in found.items()}


def add(record: dict[str, Any], values: Mapping[str, Any], left: int, beside: int) -> str:
    """Add the values [C] of the latest evaluation by name to a record that can keep those of all; else, why it cannot.

    What it keeps by then stays: a run that goes on for more rounds than were planned may have no room for them.

    Args:
      record: with the latest evaluation in it.
      values: of each client.
      left: evaluations that are to come.
      beside: records that are kept at once, which share the room.
    """
    if not values:  # nothing of clients is tested, so nothing is missing
        return ""
    if why := _why_not(record, values, left, beside):
        number = kept(record)
        of = f"the first {number} evaluations and the last one" if number else "the last evaluation alone"
        return f"clients' values are kept of {of}: {why}"
    history = record.setdefault("client_evaluations", {})
    for name, of_clients in values.items():
        history.setdefault(name, []).append(pack(of_clients))
    return ""


def _why_not(record: Mapping[str, Any], values: Mapping[str, Any], left: int, beside: int) -> str:
    done = len(record["evaluations"]["round"])
    clients, evaluations = len(next(iter(values.values()), [])), done + left
    if clients * evaluations * len(values) * beside > MOST:
        of_trials = f" x {beside} trials" if beside > 1 else ""
        return (
            f"{clients:,} clients x {evaluations:,} evaluations x {len(values)} values{of_trials} are more than "
            f"{MOST:,}; a larger --eval_every keeps them, --client_history=false leaves this line out"
        )
    if kept(record) != done - 1:
        return "the part of the run before this one has kept no more"
    return ""
