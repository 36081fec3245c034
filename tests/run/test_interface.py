"""`import fdjax`, and what a user finds there."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fdjax
from fdjax.errors import InputError
from fdjax.run import runner
from fdjax.run.logs import Told

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"algorithm": "feddistill", "dataset": "synthetic", "num_clients": 4, "samples_per_client": 20, "model": "mclr"}


def test_every_public_name_is_there():
    assert set(fdjax.__all__) <= set(dir(fdjax))
    for name in fdjax.__all__:
        assert getattr(fdjax, name) is not None
    assert fdjax.Settings is type(fdjax.settings(rounds=3))
    assert fdjax.InputError is InputError
    assert fdjax.losses.__name__ == "fdjax.client.losses"
    assert "feddistill" in fdjax.algorithms.ALGORITHMS
    with pytest.raises(AttributeError, match="module 'fdjax' has no attribute 'nothing'"):
        fdjax.nothing  # noqa: B018


def test_editors_see_the_same_names():
    """The imports that only type checkers read are of the names that are loaded at their first use."""
    tree = ast.parse((ROOT / "fdjax" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    aliases = [alias for node in block.body for alias in node.names]
    assert sorted(alias.asname or alias.name for alias in aliases) == sorted(fdjax.__all__)


IMPORTS = [
    "import fdjax; run = fdjax.run",
    "import fdjax.run.settings; run = fdjax.run",
    "from fdjax.run import settings; import fdjax; run = fdjax.run",
    "from fdjax import run; import fdjax.run.report",
]


def test_run_is_a_package_and_a_function():
    """Whatever of it was imported before; a bad setting shows that it is the runner's function, and in little time."""
    code = f"""
import sys
for imports in {IMPORTS}:
    for name in [name for name in sys.modules if name.partition(".")[0] == "fdjax"]:
        del sys.modules[name]
    exec(imports)
    try:
        run(rounds=0)
    except fdjax.InputError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "--rounds=0: expected a whole number of at least 1\n" * len(IMPORTS)


def test_what_cannot_work_is_one_line():
    for bad, message in (
        ({"rounds": 0}, "--rounds=0: expected a whole number of at least 1"),
        ({"temperature": 0.0}, "--temperature=0.0: expected a finite number above 0"),
        ({"roundz": 1}, r"unknown setting 'roundz' \(did you mean 'rounds'\?\)"),
    ):
        with pytest.raises(InputError, match=message):
            fdjax.run(**SMALL | bad)
    with pytest.raises(InputError, match="run takes Settings or names of settings, but got both; leave out rounds"):
        fdjax.run(fdjax.settings(**SMALL), rounds=3)
    with pytest.raises(InputError, match="--rounds=0"):  # settings that nobody has checked
        fdjax.run(fdjax.Settings(rounds=0))


def test_names_reach_the_runner(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(runner, "run", lambda *args, **named: calls.append((args, named)))
    fdjax.run(out=str(tmp_path), checkpoint_every=2, temperature=3.0, **SMALL)
    expected = (fdjax.settings(temperature=3.0, **SMALL), tmp_path)
    usual = {"resume": False, "progress": True, "told": Told(), "profile": False}
    assert calls == [(expected, usual | {"checkpoint_every": 2})]
