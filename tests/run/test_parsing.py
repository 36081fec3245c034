"""What is wrong with a command line is told in one line; a reader of the output that ends costs nothing."""

import os
import subprocess
import sys

import pytest
from absl import flags

from fdjax.run import parsing, program

BAD = [
    ("--rounds=three", "--rounds=three: expected a whole number"),
    ("--rounds=3.5", "--rounds=3.5: expected a whole number"),
    ("--rounds", "missing value for flag --rounds"),
    ("--learning_rate=fast", "--learning_rate=fast: expected a number"),
    ("--central_eval=maybe", "--central_eval=maybe: expected true or false"),
    ("--checkpoint_every=-1", "--checkpoint_every=-1: -1 is not a non-negative integer"),
    ("--round=3", "unknown flag --round (did you mean --rounds?)"),
    ("--nocentral_evl", "unknown flag --nocentral_evl (did you mean --central_eval?)"),
    ("--xyz=3", "unknown flag --xyz"),
    ("--flagfile=/no/such", "unable to open flagfile: [Errno 2] No such file or directory: '/no/such'"),
]


def values():
    made = flags.FlagValues()
    flags.DEFINE_integer("rounds", 1, "", flag_values=made)
    flags.DEFINE_float("learning_rate", 0.1, "", flag_values=made)
    flags.DEFINE_boolean("central_eval", True, "", flag_values=made)
    flags.DEFINE_integer("checkpoint_every", 0, "", lower_bound=0, flag_values=made)
    return made


@pytest.mark.parametrize(("given", "message"), BAD)
def test_a_bad_flag_is_told_in_one_line(given, message):
    with pytest.raises(flags.Error) as error:
        values()(["program", given])
    said = str(parsing.told(error.value, values(), list(values())))
    assert said == f"{message} (--help lists all flags)"


def test_a_flag_that_is_needed():
    made = values()
    flags.DEFINE_string("study", None, "", required=True, flag_values=made)
    with pytest.raises(flags.Error) as error:
        made(["program"])
    assert str(parsing.told(error.value, made, [])) == "--study is needed; give --study=... (--help lists all flags)"


def test_a_reader_that_ends_does_not_end_the_program():
    """It was a traceback, of this print or of the next line of progress."""
    code = (
        "import sys; from fdjax.run.program import _Unbreakable\n"
        "sys.stdout = _Unbreakable(sys.stdout)\n"
        "for _ in range(3): print('x' * 100_000, flush=True)\n"
        "sys.stderr.write('done')"
    )
    reading, writing = os.pipe()
    os.close(reading)
    found = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (found.returncode, found.stderr) == (0, "done")


def test_streams_stay_what_they_are(capsys):
    stream = program._Unbreakable(sys.stdout)
    assert print("text", file=stream) is None
    stream.flush()
    assert capsys.readouterr().out == "text\n"
    assert stream.isatty() == sys.stdout.isatty()
