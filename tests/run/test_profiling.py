"""The trace of a superstep: the stages of a round have their names, and a profile changes nothing."""

import contextlib
import gzip
import itertools
import json

import jax
import pytest
from run_cases import SMALL

import fdjax
from fdjax.algorithms import ALGORITHMS
from fdjax.contract import Broadcast
from fdjax.errors import InputError
from fdjax.run import experiment, profiling, runner, settings

THREE = SMALL | {"rounds": 3}


def with_a_broadcast_that_computes():
    """FedOpt, whose server computes anyway; what it broadcasts is computed too."""
    fedopt = ALGORITHMS["fedopt"]

    def build(task):
        algorithm = fedopt.build(task)
        (exchange,) = algorithm.round

        def broadcast(ctx, server):
            sent = exchange.broadcast(ctx, server)
            sorted_too = jax.tree.map(lambda x: x + 0.1 * jax.numpy.sort(x, axis=0), sent.shared)
            return Broadcast(sorted_too, sent.own, sent.known)

        return algorithm._replace(round=(exchange._replace(broadcast=broadcast),))

    return fedopt._replace(name="computing", build=build)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    out = tmp_path_factory.mktemp("profiled")
    method = with_a_broadcast_that_computes()
    return out, fdjax.run(out=out, progress=False, profile=True, **THREE | {"algorithm": method}), method


