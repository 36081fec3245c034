"""Pages that are made from the code: a method each, from its record; every setting; every table of results.

They are written to docs/methods, docs/results and docs/settings.md before Sphinx reads the sources. Bytes are those of
the arrays that a compiled round would send, from their shapes: nothing is trained.
"""

import inspect
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from docstrings import blocks

DOCS = Path(__file__).resolve().parents[1]
RESULTS = DOCS.parent / "benchmarks/results"
OF_ALL = re.compile(r"speed_|exchange_bytes|bad_inputs")  # tables that have all methods, which say nothing of one

FEDERATION = {"dataset": "mnist_sample", "num_clients": 10, "model": "2nn", "rounds": 1}
PROXY = {"proxy": "held_out", "proxy_size": 500}
PROXY_NEEDS = {
    "labelled": "labelled proxy data (`--proxy=held_out`)",
    "unlabelled": "proxy data (`--proxy=held_out`), whose labels it does not use",
}
SETTINGS_OF = {"Settings": "Method, nets and rounds", "EvaluationSettings": "Evaluation", "StoppingSettings": "Ending"}
CAPTION = (
    "ten clients of the MNIST sample with `2nn` nets (199,210 parameters, 796,840 bytes of float32), K = 10, and where "
    "a method needs proxy data 500 examples"
)


def pages() -> dict[str, str]:
    """Text by path below docs/."""
    from fdjax.algorithms import SHIPPED

    tables = {folder.name: folder for folder in sorted(RESULTS.iterdir()) if (folder / "table.md").is_file()}
    used = {name: algorithms_in(folder) for name, folder in tables.items() if not OF_ALL.match(name)}
    sent = {name: traffic_of(method) for name, method in SHIPPED.items()}
    made = {f"methods/{name}.md": method_page(method, sent[name], used) for name, method in SHIPPED.items()}
    made["methods/index.md"] = gallery(SHIPPED, sent)
    made |= {f"results/{name}.md": result_page(name, folder) for name, folder in tables.items()}
    made["results/index.md"] = results_index(tables)
    made["settings.md"] = settings_page()
    return made


def algorithms_in(folder: Path) -> set[str]:
    """The methods that the results of a folder are of."""
    file = folder / "results.json"
    found: set[str] = set()

    def search(value: Any) -> None:
        if isinstance(value, dict):
            if isinstance(name := value.get("algorithm"), str):
                found.add(name)
            for part in value.values():
                search(part)
        elif isinstance(value, list) and value and isinstance(value[0], dict | list):
            for part in value:
                search(part)

    if file.is_file():
        search(json.loads(file.read_text()))
    else:  # a study's report
        found.update(re.findall(r"algorithm\W+(\w+)", (folder / "table.md").read_text()))
    return found


def traffic_of(method: Any) -> Any:
    """`exchange.traffic.Traffic` of a method on the gallery's federation."""
    from fdjax.run import experiment, settings

    given = FEDERATION | (PROXY if method.proxy else {}) | ({"models": "2nn:10"} if method.split else {})
    return experiment.traffic_of(experiment.build(settings.make(algorithm=method.name, **given)))


def _bytes(count: int | None) -> str:
    return "counted as sent" if count is None else f"{count:,}"


def _total(sizes: tuple[int, ...] | None) -> str:
    return _bytes(None if sizes is None else sizes[0])


def gallery(methods: Any, sent: dict[str, Any]) -> str:
    """The index: a row for each method."""
    rows = [
        f"| [`{name}`]({name}.md) | {_cell(method.summary)} | {method.proxy or ''} | "
        f"{_total(sent[name].per_participant('up'))} | {_total(sent[name].per_participant('down'))} |"
        for name, method in methods.items()
    ]
    return f"""# Gallery of methods

{len(methods)} methods, one file and one paper each, made from the records that programs and sweeps read. Bytes are
those of one client and one round: {CAPTION}. "Counted as sent" is what is coded or ragged: a run says how much it was.

| method | what it is | proxy data | bytes up | bytes down |
|---|---|---|--:|--:|
{chr(10).join(rows)}

```{{toctree}}
:hidden:

{chr(10).join(methods)}
```
"""


