"""report.cells and report.curves: literal pictures."""

import pytest

from emu.observe.pagemap import PageMap, Stage, cell_frames
from emu.report.cells import cells, legend, map_rows
from emu.report.curves import Series, plot


def counts(**frames):
    return tuple(frames.get(stage.name.lower(), 0) for stage in Stage)


def text(row):
    return "".join(cell.char for cell in row)


def test_a_cell_is_a_capital_when_pure_and_small_when_mixed():
    """The most common stage; of two as common the one that costs memory; a mixed dot is a comma."""
    page_map = PageMap(
        8 * 512,
        512,
        (
            counts(anonymous=512),
            counts(anonymous=511, host_owned=1),
            counts(host_owned=512),
            counts(host_owned=511, free=1),
            counts(free=200, pcp=300, host_owned=12),
            counts(host_owned=256, reported=256),
            counts(lazy=512),
            counts(lost=300, anonymous=212),
        ),
    )
    assert text(cells(page_map)) == "Aa.,prLx"
    assert [text(row) for row in map_rows(page_map, 3)] == ["Aa.", ",pr", "Lx"]
    assert page_map.totals == counts(
        host_owned=512 + 1 + 511 + 12 + 256,
        anonymous=512 + 511 + 212,
        pcp=300,
        free=201,
        reported=256,
        lazy=512,
        lost=300,
    )
    assert [cell.char + " " + what for cell, what in legend(page_map)] == [
        "A anonymous",
        "P per-CPU lists",
        "F free, resident",
        "R reported, resident",
        "L lazily freed",
        "X lost",
        ". not resident",
    ]


def test_every_stage_has_a_letter_and_a_style_of_its_own():
    """So that the map reads without colour, and with it at a glance."""
    drawn = [cells(PageMap(1, 1, (counts(**{stage.name.lower(): 1}),)))[0] for stage in Stage]
    assert len({cell.char for cell in drawn}) == len({cell.style for cell in drawn}) == len(Stage)


@pytest.mark.parametrize(
    ("frames", "most", "size"), [(262144, 700, 512), (262144, 512, 512), (262144, 511, 1024), (100, 700, 1), (7, 2, 4)]
)
def test_cells_are_powers_of_two_and_fit(frames, most, size):
    assert cell_frames(frames, most) == size
    assert -(-frames // size) <= most


def test_curves_are_levels_and_rises_in_time():
    """A column holds the last value at its end; before the first there is nothing; later series cover earlier ones."""
    rising = Series([(0.0, 0), (5.0, 50), (9.0, 100)], "=", "|", "")
    flat = Series([(4.0, 50)], "-", ":", "")
    rows = plot([rising, flat], start=0, end=10, top=100, width=10, height=5)
    assert [text(row) for row in rows] == [
        "        ==",
        "        | ",
        "   -------",
        "    |     ",
        "====      ",
    ]
    rows = plot([flat, rising], start=0, end=10, top=100, width=10, height=5)
    assert text(rows[2]) == "   -====--"


def test_a_plot_without_room_or_values_is_empty():
    assert plot([], start=0, end=1, top=1, width=0, height=3) == [[], [], []]
    assert plot([], start=0, end=1, top=1, width=3, height=0) == []
    assert [text(row) for row in plot([Series([], "=", "|", "")], start=0, end=1, top=1, width=3, height=1)] == ["   "]
