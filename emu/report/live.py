"""The live view as lines of text: what a machine looks like now, composed from snapshots for a terminal of any size.

Pure: the same state gives the same lines. Everything that a line shows comes from the snapshot or from what has been
kept of earlier ones, so that a live run and a recorded one look alike.

Sizes are MiB with one decimal, as in the final table: at the end of a run the two show the same digits.
"""

from collections.abc import Sequence

from rich.text import Text

from emu.observe.snapshot import Snapshot
from emu.report.cells import Cell, legend, map_rows
from emu.report.curves import Series, plot
from emu.report.livestate import MINUTE, LiveState, Sample
from emu.report.panels import (
    blocks_panel,
    chain_lines,
    microseconds,
    panel_lines,
    rates_panel,
    short,
    states_panel,
    text_line,
)
from emu.units import format_size, mib_text, seconds_text

__all__ = ["MINUTE", "LiveState", "Sample", "compose", "map_cells", "plain_line"]

_FIXED = 14  # lines that are neither map nor events
_FOUR_PANELS = 104  # columns

KEYS = "q quit  space pause  +/- speed  s one pass  m mechanism  ? help"
HELP = """\
q      stop the run; its table is printed
space  pause: the guest and its clock stand still; again: go on
+ -    guest time twice or half as fast
s      on to the end of the next reporting pass, whenever that is, and pause
m      the next mechanism, on the same state
?      this page

Map: a cell is a letter for what most of its frames are, capital when all
are, small when it is mixed (a comma for a dot). What the host doesn't hold
is a dot, or says where it went: d discarded, s swapped, a aside, o balloon.
RSS and LazyFree are the kernel's. RSS~: with more than 512 MiB of pages,
asked where something may have changed, and in rotation elsewhere.
books: RSS minus what our frame states say. It must be 0.
Under the map: the stages in the order in which memory goes, and what went
from one to the next (and to others, in the line below), MiB a guest second.
States: what the guest says (Stable, Unused, Potentially volatile, Volatile)
by what the host holds (r in memory, p stored, z nothing); /s: frames said.
flagged: free memory with the Reported flag, which lasts until it is used.
Rates are per guest second, over the last two. Latencies are of one fault
in eight, as the faulting vCPU saw it.
The view stops the guest's clock while it looks: wall time, no guest time."""