def method_page(method: Any, sent: Any, used: dict[str, set[str]]) -> str:
    """One method: what its docstring says, bytes, hyperparameters, options, tables."""
    needs = [
        PROXY_NEEDS.get(method.proxy or ""),
        "clients and server share one architecture" if method.one_architecture else None,
        "nets in two parts: the server's takes the features of the clients' (`--models` and `--model`)" if method.split
        else "nets with parts: `features`, `head` or `blocks`" if method.parts else None,
        "private by example (`--privacy=example`) too" if method.example_fits else None,
    ]  # fmt: skip
    traits = "\n".join(f"- {text[0].upper()}{text[1:]}." for text in needs if text)
    tables = [f"[{name}](../results/{name}.md)" for name, names in used.items() if method.name in names]
    measured = f"\n## Measured\n\nTables with this method: {', '.join(tables)}.\n" if tables else ""
    build = inspect.unwrap(getattr(method.build, "func", method.build))
    module = inspect.getmodule(build)
    assert module is not None
    flags = "" if method.proxy is None else " --proxy=held_out"
    models = " --model=2nn --models=2nn:10" if method.split else ""
    return f"""# {method.name}

{_escaped(method.summary)}.

```bash
fdjax --algorithm={method.name}{flags}{models}
```

{traits}

## What it does

{markdown(module.__doc__ or "")}

Source: `{module.__name__.replace(".", "/")}.py`.

## Bytes of one client

{traffic_table(sent)}

Of {CAPTION}.

{hparams_table(method)}
{options_table(method)}{measured}"""


def traffic_table(sent: Any) -> str:
    """A row for each exchange of the set-up and of a round."""
    rows = [
        f"| {when} | {_cell(exchange[0].exchange)} | {_bytes(exchange[0].up)} | {_bytes(exchange[0].down)} |"
        for when, exchanges in (("set-up", sent.setup), ("round", sent.round))
        for exchange in exchanges
    ]
    return "\n".join(["| when | exchange | up | down |", "|---|---|--:|--:|", *rows])


def hparams_table(method: Any) -> str:
    """Name, default, range and meaning of each."""
    if not method.hparams:
        return ""
    rows = [
        f"| `{name}` | {_default(record.default)} | {_cell(record.expected())} | {_cell(record.described())} |"
        for name, record in method.hparams.items()
    ]
    head = "## Hyperparameters\n\n| flag | default | expected | what it is |\n|---|--:|---|---|\n"
    return head + "\n".join(rows) + "\n"


def _default(value: float | str) -> str:
    return f"`{value}`" if isinstance(value, str) else f"{value:g}"


def options_table(method: Any) -> str:
    """Choices of each option."""
    if not method.options:
        return ""
    rows = [f"| `{name}` | {', '.join(f'`{v}`' for v in values)} |" for name, values in method.options.items()]
    return "\n## Options\n\n| flag | choices, the default first |\n|---|---|\n" + "\n".join(rows) + "\n"


