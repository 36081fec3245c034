"""A user's own method and net, by file and by value: from Python, from the command line, and what is refused."""

import json
import re
import sys
import types
from pathlib import Path

import jax
import numpy as np
import programs
import pytest
from flax import linen as nn
from own_cases import HERE, METHOD, NET, file, method_file
from run_cases import SMALL, run, small

import fdjax
from fdjax import own
from fdjax.algorithms import ALGORITHMS, fedavg
from fdjax.errors import InputError
from fdjax.method import LOCAL_TRAINING, Method
from fdjax.models import MODELS
from fdjax.models import own as nets
from fdjax.models.nets import MCLR
from fdjax.run import experiment, methods, settings
from fdjax.run.batch import batch, experiments

# What a newcomer does.


def test_the_example_is_the_equation(rng):
    """v <- beta v + (w_t - mean), w <- w - v."""
    (exchange,) = experiment.build(small(algorithm=str(METHOD))).algorithm.round
    w, v, mean = ({"a": rng.normal(size=3)} for _ in range(3))
    ctx = types.SimpleNamespace(hparams={"beta_server": 0.7})
    after, metrics = exchange.server(ctx, {"params": w, "velocity": v}, mean)
    velocity = 0.7 * v["a"] + (w["a"] - mean["a"])
    np.testing.assert_allclose(after["velocity"]["a"], velocity, rtol=1e-12)
    np.testing.assert_allclose(after["params"]["a"], w["a"] - velocity, rtol=1e-12)
    assert metrics == {}


def test_one_line_puts_it_through_the_contract():
    kept = fdjax.check_method(str(METHOD))
    assert str(kept).startswith("fedavgm keeps the contract: 15 checks in ")


def test_by_file_and_by_value_are_the_same_numbers():
    value = methods.of(methods.resolve(str(METHOD)))
    by_file = run(algorithm=METHOD.as_posix(), model=NET, beta_server=0.5)
    module = own.load(str(HERE / "net.py"), "model").module
    by_value = run(algorithm=value._replace(build=value.build), model=module.Net(num_classes=10), beta_server=0.5)
    assert by_file.evaluations == by_value.evaluations
    assert by_file.settings.algorithm_title == f"fedavgm ({METHOD})"
    assert by_value.settings.algorithm_title == "fedavgm"
    held = [own.recorded(name) for name in (by_file.settings.algorithm, by_file.settings.model)]
    assert by_file.settings.files == dict(zip(held, (str(METHOD), str(HERE / "net.py")), strict=True))
    assert by_file.settings.check() == by_file.settings
    assert json.loads(json.dumps(by_file.settings.public())) == by_file.settings.public()


def test_cohorts_by_file_and_by_value():
    net = own.load(str(HERE / "net.py"), "model").module.Net(num_classes=10)
    by_file = small(algorithm="feddistill", models=f"{NET}:3,mclr:1")
    by_value = small(algorithm="feddistill", models=[(net, 3), ("mclr", 1)])
    for chosen, name in ((by_file, f"Net ({HERE / 'net.py'})"), (by_value, "Net")):
        cohorts = experiment.build(chosen).layout.cohorts
        assert [(cohort.model.name, cohort.size) for cohort in cohorts] == [(name, 3), ("mclr", 1)]
    assert settings.make(model=NET).algorithm == "fedavg"
    with pytest.raises(InputError, match="clients of fedavg have no model of their own, only --model=mclr"):
        small(models=f"{NET}:4")


def test_from_the_command_line(tmp_path):
    flagfile = tmp_path / "my.flags"
    given = SMALL | {"algorithm": METHOD, "beta_server": 0.25, "rounds": 1}
    flagfile.write_text("".join(f"--{name}={value}\n" for name, value in given.items()))
    result = programs.run_here("fdjax", f"--flagfile={flagfile}", f"--model={NET}", f"--out={tmp_path / 'out'}")
    assert result.returncode == 0, result.stderr
    assert f"fedavgm ({METHOD})" in result.stdout
    written = json.loads((tmp_path / "out" / "results.json").read_text())["result"]
    assert written["settings"]["beta_server"] == 0.25
    assert set(written["files"].values()) == {str(METHOD), str(HERE / "net.py")}


