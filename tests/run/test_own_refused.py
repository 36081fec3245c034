"""A user's own files and values that cannot be: one line each."""

from pathlib import Path

import pytest
from flax import nnx
from own_cases import file, method_file
from run_cases import run

import fdjax
from fdjax.algorithms import fedavg
from fdjax.errors import InputError
from fdjax.method import HParam
from fdjax.models import own as nets
from fdjax.run import contract_check, settings
from fdjax.run.contract_check import BrokenContractError

FEDAVG = "import fdjax\nfrom fdjax.algorithms import fedavg\n"
OTHER = FEDAVG + "METHOD = fedavg.METHOD._replace"
BAD_FILES = [
    ("import nothing_of_that_name", r"does not import: ModuleNotFoundError: No module named 'nothing_.*' \(my.py:1\)$"),
    ("x = 1\ndef f(:\n", r"does not import: SyntaxError: .* \(my.py:2\)$"),
    ("1 / 0", r"does not import: ZeroDivisionError: division by zero \(my.py:1\)$"),
    ("raise SystemExit(3)", r"does not import: SystemExit: 3 \(my.py:1\)$"),
    ("def build(task): pass\n_x = 1", r"has no METHOD, the record of a method \(fdjax.Method\); it has build$"),
    (FEDAVG + "MINE = fedavg.METHOD", r"has no METHOD, .*; give .*my.py:MINE$"),
    ("def METHOD(task): pass", r"METHOD is a function, expected a fdjax.Method\(name, summary, build, hparams\)$"),
    (FEDAVG + "METHOD = fdjax.Method", r"METHOD is Method, expected a fdjax.Method\("),
    (OTHER + "(name='a b')", r"METHOD: its name is 'a b', expected letters"),
    (OTHER + "(build=3)", r"METHOD: build is an int, expected a function of a fdjax.Task"),
    (OTHER + "(hparams={'a': 0.1})", r"hparam 'a' is a float, expected HParam\(default"),
    (OTHER + "(hparams={'momentum': fdjax.HParam(0.1)})", r"'momentum' has the name of a setting; call it fedavg_mom"),
    (OTHER + "(hparams={'out': fdjax.HParam(0.1)})", r"hparam 'out' has the name of a setting"),
    (OTHER + "(hparams={'aggregation': fdjax.HParam(0.1)})", r"has the name of something else in cronus; rename it$"),
    (OTHER + "(options={'how': 'a'})", r"option 'how' is 'a', expected a tuple of texts"),
    (OTHER + "(hparams={'a': fdjax.HParam(2.0, high=1.0)})", r"--a=2.0: expected a number from 0 to 1"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES, ids=[message[:40] for _, message in BAD_FILES])
def test_bad_files(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as error:
        settings.make(algorithm=file(tmp_path, text))
    assert "\n" not in str(error.value)


def test_bad_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    method_file(tmp_path)
    for given, message in (
        ("none.py", r"--algorithm=none.py: there is no such file; its folder has my.py"),
        ("no/none.py", r"there is no such file; paths are relative to the working directory"),
        ("my", r"unknown algorithm 'my'; did you mean the file, --algorithm=my.py\?"),
        ("folder/my", r"--algorithm=folder/my names no file: a file of your own ends in .py"),
        ("my.py:OTHER", r"--algorithm=my.py:OTHER has no OTHER"),
        ("mine@0123456789ab", r"method 'mine@0123456789ab' is of a file that this process has not read"),
        (fedavg.fedavg, r"expected a method's name, a file of your own \(my.py\) or a Method"),
    ):
        with pytest.raises(InputError, match=message):
            settings.make(algorithm=given)
    with pytest.raises(InputError, match="unknown hparam of mine 'mu'; known: learning_rate, local_epochs"):
        settings.make(algorithm="my.py", mu=1.0)


NETS = """
import flax.linen as nn
class Wide(nn.Module):
    width: int
    @nn.compact
    def __call__(self, x): return nn.Dense(3)(x)
class Three(nn.Module):
    @nn.compact
    def __call__(self, x): return nn.Dense(3)(x)
class Images(nn.Module):
    num_classes: int
    @nn.compact
    def __call__(self, x): return nn.Dense(self.num_classes)(x[:, 0, 0])
class Typo(nn.Module):
    @nn.compact
    def __call__(self, x): return self.nothing(x)
def text(num_classes): return "net"
number = 3
"""
BAD_NETS = [
    ("", r"--model=.*net.py names no net of the file; give .*net.py:Wide or .*net.py:Three"),
    (":Nt", r"--model=.*net.py:Nt has no Nt; give .*net.py:Wide or "),
    (":number", r"net.py:number is an int, expected a linen module or its class"),
    (":Wide", r"model 'Wide \(.*net.py\)' wants width, of which nobody knows the value"),
    (":Three", r"model 'Three \(.*net.py\)' returned .*, expected logits \[B, 10\]: the data have 10 classes"),
    (":Images", r"model 'Images \(.*net.py\)' (on|cannot take) inputs \(60,\): "),
    (":Typo", r"model 'Typo \(.*net.py\)' (on|cannot take) inputs \(60,\): .*has no attribute \"nothing\""),
    (":text", r"model 'text \(.*net.py\)' made a str, expected a linen module or a Model"),
]


@pytest.mark.parametrize(("wanted", "message"), BAD_NETS, ids=[wanted for wanted, _ in BAD_NETS])
def test_bad_nets(tmp_path, wanted, message):
    path = file(tmp_path, NETS, "net.py")
    with pytest.raises(InputError, match=message) as error:
        run(model=path + wanted)
    assert "\n" not in str(error.value)


def test_bad_lists_of_nets():
    with pytest.raises(InputError, match=r"expected pairs of a net and clients, e.g. \[\(net, 3\), \('2nn', 7\)\]"):
        settings.make(models=["mclr", 3])
    with pytest.raises(InputError, match=r"--models=mclr:0: 'mclr:0' is not of the form name:clients"):
        settings.make(models=[("mclr", 0)])
    with pytest.raises(InputError, match="is an nnx module with weights; give its class"):
        nets.resolve(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))


def test_what_a_function_raises_is_one_line(tmp_path):
    for text, message in (
        ("{}['a']", r"mine, exchange train: server \(my.py:\d+\) raised KeyError: 'a' \(my.py:\d+\)"),
        ("int(ctx.round)", r"server \(my.py:\d+\) raised ConcretizationTypeError: .*\(my.py:\d+\)"),
        ("ctx.hparams['mu']", r"unknown hyperparameter \(in ctx.hparams\) 'mu'"),
    ):
        with pytest.raises(InputError, match=message) as error:
            run(algorithm=method_file(tmp_path, text))
        assert "\n" not in str(error.value)
    path = method_file(tmp_path).replace("my.py", "other.py")
    Path(path).write_text(Path(tmp_path / "my.py").read_text().replace("base = fedavg", "return\n    base = fedavg"))
    with pytest.raises(InputError, match=r"mine: build \(other.py:\d+\) returned None, expected a fdj"):
        run(algorithm=path)


def test_a_broken_contract_says_which_check_and_how(tmp_path):
    nan = method_file(tmp_path, "jax.numpy.nan")
    with pytest.raises(BrokenContractError, match=r"mine breaks the contract, runs: state/server/.* is not f") as one:
        fdjax.check_method(nan)
    unread = contract_check.Contract(method_file(tmp_path, hparams="{'unread': HParam(1.0)}"))
    with pytest.raises(BrokenContractError, match=r"hparam 'unread' changes nothing in two rounds; read ctx") as two:
        unread.every_hparam_is_used_and_a_new_value_compiles_nothing()
    assert "\n" not in f"{one.value}{two.value}"


def test_another_value_stays_in_its_range():
    for record, value, expected in (
        (HParam(0.1), 0.1, 0.05), (HParam(0.0), 0.0, 0.5), (HParam(3, 1, integer=True), 3, 4),
        (HParam(3, 1, 3, integer=True), 3, 2), (HParam(0.6, 0.5), 0.6, 1.2), (HParam(0.0, 0.0, 0.0), 0.0, 0.0),
    ):  # fmt: skip
        assert contract_check.another(record, value) == expected
