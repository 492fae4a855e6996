"""Curves in character cells: values over the last minute, one column a slice of time.

A plotting library would draw into a file or own the terminal; what is needed here is a few rows beside other text.
"""

from collections.abc import Sequence
from typing import NamedTuple

from emu.report.cells import Cell

__all__ = ["Series", "plot"]


class Series(NamedTuple):
    """(t, value) points, ascending in t; how a level and a rise are drawn, and in which style."""

    points: Sequence[tuple[float, float]]
    level: str
    rise: str
    style: str


def _columns(points: Sequence[tuple[float, float]], start: float, end: float, width: int) -> list[float | None]:
    # the last value at the end of each column's slice of time; None before the first
    result: list[float | None] = []
    i, value = 0, None
    for column in range(width):
        until = start + (end - start) * (column + 1) / width
        while i < len(points) and points[i][0] <= until:
            value = points[i][1]
            i += 1
        result.append(value)
    return result


def plot(
    series: Sequence[Series], *, start: float, end: float, top: float, width: int, height: int
) -> list[list[Cell]]:
    """Return `height` rows of `width` cells, from `top` down to 0. Later series are drawn over earlier ones."""
    rows = [[Cell(" ", "")] * width for _ in range(height)]
    if height < 1 or width < 1 or top <= 0:
        return rows
    for points, level, rise, style in series:
        last: int | None = None
        for x, value in enumerate(_columns(points, start, end, width)):
            if value is None:
                continue
            y = height - 1 - round(min(max(value / top, 0.0), 1.0) * (height - 1))
            if last is not None:
                for between in range(min(last, y) + 1, max(last, y)):
                    rows[between][x] = Cell(rise, style)
            rows[y][x] = Cell(level, style)
            last = y
    return rows
