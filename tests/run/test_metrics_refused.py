"""Metrics, targets and histories that cannot be: one line each, before anything is compiled."""

import jax
import jax.numpy as jnp
import pytest

import fdjax
from fdjax.client.metric import Metric
from fdjax.engine.check_metric import check_metric
from fdjax.errors import InputError
from fdjax.run import experiment, settings
from fdjax.run.metrics import checked_records

IMPORTS = "import jax.numpy as jnp\nfrom fdjax import Metric\n"
BAD_FILES = [
    ("x = 1\ndef score(z): pass", r"--metrics=.*my.py has no METRIC, a fdjax.Metric; it has score$"),
    (IMPORTS + "MINE = Metric('a', per_example=jnp.add)", r"has no METRIC, .*; give .*my.py:MINE$"),
    ("def METRIC(z, y): pass", r"METRIC is a function, expected a fdjax.Metric\(name, per_example=...\)$"),
    (IMPORTS + "METRIC = Metric", r"METRIC is Metric, expected a fdjax.Metric\("),
    ("import nothing_of_that_name", r"--metrics=.*my.py does not import: ModuleNotFoundError"),
    (IMPORTS + "METRIC = Metric('a b', per_example=jnp.add)", r"METRIC: its name is 'a b', expected letters"),
    (IMPORTS + "METRIC = Metric('loss', per_example=jnp.add)", r"the name 'loss' is taken; call it my_loss, say"),
    (IMPORTS + "METRIC = Metric('roc_auc', per_example=jnp.add)", r"the name 'roc_auc' is taken"),
    (IMPORTS + "METRIC = Metric('a_undefined', per_example=jnp.add)", r"the name 'a_undefined' is taken"),
    (IMPORTS + "METRIC = Metric('a')", r"expected one of per_example, sums .* and across, but it has none of them"),
    (IMPORTS + "METRIC = Metric('a', jnp.add, jnp.add, jnp.add)", r"but it has per_example and sums$"),
    (IMPORTS + "METRIC = Metric('a', sums=jnp.add)", r"sums and finish go together; give both"),
    (IMPORTS + "METRIC = Metric('a', jnp.add, finish=jnp.sum)", r"sums and finish go together"),
    (IMPORTS + "METRIC = Metric('a', per_example=0.5)", r"METRIC: per_example is a float, expected a function"),
    (IMPORTS + "METRIC = Metric('a', jnp.add, holds=True)", r"holds=True is for finish\(sums, held\)"),
    (IMPORTS + "METRIC = Metric('a', jnp.add, better='more')", r"better is 'more', expected 'higher' or 'lower'"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES, ids=[message[:40] for _, message in BAD_FILES])
def test_bad_files(tmp_path, text, message):
    (tmp_path / "my.py").write_text(text)
    refused({"metrics": str(tmp_path / "my.py")}, message)


def refused(fields, message, build=None):
    def ready():
        made = settings.make(**fields)
        return made if build is None else build(made)

    with pytest.raises(InputError, match=message) as error:
        ready()
    assert "\n" not in str(error.value)


A = Metric("a", per_example=lambda z, y: y * 1.0)
BAD_SETTINGS = [
    ({"metrics": "balanced_acuracy"}, r"unknown metric 'balanced_acuracy' \(did you mean 'balanced_accuracy'\?\)"),
    ({"metrics": "accuracy"}, r"unknown metric 'accuracy'.*; accuracy and loss are there without asking$"),
    ({"metrics": "roc_auc,,macro_f1"}, r"unknown metric ''"),
    ({"metrics": "roc_auc,macro_f1,roc_auc"}, r"--metrics: 'roc_auc' is given twice; leave one of them out"),
    ({"metrics": [A, A._replace(unit="%")]}, r"--metrics: 'a' is given twice"),
    ({"metrics": []}, r"--metrics=\[\]: expected metrics; leave it out for none"),
    ({"metrics": 3}, r"--metrics=3: expected a metric's name, a file of your own \(my.py\) or a Metric"),
    ({"metrics": [lambda z, y: y]}, r"--metrics=<function .*: expected a metric's name"),
    ({"metrics": "none.py"}, r"--metrics=none.py: there is no such file"),
    ({"metrics": "folder/mine"}, r"--metrics=folder/mine names no file: a file of your own ends in .py"),
    ({"metrics": "a@0123456789ab"}, r"metric 'a@0123456789ab' is of a file that this process has not read"),
    ({"targets": "80"}, r"--targets='80': expected accuracies above 0 and at most 1"),
    ({"targets": "0.8,high"}, r"--targets='0.8,high': expected accuracies"),
    ({"targets": [0.5, 0.5]}, r"--targets=\[0.5, 0.5\]: expected accuracies .* each another"),
    ({"targets": True}, r"--targets=True: expected accuracies"),
    ({"client_history": 3}, r"--client_history=3: expected true or false"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), BAD_SETTINGS, ids=[message[:40] for _, message in BAD_SETTINGS])
def test_bad_settings(fields, message):
    refused(fields, message)


def sums(function, finish=lambda total: total):
    return Metric("a", sums=function, finish=finish)


MEAN = (
    r"metric a: sums \(test_metrics_refused.py:\d+\): what it returns for one example and for two others does not add"
)
BAD_FUNCTIONS = [
    (A._replace(per_example=lambda z, y: jnp.mean(y * 1.0)),
     r"^metric a: per_example \(test_metrics_refused.py:\d+\) returned float32\[\], expected one number for each"),
    (A._replace(per_example=lambda z, y: z), r"per_example .* returned float32\[3, 3\], expected one number for each"),
    (A._replace(per_example=lambda z, y: [1.0, 2.0]), r"per_example .* returned a list, expected one number"),
    (A._replace(per_example=lambda z, y: y + 1j), r"per_example .* returned complex numbers, expected real ones"),
    (A._replace(per_example=lambda z, y: jnp.log(-jnp.abs(z[:, 0]))), r"per_example .* numbers that are not finite"),
    (A._replace(per_example=lambda z: z), r"per_example .* raised TypeError: .*takes 1 positional argument"),
    (A._replace(per_example=lambda z, y: z @ jnp.ones(4)), r"per_example .* raised TypeError: "),
    (A._replace(per_example=lambda z, y: y if z[0, 0] > 0 else -y), r"raised TracerBoolConversionError: "),
    (sums(lambda z, y, w: jnp.mean(w * y)), MEAN),
    (sums(lambda z, y, w: jnp.sum(y * 1.0)), r"sums .*: examples of weight 0 count; multiply what is summed by the"),
    (sums(lambda z, y, w: w * y), r"returned the shapes \[\[1\]\] for one example and \[\[3\]\] for 3; sum over"),
    (sums(lambda z, y, w: ()), r"sums .* returned no array at all"),
    (sums(lambda z, y, w: jnp.sum(w) / (jnp.sum(w) - 3)), r"sums .* not finite for finite logits; clip what is"),
    (sums(lambda z, y, w: jnp.sum(w), lambda n: jnp.ones(4) * n), r"finish .* returned float32\[4\], expected one"),
    (sums(lambda z, y, w: jnp.sum(w), lambda n: {"value": n}), r"finish .* returned a dict, expected one number or"),
    (sums(lambda z, y, w: jnp.sum(w), lambda n, held: n), r"finish .* raised TypeError: .*missing 1 required"),
    (Metric("a", across=lambda a, tested: a), r"across .* returned float32\[3\], expected one number$"),
    (Metric("a_1", per_example=lambda z, y: y * 1.0), r"--metrics: .* both have a value 'a_1'; rename"),
]  # fmt: skip
SMALL = {"dataset": "synthetic", "num_clients": 3, "samples_per_client": 9, "model": "mclr", "rounds": 1, "devices": 1}


@pytest.mark.parametrize(("metric", "message"), BAD_FUNCTIONS, ids=[message[:40] for _, message in BAD_FUNCTIONS])
def test_bad_functions(metric, message):
    by_class = sums(lambda z, y, w: w @ jax.nn.one_hot(y, z.shape[1]))
    given = [metric, by_class] if metric.name == "a_1" else [metric]
    refused({"metrics": given}, message, lambda made: checked_records(made.metrics, 3))


def test_a_bad_function_is_refused_before_anything_is_compiled(monkeypatch):
    monkeypatch.setattr("fdjax.engine.compiling.together", lambda *_: pytest.fail("compiled"))
    with pytest.raises(InputError, match=r"metric a: per_example .* returned float32"):
        fdjax.run(metrics=A._replace(per_example=lambda z, y: z), progress=False, **SMALL)


UNTESTED = [
    ({"metrics": "jain_index", "local_eval": "none"}, r"--metrics=jain_index: no client's own part is tested; leave "),
    ({"metrics": "inside_accuracy,outside_accuracy", "algorithm": "local", "local_eval": "own"},
     r"--metrics=inside_accuracy or outside_accuracy: no client's model is tested on the test set; give --local_eval"),
    ({"metrics": "outside_accuracy", "central_eval": False}, r"--metrics=outside_accuracy: no client's model is"),
    ({"metrics": "forgetting", "algorithm": "local", "local_eval": "own"}, r"--metrics=forgetting: no model of local"),
    ({"metrics": "forgetting", "central_eval": False}, r"--metrics=forgetting: no model of fedavg is tested"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), UNTESTED, ids=[message[:40] for _, message in UNTESTED])
def test_metrics_of_what_is_not_tested(fields, message):
    refused(SMALL | fields, message, experiment.build)


def test_by_class_of_too_many_classes():
    by_class = sums(lambda z, y, w: w @ jax.nn.one_hot(y, z.shape[1]))
    assert check_metric(by_class, "a", 1000)
    with pytest.raises(InputError, match="metric a: it is by class, and there are 1,001 of them, more than 1,000"):
        check_metric(by_class, "a", 1001)


def test_a_metric_that_was_edited_is_another_one(tmp_path):
    def made(scale):
        (tmp_path / "my.py").write_text(f"{IMPORTS}METRIC = Metric('mine', lambda z, y: {scale} * y)")
        return settings.make(**SMALL, metrics=str(tmp_path / "my.py"))

    first, second = made("1.0"), made("2.0")
    assert first.metrics != second.metrics
    fdjax.run(first, tmp_path / "run", progress=False)
    with pytest.raises(InputError, match=r"metrics=mine@.* \(mine has changed since\)"):
        fdjax.run(second, tmp_path / "run", resume=True, progress=False)