def test_the_trace_has_the_stages_by_name(profiled):
    """In what Perfetto opens; of one superstep there is one evaluation, after its round."""
    out, _, _ = profiled
    with gzip.open(out / "profile" / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    tracks = {
        event["args"]["name"]: (event["pid"], event["tid"]) for event in events if event.get("name") == "thread_name"
    }
    (track,) = (where for name, where in tracks.items() if name.startswith("stages of device"))
    mine = [e for e in events if e.get("ph") == "X" and (e["pid"], e["tid"]) == track]
    spans = sorted((event["ts"], event["ts"] + event["dur"], event["name"]) for event in mine)
    order = list(dict.fromkeys(name for _, _, name in spans))
    assert set(order) == set(profiling.STAGES)
    assert order[-1] == "evaluate"
    assert all(one[1] <= other[0] + 1e-3 for one, other in itertools.pairwise(spans))
    host = {event["name"]: event for event in events if event.get("name") in ("superstep", "evaluation")}
    begin, end = host["superstep"]["ts"], host["evaluation"]["ts"] + host["evaluation"]["dur"]
    assert begin <= spans[0][0] < spans[-1][1] <= end


def test_tensorboard_gets_the_same_spans(profiled):
    """The plane that is appended is read by JAX's own reader of such files."""
    out, _, _ = profiled
    with gzip.open(out / "profile" / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    (path,) = (out / "profile" / "plugins" / "profile").glob("*/*.xplane.pb")
    planes = {plane.name: plane for plane in jax.profiler.ProfileData.from_file(str(path)).planes}
    (line,) = planes["/device:CUSTOM:stages of rounds"].lines
    there = sorted((event.start_ns / 1e3, event.duration_ns / 1e3, event.name) for event in line.events)
    process = max(event.get("pid", 0) for event in events)
    mine = sorted((e["ts"], e["dur"], e["name"]) for e in events if e.get("pid") == process and e["ph"] == "X")
    assert [name for _, _, name in there] == [name for _, _, name in mine]
    assert [at for at, _, _ in there] == pytest.approx([at for at, _, _ in mine], abs=0.01)
    assert [long for _, long, _ in there] == pytest.approx([long for _, long, _ in mine], abs=0.01)
    assert any(plane.startswith("/host:CPU") for plane in planes)


def test_a_profile_changes_no_number(profiled):
    _, result, method = profiled
    plain = fdjax.run(progress=False, **THREE | {"algorithm": method})
    assert plain.evaluations == result.evaluations
    assert plain.rounds == result.rounds


def test_names_of_stages_change_nothing_that_is_compiled(monkeypatch):
    """But for the names: the same module is lowered without them."""

    def lowered():
        built = experiment.build(settings.make(**THREE))
        pure, state = built.simulation.pure, built.simulation.shapes(built.federation)
        return jax.jit(lambda *x: pure.run(*x, 1)).lower(state, built.federation, built.hparams).as_text()

    def nameless(name):
        asked.append(name)
        return contextlib.nullcontext()

    text, asked = lowered(), []
    monkeypatch.setattr(jax, "named_scope", nameless)
    monkeypatch.setattr(experiment, "_bind", experiment._bind.__wrapped__)  # another simulation, and not a cached one
    assert lowered() == text
    assert {*profiling.STAGES} - {"evaluate"} <= {*asked}


def test_stages_of_a_module():
    text = """HloModule jit_superstep, is_scheduled=true

%fused (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %mul.1 = f32[2]{0} multiply(%p, %p), metadata={op_name="jit(superstep)/while/body/client/vmap(reduce)/mul"}
}

%body (q: f32[2]) -> f32[2] {
  %copy.7 = f32[2]{0} copy(%q)
  %fusion.3 = f32[2]{0} fusion(%copy.7), calls=%fused, metadata={op_name="jit(superstep)/client/vmap(jit(f))/add" id=1}
}

ENTRY %main (a: f32[2]) -> f32[2] {
  %copy.8 = f32[2]{0} copy(%a)
  %while.2 = f32[2]{0} while(%copy.8), body=%body, metadata={op_name="jit(superstep)/while"}
  ROOT %reduce = f32[] reduce(%while.2), metadata={op_name="jit(superstep)/server/reduce"}
}
"""
    found = profiling.stages_of([text])
    assert found == {
        ("jit_superstep", "p"): "reduce", ("jit_superstep", "mul.1"): "reduce", ("jit_superstep", "copy.7"): "client",
        ("jit_superstep", "fusion.3"): "client", ("jit_superstep", "reduce"): "server",
    }  # fmt: skip


def test_spans_last_as_long_as_operations_of_their_stage_follow_one_another():
    def operation(name, ts, dur, device="0"):
        arguments = {"hlo_module": "m", "hlo_op": name, "device_ordinal": device}
        return {"ph": "X", "pid": 1, "tid": 5, "name": name, "ts": ts, "dur": dur, "args": arguments}

    events = [operation("b", 10, 5), operation("a", 0, 4), operation("a", 4, 3), operation("c", 20, 1)]
    trace = {"traceEvents": [*events, operation("a", 2, 6, device="1")]}
    spans = profiling.spans_of(trace, {("m", "a"): "client", ("m", "b"): "server"})
    assert spans == {"0": [(0, 7, "client"), (10, 15, "server")], "1": [(2, 8, "client")]}
    profiling.add_stages(trace, spans)
    added = [(e["name"], e["tid"], e["ts"], e["dur"]) for e in trace["traceEvents"][5:] if e["ph"] == "X"]
    assert added == [("client", 0, 0, 7), ("server", 0, 10, 5), ("client", 1, 2, 6)]


def test_a_profile_that_cannot_be_written_costs_no_result(profiled, tmp_path, capsys, monkeypatch):
    _, result, method = profiled
    monkeypatch.setattr(profiling, "tell_unsaved", lambda what, reason: print(f"told: {what}: {reason}"))
    (tmp_path / "profile").write_text("a file where a folder should be")
    again = fdjax.run(out=tmp_path, progress=False, profile=True, **THREE | {"algorithm": method})
    assert again.evaluations == result.evaluations
    assert capsys.readouterr().out.count("told: the profile in") == 1


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"profile": True}, "profile=True writes to the folder of the run; give out as well"),
        ({"profile": "client", "out": "x"}, "profile='client': expected True or False"),
        ({"profile": True, "out": "x", "lifting": "loop"}, "--profile with --lifting=loop: nothing is compiled"),
    ],
)
def test_what_cannot_be_profiled_is_told_in_one_line(given, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "build", None)
    with pytest.raises(InputError) as error:
        fdjax.run(**THREE, **given)
    assert told in str(error.value)
    assert "\n" not in str(error.value)
