"""The map of a guest's RAM as characters: snapshot in, cells out, and nothing else.

A cell is a letter for the stage that most of its frames are in: a capital when all are, small when it is mixed. Memory
that the host doesn't hold is a dot, or a comma when something else is in the cell too. Without colour the letters say
it all.
"""

from typing import NamedTuple

from emu.observe.pagemap import PageMap, Stage

__all__ = ["LEGEND", "Cell", "cells", "legend", "map_rows"]


class Cell(NamedTuple):
    """A character and its style (of rich)."""

    char: str
    style: str


#: stage -> letter, style, what it is
LEGEND: dict[Stage, tuple[str, str, str]] = {
    Stage.ANONYMOUS: ("A", "green", "anonymous"),
    Stage.SHMEM: ("S", "bright_green", "shmem"),
    Stage.DIRTY: ("D", "red", "dirty"),
    Stage.WRITEBACK: ("W", "bright_red", "writeback"),
    Stage.ACTIVE: ("C", "bright_cyan", "active"),
    Stage.INACTIVE: ("I", "cyan", "inactive"),
    Stage.PCP: ("P", "magenta", "per-CPU lists"),
    Stage.FREE: ("F", "yellow", "free, resident"),
    Stage.REPORTED: ("R", "bright_blue", "reported, resident"),
    Stage.LAZY: ("L", "blue", "lazily freed"),
    Stage.HINTED: ("H", "bright_magenta", "hinted"),
    Stage.INFLATED: ("O", "bright_yellow", "in the balloon, resident"),
    Stage.BALLOONED: ("o", "dim yellow", "in the balloon"),
    Stage.VOLATILE: ("V", "bold cyan", "volatile"),
    Stage.LOST: ("X", "bold red", "lost"),
    Stage.ASIDE: ("a", "bright_white", "set aside"),
    Stage.SWAPPED: ("s", "white", "swapped"),
    Stage.DISCARDED: ("d", "dim cyan", "discarded"),
    Stage.HOST_OWNED: (".", "dim", "not resident"),
}
# cells that are mostly so get their own mark where it is mixed, since they have no small letter
_MIXED = {Stage.HOST_OWNED: ",", Stage.BALLOONED: "b"}


def _cell(counts: tuple[int, ...]) -> Cell:
    # the most common stage; of two as common, the one that costs memory
    stage = max(Stage, key=lambda s: (counts[s], s is not Stage.HOST_OWNED, -s))
    letter, style, _ = LEGEND[stage]
    if counts[stage] == sum(counts):
        return Cell(letter, style)
    return Cell(_MIXED.get(stage, letter.lower()), style)


def cells(page_map: PageMap) -> list[Cell]:
    """Return the cells of a map, from frame 0 up."""
    known: dict[tuple[int, ...], Cell] = {}
    return [known.get(counts) or known.setdefault(counts, _cell(counts)) for counts in page_map.cells]


def map_rows(page_map: PageMap, width: int) -> list[list[Cell]]:
    """Return the map as rows of at most `width` cells."""
    line = cells(page_map)
    return [line[i : i + width] for i in range(0, len(line), max(width, 1))]


def legend(page_map: PageMap) -> list[tuple[Cell, str]]:
    """Return the stages that the map has, and free and not resident in any case: what a letter means."""
    totals = page_map.totals
    return [
        (Cell(letter, style), what)
        for stage, (letter, style, what) in LEGEND.items()
        if totals[stage] or stage in (Stage.ANONYMOUS, Stage.FREE, Stage.HOST_OWNED)
    ]
