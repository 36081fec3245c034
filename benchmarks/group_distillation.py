"""Group distillation: the three research questions of the Glasgow poster, a figure and rows of a table for each.

    python -m benchmarks.group_distillation                     # the embedded MNIST sample; minutes on two cores

Li, Anagnostopoulos, Bryson ask, and give no numbers: (1) how to match teachers and students on several levels, (2) how
to weigh hard and soft knowledge as training goes on, (3) how to learn in groups, from a teacher and from peers. Here
devices, logistic regressions, are under edges, nets of two hidden layers, who hold unlike shares of the digits; both
forms of our concretisation are asked: "models", where groups share a student, and "proxy", where predictions are sent.

Two accuracies, means of clients: on a client's own kinds of examples, the poster's personality, and on the whole test
set, its consistency. All cases of one form are trials of one batch, seeds too. Of one seed all have the same clients
and the same start, and hold out the same proxy examples; differences are taken seed by seed.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from benchmarks import cases
from fdjax.run import batch, program, report, settings
from fdjax.run.experiment import Experiment
from fdjax.run.record import Result
from fdjax.run.settings import Settings

MODELS, PROXY = "group_distillation", "group_distillation_proxy"
FORMS = {MODELS: "models", PROXY: "proxy"}
ALONE = {"alpha_max": 0.0, "beta_max": 0.0}
QUESTIONS = {
    1: "How to match teachers and students? (weight 0.5)",
    2: "How to weigh hard and soft knowledge? (teachers by similarity)",
    3: "What do peers add to a teacher? (teachers by similarity, weight 0.5)",
}
METRICS = {"own_accuracy": "on own kinds of examples", "local_accuracy": "on the whole test set"}


class Case(NamedTuple):
    """A row: what is asked, and how it is answered."""

    question: int
    label: str
    algorithm: str
    hparams: Mapping[str, float] = MappingProxyType({})
    options: Mapping[str, str] = MappingProxyType({})

    @property
    def name(self) -> str:
        """Its name among the results."""
        return f"RQ{self.question}, {FORMS.get(self.algorithm, 'no exchange')}: {self.label}"


BASE = {MODELS: {"kappa": 0.0, "consistency": 0.0}, PROXY: {"kappa": 0.0, "rho": 0.0}}
WEIGHTS = {
    "constant, 0.25": {"alpha_max": 0.5, "beta_max": 0.5},
    "constant, 0.5": {},
    "constant, 0.75": {"alpha_max": 1.5, "beta_max": 1.5},
    "dynamic, kappa = 1": {"kappa": 1.0},
    "dynamic, kappa = 5": {"kappa": 5.0},
}


def _cases() -> list[Case]:
    found = []
    for form, base in BASE.items():
        criteria = ("similarity", "uniformity", "complementarity", "chance")
        found += [Case(1, name, form, base | {"similarity": 0.0} | {name: 1.0}) for name in criteria]
        found.append(Case(1, "the same teacher for all", form, base | {"similarity": 0.0}))
        found.append(Case(1, "hard labels alone", form, base | ALONE))
    for form, base in BASE.items():
        found += [Case(2, label, form, base | weights) for label, weights in WEIGHTS.items()]
        found.append(Case(2, "hard labels alone", form, base | ALONE))
    base = BASE[PROXY]
    found.append(Case(3, "teacher, and peers by revenue", PROXY, base | {"rho": 0.5}))
    found.append(Case(3, "teacher, and peers alike", PROXY, base | {"rho": 0.5}, {"peers": "uniform"}))
    found.append(Case(3, "peers by revenue alone", PROXY, base | {"rho": 1.0}))
    found.append(Case(3, "teacher alone", PROXY, base))
    found.append(Case(3, "local", "local"))
    return found


def main() -> None:
    given = flags.FLAGS
    out = report.prepare(given.out, overwrite=given.overwrite)
    found = _cases()
    results = _run(found, range(given.seed, given.seed + given.seeds))
    for question, title in QUESTIONS.items():
        _draw(out / f"question{question}.png", title, [case for case in found if case.question == question], results)
    cases.write(out, "benchmarks.group_distillation", _table(found, results), results)


def _run(found: list[Case], seeds: range) -> dict[str, list[Result]]:
    """The results of all cases by name: those of one signature are one batch, equal ones are run once."""
    chosen = {
        case.name: [
            settings.from_flags(
                **cases.without_others(case.algorithm) | dict(case.hparams) | dict(case.options),
                algorithm=case.algorithm,
                seed=seed,
            )
            for seed in seeds
        ]
        for case in found
    }
    batches: dict[Any, list[Experiment]] = {}
    for experiment in batch.experiments(list({each: None for runs in chosen.values() for each in runs})):
        batches.setdefault(experiment.signature, []).append(experiment)
    uses = Counter(each for runs in chosen.values() for each in runs)
    results: dict[Settings, Result] = {}
    for trials in batches.values():
        print(f"{len(trials)} trials of {trials[0].settings.algorithm}", flush=True)
        compiled = batch.batch(trials, len(trials))
        for trial, result in zip(trials, compiled.run(trials, lambda done, records: []), strict=True):
            share = len(trials) * uses[trial.settings]  # seconds are those of the whole batch, and rows are added up
            times = {"seconds": result.seconds / share, "compile_seconds": result.compile_seconds / share}
            results[trial.settings] = result._replace(**times)
    return {name: [results[each] for each in runs] for name, runs in chosen.items()}


def _final(runs: list[Result], metric: str) -> np.ndarray:
    """Of the last evaluation, in percent: [seeds]."""
    return 100 * np.array([run.final[metric] for run in runs])


def _draw(path: Path, title: str, found: list[Case], results: dict[str, list[Result]]) -> None:
    """Accuracies of every case: a point a seed, and a line where their mean is."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.5 + 0.32 * len(found)), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, len(METRICS), sharey=True)
    for panel, (metric, label) in zip(panels, METRICS.items(), strict=True):
        for y, case in enumerate(found):
            values = _final(results[case.name], metric)
            color = f"C{[*FORMS, 'local'].index(case.algorithm)}"
            panel.plot(values, [y] * len(values), "o", color=color, alpha=0.5)
            panel.plot([values.mean()] * 2, [y - 0.3, y + 0.3], color=color)
        panel.set_xlabel(f"accuracy {label}, %")
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(found)), [case.name.partition(", ")[2] for case in found])
    panels[0].invert_yaxis()
    report.save_figure(path, figure)


