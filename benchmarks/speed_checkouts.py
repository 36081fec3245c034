"""The other half of benchmarks.speed: the fdjax of this checkout against that of another one.

    python -m benchmarks.speed --suite=all --against=/path/to/checkout

Both run in worker processes of the same code, `peers/checkout_worker.py`, and each imports its own fdjax and its own
`benchmarks.speed_suites`. Repeats interleave, and who goes first changes with each. A ratio is this checkout's time
over the other's, of neighbouring repeats: above 1, this one is slower. The processor's seconds are given beside those
on the wall, because others who use the machine lengthen the latter.
"""

import os
import pathlib
import statistics
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.peers import Checkout
from benchmarks.speed_suites import SUITES, Case, make_work, smoke
from fdjax.errors import InputError
from fdjax.run import report

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEP_TARGET, COMPILE_TARGET = 1.05, 1.1
CLOCKS = ("wall", "processor")
Pairs = list[tuple[list[float], list[float]]]  # of each repeat: seconds [2] of this checkout, and of the other one


def compare(
    names: Sequence[str],
    other: str,
    out: pathlib.Path,
    *,
    repeats: int,
    compilations: int,
    clients: int = 0,
    steps: int = 0,
    chunk: int = 0,
    devices: int = 0,
    tiny: bool = False,
) -> bool:
    """Time the suites, print the two tables and write them: whether both checkouts ended at the same weights."""
    checkouts: list[Checkout] = []
    results = []
    try:
        paths = ROOT, pathlib.Path(other).expanduser().resolve()
        checkouts += (Checkout(path, devices) for path in paths)  # one by one: those begun are closed below
        for name in names:
            for case in (smoke(SUITES[name]) if tiny else SUITES[name]).cases:
                size = case.clients if SUITES[name].flat else clients or case.clients
                timed = case._replace(clients=size, steps=steps or case.steps)
                results.append(time_case(name, timed, checkouts, repeats, compilations, chunk))
                print(f"{name}, {timed}: steps {_spread(results[-1]['steps'], 0)}", flush=True)
    finally:
        for checkout in checkouts:
            checkout.close()
    versions = {which: checkout.version for which, checkout in zip(("this", "other"), checkouts, strict=True)}
    text = tables(results)
    environment = report.environment()
    foot = (
        f"Ratios are this checkout's time over the other's, median [least-greatest] of {repeats} repeats and of "
        f"{compilations} compilations. This: {versions['this']}; other: {versions['other']}. "
        f"{environment['device']}; {environment['machine']}."
    )
    print(f"\n{text}\n\n{foot}\n")
    folder = report.prepare(out / "speed_against")
    report.write_text(folder / "table.md", f"# benchmarks.speed, two checkouts\n\n{text}\n\n{foot}\n")
    report.write_json(folder / "results.json", environment | {"checkouts": versions, "results": results})
    print(f"written: {folder}: table.md, results.json")
    return all(result["weights_differ"] < 1e-2 for result in results)


def time_case(
    suite: str, case: Case, checkouts: list[Checkout], repeats: int, compilations: int, chunk: int
) -> dict[str, Any]:
    """Compilations and rounds of both checkouts, interleaved."""
    loaded = [checkout.ask(do="load", case=case._asdict(), chunk=chunk) for checkout in checkouts]
    compiling = _interleaved(checkouts, "compile", compilations)
    rounds = _interleaved(checkouts, "run", repeats)
    steps = make_work(case).steps
    return {
        "suite": suite,
        "case": str(case),
        "chunks": [answer["chunk"] for answer in loaded],
        "temp_bytes": [answer["temp_bytes"] for answer in loaded],
        "compilations": compiling,
        "steps": [tuple([1e3 * seconds / steps for seconds in side] for side in pair) for pair in rounds],  # in ms
        "weights_differ": _distance(*(_params(checkout) for checkout in checkouts)),
        "load": os.getloadavg()[0],
    }


def _interleaved(checkouts: list[Checkout], what: str, repeats: int) -> Pairs:
    pairs: Pairs = []
    for repeat in range(repeats):
        order = checkouts if repeat % 2 else checkouts[::-1]
        seconds = {checkout.name: checkout.ask(do=what)["seconds"] for checkout in order}
        pairs.append((seconds[checkouts[0].name], seconds[checkouts[1].name]))
    return pairs


def _params(checkout: Checkout) -> dict[str, np.ndarray]:
    """The weights before and after a round, by name."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "params.npz")
        checkout.ask(do="save", path=path)
        with np.load(path) as arrays:
            return dict(arrays)


def _distance(these: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> float:
    """How far the weights after the round lie apart, as a share of how far the round moved them."""
    if these.keys() != others.keys():
        raise InputError("the two checkouts have parameters of other names; they cannot be compared")

    def norm(pairs):
        return np.sqrt(sum(float(np.sum((a - b) ** 2)) for a, b in pairs))

    after = [name for name in these if name.startswith("after/")]
    moved = norm((these[name], these[name.replace("after/", "first/", 1)]) for name in after)
    return float(norm((these[name], others[name]) for name in after) / moved)


def ratios(pairs: Pairs, which: int) -> list[float]:
    """This checkout's time over the other's, of each repeat, by one of the clocks."""
    return [this[which] / other[which] for this, other in pairs]


def _spread(pairs: Pairs, which: int) -> str:
    values = ratios(pairs, which)
    return f"{statistics.median(values):.3f} [{min(values):.2f}-{max(values):.2f}]"


def tables(results: list[dict[str, Any]]) -> str:
    """A table of client steps and one of compilations."""
    return "\n\n".join(
        (
            _table(results, "steps", "ms a client step", STEP_TARGET),
            _table(results, "compilations", "s of compiling a superstep", COMPILE_TARGET),
        )
    )


def _table(results: list[dict[str, Any]], what: str, unit: str, target: float) -> str:
    rows = []
    for result in results:
        pairs = result[what]
        fastest = [[min(pair[side][clock] for pair in pairs) for side in (0, 1)] for clock in (0, 1)]
        median = statistics.median(ratios(pairs, 0))
        rows.append(
            (
                result["suite"],
                result["case"],
                *(f"{this:.4g} / {other:.4g}" for this, other in fastest),
                *(f"{this / other:.3f}" for this, other in fastest),
                *(_spread(pairs, which) for which in (0, 1)),
                f"<= {target:g}",
                "yes" if median <= target else "no",
                f"{result['load']:.1f}",
            )
        )
    headers = (unit, "case", *(f"fastest, {clock}" for clock in CLOCKS), *(f"their ratio, {clock}" for clock in CLOCKS),
               *(f"ratio, {clock}" for clock in CLOCKS), "target (wall)", "met", "load")  # fmt: skip
    return report.table(rows, headers)
