"""What a study gave, finished or still running: a table of configurations, pictures, one page with all of it.

    fdjax-report --study=temperature_alpha
    fdjax-report --study=my_study.py --storage=journal:/shared/study.log --out=report

Writes table.md, results.csv, PNGs and report.html, which needs none of the others. The last evaluation ranks; the best
one on the test set is shown nowhere, and the best one on a validation split only where trials had one.
"""

import csv
import io
import json
from pathlib import Path
from typing import Any

import optuna
from absl import flags
from optuna.distributions import BaseDistribution, CategoricalDistribution

from fdjax.errors import InputError
from fdjax.run import program, report
from fdjax.run.settings import FOLDERS
from sweeps import figures, outcome, page, study
from sweeps.outcome import Outcome
from sweeps.storage import open_storage

PRINTED = 20  # configurations


def main() -> None:
    given = flags.FLAGS
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    chosen = study.load(given.study)
    chosen = chosen.smaller() if given.smoke else chosen
    name = given.name or chosen.name
    results = outcome.read(chosen, _storage(given.storage or f"sqlite:///runs/sweeps/{name}.db"), name)
    out = report.prepare(given.out or f"runs/sweeps/{name}")
    write(results, out, _command())


def _storage(url: str) -> optuna.storages.BaseStorage:
    """Opened, if its file is there: a report creates no storage. Raises InputError otherwise."""
    for start in ("sqlite:///", "journal:"):
        path = url.removeprefix(start)
        if url.startswith(start) and not Path(path).is_file():
            raise InputError(f"--storage={url}: there is no file {path}; run the study first, or say where it is kept")
    return open_storage(url)


def _command() -> str:
    named = [flags.FLAGS[name] for name in ("study", "smoke", "name")]
    return " ".join(["python -m sweeps.report", *(flag.serialize() for flag in named if flag.present)])


def write(results: Outcome, out: Path, command: str) -> None:
    """Print the table, and write everything to the folder `out`."""
    title, sentences, note = f"Study {results.name}", outcome.status(results), _note(results)
    headers, rows = outcome.table(results)
    lead, settings, versions = _lead(results), _settings(results), _versions(results) | {"report": command}
    drawn, missing = figures.draw(results, out)
    print("\n\n".join(["\n".join(sentences), report.table(rows[:PRINTED], headers)]) + "\n")
    if len(rows) > PRINTED:
        print(f"{len(rows) - PRINTED} more configurations are in {out}/table.md.")
    print("\n".join([note, *missing]))
    told = "\n\n".join(f"{name}: {text}" for name, text in lead.items() if text)
    fixed, created_with = (
        "\n".join(f"- {name}: {value}" for name, value in values.items() if value not in (None, ""))
        for values in (settings, versions)
    )
    text = [f"# {title}", told, "\n".join(sentences), report.table(rows, headers), note, *missing, fixed, created_with]
    report.write_text(out / "table.md", "\n\n".join(text) + "\n")
    report.write_text(out / "results.csv", _csv(outcome.records(results)))
    html = page.page(title, lead, sentences, (headers, rows, note), drawn, missing, settings, versions)
    report.write_text(out / "report.html", html)
    print(
        f"written: {', '.join(['table.md', 'results.csv', *(f.path.name for f in drawn)])} and the page with all of it:"
    )
    print(out / "report.html")


def _note(results: Outcome) -> str:
    counts = {len(row.trials) for row in results.rows}
    sizes = outcome.tail_sizes(results.rows, results.objective)
    text = (
        f"{results.quantity.capitalize()}, mean ± std over seeds"
        if counts != {1}
        else f"{results.quantity.capitalize()}"
    )
    text += f"; {'highest' if results.maximize else 'lowest'} mean of the last evaluation first."
    if sizes[0] < outcome.TAIL:
        text += f" Some trials have fewer than {outcome.TAIL} evaluations: the mean is of all of them."
    if len(counts) > 1:
        text += f" Configurations have {min(counts)} to {max(counts)} seeds: means of few are less sure."
    if any(row.pruned for row in results.rows):
        text += " A pruned seed is in no mean, which flatters its configuration."
    if any(outcome.has_split(row) for row in results.rows):
        text += (
            " Best on a validation split: after the round whose accuracy on examples that nobody trained on, and that "
            "are not the test set's, was best, seed by seed."
        )
    return text


