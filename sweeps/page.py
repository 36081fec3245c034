"""A study's results as one HTML file that needs no other."""

import base64
import html
from collections.abc import Mapping, Sequence
from string import Template
from typing import Any

from sweeps.figures import Figure

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2 { line-height: 1.2; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; }
td.long { white-space: normal; overflow-wrap: anywhere; }
th { border-bottom: 2px solid #888; }
tr.best td { background: #eef6e8; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; }
figcaption, .small { color: #555; font-size: 0.9rem; }
code { background: #f2f2f2; padding: 0.1rem 0.3rem; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>$title</h1>
$lead
<h2>Configurations, best first</h2>
$table
<h2>Pictures</h2>
$figures
<h2>Settings</h2>
$settings
<h2>Made with</h2>
$versions
</body>
</html>
""")

_FIRST = 20  # rows in sight; the rest unfolds


def page(
    title: str,
    lead: Mapping[str, str],
    sentences: Sequence[str],
    table: tuple[Sequence[str], Sequence[Sequence[str]], str],
    figures: Sequence[Figure],
    missing: Sequence[str],
    settings: Mapping[str, Any],
    versions: Mapping[str, str],
) -> str:
    """The whole page. `table`: headers, rows and a note; all texts are escaped here."""
    headers, rows, note = table
    body = _table(headers, rows[:_FIRST], best=True)
    if len(rows) > _FIRST:
        body += f"<details><summary>{len(rows) - _FIRST} more</summary>{_table(headers, rows[_FIRST:])}</details>"
    told = [f"<p><b>{html.escape(name)}:</b> {html.escape(text)}</p>" for name, text in lead.items() if text]
    return _PAGE.substitute(
        title=html.escape(title),
        lead="\n".join([*told, *map(_paragraph, sentences)]),
        table=f"{body}\n{_paragraph(note)}",
        figures="\n".join([*map(_figure, figures), *map(_paragraph, missing)]),
        settings=_pairs(settings),
        versions=_pairs(versions),
    )


def _paragraph(text: str) -> str:
    return f'<p class="small">{html.escape(text)}</p>'


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], best: bool = False) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in headers)
    lines = [
        f"<tr{' class=best' if best and i == 0 else ''}>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>"
        for i, row in enumerate(rows)
    ]
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n' + "\n".join(lines) + "\n</table></div>"


def _pairs(values: Mapping[str, Any]) -> str:
    lines = [
        f'<tr><th>{html.escape(str(name))}</th><td class="long">{html.escape(str(value))}</td></tr>'
        for name, value in values.items()
        if value not in (None, "")
    ]
    return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _figure(figure: Figure) -> str:
    image = base64.b64encode(figure.path.read_bytes()).decode()
    caption = html.escape(figure.caption)
    return (
        f'<figure><img src="data:image/png;base64,{image}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
    )
