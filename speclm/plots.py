"""Charts as PNG files, drawn with matplotlib, which only this module imports."""

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from speclm.errors import OptionError

_DPI = 110
_PANEL_INCHES = (4.6, 3.2)
_BARS_INCHES = (7.0, 3.6)
_MAX_LETTERS = 70  # below the bars, of labels that are not turned


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a chart.

    Args:
        name: Name in the legend.
        points: Its points, x first.
        is_dashed: Whether it is drawn dashed, such as figures of an evaluation.
    """

    name: str
    points: Sequence[tuple[float, float]]
    is_dashed: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """A chart of lines."""

    title: str
    x_label: str
    lines: Sequence[Line]


@dataclass(frozen=True, slots=True)
class Bars:
    """Bars of one colour, one for each category.

    Args:
        name: Name in the legend.
        heights: Height of each bar.
        spreads: Lower and upper end of the mark on each bar; None for none.
    """

    name: str
    heights: Sequence[float]
    spreads: Sequence[tuple[float, float]] | None = None


def has_plots() -> bool:
    """Return whether charts can be drawn: whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def require_plots(option: str) -> None:
    """Check that charts can be drawn.

    Args:
        option: What draws them, for the message.

    Raises:
        OptionError: If matplotlib is not installed.
    """
    if not has_plots():
        raise OptionError(
            f"{option} draws charts with matplotlib, which is not installed; run: pip install "
            "'speclm[plots]'"
        )


def draw_panels(panels: Sequence[Panel]) -> bytes:
    """Return charts of lines next to each other, as a PNG file.

    Raises:
        OptionError: If matplotlib is not installed.
    """
    width, height = _PANEL_INCHES
    figure, axes = _figure((width * len(panels), height), num_axes=len(panels))
    for axis, panel in zip(axes, panels, strict=True):
        for line in panel.lines:
            x, y = zip(*line.points, strict=True) if line.points else ((), ())
            style, marker = ("--" if line.is_dashed else "-"), ("o" if len(x) < 3 else "")
            axis.plot(x, y, linestyle=style, marker=marker, label=_plain(line.name))
        axis.set_title(_plain(panel.title))
        axis.set_xlabel(_plain(panel.x_label))
        _finish(axis, has_legend=bool(panel.lines))
    return _png(figure)


def draw_bars(
    title: str,
    categories: Sequence[str],
    groups: Sequence[Bars],
    *,
    line_at: float | None = None,
    is_stacked: bool = False,
) -> bytes:
    """Return a chart of bars, grouped by category, as a PNG file.

    Args:
        title: Title of the chart.
        categories: Labels of the x axis.
        groups: Bars of each colour. The name of a single one labels the y axis.
        line_at: Height of a dashed line across the chart; None for none.
        is_stacked: Whether the bars of a category stand on each other, not next to each other.

    Raises:
        OptionError: If matplotlib is not installed.
    """
    figure, (axis,) = _figure(_BARS_INCHES, num_axes=1)
    width = 0.8 / (1 if is_stacked else max(len(groups), 1))
    bottoms = [0.0] * len(categories)
    for index, bars in enumerate(groups):
        shift = 0.0 if is_stacked else (index - (len(groups) - 1) / 2) * width
        x = [place + shift for place in range(len(categories))]
        marks = None
        if bars.spreads is not None:
            pairs = list(zip(bars.heights, bars.spreads, strict=True))
            marks = [[h - low for h, (low, _) in pairs], [high - h for h, (_, high) in pairs]]
        name = _plain(bars.name)
        axis.bar(x, bars.heights, width=width, bottom=bottoms, yerr=marks, capsize=3, label=name)
        if is_stacked:
            bottoms = [low + high for low, high in zip(bottoms, bars.heights, strict=True)]
    if line_at is not None:
        axis.axhline(line_at, color="black", linewidth=0.8, linestyle="--")
    is_crowded = sum(map(len, categories)) > _MAX_LETTERS
    turned = {"rotation": 30, "ha": "right"} if is_crowded else {}
    axis.set_xticks(range(len(categories)), [_plain(name) for name in categories], **turned)
    if len(categories) == 1:
        axis.set_xlim(-1.0, 1.0)
    axis.set_title(_plain(title))
    _finish(axis, has_legend=False)
    if len(groups) == 1:
        axis.set_ylabel(_plain(groups[0].name))
    elif groups:
        axis.legend(fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _png(figure)


def _figure(inches: tuple[float, float], *, num_axes: int) -> tuple[Any, Sequence[Any]]:
    """Return a figure and its axes; no window and no state of matplotlib's is involved."""
    require_plots("this")
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, dpi=_DPI, layout="constrained")
    axes: Any = figure.subplots(1, max(num_axes, 1), squeeze=False)
    return figure, list(axes[0])


def _finish(axis: Any, *, has_legend: bool) -> None:
    axis.grid(visible=True, axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    if has_legend:
        axis.legend(fontsize="small", frameon=False)


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():  # a character that the font lacks is drawn as a box
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(file, format="png")
    return file.getvalue()


def _plain(text: str) -> str:
    """Return a text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")
