"""What an installed fdjax needs: one version, console commands, no checkout. `.ci/wheel` installs and runs one."""

import configparser
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fdjax
from fdjax.errors import InputError
from fdjax.run import report
from sweeps.study import load, shipped

ROOT = Path(__file__).resolve().parents[1]


def declared() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


COMMANDS = dict(line.split(" = ") for line in declared()["options.entry_points"]["console_scripts"].split("\n") if line)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_console_command_is_a_function_of_a_program(command):
    module, _, function = COMMANDS[command].partition(":")
    program = importlib.import_module(module)
    assert f"`{command}`" in getattr(program, function).__doc__
    assert command in (program.__doc__ or "")  # which --help begins with


def test_a_console_command_tells_bad_input_in_one_line(tmp_path):
    code = "import sys; sys.argv = ['fdjax', '--roundz=2']; from fdjax.__main__ import command; command()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert done.returncode == 2
    assert done.stderr == "error: unknown flag --roundz (did you mean --rounds?) (--help lists all flags)\n"
    assert not done.stdout


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def test_help_of_a_console_command_begins_with_what_the_program_does(tmp_path):
    code = "import sys; sys.argv = ['fdjax', '--help']; from fdjax.__main__ import command; command()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert done.stdout.lstrip().startswith("One simulation of any method.")
    assert "--rounds" in done.stdout


def test_the_version_has_one_place():
    assert declared()["metadata"]["version"] == "attr: fdjax.__version__"
    changes = (ROOT / "CHANGELOG.md").read_text()
    released = re.findall(r"^## \[(\d.*?)\]", changes, re.MULTILINE)
    assert released[:1] in ([], [fdjax.__version__])


def test_extras_name_no_package_twice():
    parser = declared()
    named = [parser["options"]["install_requires"], *parser["options.extras_require"].values()]
    packages = [
        line.split(">")[0].split("=")[0].strip() for text in named for line in text.splitlines() if line.strip()
    ]
    assert sorted(packages) == sorted({*packages})


def test_studies_of_ours_have_names_and_users_have_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {*shipped()} >= {"temperature_alpha", "fedprox_tpe"}
    for name in shipped():
        assert load(name).name == name
    (tmp_path / "mine.py").write_text(shipped()["temperature_alpha"].read_text())
    assert load("mine.py") == load("temperature_alpha")
    with pytest.raises(InputError, match=r"--study=temperature: no such file; .* Ours, by name: .*temperature_alpha"):
        load("temperature")


def test_the_revision_is_that_of_our_own_repository_alone(tmp_path, monkeypatch):
    """A package that is installed within somebody's repository is not of that repository's revision."""

    def git(*words):
        subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True)

    package = tmp_path / ".venv/site-packages/fdjax/run"
    package.mkdir(parents=True)
    file = shutil.copy(Path(report.__file__), package)
    monkeypatch.setattr(report, "__file__", file)
    assert report._revision() is None
    git("init", "--quiet")
    (tmp_path / "theirs.txt").write_text("")
    git("add", "theirs.txt")
    git("-c", "user.name=n", "-c", "user.email=e", "commit", "--quiet", "--message=theirs")
    assert report._revision() is None
    git("add", "--force", file)
    assert report._revision().endswith("-dirty")
