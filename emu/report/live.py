"""The live view as lines of text: what a machine looks like now, composed from snapshots for a terminal of any size.

Pure: the same state gives the same lines. Everything that a line shows comes from the snapshot or from what has been
kept of earlier ones, so that a live run and a recorded one look alike.

Sizes are MiB with one decimal, as in the final table: at the end of a run the two show the same digits.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.text import Text

from emu.observe.pagemap import LABELS, Stage
from emu.observe.snapshot import Snapshot
from emu.observe.usages import LETTERS
from emu.report.cells import Cell, legend, map_rows
from emu.report.curves import Series, plot
from emu.units import format_size, mib_text, seconds_text

__all__ = ["MINUTE", "LiveState", "Sample", "compose", "map_cells", "plain_line"]

MINUTE = 60.0  # guest seconds that the curves show
_RATE_OVER = 2.0  # guest seconds
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


@dataclass(frozen=True, slots=True)
class Sample:
    """What is kept of a snapshot for curves and rates."""

    t: float
    rss: int
    used: int
    footprint: int
    faults: int
    reports: int
    returned: int
    #: frames that have gone along each arrow of the chain
    flows: tuple[int, ...] = ()
    #: transitions to each usage, in the order of LETTERS (CMM2)
    said: tuple[int, ...] = ()

    @classmethod
    def of(cls, s: Snapshot) -> "Sample":
        counters = s.counters
        return cls(
            s.t,
            s.rss_bytes,
            s.guest_used_bytes,
            s.footprint_bytes,
            counters["pgfault"],
            counters.get("reports", 0),
            counters["discard_frames"] * 4096,
            tuple(flow.frames for flow in s.flows),
            () if s.usages is None else tuple(s.usages.said(usage) for usage in LETTERS),
        )


@dataclass(slots=True)
class LiveState:
    """What the view is composed of."""

    title: str
    snapshot: Snapshot | None = None
    history: deque[Sample] = field(default_factory=deque)
    #: (guest time, what), newest last
    events: deque[tuple[float, str]] = field(default_factory=lambda: deque(maxlen=50))
    status: str = "running"
    message: str = ""
    help: bool = False
    #: seconds: of one look, of all, and of the run; and how many
    look_seconds: float = 0.0
    looked_seconds: float = 0.0
    run_seconds: float = 0.0
    looks: int = 0
    unicode: bool = True
    #: whether there is a keyboard
    keys: bool = True

    def add(self, snapshot: Snapshot) -> None:
        """Take a new snapshot; of the history, the last minute and one sample before it stay."""
        self.snapshot = snapshot
        if self.history and snapshot.t < self.history[-1].t:
            self.history.clear()
        self.history.append(Sample.of(snapshot))
        while len(self.history) > 1 and self.history[1].t <= snapshot.t - MINUTE:
            self.history.popleft()

    def rates(self) -> Sample | None:
        """Return faults, reports and bytes given back per guest second; None before any has passed, or when stepped."""
        if not self.history or (self.snapshot is not None and self.snapshot.clock == "step"):
            return None  # stepped time passes where nothing is done: a rate over it means nothing
        last = self.history[-1]
        first = last
        for sample in reversed(self.history):
            first = sample
            if last.t - sample.t >= _RATE_OVER:
                break
        passed = last.t - first.t
        if passed <= 0:
            return None

        def per_second(new: int, old: int) -> int:
            return round((new - old) / passed)

        return Sample(
            passed,
            0,
            0,
            0,
            per_second(last.faults, first.faults),
            per_second(last.reports, first.reports),
            per_second(last.returned, first.returned),
            # after a switch of the mechanism the arrows are others
            tuple(per_second(new, old) for new, old in zip(last.flows, first.flows, strict=False))
            if len(last.flows) == len(first.flows)
            else (),
            tuple(per_second(new, old) for new, old in zip(last.said, first.said, strict=False)),
        )


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


def _line(parts: Sequence[tuple[str, str]]) -> Text:
    text = Text(no_wrap=True, overflow="crop")
    for part, style in parts:
        text.append(part, style)
    return text


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
    return _line([("".join(line), "dim")])


def _title(state: LiveState, s: Snapshot | None, width: int) -> Text:
    right = "" if s is None else f"{format_size(s.ram_bytes)}  t {seconds_text(s.t)} {s.clock}  {state.status} "
    left = f" {state.title} "
    left = left[: max(width - len(right), 0)]
    return _line([(left.ljust(width - len(right)) + right, "reverse")])


def _head(s: Snapshot, width: int) -> Text:
    bloat = "-" if not s.guest_used_bytes else f"{s.footprint_bytes / s.guest_used_bytes:.2f}x"
    books = s.books_difference
    kept = (("aside", s.side_bytes), ("pool", s.pool_bytes))
    line = _line(
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
        more = _line([(f"  {label} ", "dim"), (value, "")])
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
        text = "" if value is None else _short(value)
        lines.append([(f"{text:>{label - 1}}{axis}", "dim"), *_cells(row)])
    if height > 1:
        foot = "-60s"
        lines.append([(" " * label + foot + "now".rjust(max(width - label - len(foot), 4)), "dim")])
    return lines


def _short(size: float) -> str:
    for unit, power in (("T", 40), ("G", 30), ("M", 20)):
        if size >= 1 << power:
            value = size / (1 << power)
            return f"{value:.0f}{unit}" if value >= 100 else f"{value:.1f}{unit}"
    return "0" if not size else f"{size / 1024:.0f}K"


def _microseconds(ns: int) -> str:
    return f"{ns / 1000:.1f}" if ns < 100_000 else f"{ns / 1000:.0f}"


def _rates(state: LiveState, s: Snapshot) -> list[tuple[str, str]]:
    rates = state.rates()
    write = s.write_faults
    latency = "none yet"
    if write.samples:
        latency = f"p50 {_microseconds(write.p50_ns)} p99 {_microseconds(write.p99_ns)}"
    return [
        ("faults/s", "-" if rates is None else f"{rates.faults:,}"),
        ("reports/s", "-" if rates is None else f"{rates.reports:,}"),
        ("back MiB/s", "-" if rates is None else mib_text(rates.returned)),
        ("write us", latency),
        (write.service, {"inline": "on the vCPU's core", "off": "by the kernel"}.get(write.service, write.placement)),
    ]


def _blocks(s: Snapshot) -> list[tuple[str, str]]:
    def orders(first: int, last: int) -> str:
        return " ".join(f"{n:,}" for n in s.free_area[first : last + 1])

    reported = sum(n << order for order, n in enumerate(s.reported_area)) * 4096
    free = sum(n << order for order, n in enumerate(s.free_area)) * 4096
    return [
        ("order 0-3", orders(0, 3)),
        ("4-7", orders(4, 7)),
        ("8-10", orders(8, 10)),
        ("per-CPU", mib_text(s.guest_pcp_bytes)),
        ("flagged", f"{_short(reported)} of {_short(free)}"),
    ]


def _four(number: int, thousand: int, units: str) -> str:
    # a number in four places
    value, unit = float(number), ""
    for name in units:
        if value < 999.5:  # a thousand is a place more
            break
        value, unit = value / thousand, name
    return f"{value:.1f}{unit}" if unit and value < 9.95 else f"{value:.0f}{unit}"


def _states(state: LiveState, s: Snapshot) -> list[tuple[str, str]]:
    # Guest's states by host's, and how many frames a guest second go into each of the guest's. The narrowest panel
    # is 24 wide.
    assert s.usages is not None
    rates = state.rates()
    rows = [(" ", "".join(f"{head:>5}" for head in ("r", "p", "z", "/s")))]
    for i, (usage, letter) in enumerate(LETTERS.items()):
        said = "-" if rates is None or len(rates.said) != len(LETTERS) else _four(rates.said[i], 1000, "kMG")
        cells = [_four(frames * 4, 1024, "MGT") if frames else "0" for frames in s.usages.frames[usage]]
        cells = [text if text == "0" or text[-1] in "MGT" else f"{text}K" for text in cells]
        rows.append((letter, "".join(f"{text:>5}" for text in (*cells, said))))
    return rows


#: on the chain's line there is room for short names only
_SHORT_LABELS = {
    Stage.ANONYMOUS: "anon",
    Stage.WRITEBACK: "wb",
    Stage.ACTIVE: "act",
    Stage.INACTIVE: "inact",
    Stage.PCP: "pcp",
    Stage.HOST_OWNED: "host",
    Stage.BALLOONED: "balloon",
    Stage.VOLATILE: "vol",
    Stage.DISCARDED: "disc",
}


def _name(stage: Stage) -> str:
    return _SHORT_LABELS.get(stage, LABELS[stage])


def _mib_rate(frames: int | None) -> str:
    return "-" if frames is None else f"{frames * 4096 / (1 << 20):.1f}"


_NO_ARROW = -1


def _drawn(frames: int | None, arrow: str) -> str:
    # an arrow, and what goes along it, if anything does
    if frames == _NO_ARROW:
        return ""
    return f" {arrow}" if frames == 0 else f" {arrow}{_mib_rate(frames)}"


def _chain(state: LiveState, s: Snapshot, width: int) -> list[Text]:
    # Two lines: the stages with what flows between neighbours, and the arrows between others that carry something.
    rates = state.rates()
    known = rates is not None and len(rates.flows) == len(s.flows)
    flows: dict[tuple[Stage, Stage], int | None] = {
        (flow.source, flow.target): rates.flows[i] if rates is not None and known else None
        for i, flow in enumerate(s.flows)
    }
    every = dict(flows)
    right, left = ("→", "←") if state.unicode else (">", "<")
    parts: list[tuple[str, str]] = []
    for i, stage in enumerate(s.chain):
        if i:
            before = s.chain[i - 1]
            there, back = flows.pop((before, stage), _NO_ARROW), flows.pop((stage, before), _NO_ARROW)
            # the way back only when something goes it
            parts.append((_drawn(there, right) + (_drawn(back, left) if (back or 0) > 0 else "") + " ", "yellow"))
        parts.append((f" {_name(stage)} ", "dim"))
        parts.append((_short(s.stages[stage]), "bold"))
    others = [f"{_name(a)}{right}{_name(b)} {_mib_rate(n)}" for (a, b), n in flows.items() if n]
    if sum(len(text) for text, _ in parts) > width:  # then the rates go below: a stage is worth more
        parts = []
        for i, stage in enumerate(s.chain):
            parts.append((f" {right} " if i else " ", "yellow"))
            parts += [(f"{_name(stage)} ", "dim"), (_short(s.stages[stage]), "bold")]
        others = [f"{_name(a)}{right}{_name(b)} {_mib_rate(n)}" for (a, b), n in every.items() if n]
    text = "  ".join(others) if others else "nothing else flows"
    return [_line(parts), _line([(f" MiB/s: {text}", "dim")])]


def _panels(columns: Sequence[tuple[int, Sequence[tuple[str, str]]]], lines: int) -> list[Text]:
    result = []
    for i in range(lines):
        parts: list[tuple[str, str]] = []
        for width, rows in columns:
            label, value = rows[i] if i < len(rows) else ("", "")
            text = f" {label} "
            parts.append((text[:width], "dim"))
            parts.append((value[: max(width - len(text), 0)].ljust(max(width - len(text), 0)), ""))
        result.append(_line(parts))
    return result


def compose(state: LiveState, width: int, height: int) -> list[Text]:
    """Return the lines of the view: at most `height`, none longer than `width`."""
    s = state.snapshot
    lines = [_title(state, s, width)]
    if state.help:
        lines += [_line([(" " + line, "")]) for line in HELP.splitlines()]
    elif s is None:
        lines.append(_line([(" starting", "dim")]))
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
            lines.append(_line([*_cells(row), (f"{pad} {bar} ", "dim"), *curves[i]]))
        parts: list[tuple[str, str]] = []
        for (char, style), what in [] if s.page_map is None else legend(s.page_map):
            parts += [(f" {char}", style), (f" {what} ", "dim")]
        lines.append(_line(parts))
        lines += _chain(state, s, width)
        panels = [(f"mechanism: {s.mechanism}", s.panel), ("by guest time", _rates(state, s))]
        if s.usages is not None:
            panels.append(("states, and said", _states(state, s)))
        if s.usages is None or width >= _FOUR_PANELS:
            panels.append(("free blocks, MiB", _blocks(s)))
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
        lines += _panels(columns, 5)
        share = state.looked_seconds / state.run_seconds * 100 if state.run_seconds else 0.0
        cost = f"watching: {state.look_seconds * 1e3:.1f} ms a look, {share:.1f} % of the run, no guest time"
        lines.append(_rule([(1, "events"), (max(width - len(cost) - 3, 10), cost)], width, state))
        room = max(height - len(lines) - 1, 0)
        recent = list(state.events)[-room:] if room else []
        lines += [_line([(f" {seconds_text(t):>7} ", "dim"), (what, "")]) for t, what in recent]
    lines = lines[: height - 1] if height > 1 else lines[:1]
    while len(lines) < height - 1:
        lines.append(_line([("", "")]))
    if height > 1:
        keys = KEYS if state.keys else "no keys: stdin isn't a terminal; Ctrl-C ends the run"
        lines.append(_line([(f" {state.message}", "bold") if state.message else (f" {keys}", "dim")]))
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
    latency = f"  fault p50 {_microseconds(s.write_faults.p50_ns)} us" if s.write_faults.samples else ""
    return (
        f"t {seconds_text(s.t):>7}  RSS {mib_text(s.rss_bytes):>8}{'' if s.rss_exact else '~'}  "
        f"used {mib_text(s.guest_used_bytes):>8}  footprint {mib_text(s.footprint_bytes):>8}  "
        f"books {s.books_difference}  {s.mechanism}{per_second}{latency}"
    )