def settings_page() -> str:
    """A table for each group of settings, and one of what a setting chooses from, where that is explained."""
    from fdjax.run.metrics import KNOWN
    from fdjax.run.setting import summary
    from fdjax.run.settings import FLAGS, Settings

    named = {name: s.choices for name, s in FLAGS.items() if isinstance(s.choices, Mapping) and len(s.choices) > 4}
    del named["algorithm"]  # which have pages
    named["metrics"] = KNOWN  # of which a list is given, so that they are no choices

    def row(name: str) -> str:
        setting, default = FLAGS[name], getattr(Settings, name)
        shown = "" if default in (None, "") else f"`{default}`"
        if name in named:
            help = setting.help.partition(":")[0] if name == "metrics" else setting.help
            what = f"{_cell(help)}: see [below](#setting-{name})"
        else:
            what = _setting_cell(setting)
        return f"| `{name}` | {shown} | {what} |"

    groups = [
        f"## {SETTINGS_OF.get(group.__name__, group.__name__.removesuffix('Settings'))}\n\n"
        "| setting | default | what it is |\n|---|---|---|\n" + "\n".join(map(row, names))
        for group in (Settings, *Settings.__bases__)
        if (names := [name for name in FLAGS if name in group.__annotations__])
    ]
    tables = [
        f"(setting-{name})=\n\n### `{name}`\n\n| choice | what it is |\n|---|---|\n"
        + "\n".join(f"| `{choice}` | {_cell(summary(what))} |" for choice, what in choices.items())
        for name, choices in named.items()
    ]
    return f"""# Settings

Every setting of a run: a flag of `fdjax` (`--rounds=20`), and a keyword of `fdjax.run` (`rounds=20`). Hyperparameters
and options of methods are given in the same way; they are on the pages of the [methods](methods/index.md).

{(chr(10) * 2).join(groups)}

## Choices

{(chr(10) * 2).join(tables)}
"""


def _setting_cell(setting: Any) -> str:
    if setting.choices and len(setting.choices) > 20:
        return _cell(setting.help)
    return _cell(setting.flag_help())


def results_index(tables: dict[str, Path]) -> str:
    """The README of benchmarks/results, whose first column becomes links."""
    text = (RESULTS / "README.md").read_text()

    def link(match: re.Match) -> str:
        names = [part.strip("` ") for part in match[1].split(",")]
        return "| " + ", ".join(f"[{n}]({n}.md)" if n in tables else f"`{n}`" for n in names) + " |"

    text = re.sub(r"^\| ((?:`[\w*-]+`(?:, )?)+) \|", link, text, flags=re.MULTILINE)
    return f"{text}\n```{{toctree}}\n:hidden:\n\n{chr(10).join(tables)}\n```\n"


def result_page(name: str, folder: Path) -> str:
    """A table as a benchmark or study wrote it."""
    text = re.sub(r"^#.*\n", "", (folder / "table.md").read_text().strip(), count=1)
    curves = "\n\n![curves](curves/" + f"{name}.png)\n" if (folder / "curves.png").is_file() else ""
    return f"# {name}\n\n{_safe(text)}{curves}\n"


def _safe(text: str) -> str:
    return text.replace("<", "&lt;")


def markdown(docstring: str) -> str:
    """A docstring as Markdown: its indented paragraphs, which are equations, as they are; its first line in bold."""
    parts = []
    for indented, lines in blocks(docstring):
        if indented:
            parts.append("\n".join(["```text", *lines, "```"]))
        else:
            parts.append(_escaped("\n".join(_with_gap_before_lists(lines))))
    return "\n\n".join(parts)


def _with_gap_before_lists(lines: list[str]) -> list[str]:
    out: list[str] = []
    for line in lines:
        if line.startswith("- ") and out and not re.match(r"(- |  |$)", out[-1]):
            out.append("")
        out.append(line)
    return out


def _escaped(text: str) -> str:
    """Signs that Markdown reads, outside of code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if i % 2 else re.sub(r"([*_<|\[\]~^])", r"\\\1", part) for i, part in enumerate(parts))


def _cell(text: str) -> str:
    return _escaped(" ".join(text.split()))


def write(app) -> None:
    """Write what has changed, so that Sphinx reads that alone, and remove what is no longer made."""
    made = pages()
    curves = DOCS / "results/curves"
    curves.mkdir(parents=True, exist_ok=True)
    for old in [*DOCS.glob("methods/*.md"), *DOCS.glob("results/*.md")]:
        if str(old.relative_to(DOCS)) not in made:
            old.unlink()
    for name, text in made.items():
        file = DOCS / name
        file.parent.mkdir(exist_ok=True)
        if not file.is_file() or file.read_text() != text:
            file.write_text(text)
    for folder in RESULTS.iterdir():
        if (folder / "curves.png").is_file():
            shutil.copyfile(folder / "curves.png", curves / f"{folder.name}.png")


def setup(app) -> dict[str, Any]:
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True}