def test_help_has_the_flags_of_a_file():
    """Flags that are no settings are reserved, or absl would end in a traceback where a method takes one."""
    result = programs.run_here("fdjax", f"--algorithm={METHOD}", "--help")
    text = " ".join(result.stdout.split())
    assert "hyperparameter of fedavgm (default 0.9): momentum of the server" in text
    assert f"fedavgm ({METHOD}): FedAvgM (Hsu et al. 2019)" in text
    listed = {*re.findall(r"^ *--(?:\[no\])?(\w+):", result.stdout, re.MULTILINE)}
    ours = {n for m in methods.known().values() for n in (*m.hparams, *m.options)} | {"beta_server"}
    assert listed - set(settings.FLAGS) - ours <= methods.RESERVED


def test_a_file_that_is_none_ends_in_one_line_before_flags_are_read():
    result = programs.run_here("fdjax", "--algorithm", "none.py", "--my_hparam=1")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: --algorithm=none.py: there is no such file; ")
    assert result.stderr.count("\n") == 1


def test_flags_of_files_are_looked_for_where_absl_looks(tmp_path):
    flagfile = tmp_path / "x.flags"
    flagfile.write_text(f"--algorithm={METHOD}\n")
    for arguments in (
        [f"--algorithm={METHOD}"], ["-algorithm", str(METHOD)], [f"--flagfile={flagfile}"],
        ["--flagfile", str(flagfile)], [f"--algorithms=fedavg,{METHOD}"], ["--algorithm=x.py", f"--algorithm={METHOD}"],
    ):  # fmt: skip
        assert [m.name for m in methods.on_command_line(["program", *arguments]).values()] == ["fedavgm"]
    for arguments in ([], ["--algorithm=fedavg"], ["--", f"--algorithm={METHOD}"], ["--flagfile=none"]):
        assert methods.on_command_line(["program", *arguments]) == {}


# Contents, and not names or paths.


def scale_of(chosen):
    """By what the server of the algorithm that a run would compile multiplies."""
    (exchange,) = experiment.build(chosen).algorithm.round
    return float(exchange.server(None, None, {"a": 1.0})[0]["a"])


def test_two_files_of_one_name_are_two(tmp_path):
    """Nor do they share what they import from beside them."""
    paths = []
    for folder, scale in (("a", 1.0), ("b", 0.5)):
        paths.append(method_file(tmp_path / folder, "SCALE", more="from helper import SCALE"))
        file(tmp_path / folder, f"SCALE = {scale}\n", "helper.py")
    chosen = [small(algorithm=path) for path in (*paths, paths[0])]
    assert [scale_of(one) for one in chosen] == [1.0, 0.5, 1.0]
    assert chosen[0] == chosen[2]
    assert chosen[0].static(16) != chosen[1].static(16)
    assert not {"helper", "my"} & sys.modules.keys()


def test_equal_files_in_two_folders_may_read_other_data(tmp_path):
    """What a file reads from beside it is no part of its text."""
    read = "from pathlib import Path\nSCALE = float((Path(__file__).parent / 'scale.txt').read_text())"
    names = []
    for folder, scale in (("a", 1.0), ("b", 0.5)):
        path = method_file(tmp_path / folder, "SCALE", more="")
        Path(path).write_text(read + Path(path).read_text())
        file(tmp_path / folder, str(scale), "scale.txt")
        names.append(small(algorithm=path))
    assert [scale_of(name) for name in names] == [1.0, 0.5]


def test_what_is_recorded_does_not_depend_on_what_was_read_before(tmp_path):
    """A run that was recorded by the second of two like files goes on in a process that knows that one alone."""
    paths = [method_file(tmp_path / folder, "1.0") for folder in ("a", "b")]
    chosen = [small(algorithm=path) for path in paths]
    assert chosen[0].algorithm != chosen[1].algorithm
    assert chosen[0].public() == chosen[1].public()
    assert settings.contents([("algorithm", paths[0])]).popitem()[1] == chosen[1].public()["algorithm"]