def _table(found: list[Case], results: dict[str, list[Result]]) -> str:
    lines = []
    for case in found:
        runs, alone = results[case.name], results[found[-1].name]
        numbers = []
        for metric in METRICS:
            values, lead = _final(runs, metric), _final(runs, metric) - _final(alone, metric)
            numbers += [f"{values.mean():.1f}", " / ".join(f"{v:+.1f}" for v in lead) if runs is not alone else ""]
        lines.append((str(case.question), FORMS.get(case.algorithm, ""), case.label, *numbers))
    headers = ["question", "form", "case"]
    for label in METRICS.values():
        headers += [f"{label}, %", "above local, points, of each seed"]
    used = results[found[0].name][0].settings
    note = (
        f"Mean accuracy of the clients' own models after {used.rounds} rounds, seeds {used.seed} to "
        f"{used.seed + len(results[found[0].name]) - 1}, paired. {used.models}, the first below the others."
    )
    return f"{report.table(lines, headers)}\n\n{note}"


if __name__ == "__main__":
    flags.DEFINE_integer("seeds", 3, "number of seeds, from --seed on; batches need two", lower_bound=2)
    asked = {name for case in _cases() for name in (*case.hparams, *case.options)}
    settings.define_flags(
        skip=("algorithm", *asked), dataset="mnist_sample", train_fraction=0.25, partition="dirichlet_a", alpha=0.3,
        num_clients=12, model="2nn", models="mclr:8,2nn:4", paths="next", batch_size=10, learning_rate=0.03, rounds=10,
        eval_every=10, proxy="held_out", proxy_size=500,
    )  # fmt: skip
    program.define_output_flags("runs/group_distillation")
    program.start(main)
