"""Every registered method on one federation: bytes up and down, accuracy, seconds, compilation, beside FedAvg.

    python -m benchmarks.exchange_bytes
    python -m benchmarks.exchange_bytes --algorithms=fedavg,fd,dsfl --alpha=0.1 --rounds=20

100 clients share the embedded MNIST sample under Dirichlet(alpha). Proxy examples are held out of the training data of
all methods, also of those that do not use them, so that all train on the same. Batch size, learning rate and local
epochs are the same for all; what else a method has stays at its defaults. A method whose clients' models are in two
parts has --model for them and --server_model on their features.

Bytes are those of one client and round, mean over clients and rounds, of the arrays that were sent, or the coded bytes
where the method counts these. What a method sends once, in a set-up of all clients before the first round, has a column
of its own, and the picture begins with it. Seconds of a round are those of a superstep after the last round, timed
apart, without evaluation, compilation and set-up.

A method that fails is a row that says why; the others are printed all the same, and the exit code is 1.
"""

import contextlib
import functools
import sys
import time
import traceback
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from absl import flags

from benchmarks import cases
from fdjax.algorithms import ALGORITHMS
from fdjax.errors import InputError
from fdjax.run import experiment, methods, program, report, settings
from fdjax.run.checkpoint import Checkpoints
from fdjax.run.runner import InterruptedRun, Result

REFERENCE = "fedavg"
OURS = {
    "fedgen": {"generated_weight": 1.0, "latent_weight": 1.0},  # its code's 10, at a fifth of this rate, diverge here
    "fedftg": {"server_steps": 2},  # of ten participants; here a hundred, from each of which the generator learns
}  # in place of defaults


def main() -> None:
    given = flags.FLAGS
    names = [methods.resolve(name, settings.SETTINGS) for name in given.algorithms or ALGORITHMS]
    _refuse_unused(names)
    out = report.prepare(given.out, overwrite=given.overwrite)
    results: dict[str, list[Result]] = {}
    seconds: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name in names:
        try:
            chosen = _settings(name)
            results |= cases.run_seeds({name: [chosen]}, out)
            seconds[name] = _seconds_of_a_round(chosen, cases.run_folder(out, name, chosen))
        except InterruptedRun:
            raise
        except Exception as error:  # whatever it is, the other rows are worth having
            if not isinstance(error, InputError):
                traceback.print_exc()
            failed[name] = _one_line(error)
            results.pop(name, None)
            print(f"{methods.title(name)} failed: {failed[name]}", file=sys.stderr, flush=True)
    if not results:
        raise InputError(next(iter(failed.values())))
    _draw(out / "curves.png", {name: runs[0] for name, runs in results.items()})
    reasons = "".join(f"\n\n{methods.title(name)} failed: {reason}" for name, reason in failed.items())
    text = f"{_table(names, results, seconds, failed)}{reasons}\n\n{_notes(results)}"
    cases.write(out, "benchmarks.exchange_bytes", text, results, {"seconds_per_round": seconds, "failed": failed})
    if failed:
        sys.exit(1)


def _refuse_unused(names: list[str]) -> None:
    """Raises InputError for an hparam or option that none of the methods has."""
    understood = {n for name in names for n in (*methods.of(name).hparams, *methods.of(name).options)}
    for method in methods.known().values():
        for name in (*method.hparams, *method.options):
            if flags.FLAGS[name].present and name not in understood:
                titles = ", ".join(map(methods.title, names))
                raise InputError(f"--{name} is of none of {titles}; leave it out or name its method")


def _settings(name: str) -> settings.Settings:
    given = flags.FLAGS
    models: dict[str, Any] = {}
    if methods.of(name).split:
        models = {"models": f"{given.model}:{given.num_clients}", "model": given.server_model}
    ours = {n: value for n, value in OURS.get(name, {}).items() if not flags.FLAGS[n].present}
    return settings.from_flags(algorithm=name, local_eval="full", **models, **cases.without_others(name) | ours)


def _exceptions(results: dict[str, list[Result]]) -> str:
    """The hyperparameters that are not, in words."""
    used = {name: runs[0].settings.public() for name, runs in results.items()}
    found = [f"{name}'s {n} = {used[name][n]:g}" for name in used for n in OURS.get(name, {})]
    return f", but for {', '.join(found)}" if found else ""


def _one_line(error: Exception) -> str:
    kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
    return kind + (str(error).strip().splitlines() or ["no message"])[0][:200]


def _seconds_of_a_round(chosen: settings.Settings, folder: Path) -> float:
    """Of a superstep after the last round, whose state is in the checkpoint."""
    built = experiment.build(chosen)
    length = min(chosen.eval_every, chosen.rounds)
    with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        state = checkpoints.restore(built.simulation.init(chosen.seed, built.federation))
    given, run = (state, built.federation, built.hparams), cast(Any, built.simulation.run)
    if built.plan.lifting.kind == "loop":
        superstep = functools.partial(run, *given, length)
    else:  # compiled before the clock starts
        superstep = functools.partial(run.lower(*given, length, np.int32(0)).compile(), *given, np.int32(length))
    began = time.perf_counter()
    jax.block_until_ready(superstep())
    return (time.perf_counter() - began) / length


def sent(result: Result) -> tuple[float, float]:
    """Bytes up and down of one client and round, mean over those that took part and over rounds."""
    up, down = (result.rounds[way][-1] - result.setup.get(way, 0.0) for way in ("bytes_up", "bytes_down"))
    total = result.settings.rounds * sum(result.traffic.participants)
    return up / total, down / total


