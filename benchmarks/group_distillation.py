"""Group distillation: the three research questions of the Glasgow poster, a figure and rows of a table for each.

    python -m benchmarks.group_distillation                     # the embedded MNIST sample; minutes on two cores

Li, Anagnostopoulos, Bryson ask, and give no numbers: (1) how to match teachers and students on several levels, (2) how
to weigh hard and soft knowledge as training goes on, (3) how to learn in groups, from a teacher and from peers. Here
devices, logistic regressions, are under edges, nets of two hidden layers, who hold unlike shares of the digits; both
forms of our concretisation are asked: "models", where groups share a student, and "proxy", where predictions are sent.

Two accuracies, means of clients: on a client's own kinds of examples, the poster's personality, and on the whole test
set, its consistency. All cases of one form are trials of one batch, seeds too. Of one seed all have the same clients
and the same start; differences are taken seed by seed.
"""

from typing import Any, NamedTuple

import numpy as np
from absl import flags

from benchmarks import cases
from fdjax.run import batch, program, report, settings
from fdjax.run.record import Result

MODELS, PROXY = "group_distillation", "group_distillation_proxy"
FORMS = {MODELS: "models", PROXY: "proxy"}
ALONE = {"alpha_max": 0.0, "beta_max": 0.0}
METRICS = {"own_accuracy": "on own kinds of examples", "local_accuracy": "on the whole test set"}


class Case(NamedTuple):
    """A row: what is asked, and how it is answered."""

    question: int
    label: str
    algorithm: str
    hparams: dict[str, Any] = {}
    options: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """Its name among the results."""
        return f"RQ{self.question}, {FORMS.get(self.algorithm, 'no exchange')}: {self.label}"


def _cases() -> list[Case]:
    plain = {"kappa": 0.0}
    found = []
    for form in (MODELS, PROXY):
        base = plain | ({"rho": 0.0} if form == PROXY else {"consistency": 0.0})
        for name in ("similarity", "uniformity", "complementarity", "chance"):
            found.append(Case(1, name, form, base | {"similarity": 0.0} | {name: 1.0}))
        found.append(Case(1, "one teacher for all", form, base | {"similarity": 0.0}))
        found.append(Case(1, "hard labels alone", form, base | ALONE))
        for label, kappa, most in (("constant, 0.25", 0, 0.5), ("constant, 0.5", 0, 1), ("constant, 0.75", 0, 1.5),
                                   ("dynamic, kappa = 1", 1, 1), ("dynamic, kappa = 5", 5, 1)):  # fmt: skip
            found.append(Case(2, label, form, base | {"kappa": kappa, "alpha_max": most, "beta_max": most}))
    for label, rho, options in (("peers by revenue", 0.5, {}), ("peers alike", 0.5, {"peers": "uniform"}),
                                ("peers by revenue alone", 1.0, {}), ("no peers", 0.0, {})):  # fmt: skip
        found.append(Case(3, label, PROXY, plain | {"rho": rho}, options))
    found.append(Case(3, "hard labels alone", PROXY, plain | ALONE))
    found.append(Case(3, "local", "local"))
    return found


def main() -> None:
    given = flags.FLAGS
    out = report.prepare(given.out, overwrite=given.overwrite)
    found = [case for case in _cases() if not given.questions or str(case.question) in given.questions]
    results = _run(found, range(given.seed, given.seed + given.seeds))
    for question in sorted({case.question for case in found}):
        _draw(out / f"question{question}.png", question, found, results)
    cases.write(out, "benchmarks.group_distillation", _table(found, results), results)


def _settings(case: Case, seed: int) -> settings.Settings:
    others = cases.without_others(case.algorithm)
    chosen = others | case.hparams | case.options
    return settings.from_flags(**chosen, algorithm=case.algorithm, seed=seed)


def _run(found: list[Case], seeds: range) -> dict[str, list[Result]]:
    """The results of all cases, those with one signature as one batch."""
    groups: dict[Any, list[tuple[str, Any]]] = {}
    chosen = [(case.name, _settings(case, seed)) for case in found for seed in seeds]
    for (name, _), experiment in zip(chosen, batch.experiments([made for _, made in chosen]), strict=True):
        groups.setdefault(experiment.signature, []).append((name, experiment))
    results: dict[str, list[Result]] = {case.name: [] for case in found}
    for group in groups.values():
        trials = [experiment for _, experiment in group]
        print(f"{len(trials)} trials of {trials[0].settings.algorithm}", flush=True)
        compiled = batch.batch(trials, len(trials))
        for (name, _), result in zip(group, compiled.run(trials, lambda done, records: []), strict=True):
            results[name].append(result)
    return results
