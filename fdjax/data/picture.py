"""`draw_partition`: a picture of which client holds which labels."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fdjax.data.holdings import count_labels
from fdjax.errors import InputError
from fdjax.types import Holdings

MOST_BUBBLES = 50
MOST_COLUMNS = 2000


def draw_partition(
    holdings: Holdings,
    labels: np.ndarray,
    num_classes: int,
    path: str | os.PathLike,
    title: str = "",
    classes: Sequence[str] = (),
) -> None:
    """Writes a picture of how many examples of each label each client holds, in the format that the suffix names.

    `classes` [K] are what the labels are called, if they are not 0, 1, ...

    Up to 50 clients: a bubble per client and label, its area the count. More: a column per client, its colours the
    client's label shares, clients sorted by their largest label; above it the clients' sizes. Raises InputError for a
    path that cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not Path(path).suffix:
        raise InputError(f"cannot write {str(path)!r}: it names no format; give a file such as partition.png")
    table = count_labels(holdings, labels, num_classes)
    figure = Figure(figsize=(8, 5), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    axes = (_bubbles if len(table) <= MOST_BUBBLES else _heat)(figure, table, title)
    ticks = np.arange(0, num_classes, -(-num_classes // 25))
    axes.set_yticks(ticks, [classes[int(label)] for label in ticks] if classes else None)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # matplotlib warns about fonts, which no caller can help
            figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {str(path)!r} ({error}); give a file such as partition.png") from None


def _bubbles(figure, table: np.ndarray, title: str) -> Any:
    num_clients, num_classes = table.shape
    height, width = 5 * 60 / max(num_classes, 5), 8 * 60 / max(num_clients, 5)
    axes = figure.add_subplot()
    client, label = np.nonzero(table)
    largest = max(table.max(), 1)
    area = min(height, width, 40) ** 2 * table[client, label] / largest
    axes.scatter(client, label, s=area, c=table[client, label], cmap="viridis_r", vmin=0, vmax=largest, zorder=2)
    figure.colorbar(axes.collections[0], ax=axes, label="examples of the label")
    axes.set(xlabel="client", ylabel="label", xlim=(-0.7, num_clients - 0.3), ylim=(-0.7, num_classes - 0.3))
    axes.set_title(title or f"{num_clients} clients, {table.sum():,} examples", fontsize=10)
    axes.set_xticks(np.arange(0, num_clients, -(-num_clients // 25)))
    axes.grid(alpha=0.2)
    return axes


def _heat(figure, table: np.ndarray, title: str) -> Any:
    num_clients, num_classes = table.shape
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    largest = np.where(share.any(axis=1), share.argmax(axis=1), num_classes)
    order = np.lexsort((-share.max(axis=1), largest))
    columns = order[np.linspace(0, num_clients - 1, min(num_clients, MOST_COLUMNS)).astype(int)]
    top, main = figure.subplots(2, 1, sharex=True, height_ratios=(1, 3))
    extent = (0, num_clients, -0.5, num_classes - 0.5)
    position = (np.arange(len(columns)) + 0.5) * num_clients / len(columns)
    top.fill_between(position, table.sum(axis=1)[columns], step="mid", linewidth=0, color="tab:blue")
    top.set(ylabel="examples", ylim=(0, None))
    top.set_title(title or f"{num_clients:,} clients, {table.sum():,} examples", fontsize=10)
    image = main.imshow(
        share[columns].T, aspect="auto", origin="lower", extent=extent, cmap="viridis", vmin=0, interpolation="nearest"
    )
    figure.colorbar(image, ax=[top, main], label="share of the label in the client")
    shown = f", {len(columns):,} shown" if len(columns) < num_clients else ""
    main.set(xlabel=f"clients, sorted by their largest label{shown}", ylabel="label")
    return main