def sent_once(result: Result) -> float:
    """Bytes up and down of one client in the set-up, in which all take part."""
    return report.bytes_until(result, 0) / sum(result.traffic.sizes)


def _measure(result: Result) -> tuple[str, str]:
    """The metric that stands for the method, and whose it is."""
    if result.settings.method.pooled:
        return "central_accuracy", "all data pooled"
    if "central_accuracy" not in result.final:
        return "local_accuracy", "mean of clients"
    return "central_accuracy", "ensemble" if result.settings.algorithm == "ensemble" else "central"


def _table(
    names: list[str], results: dict[str, list[Result]], seconds: dict[str, float], failed: dict[str, str]
) -> str:
    lines = []
    reference = sum(sent(results[REFERENCE][0])) if REFERENCE in results else 0.0
    for name in names:
        if name in failed:
            lines.append((methods.title(name), *[""] * 4, "failed", *[""] * 5))
            continue
        result = results[name][0]
        (up, down), (metric, whose) = sent(result), _measure(result)
        lines.append(
            (
                methods.title(name),
                f"{up:,.0f}",
                f"{down:,.0f}",
                f"{sent_once(result):,.0f}" if result.setup else "",
                f"{reference / (up + down):,.3g}" if up + down and reference else "",
                report.percent(result.final[metric]),
                whose,
                report.percent(result.final["local_accuracy"]),
                report.percent(result.final["own_accuracy"]),
                f"{seconds[name]:.3g}",
                f"{result.compile_seconds:.0f}",
            )
        )
    headers = ("", "bytes up", "bytes down", "bytes of the set-up", "FedAvg's bytes / these", "accuracy", "whose",
               "mean of clients", "on own labels", "s a round", "s compiling")  # fmt: skip
    return report.table(lines, headers)


def _notes(results: dict[str, list[Result]]) -> str:
    given, used = flags.FLAGS, next(iter(results.values()))[0].settings
    split = [name for name in results if methods.of(name).split]
    alpha = f" (alpha = {used.alpha:g})" if used.alpha is not None else ""
    public = used.public()
    parts = [
        f"Accuracy in % on the full test set after {used.rounds} rounds, one seed. {used.dataset}, {used.num_clients} "
        f"clients, {used.partition_name}{alpha}, {100 * used.participation:g} % of them in a round; {given.model}, "
        f"B = {used.batch_size}, learning rate {public['learning_rate']:g}, local epochs {public['local_epochs']:g}; "
        f"other settings are each method's defaults{_exceptions(results)}. {used.proxy_size:,} examples "
        f"({used.proxy}) are proxy data, which "
        "no client of any method trains on as its own.",
        "Bytes are of one client and round; those of the set-up, which some methods have, of one client, both ways. "
        "Mean of clients: each client's own model, or the central one where it has none, on the full test set; on own "
        "labels: on a part with the client's labels.",
    ]
    if split:
        parts.append(
            f"{', '.join(split)}: clients have {given.model} in two parts, the server {given.server_model} on the "
            "features; the clients predict by way of the server."
        )
    return "\n\n".join(parts)


def _draw(path: Path, results: dict[str, Result]) -> None:
    """Accuracy against the bytes of a client that always takes part, the mean; methods without any are lines across."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    markers, columns = "osD^v<>Pp*", -(-len(results) // 22)  # a marker for every ten colours
    figure, axis = plt.subplots(figsize=(6.5 + 2.8 * columns, 5.5), layout="constrained")
    colors = matplotlib.colormaps["tab10"].colors  # pyright: ignore[reportAttributeAccessIssue]
    for number, (name, result) in enumerate(results.items()):
        metric, whose = _measure(result)
        accuracy = [100 * value for value in result.evaluations[metric]]
        color, label = colors[number % len(colors)], f"{methods.title(name)} ({whose})"
        in_setup, in_a_round = sent_once(result), sum(sent(result))
        total = [in_setup + in_a_round * r for r in result.evaluations["round"]]
        if total[-1] == 0:
            axis.axhline(accuracy[-1], color=color, linestyle="--", linewidth=1, label=f"{label}: sends nothing")
            continue
        sent_some = [bytes > 0 for bytes in total]  # a logarithmic axis has no place for what was before
        curve = [[v for v, some in zip(values, sent_some, strict=True) if some] for values in (total, accuracy)]
        axis.plot(*curve, color=color, linewidth=1.2)
        axis.plot(total[-1], accuracy[-1], color=color, marker=markers[number // len(colors)], label=label)
    used = next(iter(results.values())).settings
    axis.set(
        xscale="log", xlabel="bytes that a client has sent and received", ylabel="accuracy on the full test set, %"
    )
    axis.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside right upper", ncols=columns)
    axis.set_title(f"{used.dataset}, {used.num_clients} clients, {used.partition_name}, {used.rounds} rounds")
    report.save_figure(path, figure)


if __name__ == "__main__":
    flags.DEFINE_list("algorithms", None, f"methods, or files of your own, default all: {', '.join(ALGORITHMS)}")
    flags.DEFINE_string("server_model", "2nn", "the server's model on features, of methods with models in two parts")
    settings.define_flags(
        skip=("algorithm", "models", "local_eval"),
        num_clients=100, partition="dirichlet_a", alpha=0.3, model="2nn", rounds=10, eval_every=2, batch_size=10,
        learning_rate=0.05, local_epochs=2, proxy="held_out", proxy_size=500,
    )  # fmt: skip
    program.define_output_flags("runs/exchange_bytes")
    program.start(main)
