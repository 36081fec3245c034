"""Methods by what users call them: ours by name, a user's own by file, by record or by the name that settings keep."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from fdjax import own
from fdjax.algorithms import ALGORITHMS, SHIPPED
from fdjax.errors import InputError, a_kind, unknown
from fdjax.method import HParam, Method
from fdjax.run.guard import guarded
from fdjax.runtime import use_all_cores

_OWN = own.Registry("method")
_DEFAULT = "METHOD"  # the record of a file, where no other name is given
# Flags of programs that are no settings: a method's hyperparameters are flags beside them.
RESERVED = {
    "algorithms", "batch", "checkpoint_every", "compile_cache", "coordinator", "draw_partition", "flagfile", "help",
    "name", "num_processes", "out", "overwrite", "process_id", "profile", "progress", "resume", "seeds", "server_model",
    "settings", "smoke", "storage", "study", "tensorboard", "undefok", "wandb", "workers",
}  # fmt: skip


def resolve(given: Any, taken: Collection[str] = ()) -> str:
    """The name by which settings hold a method.

    Args:
      given: the name of one of ours, path/to/my.py, path/to/my.py:NAME, a `Method`, or what this function returned.
      taken: names that no hyperparameter or option may have, those of settings.

    Raises:
      InputError: a name that nothing has, a file that does not import or has no such method, a record that is none.
    """
    if isinstance(given, Method):
        return _of_ours(given) or _add_value(given, taken)
    if not isinstance(given, str):
        raise InputError(f"--algorithm={given!r}: expected a method's name, a file of your own (my.py) or a Method")
    if given in ALGORITHMS:
        method = ALGORITHMS[given]  # which a notebook may have put there, or replaced
        return given if SHIPPED.get(given) is method else _add_value(method, taken)
    if own.is_file(given):
        return _of_file(given, taken)
    if own.is_own(given):
        return _OWN[given] and given
    raise _unknown(given)


def of(name: str) -> Method:
    """The record of a method by the name that settings hold."""
    return _OWN[name].value if own.is_own(name) else ALGORITHMS[name]


def known() -> dict[str, Method]:
    """Ours, and every method of a user's own that this process has met."""
    return ALGORITHMS | {name: _OWN[name].value for name in _OWN}


def title(name: str) -> str:
    """How tables call a method: by its own name, and the file it is from."""
    return _OWN[name].titled(name) if own.is_own(name) else name


def file_of(name: str) -> str:
    """The file that a method is from; empty for ours."""
    return _OWN[name].file if own.is_own(name) else ""


def on_command_line(argv: Sequence[str], taken: Collection[str] = ()) -> dict[str, Method]:
    """The methods of users' files that --algorithm or --algorithms names among arguments, flag files included.

    Their hyperparameters are flags, which must exist before absl parses. What absl itself will refuse is left to it.
    """
    try:
        arguments = flags.FLAGS.read_flags_from_files(list(argv[1:]), force_gnu=True)
    except (flags.Error, OSError):
        return {}
    given = []
    for i, argument in enumerate(arguments):
        match = re.fullmatch(r"--?algorithms?(?:=(.*))?", argument, re.DOTALL)
        if argument == "--":
            break
        if match:
            value = match[1] if match[1] is not None else next(iter(arguments[i + 1 :]), "")
            given = value.split(",")  # the last one counts
    paths = [path for path in given if own.is_file(path)]
    if paths:
        use_all_cores()  # which such a file may be the first to use
    names = [resolve(path, taken) for path in paths]
    return {name: of(name) for name in names}


def _of_ours(method: Method) -> str | None:
    return method.name if SHIPPED.get(method.name) is method is ALGORITHMS.get(method.name) else None


def _add_value(method: Method, taken: Collection[str]) -> str:
    """The name of a record that was given as a value."""
    where = f"method {method.name!r}"
    name = _OWN.add_value(str(_checked(method, where, taken).name), method)
    if _OWN[name].value is method:  # met for the first time
        _OWN.replace(name, guarded(method))
    return name


def _of_file(given: str, taken: Collection[str]) -> str:
    """The name of the record in a file: of METHOD, or of what is named behind a colon."""
    path, _, wanted = given.partition(":")
    file, attribute, where = own.load(path, "algorithm"), wanted or _DEFAULT, f"--algorithm={given}"
    noun, form = "the record of a method (fdjax.Method)", "fdjax.Method(name, summary, build, hparams)"
    method = _checked(file.record(attribute, Method, where, noun, form), f"{where}: {attribute}", taken)
    content = file.content if attribute == _DEFAULT else file.content_of(attribute)
    return _OWN.add(method.name, content, file.thing(guarded(method)))


def _unknown(given: str) -> InputError:
    """For a name that nothing has, which may be of a file without its ending."""
    path = Path(f"{given.partition(':')[0]}.py").expanduser()
    if path.is_file():
        return InputError(f"unknown algorithm {given!r}; did you mean the file, --algorithm={path}?")
    if "/" in given:
        return InputError(f"--algorithm={given} names no file: a file of your own ends in .py, and there is no {path}")
    return unknown("algorithm", given, ALGORITHMS)


def _checked(method: Method, where: str, taken: Collection[str]) -> Method:
    """The record. Raises InputError for one that no program could use."""
    if not (isinstance(method.name, str) and re.fullmatch(r"\w[\w.+-]*", method.name)):
        raise InputError(f"{where}: its name is {method.name!r}, expected letters, digits and _")
    if not callable(method.build):
        raise InputError(f"{where}: build is {a_kind(method.build)}, expected a function of a fdjax.Task")
    if not isinstance(method.hparams, Mapping) or not isinstance(method.options, Mapping):
        raise InputError(f"{where}: hparams and options are dicts by name, HParam(0.1) and a tuple of choices")
    for name, record in method.hparams.items():
        if not isinstance(record, HParam):
            raise InputError(f"{where}: hparam {name!r} is {a_kind(record)}, expected HParam(default)")
        if isinstance(record.default, str) and record.default not in method.hparams:
            raise unknown(f"default of hparam {name!r} ({where})", record.default, method.hparams)
    for name, choices in method.options.items():
        if not (isinstance(choices, tuple) and choices and all(isinstance(choice, str) for choice in choices)):
            raise InputError(f"{where}: option {name!r} is {choices!r}, expected a tuple of texts, the default first")
    _check_names(method, where, taken)
    method.values({})  # the defaults are in their own ranges
    return method


def _check_names(method: Method, where: str, taken: Collection[str]) -> None:
    """Raises InputError for an hparam or option whose name means something else already."""
    ours = [(kind, name, other.name) for other in SHIPPED.values() for kind, name in _names(other)]
    for kind, name in _names(method):
        if not (isinstance(name, str) and name.isidentifier()):
            raise InputError(f"{where}: {kind} {name!r} cannot be a flag; use letters, digits and _")
        if name in taken or name in RESERVED:
            other = f"{re.sub(r'[.+-]', '_', method.name)}_{name}"
            raise InputError(f"{where}: {kind} {name!r} has the name of a setting; call it {other}, say")
        clash = next((who for other, same, who in ours if same == name and other != kind), None)
        if clash or (name in method.hparams and name in method.options):
            raise InputError(f"{where}: {kind} {name!r} has the name of something else in {clash or 'it'}; rename it")


def _names(method: Method) -> list[tuple[str, str]]:
    return [*(("hparam", name) for name in method.hparams), *(("option", name) for name in method.options)]
