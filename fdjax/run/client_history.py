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


def add(record: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Add the values [C] of the latest evaluation by name to what a record keeps."""
    history = record.setdefault("client_evaluations", {})
    for name, of_clients in values.items():
        history.setdefault(name, []).append(pack(of_clients))


def why_not(record: Mapping[str, Any], values: Mapping[str, Any], evaluations: int, trials: int) -> str:
    """Why a record that is to have so many evaluations keeps no history of these values; empty if it can.

    `trials`: records that are kept side by side.
    """
    before = len(record["evaluations"].get("round", [])) - 1  # the latest is among them already
    kept = record.get("client_evaluations", {})
    clients = len(next(iter(values.values()), []))
    total = evaluations * clients * len(values) * trials
    if total > MOST:
        of_trials = f" x {trials} trials" if trials > 1 else ""
        return (
            f"{clients:,} clients x {evaluations:,} evaluations x {len(values)} values{of_trials} are more than "
            f"{MOST:,}; a larger --eval_every keeps them, --client_history=false leaves this line out"
        )
    if before and any(len(kept.get(name, [])) != before for name in values):
        return "the part of the run before this one has kept none"
    return ""