def _lead(results: Outcome) -> dict[str, str]:
    # A trial has the seconds of its whole batch, which count once.
    batches = {
        tuple(trial.user_attrs.get(n) for n in ("worker", "seconds", "compile_seconds")) for trial in results.finished
    }
    seconds, compiling = [sum(batch[i] or 0.0 for batch in batches) for i in (1, 2)]
    measured = f"{seconds:.0f} s of finished trials, {compiling:.0f} s of it compilation" if seconds else ""
    runtime = results.attributes.get("runtime", results.study.runtime)
    return {
        "Question": results.attributes.get("question", results.study.question),
        "Paper": results.attributes.get("paper", results.study.paper),
        "Runtime": "; ".join(text for text in (runtime, measured) if text),
    }


def _settings(results: Outcome) -> dict[str, Any]:
    """What was fixed, what was searched, and the defaults that all trials ran with."""
    described = results.attributes.get("description") or json.loads(json.dumps(results.study.description()))
    fixed, space = described["fixed"], described["space"]
    searched = {n: optuna.distributions.json_to_distribution(json.dumps(d)) for n, d in space.items()}
    used = [trial.user_attrs.get("settings") or {} for trial in results.finished]
    left = {n: v for n, v in used[0].items() if n not in {*fixed, *space, *FOLDERS} and v is not None}
    common = {n: v for n, v in left.items() if all(other.get(n) == v for other in used)}
    return {
        **{n: v for n, v in fixed.items() if n not in FOLDERS},
        **{f"{name} (searched)": _range(distribution) for name, distribution in searched.items()},
        "objective": f"{results.objective}, {'maximize' if results.maximize else 'minimize'}",
        "search": described["search"],
        "pruner": "" if described.get("pruner") == "None" else described.get("pruner"),
        "all else": ", ".join(f"{n}={v}" for n, v in sorted(common.items())),
    }


def _range(distribution: BaseDistribution) -> str:
    if isinstance(distribution, CategoricalDistribution):
        return ", ".join(map(outcome.word, distribution.choices))
    low, high, log, step = (getattr(distribution, name) for name in ("low", "high", "log", "step"))
    stepped = f", in steps of {step:g}" if step is not None and not log else ""
    return f"{low:g} to {high:g}{', log' if log else ''}{stepped}"


def _versions(results: Outcome) -> dict[str, str]:
    environment = results.attributes.get("environment") or {}
    versions = ", ".join(f"{name} {version}" for name, version in environment.get("versions", {}).items() if version)
    workers = {trial.user_attrs.get("worker") for trial in results.finished} - {None}
    return {
        "versions": versions,
        "device": environment.get("device", ""),
        "machine": environment.get("machine", ""),
        "revision": environment.get("revision") or "",
        "hash of the sources": results.attributes.get("code", ""),
        "files": ", ".join(f"{given}: {held}" for given, held in results.attributes.get("files", {}).items()),
        "workers": str(len(workers)) if workers else "",
        "sweep": results.attributes.get("command", ""),
    }


def _csv(records: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def command() -> None:
    """`fdjax-report`, or `python -m sweeps.report`."""
    ours = ", ".join(study.shipped())
    flags.DEFINE_string("study", None, f"file that defines STUDY, or one of ours: {ours}", required=True)
    flags.DEFINE_boolean("smoke", False, "the study's smoke variant")
    flags.DEFINE_string("storage", None, "URL, or journal:path; default sqlite:///runs/sweeps/<study>.db")
    flags.DEFINE_string("name", None, "of the study in the storage; default its own")
    flags.DEFINE_string("out", None, "folder for the report; default runs/sweeps/<study>")
    program.start(main)


if __name__ == "__main__":
    command()
