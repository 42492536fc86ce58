"""Draw speed-ups as bars, in an SVG that reads well on light and dark pages."""

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

Record = dict[str, Any]

SETTING = "greedy"
SETS = {"sql_dev": "#2f81f7", "gsm8k_dev": "#d29922"}
TEXT = "#6e7b88"  # contrast of at least 4.3 with white and with GitHub's dark background
WIDTH, LEFT, RIGHT = 760, 190, 110
TOP, BAR, GAP = 58, 14, 14
NOTES = (
    "tau: tokens per target forward (prefill excluded);",
    "vLLM's mean acceptance length counts the bonus token too",
)


def draw(records: Sequence[Record], *, label_of: Callable[[str, Any], str]) -> str:
    """Return the picture of the greedy records: a bar per method and set of prompts.

    Args:
        records: Records of one run, in the order of the bars.
        label_of: Returns what the value of a setting is called.
    """
    shown = [record for record in records if record["settings"]["setting"] == SETTING]
    if not shown:
        return frame(70, [text(20, 40, "Speed-up by method: not measured yet")])
    methods = list(dict.fromkeys(record["settings"]["method"] for record in shown))
    scale = (WIDTH - LEFT - RIGHT) / max(record["upper_quartile"] for record in shown)
    parts = [text(LEFT, 22, "Speed-up over base.generate, greedy", size=15)]
    for index, (name, colour) in enumerate(SETS.items()):
        x = LEFT + 130 * index
        parts.append(f'<rect x="{x}" y="34" width="12" height="12" fill="{colour}"/>')
        parts.append(text(x + 18, 45, label_of("prompts", name)))
    y = TOP
    for method in methods:
        name = label_of("method", method).replace("`", "")
        parts.append(text(LEFT - 10, y + BAR + 4, name, anchor="end"))
        for prompts, colour in SETS.items():
            for record in shown:
                found = record["settings"]
                if (found["method"], found["prompts"]) == (method, prompts):
                    parts += bar(record, y, scale, colour)
            y += BAR
        y += GAP
    x = LEFT + scale
    parts.append(
        f'<path d="M{x:.1f} {TOP - 6}V{y - GAP + 6}" stroke="{TEXT}" stroke-dasharray="4"/>'
    )
    parts.append(text(x, y + 6, "regular generation", anchor="middle", size=11))
    notes = (*NOTES, f"bars: median of pairs; lines: quartiles; {measured_on(shown)}")
    parts += [text(20, y + 30 + 16 * index, note, size=11) for index, note in enumerate(notes)]
    return frame(y + 30 + 16 * len(notes), parts)


def bar(record: Record, y: int, scale: float, colour: str) -> list[str]:
    """Return the bar of a record, the line of its quartiles and its figures."""
    low, median, high = (
        scale * record[key] for key in ("lower_quartile", "median", "upper_quartile")
    )
    middle = y + BAR / 2
    tau = "" if record["tau"] is None else f", tau {record['tau']:.2f}"
    return [
        f'<rect x="{LEFT}" y="{y + 1}" width="{median:.1f}" height="{BAR - 2}" fill="{colour}"/>',
        f'<path d="M{LEFT + low:.1f} {middle}H{LEFT + high:.1f}" stroke="{TEXT}"/>',
        text(LEFT + high + 8, y + BAR - 3, f"{record['median']:.2f}{tau}", size=11),
    ]


def measured_on(records: Sequence[Record]) -> str:
    """Return how often and on what the records were measured."""
    counts, first = [record["n"] for record in records], records[0]
    machine, commit = first["machine"], first["commit"]["sha"] or "unknown"
    number = f"{min(counts)}" if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
    threads = f"{machine['num_threads']} thread" + ("s" if machine["num_threads"] != 1 else "")
    return f"{number} pairs; {machine['cpu']}, {threads}; commit {commit[:7]}"


def text(x: float, y: float, content: str, *, anchor: str = "start", size: int = 13) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">'
        f"{escape(content)}</text>"
    )


def frame(height: float, parts: Sequence[str]) -> str:
    style = f'font-family="sans-serif" fill="{TEXT}"'
    size = f'width="{WIDTH}" height="{height:.0f}" viewBox="0 0 {WIDTH} {height:.0f}"'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>', *parts, "</svg>"]
    return "\n".join(lines) + "\n"
