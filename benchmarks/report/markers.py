"""Fill what stands between two markers of a page, for all scripts that write tables.

The markers are ``<!-- KIND:NAME key=value -->`` and ``<!-- /KIND -->``, each on a line of its own.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import fill

ROOT = Path(__file__).parents[2]

WIDTH = 100

Fill = Callable[[str, Mapping[str, str]], str]
"""Returns the text for a marker's name and the settings that stand in it."""


def wrap(text: str, *, indent: str = "") -> str:
    """Return text in lines of at most `WIDTH` columns, all but the first one indented."""
    return fill(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def rewrite(text: str, kind: str, content: Fill) -> str:
    """Return a page with what all markers of a kind enclose written anew.

    Raises:
        ValueError: If a marker has no partner or no name.
    """
    marked = re.compile(
        rf"(?P<start><!-- {kind}:(?P<name>\S+)(?P<wanted>(?: [^\s=]+=\S+)*) -->\n)"
        rf".*?(?P<end><!-- /{kind} -->)",
        re.DOTALL,
    )
    num_marked = len(marked.findall(text))
    num_markers = len(re.findall(rf"<!-- /?{kind}\b.*?-->", text))
    if num_markers != 2 * num_marked:
        raise ValueError(
            f"{num_marked} {kind} are between two markers, found {num_markers} markers; write "
            f"<!-- {kind}:NAME key=value --> and <!-- /{kind} --> on lines of their own"
        )

    def fill_one(match: re.Match[str]) -> str:
        wanted = dict(text.split("=", 1) for text in match["wanted"].split())
        return f"{match['start']}{content(match['name'], wanted)}{match['end']}"

    return marked.sub(fill_one, text)


def write_pages(
    pages: Sequence[str],
    rewrite_page: Callable[[str, Path], str],
    *,
    script: str,
    description: str,
    files: Mapping[str, Callable[[Path], str]] | None = None,
    arguments: Sequence[str] | None = None,
) -> int:
    """Read the command line, write or check pages, and return the exit status.

    Args:
        pages: Paths in a checkout.
        rewrite_page: Returns a page's new text, from its text and the folder of the checkout.
        script: Its path in a checkout.
        description: What it does.
        files: Returns the text of further files, by path, from the folder of the checkout.
        arguments: Of the command line; None for those of the process.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if out of date")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout whose pages are written")
    options = parser.parse_args(arguments)
    is_current = True
    for name in (*pages, *(files or {})):
        page = options.root / name
        text = page.read_text(encoding="utf-8") if page.exists() else ""
        try:
            is_page = files is None or name not in files
            rendered = rewrite_page(text, options.root) if is_page else files[name](options.root)
        except ValueError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 2
        if rendered == text:
            continue
        is_current = False
        if options.check:
            print(f"{name} is out of date; run python {script}", file=sys.stderr)
        else:
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(rendered, encoding="utf-8")
            print(f"{name} rewritten")
    return 1 if options.check and not is_current else 0
