"""Runs what a page shows, block by block, in an empty folder of the page's own.

- A block of Python is executed; the blocks of a page share their names.
- A block of bash is carried out line by line, programs of ours within this process. If its first line is a comment
  that begins with "# needs", what it needs is not here: its commands are parsed, so that every flag is known, and no
  more. `make`, `pip` and the programs of others are looked up and not started.
- A block that begins with "# takes" is long: it is run by the exhaustive test, and else treated as if it had needs.
- A block whose caption is the name of a file, or a literalinclude with one, is written under that name.
- `text` is what something prints, or a sketch, and is left alone; another language is an error.
"""

import configparser
import contextlib
import importlib
import io
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import programs
from sybil import Document, Example, Region
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.abstract.lexers import LexerCollection
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer
from sybil.parsers.myst.lexers import DirectiveLexer

from fdjax.run import parsing, program

ROOT = Path(__file__).resolve().parents[1]
NEEDS, TAKES = "# needs", "# takes"
NOT_STARTED = {"cd", "git", "optuna-dashboard", "tensorboard", "wandb"}  # programs of others
_LEXERS = LexerCollection(
    [FencedCodeBlockLexer(r"\w*"), DirectiveLexer("code-block"), DirectiveLexer("literalinclude")]
)
_python = PythonEvaluator()


def _execute(example: Example) -> None:
    if example.namespace["only_parse"]:
        compile(example.parsed, example.path, "exec")
    else:
        _python(example)


def pages() -> list[Path]:
    """What is shown: the README and the pages that are written by hand."""
    made = {ROOT / "docs/settings.md"}
    return [ROOT / "README.md", *sorted({*(ROOT / "docs").glob("*.md")} - made)]


def run(page: Path, *, long: bool = False) -> None:
    """Carry out the blocks of a page in turn; with `long`, those that take long too."""
    document = Document.parse(str(page), _blocks)
    document.namespace["__name__"] = "__main__"
    for example in document.examples():
        skipped = NEEDS if long else (NEEDS, TAKES)
        example.namespace["only_parse"] = example.parsed.lstrip().startswith(skipped)
        example.evaluate()


def takes_long(page: Path) -> bool:
    """Whether a page has blocks that take long."""
    return f"\n{TAKES}" in page.read_text()


def _blocks(document: Document) -> Iterator[Region]:
    for region in _LEXERS(document):
        caption = (region.lexemes.get("options") or {}).get("caption", "")
        directive = region.lexemes.get("directive", "")
        language = region.lexemes.get("language", region.lexemes.get("arguments", ""))
        if directive and directive not in ("code-block", "literalinclude"):
            continue
        if directive == "literalinclude" or re.fullmatch(r"[\w./-]+\.\w+", caption):
            region.evaluator = _file(caption, language if directive == "literalinclude" else "", document)
        elif language == "python":
            region.evaluator = _execute
        elif language == "bash":
            region.evaluator = _bash
        elif language != "text":
            region.evaluator = _refuse
        else:
            continue
        region.parsed = region.lexemes["source"]
        yield region


def _refuse(example: Example) -> None:
    raise AssertionError(f"{example.path}:{example.line}: a block of no language that is run, or of text")


def _file(caption: str, included: str, document: Document) -> Callable[[Example], None]:
    def write(example: Example) -> None:
        if included:
            assert caption, f"{example.path}:{example.line}: give the name of the file as :caption:"
            shutil.copy(Path(document.path).parent / included, caption)
        else:
            Path(caption).write_text(example.parsed)

    return write


def _bash(example: Example) -> None:
    text = example.parsed.replace("\\\n", " ")
    only_parse = example.namespace["only_parse"]
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words and not only_parse:
            print(f"$ {shlex.join(words)}")
        if words:
            _command(words, only_parse)


def _command(words: list[str], only_parse: bool) -> None:
    name, *rest = words
    name = name.removeprefix(".venv/bin/")
    if name == "python":
        assert rest[0] == "-m", f"only `python -m` is run: {shlex.join(words)}"
        name, rest = rest[1], rest[2:]
        if name == "pip":
            return _extras(rest)
        return _carry_out(lambda: programs.run_module(name), rest, only_parse)
    if name in (commands := console_commands()):
        module, _, function = commands[name].partition(":")
        return _carry_out(lambda: getattr(importlib.import_module(module), function)(), rest, only_parse)
    if name == "make":
        for target in rest:
            assert "=" in target or re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
        return None
    if name == "pip":
        return _extras(rest)
    assert name in NOT_STARTED, f"no program is known by the name of {name!r}"
    return None


def setup_cfg() -> configparser.ConfigParser:
    """The package's declarations."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def console_commands() -> dict[str, str]:
    """module:function by the command's name."""
    declared = setup_cfg()["options.entry_points"]["console_scripts"]
    return dict(line.split(" = ") for line in declared.splitlines() if line)


def _extras(words: list[str]) -> None:
    """What pip would install has those extras."""
    known = {*setup_cfg()["options.extras_require"]}
    for extras in re.findall(r"(?:fdjax|\.)\[([\w,]+)\]", " ".join(words)):
        assert {*extras.split(",")} <= known, f"pip {shlex.join(words)}: the extras are {sorted(known)}"


def _carry_out(run: Callable[[], object], arguments: list[str], only_parse: bool) -> None:
    """A program within this process, without the frame that ends it: `InputError` is raised."""

    def start(main: Callable[..., None], takes: str = "") -> None:
        left = parsing.parse_flags(sys.argv)
        assert len(left) == 1 or takes, f"unexpected arguments {left[1:]}"
        if not only_parse:
            main(*left[1:])

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(program, "start", start))
        stack.enter_context(programs.arguments(*arguments))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        try:
            run()
        except SystemExit as end:
            if end.code:
                raise
