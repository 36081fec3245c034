"""The command line, parsed: what absl refuses is told in one line, as all bad input is."""

import difflib
import re
from collections.abc import Sequence

from absl import flags

from fdjax.errors import InputError, end

_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}


def parse_flags(argv: Sequence[str]) -> list[str]:
    """What is left of the arguments when the flags are parsed; bad ones end the program in one line, with code 2."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        ours = [flag.name for flag in flags.FLAGS.get_key_flags_for_module(argv[0])]
        end(told(error, flags.FLAGS, ours))


def told(error: flags.Error, values: flags.FlagValues, ours: Sequence[str]) -> InputError:
    """What absl says of a flag, in our words; `ours` are the flags of which the nearest is named."""
    return InputError(f"{_words(error, values, ours)} (--help lists all flags)")


def _words(error: flags.Error, values: flags.FlagValues, ours: Sequence[str]) -> str:
    if isinstance(error, flags.UnrecognizedFlagError):
        name = error.flagname
        near = [found for n in (name, name.removeprefix("no")) for found in difflib.get_close_matches(n, ours, n=1)]
        return f"unknown flag --{name}" + (f" (did you mean --{near[-1]}?)" if near else "")
    text = " ".join(str(error).replace("ERROR:: ", "").split())
    illegal = re.fullmatch(r"flag --(?P<name>\w+)=(?P<value>.*?): (?P<reason>.*)", text)
    if not illegal:
        return text[:1].lower() + text[1:]
    name, value, reason = illegal["name"], illegal["value"], illegal["reason"]
    if value == "None":
        return f"--{name} is needed; give --{name}=..."
    kind = _KINDS.get(values[name].flag_type())
    return f"--{name}={value}: expected {kind}" if kind and " is not " not in reason else f"--{name}={value}: {reason}"
