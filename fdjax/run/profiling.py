"""A trace of one superstep and its evaluation, in which the stages of a round have their names.

What XLA reports of a compiled call are its operations, by names such as `fusion.3`. To which stage one of them belongs
is in the compiled module, from the named scopes in `engine/step.py` and `engine/evaluate.py`; the host matches both. A
stage without an operation, such as a broadcast of params as they are, has no span.
"""

import contextlib
import gzip
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from fdjax.engine import hosts
from fdjax.errors import InputError
from fdjax.run import xplane
from fdjax.run.saving import reason_of, saving, tell_unsaved

STAGES = ("broadcast", "client", "reduce", "server", "evaluate")
TRACE = "trace.json.gz"
_OF_STAGE = re.compile(rf"(?:^|[/(])({'|'.join(STAGES)})(?=\)*/)")  # not the last part, an operation
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = .*metadata=\{[^}]*op_name=\"([^\"]*)\"")
_MODULE = re.compile(r"^HloModule ([\w.\-]+)")


def check_profile(profile: Any, out: Path | None, lifting: str) -> None:
    """Raises InputError for a profile that has no folder, or nothing compiled to be of."""
    if not isinstance(profile, bool):
        raise InputError(f"profile={profile!r}: expected True or False")
    if profile and out is None:
        raise InputError("profile=True writes to the folder of the run; give out as well")
    if profile and lifting == "loop":
        raise InputError("--profile with --lifting=loop: nothing is compiled that could be profiled; leave one out")


class Profiler:
    """Traces the second superstep of a run, or the only one, into `folder`; without a folder, nothing."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._supersteps, self._done = 0, False
        self.modules: list[str] = []  # what was compiled, as HLO text

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """A block that compiles what is to be profiled: code that is kept from before may lack the names of stages."""
        name = "jax_compilation_cache_include_metadata_in_key"
        before = getattr(jax.config, name)
        jax.config.update(name, before or self.folder is not None)
        try:
            yield
        finally:
            jax.config.update(name, before)

    @contextlib.contextmanager
    def superstep(self, *, last: bool) -> Iterator[None]:
        """A block that runs a superstep and its evaluation, and waits for both."""
        self._supersteps += 1
        if self.folder is None or self._done or not hosts.is_first() or (self._supersteps < 2 and not last):
            yield
            return
        self._done, started = True, False
        try:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            jax.profiler.start_trace(str(self.folder), profiler_options=options)
            started = True
        except Exception as error:  # such as of another profiler that is at work
            _tell(self.folder, error)
        try:
            yield
        finally:
            if started:
                self._write()

    def _write(self) -> None:
        assert self.folder is not None
        try:
            jax.profiler.stop_trace()
            found = max(self.folder.glob(f"plugins/profile/*/*.{TRACE}"), key=lambda path: path.stat().st_mtime)
            with gzip.open(found, "rt") as file:
                trace = json.load(file)
            spans = spans_of(trace, stages_of(self.modules))
            add_stages(trace, spans)
            with saving(self.folder / TRACE) as temporary:
                temporary.write_bytes(gzip.compress(json.dumps(trace).encode()))
            with open(f"{str(found).removesuffix(TRACE)}xplane.pb", "ab") as file:
                file.write(xplane.plane_of(spans))
        except Exception as error:  # of a disk, or of another library: no result may be lost for it
            _tell(self.folder, error)
            return
        total: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        for begin, end, stage in (span for found in spans.values() for span in found):
            total[stage] += (end - begin) / 1e6 / len(spans)
        seconds = ", ".join(f"{stage} {time:.3g} s" for stage, time in total.items() if time)
        text = f"profile of a superstep: {seconds}; {self.folder / TRACE} opens in ui.perfetto.dev"
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Say so if there was no superstep to trace."""
        if self.folder is not None and not self._done and hosts.is_first():
            tqdm.write("warning: nothing was profiled: the run ended before its second superstep", file=sys.stderr)


def _tell(folder: Path, error: Exception) -> None:
    tell_unsaved(f"the profile in {folder}", reason_of(error))


def stage_of(op_name: str) -> str:
    """The innermost stage in the name that JAX gives an operation; empty if it is of none."""
    found = _OF_STAGE.findall(op_name)
    return found[-1] if found else ""


def stages_of(modules: Sequence[str]) -> dict[tuple[str, str], str]:
    """{(module, operation): stage} of compiled modules as HLO text.

    An operation that the compiler added without a name, such as a copy, has the stage of its computation, where all
    others in that have the same one.
    """
    found: dict[tuple[str, str], str] = {}
    for text in modules:
        lines = text.splitlines()
        module = _MODULE.match(lines[0])
        name, unnamed, named = module[1] if module else "", [], set[str]()
        for line in lines:
            if line.startswith("}"):
                if len(named) == 1:
                    found |= {(name, operation): next(iter(named)) for operation in unnamed}
                unnamed, named = [], set()
            elif operation := _OPERATION.match(line):
                stage = stage_of(operation[2])
                named.add(stage)
                if stage:
                    found[name, operation[1]] = stage
            elif plain := re.match(r"^\s+(?:ROOT )?%?([\w.\-]+) = ", line):
                unnamed.append(plain[1])
    return {key: stage for key, stage in found.items() if stage}


Spans = Mapping[str, Sequence[tuple[float, float, str]]]  # by device: begin and end in microseconds, and the stage


def spans_of(trace: Mapping[str, Any], stages: Mapping[tuple[str, str], str]) -> Spans:
    """When each device was in which stage: a span is as long as operations of one stage follow one another there."""
    by_device: dict[str, list[tuple[float, float, str]]] = {}
    for event in trace["traceEvents"]:
        arguments = event.get("args", {})
        stage = stages.get((arguments.get("hlo_module", ""), arguments.get("hlo_op", "")))
        if event.get("ph") == "X" and stage:
            operation = event["ts"], event["ts"] + event.get("dur", 0), stage
            by_device.setdefault(str(arguments.get("device_ordinal", event["pid"])), []).append(operation)
    return {device: [*_spans(sorted(operations))] for device, operations in sorted(by_device.items())}


def add_stages(trace: dict[str, Any], spans: Spans) -> None:
    """Add a track for each device to a trace in Chrome's JSON."""
    process = max((event.get("pid", 0) for event in trace["traceEvents"]), default=0) + 1
    named = {"ph": "M", "name": "process_name", "pid": process, "args": {"name": "stages of rounds"}}
    trace["traceEvents"].append(named)
    for number, (device, found) in enumerate(spans.items()):
        track = {"pid": process, "tid": number}
        name = f"stages of device {device}"
        trace["traceEvents"].append({"ph": "M", "name": "thread_name", "args": {"name": name}, **track})
        trace["traceEvents"] += [
            {"ph": "X", "name": stage, "ts": begin, "dur": end - begin, **track} for begin, end, stage in found
        ]


def _spans(operations: Sequence[tuple[float, float, str]]) -> Iterator[tuple[float, float, str]]:
    """Runs of operations of one stage, none of which begins before the one before it ends."""
    begin, end, stage = operations[0]
    for start, stop, other in operations[1:]:
        if other == stage:
            end = max(end, stop)
        else:
            yield begin, min(end, start), stage
            begin, end, stage = start, stop, other
    yield begin, end, stage
