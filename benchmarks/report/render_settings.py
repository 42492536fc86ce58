"""Write the tables of what `generate` takes from the list that the code reads.

A table stands between ``<!-- settings:FATE -->`` and ``<!-- /settings -->`` and shows the settings
of that fate, in the order of `speclm.generation.settings`.

    python benchmarks/report/render_settings.py          # rewrites the tables
    python benchmarks/report/render_settings.py --check  # fails if one is out of date
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.report import markers
from speclm.generation.settings import SETTINGS, Fate, Setting

PAGES = ("docs/generate.md",)


def row(setting: Setting) -> str:
    """Return a line of a table."""
    note = f"{setting.note[0].upper()}{setting.note[1:]}."
    if setting.needs is not None:
        note += f" Has no effect without `{setting.needs}`."
    if setting.unless is not None:
        note += f" Has no effect with `{setting.unless}`."
    return f"| `{setting.name}` | {setting.kind.value} | {note} |\n"


def render(fate: str, _: Mapping[str, str]) -> str:
    """Return the table of a fate.

    Raises:
        ValueError: If there is no such fate.
    """
    rows = [row(setting) for setting in SETTINGS if setting.fate is Fate(fate)]
    return "| setting | is a | what it does |\n| --- | --- | --- |\n" + "".join(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    def rewrite(text: str, _: Path) -> str:
        return markers.rewrite(text, "settings", render)

    return markers.write_pages(
        PAGES,
        rewrite,
        script="benchmarks/report/render_settings.py",
        description=__doc__.splitlines()[0],
        arguments=arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
