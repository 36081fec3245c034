"""Which lifting a run gets, and whether it fits in memory: decided and said before the run starts."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import psutil
from jax.sharding import Mesh

from fdjax.engine import lift
from fdjax.errors import InputError
from fdjax.exchange import communication
from fdjax.types import Array, Model

CACHE_BYTES = 1 << 21  # that a chunk may keep hot on a CPU core
COPIES = 4  # of each client's parameters: received, trained, gradient, update
WIDEST = 256
NARROW = (1, 8)  # chunks for clients with more work than the others'
OVERHEAD = 1.2  # of a chunk's step, in clients' steps: measured on a CPU, with logistic regression
_CGROUP = Path("/sys/fs/cgroup")


class Plan(NamedTuple):
    """A lifting and why it was picked."""

    kind: str
    mesh: Mesh
    chunk: int
    narrow: tuple[tuple[float, int], ...]
    automatic_chunk: bool
    why: str


def choose(
    kind: str,
    chunk: int,
    devices: int,
    models: Sequence[Model],
    participants: Sequence[int],
    steps: Sequence[Array],
    *,
    ordered: bool = False,
) -> Plan:
    """The lifting for `kind` (of lift.KINDS, or auto), `chunk` and `devices` (0: to be chosen, all).

    `ordered`: a chunk that is given stays as it is, also where it is more than a device's share of the clients.

    `steps`: of each client of each cohort, an epoch's; clients with far more of them than others get narrower chunks.
    On a CPU a chunk's parameters stay in a core's cache over a client's steps; elsewhere chunks are wide.
    Raises InputError for what cannot be laid out: too many devices, a chunk without enough clients to fill it.
    """
    most = max(participants)
    alone = kind in ("vmap", "chunk", "loop")
    mesh = lift.make_mesh(_devices(kind, 1 if alone and not devices else devices, alone))
    each = -(-most // mesh.size)
    if chunk > most:
        raise InputError(f"--chunk={chunk}, but a round has {most} participants; give at most {most}, or 0")
    size = largest(models)
    platform = mesh.devices.flat[0].platform
    given = chunk if ordered else min(each, chunk)
    chosen = given if chunk else automatic_chunk(models, mesh, most)
    narrow = () if chunk or kind in ("vmap", "loop") else narrower(steps, participants, chosen, mesh)
    picked = kind
    if kind == "auto":
        picked = "shard_map" if mesh.size > 1 else "vmap" if chosen == most and not narrow else "chunk"
    why = f"{picked} on {mesh.size} {platform} device{'s' * (mesh.size > 1)}"
    if picked not in ("vmap", "loop"):
        why += f", {chosen} client{'s' * (chosen > 1)} at once on each"
        if not chunk:
            why += f" ({size / 1e6:.3g} MB of parameters" + (
                f", {CACHE_BYTES >> 20} MB of cache)" if platform == "cpu" else ")"
            )
        if empty := -most % (mesh.size * chosen):
            why += f"; the last turn leaves {empty} of {mesh.size * chosen} places empty"
        for share, width in narrow:
            why += f"; the first {round(share * most)}, of most work, {width} at once"
    automatic = not chunk and picked not in ("vmap", "loop")
    return Plan(picked, mesh, most if picked == "vmap" else chosen, narrow, automatic, why)


def largest(models: Sequence[Model]) -> int:
    """Bytes of the parameters of the largest of them."""
    return max(communication.size(jax.eval_shape(model.init, jax.random.key(0))) for model in models)


def automatic_chunk(models: Sequence[Model], mesh: Mesh, participants: int) -> int:
    """Clients to vmap together: on a CPU as many as keep their parameters in a core's cache, elsewhere many.

    Evened out over the turns that a device takes, so that the last one has few empty places.
    """
    size = largest(models)
    cpu = mesh.devices.flat[0].platform == "cpu"
    widest = max(1, min(WIDEST, CACHE_BYTES // (COPIES * size))) if cpu else WIDEST
    each = -(-participants // mesh.size)
    return -(-each // -(-each // widest))


def narrower(
    steps: Sequence[Array], participants: Sequence[int], chunk: int, mesh: Mesh
) -> tuple[tuple[float, int], ...]:
    """Lifting.narrow that makes the cohort of most work cheapest, each further width for a tenth of the cost at least.

    A chunk of w clients runs as long as the longest of them, at (w + OVERHEAD) a step; chunks are cut in order of work.
    Ours. Elsewhere than on a CPU a step costs about the same for any chunk, and nothing is narrowed.
    """
    if mesh.devices.flat[0].platform != "cpu":
        return ()
    everyone, size = max(zip(steps, participants, strict=True), key=lambda cohort: np.sum(cohort[0]))
    everyone = np.sort(np.asarray(everyone))[::-1]
    longest = everyone[np.arange(size) * len(everyone) // size]  # as the participants of a round may be
    widths, cost, best = [chunk], *_cut(longest, [chunk], mesh.size)
    for width in sorted((w for w in NARROW if w < chunk), reverse=True):
        widths = [width, *widths]
        less, cuts = _cut(longest, widths, mesh.size)
        if less < 0.9 * cost:
            cost, best = less, cuts
    return tuple((stop / size, width) for stop, width in best if width < chunk)


def _cut(longest: np.ndarray, widths: list[int], devices: int) -> tuple[float, list[tuple[int, int]]]:
    """The least cost of rows in turns of these widths, rising, and up to where which width goes [(stop, width)]."""
    size, costs = len(longest), [np.full(len(longest) + 1, np.inf)]
    costs[0][size] = 0
    for width in reversed(widths):  # costs[-1][i]: of rows i on, in this width or wider ones
        cost = costs[-1].copy()
        for i in range(size - 1, -1, -1):
            turn = longest[i] * (width + OVERHEAD) + cost[min(size, i + width * devices)]
            cost[i] = min(cost[i], turn)
        costs.append(cost)
    cuts, row = [], 0
    for width, cost, wider in zip(widths, costs[:0:-1], costs[-2::-1], strict=True):
        begun = row
        while row < size and cost[row] < wider[row]:
            row = min(size, row + width * devices)
        if row > begun:
            cuts.append((row, width))
    return float(costs[-1][0]), cuts


def _devices(kind: str, count: int, alone: bool) -> list[Any]:
    """The first `count` devices (0: all), the same number of every host."""
    available, hosts = jax.devices(), jax.process_count()
    if alone and (count > 1 or hosts > 1):
        raise InputError(f"--lifting={kind} runs on one device of one host; use shard_map, pmap or auto for several")
    if count > len(available):
        raise InputError(f"--devices={count}, but there are {len(available)}; give at most as many")
    if count % hosts:
        raise InputError(
            f"--devices={count} cannot be shared by {hosts} hosts; give a multiple of {hosts}, or 0 for all"
        )
    if not count:
        return available
    mine = {host: [d for d in available if d.process_index == host][: count // hosts] for host in range(hosts)}
    if sum(map(len, mine.values())) < count:
        raise InputError(f"--devices={count}: some of the {hosts} hosts have fewer than {count // hosts} devices")
    return [device for devices in mine.values() for device in devices]


def free_bytes(mesh: Mesh) -> int | None:
    """Memory that a run may still take on one device of this host; None if nobody can tell.

    The devices of a CPU share the host's memory, as far as its control group lets it be used.
    """
    local = mesh.local_devices
    if local[0].platform == "cpu":
        free = psutil.virtual_memory().available
        try:
            limit, used = ((_CGROUP / name).read_text() for name in ("memory.max", "memory.current"))
            free = min(free, int(limit) - int(used)) if limit.strip() != "max" else free
        except (OSError, ValueError):  # no control group, or one of another kind
            pass
        return free // len(local)
    stats = [device.memory_stats() or {} for device in local]
    known = [s["bytes_limit"] - s["bytes_in_use"] for s in stats if {"bytes_limit", "bytes_in_use"} <= s.keys()]
    return min(known) if known else None


def needed_bytes(compiled: Any) -> int:
    """What a compiled call takes on one device beside its arguments."""
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def fit_chunk(chunk: int, free: int, needed_by: Callable[[int], int], *, may_change: bool) -> tuple[int, int]:
    """(chunk, bytes it needs on a device), the given chunk if it fits, else, if it may change, the largest that does.

    `needed_by(chunk)` compiles. Memory is about linear in the chunk, so two measurements say which would fit.
    Raises InputError if nothing fits, or if the chunk may not change: with the chunk that would.
    """
    asked, needed = chunk, needed_by(chunk)
    first = needed
    while needed > free and chunk > 1:
        half = chunk // 2
        smaller = needed_by(half)
        slope = max((needed - smaller) / (chunk - half), 1)
        chunk = half if smaller > free else min(chunk - 1, half + int((free - smaller) / slope))
        needed = smaller if chunk == half else needed_by(chunk)
    text = f"a round needs {first / 1e9:.3g} GB on a device at --chunk={asked}, and {free / 1e9:.3g} GB are free"
    if needed > free:
        raise InputError(f"{text}; even one client at a time needs {needed / 1e9:.3g} GB: use a smaller model or batch")
    if chunk != asked and not may_change:
        raise InputError(f"{text}; --chunk={chunk} would fit")
    return chunk, needed
