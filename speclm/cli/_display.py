"""Output of commands: progress, tables of measurements, and coloured answers."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from speclm.bench import Comparison
from speclm.chat import TextDecoder
from speclm.cli._console import printable
from speclm.stats import RowStats

ACCEPTED_STYLE = "bold green"

_MAX_LETTERS = 32  # of the name of a category
_COLUMNS = (
    "method", "tok/s", "plain", "ratio", "quartiles", "tau", "kept %", "identical"
)  # fmt: skip


@contextmanager
def progress(description: str, *, total: int) -> Iterator[Callable[[object], None]]:
    """Show on standard error how much is done and how long the rest may take.

    Args:
        description: What is being done.
        total: Number of steps.

    Yields:
        A function that counts a step; its argument is ignored.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True
    ) as shown:
        task = shown.add_task(description, total=total)
        yield lambda _: shown.advance(task)


def comparison_table(keys: Iterable[str]) -> Table:
    """Return an empty table whose first columns are `keys`.

    ``plain`` is regular generation's tokens/s in the same pairs; ``kept %`` is the acceptance rate
    at depth 1, 2 and 3.
    """
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold underline")
    for name in keys:
        table.add_column(name)
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    return table


def add_comparison(table: Table, keys: Iterable[str], comparison: Comparison) -> None:
    """Add a row to a table of `comparison_table`."""
    ratio, stats = comparison.ratio, comparison.stats
    depths = [] if stats is None else stats.acceptance_by_depth[:3]
    table.add_row(
        *keys,
        comparison.method,
        f"{comparison.tokens_per_second:.0f}",
        f"{comparison.plain_tokens_per_second:.0f}",
        f"{ratio.median:.2f}x",
        f"{ratio.lower_quartile:.2f}-{ratio.upper_quartile:.2f}",
        "" if stats is None else f"{stats.tau:.2f}",
        " ".join(f"{share:.0%}"[:-1] for share in depths),
        verdict(comparison),
    )


def category_table(parts: Sequence[tuple[str, str, Comparison]]) -> Table:
    """Return a table of the categories of questions.

    ``P50 ms`` and ``P90 ms`` are the median and the 90th percentile of a call, of the method and of
    regular generation.

    Args:
        parts: Setting, category and measurement of each row. Settings and methods have a column if
            there are several.
    """
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold underline")
    keys = [(setting, category, part.method) for setting, category, part in parts]
    names = ("setting", "category", "method")
    shown = [column for column in range(3) if column == 1 or len({key[column] for key in keys}) > 1]
    for column in shown:
        table.add_column(names[column], no_wrap=True, max_width=_MAX_LETTERS)
    for name in ("calls", "tau", "ratio", "P50 ms", "P90 ms", "identical"):
        table.add_column(name, justify="right", no_wrap=True)
    for key, (_, _, part) in zip(keys, parts, strict=True):
        stats, ours, plain = part.stats, part.latency, part.plain_latency
        table.add_row(
            *(Text(" ".join(printable(key[column]).split())) for column in shown),
            str(len(part.pairs)),
            "" if stats is None else f"{stats.tau:.2f}",
            f"{part.ratio.median:.2f}x",
            f"{1e3 * ours.p50:.0f} / {1e3 * plain.p50:.0f}",
            f"{1e3 * ours.p90:.0f} / {1e3 * plain.p90:.0f}",
            verdict(part),
        )
    return table


def verdict(comparison: Comparison) -> Text:
    """Return whether the outputs equal those of regular generation, as text."""
    same, total = comparison.num_identical, len(comparison.pairs)
    if not comparison.promises_identity:
        return Text(f"{same}/{total}", style="dim")
    if same == total:
        return Text("yes", style="green")
    if comparison.is_honest:
        return Text(f"{same}/{total}, rounding", style="yellow")
    return Text(f"NO, {same}/{total}", style="bold red")


def coloured(tokens: list[int], stats: RowStats, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Return the text of a row, with accepted draft tokens coloured.

    Args:
        tokens: New tokens of the row.
        stats: Its counters; the prefill and every round give accepted tokens and a bonus token.
        tokenizer: Decodes them.
    """
    is_drafted: list[bool] = []
    for accepted_length in [stats.prefill_tokens - 1, *stats.accepted_lengths]:
        is_drafted += [True] * accepted_length + [False]
    decoder, text = TextDecoder(tokenizer), Text()
    for index, token in enumerate(tokens):
        drafted = index < len(is_drafted) and is_drafted[index]
        piece = printable(decoder.push(token))
        text.append(piece, style=ACCEPTED_STYLE if drafted else "")
    return text
