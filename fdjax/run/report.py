"""What a run leaves behind: tables, curves, results.json."""

import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tabulate import tabulate

from fdjax.engine import hosts
from fdjax.errors import InputError
from fdjax.run import derived, metrics
from fdjax.run.checkpoint import FOLDER
from fdjax.run.lock import locked
from fdjax.run.record import Result, kind_of
from fdjax.run.saving import saving
from fdjax.run.settings import FOLDERS

_VERSIONS = ("fdjax", "jax", "jaxlib", "flax", "optax", "numpy", "optuna")


def prepare(out: str | os.PathLike, *, overwrite: bool = False, resume: bool = False) -> Path:
    """The folder `out`, created if it does not exist; with `overwrite`, without the checkpoints that it holds.

    With `resume` it is not created, so that a folder that was misspelt leaves nothing behind.
    Raises InputError if nothing can be written there, or if what is to be overwritten is in use.
    """
    folder = Path(out).expanduser()
    with hosts.all_or_none():
        if not resume or folder.is_dir():
            try:
                _make_room(folder, overwrite=overwrite)
            except OSError as error:
                raise InputError(f"cannot write to --out={out}: {error.strerror}; choose another folder") from None
    return folder


def _make_room(folder: Path, *, overwrite: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".writable-{os.getpid()}"
    probe.touch()
    probe.unlink()
    if overwrite and hosts.is_first():
        for checkpoints in (folder / FOLDER, *folder.glob(f"runs/*/{FOLDER}")):
            if checkpoints.is_dir():
                with locked(checkpoints.parent):
                    shutil.rmtree(checkpoints)


def environment() -> dict[str, Any]:
    """Versions, device, machine and git revision: what a number needs beside it."""
    device = jax.devices()[0]
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _VERSIONS},
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "revision": _revision(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _revision() -> str | None:
    """The git revision of the source, "-dirty" if files differ from it; None outside a checkout.

    An installed package may lie within the repository of somebody's project, which does not track its files.
    """
    file = Path(__file__)

    def git(*words: str) -> str:
        command = ["git", "-C", str(file.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def bytes_of_one_client(result: Result, way: str) -> tuple[int, ...] | float:
    """Bytes of a round and a participant of each cohort; the mean over all if not all of them sent the same.

    That is so where what is sent is coded or ragged, or where participants without examples sent nothing.
    """
    traffic, rounds = result.traffic, result.rounds[f"bytes_{way}"]
    sent = rounds[-1] - result.setup.get(f"bytes_{way}", 0.0) if rounds else 0.0
    sizes = traffic.per_participant(way)
    if sizes is not None and sent == len(rounds) * int(np.dot(sizes, traffic.participants)):
        return sizes
    drawn = result.rounds["participants"] if result.settings.sampling == "poisson" else []
    return sent / max(sum(drawn) or len(rounds) * sum(traffic.participants), 1)


def bytes_until(result: Result, round: int) -> float:
    """Bytes up and down of all clients in the set-up, if there is one, and in the first `round` rounds."""
    return sum(
        result.rounds[f"bytes_{way}"][round - 1] if round else result.setup.get(f"bytes_{way}", 0.0)
        for way in ("up", "down")
    )


def reached(result: Result) -> dict[str, dict[str, Any]]:
    """Of each of the settings' targets: of what it is an accuracy, and at which round and after how many bytes.

    These are interpolated between evaluations; None for a target that was never reached.
    """
    if not (targets := derived.targets_of(result.settings.targets)):
        return {}
    rounds, name = result.evaluations["round"], f"{kind_of(result.evaluations)}_accuracy"
    sent = [bytes_until(result, int(round)) for round in rounds]
    found = {}
    for target in targets:
        at = derived.rounds_to(rounds, result.evaluations[name], target)
        found[f"{target:g}"] = {"of": name, "round": at, "bytes": derived.bytes_at(at, rounds, sent)}
    return found


def result_dict(result: Result) -> dict[str, Any]:
    """A result as plain JSON values; folders, which mean nothing on another machine, left out.

    The means over clients of `final` can be made again from `clients` and `holdings`, see `record.holdings_of`.
    """
    return {
        "settings": {name: value for name, value in result.settings.public().items() if name not in FOLDERS},
        **({"files": result.settings.files} if result.settings.files else {}),  # of a user's own
        **({"metrics": asked} if (asked := metrics.described(result.settings.metrics)) else {}),
        "round": result.round,  # fewer than settings.rounds if the run was stopped
        **({"stopped": dict(result.stopped)} if result.stopped else {}),
        "final": result.final,
        "setup": result.setup,
        "rounds": result.rounds,
        "evaluations": result.evaluations,
        "clients": result.clients,
        "holdings": dict(result.holdings),
        **({"classes": list(result.classes)} if result.classes else {}),  # what the labels 0, 1, ... are called
        **({"targets": targets} if (targets := reached(result)) else {}),
        "bytes_per_participant": {way: bytes_of_one_client(result, way) for way in ("up", "down")},
        "participants": result.traffic.participants,
        **({"privacy": dict(result.privacy)} if result.privacy else {}),
        "seconds": result.seconds,
        "compile_seconds": result.compile_seconds,
    }


def write_json(path: Path, content: Any) -> None:
    """Write JSON; a number that is not finite becomes null."""

    def plain(value):
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    write_text(path, json.dumps(plain(content), indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file by way of a temporary one; of several hosts, the first does. What cannot be written is told."""
    if hosts.is_first():
        with saving(path) as temporary:
            temporary.write_text(text)


def table(rows: Iterable[Sequence[Any]], headers: Sequence[str]) -> str:
    """A markdown table; it reads well in a terminal too."""
    return tabulate(list(rows), headers, tablefmt="pipe", disable_numparse=True)


def spread(values: Sequence[float] | np.ndarray) -> tuple[float, float | None]:
    """Mean and, of two values or more, sample standard deviation."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def percent(mean: float, std: float | None = None) -> str:
    """A fraction as a percentage, with its standard deviation if there is one; "n/a" where nothing was tested."""
    if math.isnan(mean):
        return "n/a"
    return f"{100 * mean:.2f}" + (f" ± {100 * std:.2f}" if std is not None else "")


def byte_size(count: float, digits: int | None = None) -> str:
    """A number of bytes in a decimal unit: 2,851,368 is 2.85 MB; with `digits`, no more of them than it needs."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            if digits:
                return f"{count:.{digits}g} {unit}"
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


Curve = tuple[str, Sequence[float], Sequence[float]] | tuple[str, Sequence[float], Sequence[float], Sequence[float]]
# label, x, y, and half the width of a band around y
Panel = tuple[str, str, str, Sequence[Curve]]  # title, x label, y label, curves
BYTES = "bytes up and down, all clients"  # an x label whose axis is in MB, kB ..., by its values


def draw_curves(path: Path, panels: Sequence[Panel], title: str = "", *, log_x: bool = False) -> None:
    """Draw panels side by side; with `log_x` their x axes are logarithmic, and begin above 0.

    A picture that cannot be written is told.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    colors = plt.get_cmap("tab10").colors  # pyright: ignore
    # Curves that lie on one another differ by their dashes too; three and ten give thirty looks.
    looks = {"linestyle": ["-", "--", ":"] * 10, "color": [*colors] * 3}

    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4), layout="constrained", squeeze=False)
    for axis, (name, x_label, y_label, curves) in zip(axes[0], panels, strict=True):
        axis.set_prop_cycle(**looks)
        for label, x, y, *band in curves:
            x = np.where(np.asarray(x) > 0, x, np.nan) if log_x else x  # such as before anything was sent
            (line,) = axis.plot(x, y, label=label, marker="." if len(x) < 25 else None, linewidth=1.4)
            for half in band:
                low, high = np.subtract(y, half), np.add(y, half)
                axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set(title=name, xlabel=x_label, ylabel=y_label)
        if x_label == "round":
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if x_label == BYTES:
            axis.xaxis.set_major_formatter(lambda value, _: byte_size(value, digits=3))
        if log_x:
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    save_figure(path, figure)


def save_figure(path: Path, figure: Any) -> None:
    """Write a figure of matplotlib, and close it; one that cannot be written is told."""
    import matplotlib.pyplot as plt

    if hosts.is_first():
        with saving(path) as temporary:
            figure.savefig(temporary, dpi=120)
    plt.close(figure)
