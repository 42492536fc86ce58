"""Cuts grids of settings down to the cells that can fail differently."""

from collections.abc import Callable, Collection, Iterable
from itertools import product
from typing import Any

import pytest


def grid(cells: Iterable[Any], *, runs: Callable[..., bool]) -> list[Any]:
    """Return the cells of a grid, of which some run only in `make deep`.

    Args:
        cells: One tuple of arguments each, or single arguments.
        runs: Given the arguments of a cell, returns whether `make test` runs it too.
    """
    parts = [cell if isinstance(cell, tuple) else (cell,) for cell in cells]
    return [pytest.param(*part, marks=() if runs(*part) else pytest.mark.slow) for part in parts]


def turns(*axes: Collection[Any]) -> list[Any]:
    """Return the product of axes, of which `make test` runs each cell with one value of the last.

    The values of the last axis take turns, so that each meets every value of the other axes.
    """
    cells = []
    for indexed in product(*(enumerate(axis) for axis in axes)):
        *others, last = (index for index, _ in indexed)
        marks = () if last == sum(others) % len(axes[-1]) else pytest.mark.slow
        cells.append(pytest.param(*(value for _, value in indexed), marks=marks))
    return cells
