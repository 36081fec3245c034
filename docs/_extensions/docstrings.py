"""Docstrings as this package writes them, made readable for Sphinx: equations and code are indented paragraphs.

They become literal blocks; fields of a NamedTuple or dataclass are explained by the comments behind them in the source.
"""

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

_SECTION = re.compile(r"(Args|Returns|Raises|Yields|Attributes):$")


def blocks(text: str) -> Iterator[tuple[bool, list[str]]]:
    """The parts of a docstring in turn: (whether they are indented, lines without that indentation)."""
    current: list[str] = []
    indented = False
    for line in [*inspect.cleandoc(text).splitlines(), None]:
        here = indented if line is not None and not line.strip() else line is not None and line.startswith("    ")
        begins = here and not indented and bool(current) and bool(current[-1].strip())
        if line is None or (here != indented and not begins):
            if any(part.strip() for part in current):
                yield indented, textwrap.dedent("\n".join(current)).strip("\n").splitlines()
            current, indented = [], here
        if line is not None:
            current.append(line)


def fields_of(owner: type) -> list[tuple[str, str, str]]:
    """(name, type, comment) of each field that a class declares, as its source has them."""
    source = textwrap.dedent(inspect.getsource(owner))
    body = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)).body
    lines, found = source.splitlines(), []
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not node.target.id.startswith("_"):
            assert node.end_lineno is not None
            last = lines[node.end_lineno - 1][node.end_col_offset or 0 :]
            comment = [last.partition("#")[2].strip()] if "#" in last else []
            for line in lines[node.end_lineno :]:
                if not line.strip().startswith("#"):
                    break
                comment.append(line.strip().lstrip("# "))
            default = f" = {ast.unparse(node.value)}" if node.value is not None else ""
            found.append((node.target.id, ast.unparse(node.annotation) + default, " ".join(comment)))
    return found


def _has_fields(owner: Any) -> bool:
    named = isinstance(owner, type) and issubclass(owner, tuple) and hasattr(owner, "_fields")
    return named or (isinstance(owner, type) and dataclasses.is_dataclass(owner))


def _process(app, what: str, name: str, thing: Any, options, lines: list[str]) -> None:
    """Indented paragraphs become literal blocks, but for the sections that napoleon reads."""
    out: list[str] = []
    section = False
    for indented, part in blocks("\n".join(lines)):
        if indented and section:
            out += [f"    {line}" for line in part]
        elif indented:
            out += ["", "::", "", *(f"    {line}" for line in part), ""]
        else:
            out += _lists_apart(part)
        section = not indented and bool(_SECTION.match(part[-1]))
        out += [] if section else [""]
    if what == "class" and _has_fields(thing) and thing.__name__ != "Settings":
        out += ["", *(line for field in fields_of(thing) for line in _field(*field))]
    lines[:] = out


def _lists_apart(part: list[str]) -> list[str]:
    """A list needs an empty line before it, and the further lines of an item two spaces."""
    out: list[str] = []
    for line in part:
        if line.startswith("- ") and out and out[-1].strip() and not re.match(r"(- |  )", out[-1]):
            out.append("")
        out.append(line)
    return out


def _field(name: str, kind: str, comment: str) -> list[str]:
    return [f"- ``{name}``: ``{kind}``" + (f" — {_escaped(comment)}" if comment else "")]


def _escaped(text: str) -> str:
    return re.sub(r"([*|_])(?=[^`]*(?:`[^`]*`[^`]*)*$)", r"\\\1", text)


def _skip(app, what: str, name: str, thing: Any, skip: bool, options) -> bool | None:
    """Fields are in the list above."""
    return True if type(thing).__name__ in ("_tuplegetter", "member_descriptor") else None


def setup(app) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", _process, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True}
