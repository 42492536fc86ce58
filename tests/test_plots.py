import io

import pytest
from PIL import Image

from speclm import plots
from speclm.errors import OptionError
from speclm.plots import Bars, Line, Panel, draw_bars, draw_panels

PANELS = [
    Panel(
        "Loss in $", "step", [Line("a", [(1.0, 2.0), (2.0, 1.0)]), Line("b", [(1.0, 3.0)], True)]
    ),
    Panel("Nothing yet", "step", []),
]


def test_charts_are_png_files():
    bars = [Bars("mean", [1.0, 2.0], [(0.5, 1.5), (2.0, 2.5)]), Bars("P90", [1.5, 2.5])]
    charts = [
        draw_panels(PANELS),
        draw_bars("Times", ["$1", "二"], bars, line_at=1.0),
        draw_bars("Phases", ["a long label" * 4, "another" * 5], bars, is_stacked=True),
    ]
    images = [Image.open(io.BytesIO(chart)) for chart in charts]
    assert [image.format for image in images] == ["PNG"] * 3
    assert all(len(set(image.convert("L").get_flattened_data())) > 10 for image in images)


def test_missing_matplotlib_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda _: None)
    for draw in (lambda: draw_panels(PANELS), lambda: plots.require_plots("--report")):
        with pytest.raises(OptionError, match=r"matplotlib.*not installed.*'speclm\[plots\]'"):
            draw()