def _widths(width: int) -> tuple[int, int]:
    # of the map and of the curves, with " | " between
    curves = min(max(width * 36 // 100, 24), 72)
    return max(width - curves - 3, 8), curves


def _map_height(height: int) -> int:
    events = max(height // 10, 2)
    return max(height - _FIXED - events, 1)


def map_cells(width: int, height: int) -> int:
    """Return how many cells of a map there is room for."""
    return _widths(width)[0] * _map_height(height)


def _cells(row: Sequence[Cell]) -> list[tuple[str, str]]:
    # neighbours of one style as one part
    parts: list[tuple[str, str]] = []
    for char, style in row:
        if parts and parts[-1][1] == style:
            parts[-1] = (parts[-1][0] + char, style)
        else:
            parts.append((char, style))
    return parts


def _rule(texts: Sequence[tuple[int, str]], width: int, state: LiveState) -> Text:
    # headings at columns, in a line
    line = ["─" if state.unicode else "-"] * width
    for column, text in texts:
        for i, char in enumerate(f" {text} " if text else "", start=column):
            if 0 <= i < width:
                line[i] = char
    return text_line([("".join(line), "dim")])


def _title(state: LiveState, s: Snapshot | None, width: int) -> Text:
    right = "" if s is None else f"{format_size(s.ram_bytes)}  t {seconds_text(s.t)} {s.clock}  {state.status} "
    left = f" {state.title} "
    left = left[: max(width - len(right), 0)]
    return text_line([(left.ljust(width - len(right)) + right, "reverse")])


def _head(s: Snapshot, width: int) -> Text:
    bloat = "-" if not s.guest_used_bytes else f"{s.footprint_bytes / s.guest_used_bytes:.2f}x"
    books = s.books_difference
    kept = (("aside", s.side_bytes), ("pool", s.pool_bytes))
    line = text_line(
        [
            (" MiB: RSS ", "dim"),
            (mib_text(s.rss_bytes), "bold"),
            ("" if s.rss_exact else "~", ""),
            *(part for name, size in kept if size for part in ((f" + {name} ", "dim"), (mib_text(size), ""))),
            (" + tables ", "dim"),
            (mib_text(s.footprint_bytes - s.rss_bytes - s.side_bytes - s.pool_bytes), ""),
            (" = footprint ", "dim"),
            (mib_text(s.footprint_bytes), "bold"),
            ("  used ", "dim"),
            (mib_text(s.guest_used_bytes), "bold"),
            ("  books ", "dim"),
            (f"{books:+,}" if books else "0", "" if books <= 0 else "bold red"),
        ]
    )
    for label, value in (
        ("bloat", bloat),
        ("LazyFree", mib_text(s.lazyfree_bytes)),
        ("cached", mib_text(s.guest_cached_bytes)),
    ):
        more = text_line([(f"  {label} ", "dim"), (value, "")])
        if line.cell_len + more.cell_len > width:
            break
        line.append_text(more)
    return line


def _marks(state: LiveState) -> tuple[str, str, str, str, str, str]:
    # RSS, used, footprint: a level and a rise each
    return ("━", "┃", "┄", "┊", "·", "·") if state.unicode else ("#", "#", "-", ":", ".", ".")


def _curves(state: LiveState, s: Snapshot, width: int, height: int) -> list[list[tuple[str, str]]]:
    label = 6
    top = max([sample.footprint for sample in state.history] + [sample.used for sample in state.history] + [1 << 20])
    marks = _marks(state)
    series = [
        Series([(h.t, h.footprint) for h in state.history], marks[4], marks[5], "dim"),
        Series([(h.t, h.used) for h in state.history], marks[2], marks[3], "green"),
        Series([(h.t, h.rss) for h in state.history], marks[0], marks[1], "bold"),
    ]
    plotted = max(height - 1, 1)
    rows = plot(series, start=s.t - MINUTE, end=s.t, top=top, width=max(width - label, 1), height=plotted)
    axis = "┤" if state.unicode else "|"
    lines = []
    for i, row in enumerate(rows):
        value = top if i == 0 else 0 if i == plotted - 1 else top // 2 if i == (plotted - 1) // 2 else None
        text = "" if value is None else short(value)
        lines.append([(f"{text:>{label - 1}}{axis}", "dim"), *_cells(row)])
    if height > 1:
        foot = "-60s"
        lines.append([(" " * label + foot + "now".rjust(max(width - label - len(foot), 4)), "dim")])
    return lines


def compose(state: LiveState, width: int, height: int) -> list[Text]:
    """Return the lines of the view: at most `height`, none longer than `width`."""
    s = state.snapshot
    lines = [_title(state, s, width)]
    if state.help:
        lines += [text_line([(" " + line, "")]) for line in HELP.splitlines()]
    elif s is None:
        lines.append(text_line([(" starting", "dim")]))
    else:
        map_width, curve_width = _widths(width)
        rows = _map_height(height)
        lines.append(_head(s, width))
        marks = _marks(state)
        cell = "" if s.page_map is None else format_size(s.page_map.cell_frames * 4096)
        lines.append(
            _rule(
                [
                    (1, f"map: {cell} a cell, small: mixed"),
                    (map_width + 2, f"{marks[0]} RSS {marks[2]} used {marks[4]} footprint"),
                ],
                width,
                state,
            )
        )
        cells = [] if s.page_map is None else map_rows(s.page_map, map_width)
        curves = _curves(state, s, curve_width, rows)
        bar = "│" if state.unicode else "|"
        for i in range(rows):
            row = cells[i] if i < len(cells) else []
            pad = " " * (map_width - len(row))
            lines.append(text_line([*_cells(row), (f"{pad} {bar} ", "dim"), *curves[i]]))
        parts: list[tuple[str, str]] = []
        for (char, style), what in [] if s.page_map is None else legend(s.page_map):
            parts += [(f" {char}", style), (f" {what} ", "dim")]
        lines.append(text_line(parts))
        lines += chain_lines(state, s, width)
        panels = [(f"mechanism: {s.mechanism}", s.panel), ("by guest time", rates_panel(state, s))]
        if s.usages is not None:
            panels.append(("states, and said", states_panel(state, s)))
        if s.usages is None or width >= _FOUR_PANELS:
            panels.append(("free blocks, MiB", blocks_panel(s)))
        shares = [29, 27, 24, 24][: len(panels)]
        columns: list[tuple[int, Sequence[tuple[str, str]]]] = []
        heads: list[tuple[int, str]] = []
        at = 0
        for (head, rows_), part in zip(panels, shares, strict=True):
            wide = width * part // sum(shares)
            heads.append((max(at, 1), head))
            columns.append((wide if len(columns) < len(panels) - 1 else width - at, rows_))
            at += wide
        lines.append(_rule(heads, width, state))
        lines += panel_lines(columns, 5)
        share = state.looked_seconds / state.run_seconds * 100 if state.run_seconds else 0.0
        cost = f"watching: {state.look_seconds * 1e3:.1f} ms a look, {share:.1f} % of the run, no guest time"
        lines.append(_rule([(1, "events"), (max(width - len(cost) - 3, 10), cost)], width, state))
        room = max(height - len(lines) - 1, 0)
        recent = list(state.events)[-room:] if room else []
        lines += [text_line([(f" {seconds_text(t):>7} ", "dim"), (what, "")]) for t, what in recent]
    lines = lines[: height - 1] if height > 1 else lines[:1]
    while len(lines) < height - 1:
        lines.append(text_line([("", "")]))
    if height > 1:
        keys = KEYS if state.keys else "no keys: stdin isn't a terminal; Ctrl-C ends the run"
        lines.append(text_line([(f" {state.message}", "bold") if state.message else (f" {keys}", "dim")]))
    for line in lines:
        line.truncate(width)
    return lines


def plain_line(state: LiveState) -> str:
    """Return the state as one line, for a pipe. Sizes are MiB."""
    s = state.snapshot
    if s is None:
        return ""
    rates = state.rates()
    per_second = "" if rates is None else f"  faults/s {rates.faults:,}  back/s {mib_text(rates.returned)}"
    latency = f"  fault p50 {microseconds(s.write_faults.p50_ns)} us" if s.write_faults.samples else ""
    return (
        f"t {seconds_text(s.t):>7}  RSS {mib_text(s.rss_bytes):>8}{'' if s.rss_exact else '~'}  "
        f"used {mib_text(s.guest_used_bytes):>8}  footprint {mib_text(s.footprint_bytes):>8}  "
        f"books {s.books_difference}  {s.mechanism}{per_second}{latency}"
    )