def test_a_file_that_was_edited_is_a_new_method(tmp_path):
    path = method_file(tmp_path, "1.0")
    before = run(algorithm=path, out=tmp_path / "out")
    method_file(tmp_path, "0.5")  # of the same length, in the same second
    after = run(algorithm=path)
    assert before.evaluations != after.evaluations
    with pytest.raises(InputError, match=r"was run with algorithm=mine@\w+, not mine@\w+ \(mine has changed since\)"):
        run(algorithm=path, out=tmp_path / "out", resume=True, rounds=5)
    method_file(tmp_path, "1.0")
    assert run(algorithm=path, out=tmp_path / "out", resume=True, rounds=5).rounds["bytes_up"]


def test_a_neighbour_that_was_edited_is_a_new_method(tmp_path):
    """Also one that is imported by a neighbour, or only when a function is called."""
    file(tmp_path / "package", "from .inner import SCALE", "__init__.py")
    path = method_file(tmp_path, "scale()", more="def scale():\n    import package\n    return package.SCALE")
    found = []
    for scale in (1.0, 0.5):
        file(tmp_path / "package", f"SCALE = {scale}\n", "inner.py")
        found.append(scale_of(small(algorithm=path)))
    assert found == [1.0, 0.5]


def test_a_method_replaced_under_its_name_is_another(monkeypatch):
    def method(scale):
        def build(task):
            (exchange,) = (base := fedavg.fedavg(task)).round
            shrink = lambda ctx, params, mean: (jax.tree.map(lambda w: scale * w, mean), {})  # noqa: E731
            return base._replace(round=(exchange._replace(server=shrink),))

        return Method("replaced", "", build, LOCAL_TRAINING, one_architecture=True)

    chosen = []
    for scale in (1.0, 0.5, 1.0):
        monkeypatch.setitem(ALGORITHMS, "replaced", method(scale))
        chosen.append(small(algorithm="replaced"))
    assert [scale_of(one) for one in chosen] == [1.0, 0.5, 1.0]
    assert chosen[0] == chosen[2]  # written again unchanged, it compiles nothing
    assert methods.resolve(ALGORITHMS["fedprox"]) == "fedprox"


def test_a_net_replaced_under_its_name_is_another(monkeypatch):
    seen = set()
    for name in ("mclr", "2nn"):
        monkeypatch.setitem(MODELS, "mine", MODELS[name])
        seen.add(settings.make(model="mine").model)
    assert len(seen) == 2


@pytest.mark.exhaustive
def test_trials_of_own_methods_share_a_batch():
    chosen = [small(algorithm=str(METHOD), beta_server=beta) for beta in (0.0, 0.5)]
    ready = experiments(chosen)
    assert ready[0].signature == ready[1].signature
    zero, half = batch(ready, 2).run(ready, lambda done, records: ())
    assert zero.evaluations != half.evaluations


@pytest.mark.parametrize(
    ("thing", "label"),
    [
        (lambda num_classes: nn.Dense(num_classes), "lambda"),
        (lambda k: nn.Dense(k), "lambda"),
        (MCLR(num_classes=10), "MCLR"),
        (MCLR, "MCLR"),
        (fdjax.models.build("mclr", (60,), 10), "mclr"),
    ],
)
def test_what_may_be_a_net(thing, label):
    name = nets.resolve(thing)
    assert name.partition("@")[0] == label
    model = nets.build(name, (60,), 10)
    assert model.apply(model.init(jax.random.key(0)), np.zeros((2, 60), np.float32)).shape == (2, 10)


NNX = """
from flax import nnx
class Net(nnx.Module):
    def __init__(self, num_classes, rngs, *, width=7):
        self.inner, self.outer = nnx.Linear(60, width, rngs=rngs), nnx.Linear(width, num_classes, rngs=rngs)
    def __call__(self, x):
        return self.outer(nnx.relu(self.inner(x)))
def made(num_classes, rngs):
    return Net(num_classes, rngs, width=9)
"""


@pytest.mark.parametrize(("wanted", "width"), [("Net", 7), ("made", 9)])
def test_nnx_modules(tmp_path, wanted, width):
    model = nets.build(nets.resolve(f"{file(tmp_path, NNX, 'net.py')}:{wanted}"), (60,), 10)
    params = model.init(jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 61 * width + 10 * (width + 1)
    assert model.apply(params, np.zeros((2, 60), np.float32)).shape == (2, 10)
