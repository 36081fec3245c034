"""Which lifting a run gets, and whether it fits in memory: decided, and said, before the run starts."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import psutil
from jax.sharding import Mesh

from fdjax.engine import lift
from fdjax.engine.lift import Lifting
from fdjax.errors import InputError
from fdjax.exchange import traffic
from fdjax.types import Array, Model, PyTree

CACHE_BYTES = 1 << 21  # that a chunk may keep hot on a CPU core
COPIES = 4  # of each client's parameters: received, trained, gradient, update
WIDEST = 256
NARROW = (1, 8)  # chunks for clients with more work than the others'
OVERHEAD = 1.2  # of a chunk's step, in clients' steps: measured on a CPU, with logistic regression
_CGROUP = Path("/sys/fs/cgroup")
_ON_ONE_DEVICE = ("vmap", "chunk", "loop")


class Request(NamedTuple):
    """What the user of a run asks of its lifting; what is left at its default is chosen for them."""

    kind: str = "auto"  # one of lift.KINDS
    chunk: int = 0
    devices: int = 0  # 0: all
    ordered: bool = False


class Work(NamedTuple):
    """What a round has to do, as far as the choice of a lifting depends on it."""

    models: tuple[Model, ...]  # all that a client may train
    participants: tuple[int, ...]  # of a round, of each cohort
    steps: tuple[Array, ...]  # [C_j] each: steps of an epoch of every client of a cohort

    @property
    def most(self) -> int:
        """Participants of the largest cohort."""
        return max(self.participants)


class Plan(NamedTuple):
    """A lifting, and why it was picked."""

    lifting: Lifting
    automatic_chunk: bool  # whether the chunk was chosen here, so that another may take its place
    why: str
    work: Work

    def in_chunks_of(self, chunk: int) -> "Plan":
        """The same plan with another chunk, and narrower chunks to go with it where it has such."""
        narrow = narrower(self.work, chunk, self.lifting.mesh) if self.lifting.narrow else ()
        kind = "chunk" if self.lifting.kind == "vmap" else self.lifting.kind
        return self._replace(lifting=self.lifting._replace(kind=kind, chunk=chunk, narrow=narrow))


def choose(request: Request, work: Work) -> Plan:
    """The lifting for what is asked and what is to be done.

    Clients with far more steps than others get narrower chunks. On a CPU a chunk's parameters stay in a core's cache
    over a client's steps; elsewhere chunks are wide.
    Raises InputError for what cannot be laid out: too many devices, or a chunk without enough clients to fill it.
    """
    if request.chunk > work.most:
        raise InputError(
            f"--chunk={request.chunk}, but a round has {work.most} participants; give at most {work.most}, or 0"
        )
    mesh = lift.make_mesh(_devices(request.kind, request.devices))
    whole = request.kind in ("vmap", "loop")  # kinds to which a chunk means nothing
    chunk = _given_chunk(request, work, mesh) if request.chunk else automatic_chunk(work, mesh)
    narrow = () if request.chunk or whole else narrower(work, chunk, mesh)
    kind = request.kind
    if kind == "auto":
        kind = "shard_map" if mesh.size > 1 else "vmap" if chunk == work.most and not narrow else "chunk"
    automatic = not request.chunk and request.kind not in ("vmap", "loop")
    lifting = Lifting(kind, mesh, work.most if kind == "vmap" else chunk, narrow, request.ordered)
    return Plan(lifting, automatic, _in_words(lifting, work, chosen_here=not request.chunk), work)


def _given_chunk(request: Request, work: Work, mesh: Mesh) -> int:
    """The chunk that was asked for, but not more than a device's share; sums in order need it as it is."""
    return request.chunk if request.ordered else min(request.chunk, -(-work.most // mesh.size))


def _in_words(lifting: Lifting, work: Work, *, chosen_here: bool) -> str:
    """What a lifting does, and what its chunk was chosen by."""
    mesh, chunk = lifting.mesh, lifting.chunk
    platform = mesh.devices.flat[0].platform
    words = f"{lifting.kind} on {mesh.size} {platform} device{'s' * (mesh.size > 1)}"
    if lifting.kind in ("vmap", "loop"):
        return words
    words += f", {chunk} client{'s' * (chunk > 1)} at once on each"
    if chosen_here:
        cache = f", {CACHE_BYTES >> 20} MB of cache" if platform == "cpu" else ""
        words += f" ({largest(work.models) / 1e6:.3g} MB of parameters{cache})"
    if empty := -work.most % (mesh.size * chunk):
        words += f"; the last turn leaves {empty} of {mesh.size * chunk} places empty"
    for share, width in lifting.narrow:
        words += f"; the first {round(share * work.most)}, of most work, {width} at once"
    return words


def largest(models: Sequence[Model]) -> int:
    """Bytes of the parameters of the largest of them."""
    return max(_bytes_of(model.init) for model in {*models})


@functools.lru_cache(maxsize=64)
def _bytes_of(init: Callable[[jax.Array], PyTree]) -> int:
    return traffic.size(jax.eval_shape(init, jax.random.key(0)))


def automatic_chunk(work: Work, mesh: Mesh) -> int:
    """Clients to vmap together: on a CPU as many as keep their parameters in a core's cache, elsewhere many.

    Evened out over the turns that a device takes, so that the last one has few empty places.
    """
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    widest = max(1, min(WIDEST, CACHE_BYTES // (COPIES * largest(work.models)))) if is_cpu else WIDEST
    share = -(-work.most // mesh.size)
    turns = -(-share // widest)
    return -(-share // turns)


def narrower(work: Work, chunk: int, mesh: Mesh) -> tuple[tuple[float, int], ...]:
    """Lifting.narrow that makes the cohort of most work cheapest, each further width for a tenth of the cost at least.

    A chunk of w clients runs as long as the longest of them, at (w + OVERHEAD) a step; chunks are cut in order of work.
    Ours. Elsewhere than on a CPU a step costs about the same for any chunk, and nothing is narrowed.
    """
    if mesh.devices.flat[0].platform != "cpu":
        return ()
    steps, size = max(zip(work.steps, work.participants, strict=True), key=lambda cohort: np.sum(cohort[0]))
    falling = np.sort(np.asarray(steps))[::-1]
    expected = falling[np.arange(size) * len(falling) // size]  # steps of the participants, if they are drawn evenly
    widths = [chunk]
    cost, cuts = _cheapest_cut(expected, widths, mesh.size)
    for width in sorted((w for w in NARROW if w < chunk), reverse=True):
        widths = [width, *widths]
        new_cost, new_cuts = _cheapest_cut(expected, widths, mesh.size)
        if new_cost < 0.9 * cost:
            cost, cuts = new_cost, new_cuts
    return tuple((stop / size, width) for stop, width in cuts if width < chunk)


def _cheapest_cut(steps: np.ndarray, widths: list[int], devices: int) -> tuple[float, list[tuple[int, int]]]:
    """The least cost of clients of falling `steps` in turns of rising `widths`, and where each width ends.

    The second is [(stop, width)]: the clients up to `stop`, and after the stop before, run in chunks of `width`.
    """
    size, costs = len(steps), [np.full(len(steps) + 1, np.inf)]
    costs[0][size] = 0
    for width in reversed(widths):  # costs[-1][i]: of clients i on, in turns of this width or of wider ones
        cost = costs[-1].copy()
        for i in range(size - 1, -1, -1):
            turn = steps[i] * (width + OVERHEAD) + cost[min(size, i + width * devices)]
            cost[i] = min(cost[i], turn)
        costs.append(cost)
    cuts, client = [], 0
    for width, cost, cost_if_wider in zip(widths, costs[:0:-1], costs[-2::-1], strict=True):
        first = client
        while client < size and cost[client] < cost_if_wider[client]:
            client = min(size, client + width * devices)
        if client > first:
            cuts.append((client, width))
    return float(costs[-1][0]), cuts


def _devices(kind: str, count: int) -> list[Any]:
    """The first `count` devices, the same number of every host; for 0 all, or one for a kind that runs on one."""
    available, hosts = jax.devices(), jax.process_count()
    if kind in _ON_ONE_DEVICE:
        count = count or 1
        if count > 1 or hosts > 1:
            raise InputError(
                f"--lifting={kind} runs on one device of one host; use shard_map, pmap or auto for several"
            )
    if count > len(available):
        raise InputError(f"--devices={count}, but there are {len(available)}; give at most as many")
    if count % hosts:
        raise InputError(
            f"--devices={count} cannot be shared by {hosts} hosts; give a multiple of {hosts}, or 0 for all"
        )
    if not count:
        return available
    by_host = [[d for d in available if d.process_index == host][: count // hosts] for host in range(hosts)]
    if sum(map(len, by_host)) < count:
        raise InputError(f"--devices={count}: some of the {hosts} hosts have fewer than {count // hosts} devices")
    return [device for devices in by_host for device in devices]


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


def fit_states(clients: PyTree, mesh: Mesh, free: int) -> int:
    """Bytes of the clients' states on one device, each of which holds its share of the rows.

    Raises InputError if they are more than is free.
    """
    held = traffic.size(clients) // mesh.size
    if held > free:
        raise InputError(
            f"the states of the clients need {held / 1e9:.3g} GB on each of {mesh.size} devices, and {free / 1e9:.3g} "
            "GB are free; use more devices, fewer clients or a smaller model"
        )
    return held


def needed_bytes(compiled: Any) -> int:
    """What a compiled call takes on one device beside its arguments."""
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def fit_chunk(chunk: int, free: int, needed_by: Callable[[int], int], *, may_change: bool) -> tuple[int, int]:
    """The given chunk if it fits, else, if it may change, the largest that does; and the bytes it needs on a device.

    `needed_by(chunk)` compiles. Memory is about linear in the chunk, so two measurements say which would fit.
    Raises InputError if nothing fits, or if the chunk may not change: with the chunk that would.
    """
    asked, needed = chunk, needed_by(chunk)
    needed_as_asked = needed
    while needed > free and chunk > 1:
        half = chunk // 2
        needed_by_half = needed_by(half)
        slope = max((needed - needed_by_half) / (chunk - half), 1)
        chunk = half if needed_by_half > free else min(chunk - 1, half + int((free - needed_by_half) / slope))
        needed = needed_by_half if chunk == half else needed_by(chunk)
    problem = (
        f"a round needs {needed_as_asked / 1e9:.3g} GB on a device at --chunk={asked}, and {free / 1e9:.3g} GB are free"
    )
    if needed > free:
        raise InputError(
            f"{problem}; even one client at a time needs {needed / 1e9:.3g} GB: use a smaller model or batch"
        )
    if chunk != asked and not may_change:
        raise InputError(f"{problem}; --chunk={chunk} would fit")
    return chunk, needed
