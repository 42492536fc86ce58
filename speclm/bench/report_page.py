"""A page of tables and charts, as Markdown and as one HTML file."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from speclm.cards import markdown_table

Rows = Sequence[Sequence[object]]

_HTML = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; }}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.5rem; }}
div {{ overflow-x: auto; }}
table {{ border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem; }}
th, td {{ border-bottom: 1px solid #8886; padding: 0.25rem 0.7rem; text-align: left; }}
th, td {{ white-space: nowrap; }}
.facts td + td {{ white-space: normal; }}
td {{ font-variant-numeric: tabular-nums; }}
img {{ max-width: 100%; background: white; border-radius: 4px; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page.

    Args:
        title: Heading; empty for none.
        paragraphs: Texts above the table.
        header: Names of the columns.
        rows: Cells of the table; without any there is no table.
        notes: List below the table.
        charts: Pairs of a description and a file.
    """

    title: str = ""
    paragraphs: Sequence[str] = ()
    header: Sequence[object] = ()
    rows: Rows = ()
    notes: Sequence[str] = ()
    charts: Sequence[tuple[str, str]] = ()


def markdown_page(title: str, sections: Sequence[Section]) -> str:
    """Return a page of Markdown, whose images are files next to it."""
    blocks = [f"# {_as_text(title)}"]
    for section in sections:
        blocks += [f"## {section.title}"] if section.title else []
        blocks += section.paragraphs
        rows = [[_as_text(cell) for cell in row] for row in section.rows]
        blocks += [markdown_table(section.header, rows)] if rows else []
        blocks += ["\n".join(f"- {note}" for note in section.notes)] if section.notes else []
        blocks += [f"![{name}]({file})" for name, file in section.charts]
    return "\n\n".join(blocks) + "\n"


def html_page(title: str, sections: Sequence[Section], images: Mapping[str, bytes]) -> str:
    """Return a page of HTML that needs no other file, no script and no network.

    Args:
        title: Title and heading.
        sections: Content; all text is escaped.
        images: PNG files by the names that the sections use.
    """
    blocks: list[str] = []
    for section in sections:
        blocks += [f"<h2>{escape(section.title)}</h2>"] if section.title else []
        blocks += [f"<p>{escape(text)}</p>" for text in section.paragraphs]
        blocks += [_table(section.header, section.rows)] if section.rows else []
        if section.notes:
            items = "\n".join(f"<li>{escape(note)}</li>" for note in section.notes)
            blocks.append(f"<ul>\n{items}\n</ul>")
        for name, file in section.charts:
            data = base64.b64encode(images[file]).decode("ascii")
            source = f"data:image/png;base64,{data}"
            blocks.append(f'<p><img src="{source}" alt="{escape(name, quote=True)}"></p>')
    return _HTML.format(title=escape(title), body="\n".join(blocks))


def _as_text(value: object) -> str:
    """Return a text in which Markdown sees no tag."""
    return str(value).replace("<", "&lt;")


def _table(header: Sequence[object], rows: Rows) -> str:
    names = [_row("th", header)] if any(header) else []
    lines = "\n".join([*names, *(_row("td", row) for row in rows)])
    kind = "" if names else ' class="facts"'
    return f"<div><table{kind}>\n{lines}\n</table></div>"


def _row(tag: str, cells: Sequence[object]) -> str:
    inner = "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells)
    return f"<tr>{inner}</tr>"
