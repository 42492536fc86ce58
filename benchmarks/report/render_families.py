"""Write the tables of the compatibility page from the records of families.

A table stands between ``<!-- families:NAME -->`` and ``<!-- /families -->``; its name is
``summary``, ``trees``, ``chains``, ``plain`` or ``survey``. Rows are those of the newest
Transformers that was recorded; a column says what differs in the older one. Needs nothing but
Python.

    python benchmarks/report/render_families.py          # rewrites the tables
    python benchmarks/report/render_families.py --check  # fails if one is out of date
"""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.report import markers
from speclm.files.json_lines import parse_json_lines

PAGES = ("docs/compatibility.md",)
RESULTS = "benchmarks/results/families.jsonl"
WORDS = {"trees": "tree attention", "chains": "chains", "plain": "regular generation"}
"""How the page calls what the records call a backend."""

Row = dict[str, Any]
Records = Mapping[str, Sequence[Row]]


def read(root: Path) -> dict[str, list[Row]]:
    """Return the records of each Transformers version, the newest first."""
    rows = parse_json_lines(root / RESULTS)
    versions = {row["transformers"] for row in rows}
    newest_first = sorted(versions, key=lambda text: [int(part) for part in text.split(".")[:2]])
    return {
        version: [row for row in rows if row["transformers"] == version]
        for version in reversed(newest_first)
    }


def render(name: str, _: Mapping[str, str], *, records: Records) -> str:
    """Return a table.

    Raises:
        ValueError: If there is none of that name.
    """
    if name == "summary":
        return summary(records)
    if name == "survey":
        return survey(records)
    if name not in WORDS:
        raise ValueError(f"no table {name!r}; there are summary, survey and {', '.join(WORDS)}")
    newest = next(iter(records.values()))
    rows = [row for row in newest if row["kind"] == "table" and row["backend"] == WORDS[name]]
    has_reason = name != "trees"
    header = "| family | for example |" + (" why |" if has_reason else "")
    ruler = "| --- | --- |" + (" --- |" if has_reason else "")
    others = {row["family"]: difference(row, records) for row in rows}
    if any(others.values()):
        header, ruler = f"{header} differs in |", f"{ruler} --- |"
    lines = [header, ruler]
    for row in sorted(rows, key=lambda row: str(row["family"])):
        cells = [f"`{row['family']}`", row["examples"]]
        if has_reason:
            cells.append(reason(row))
        if any(others.values()):
            cells.append(others[row["family"]])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def summary(records: Records) -> str:
    """Return, for each version, how many families are verified how, and how many cells agree."""
    lines = [
        "| Transformers | trees | chains | plain | outputs compared | identical |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for version, rows in records.items():
        cells = [cell for row in rows for cell in row.get("cells", {}).values()]
        counts = [
            f"{count(rows, 'table', words)} + {count(rows, 'survey', words)}"
            for words in WORDS.values()
        ]
        identical = sum(cell["identical"] for cell in cells)
        lines.append(f"| {version} | {' | '.join(counts)} | {len(cells)} | {identical} |")
    return "\n".join(lines) + "\n"


def survey(records: Records) -> str:
    """Return the further types of the newest version, by how they are verified."""
    version, newest = next(iter(records.items()))
    rows = [row for row in newest if row["kind"] == "survey"]
    lines = []
    for word, backend in WORDS.items():
        names = [f"`{row['family']}`" for row in rows if row["backend"] == backend]
        lines.append(f"- **{word.capitalize()}** ({len(names)}): {', '.join(names)}.")
    untried = [f"`{row['family']}`" for row in rows if row["backend"] is None]
    lines.append(
        f"- **Not tried** ({len(untried)}), because no small text model comes out of a generic "
        f"config: {', '.join(untried)}."
    )
    wrapped = [markers.wrap(line, indent="  ") for line in lines]
    return f"Transformers {version}:\n\n" + "\n".join(wrapped) + "\n"


def count(rows: Sequence[Row], kind: str, backend: str) -> int:
    return sum(row["kind"] == kind and row["backend"] == backend for row in rows)


def reason(row: Row) -> str:
    """Return why the last backend that was tried was refused."""
    text = str(row["reason"]).split("; chain self-check")[0].removeprefix("no trees: ")
    return text.split("; no chains: ")[-1].replace("|", r"\|")


def difference(row: Row, records: Records) -> str:
    """Return the versions in which a family is verified otherwise, and how."""
    others = []
    for version, rows in list(records.items())[1:]:
        same = [other for other in rows if other["family"] == row["family"]]
        if not same:
            others.append(f"{version}: unknown")
        elif same[0]["backend"] != row["backend"]:
            others.append(f"{version}: {same[0]['backend']}")
    return ", ".join(others)


def main(arguments: Sequence[str] | None = None) -> int:
    def rewrite(text: str, root: Path) -> str:
        return markers.rewrite(text, "families", partial(render, records=read(root)))

    return markers.write_pages(
        PAGES,
        rewrite,
        script="benchmarks/report/render_families.py",
        description=__doc__.splitlines()[0],
        arguments=arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
