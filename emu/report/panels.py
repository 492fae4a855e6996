"""The live view's lower half: the chain of stages, and panels of labels and values, as lines of text."""

from collections.abc import Sequence

from rich.text import Text

from emu.observe.pagemap import LABELS, Stage
from emu.observe.snapshot import Snapshot
from emu.observe.usages import LETTERS
from emu.report.livestate import LiveState
from emu.units import mib_text

__all__ = [
    "blocks_panel",
    "chain_lines",
    "microseconds",
    "panel_lines",
    "rates_panel",
    "short",
    "states_panel",
    "text_line",
]


def text_line(parts: Sequence[tuple[str, str]]) -> Text:
    """Return parts (text, style) as a line that is cut and never wrapped."""
    text = Text(no_wrap=True, overflow="crop")
    for part, style in parts:
        text.append(part, style)
    return text


def short(size: float) -> str:
    """Return bytes as a few letters: 12.3M."""
    for unit, power in (("T", 40), ("G", 30), ("M", 20)):
        if size >= 1 << power:
            value = size / (1 << power)
            return f"{value:.0f}{unit}" if value >= 100 else f"{value:.1f}{unit}"
    return "0" if not size else f"{size / 1024:.0f}K"


def microseconds(ns: int) -> str:
    """Return ns as microseconds."""
    return f"{ns / 1000:.1f}" if ns < 100_000 else f"{ns / 1000:.0f}"


def rates_panel(state: LiveState, s: Snapshot) -> list[tuple[str, str]]:
    """Return what happens a guest second, and what a fault takes."""
    rates = state.rates()
    write = s.write_faults
    latency = "none yet"
    if write.samples:
        latency = f"p50 {microseconds(write.p50_ns)} p99 {microseconds(write.p99_ns)}"
    return [
        ("faults/s", "-" if rates is None else f"{rates.faults:,}"),
        ("reports/s", "-" if rates is None else f"{rates.reports:,}"),
        ("back MiB/s", "-" if rates is None else mib_text(rates.returned)),
        ("write us", latency),
        (write.service, {"inline": "on the vCPU's core", "off": "by the kernel"}.get(write.service, write.placement)),
    ]


def blocks_panel(s: Snapshot) -> list[tuple[str, str]]:
    """Return free blocks by order, and what of free memory is reported."""

    def orders(first: int, last: int) -> str:
        return " ".join(f"{n:,}" for n in s.free_area[first : last + 1])

    reported = sum(n << order for order, n in enumerate(s.reported_area)) * 4096
    free = sum(n << order for order, n in enumerate(s.free_area)) * 4096
    return [
        ("order 0-3", orders(0, 3)),
        ("4-7", orders(4, 7)),
        ("8-10", orders(8, 10)),
        ("per-CPU", mib_text(s.guest_pcp_bytes)),
        ("flagged", f"{short(reported)} of {short(free)}"),
    ]


def _four(number: int, thousand: int, units: str) -> str:
    # a number in four places
    value, unit = float(number), ""
    for name in units:
        if value < 999.5:  # a thousand is a place more
            break
        value, unit = value / thousand, name
    return f"{value:.1f}{unit}" if unit and value < 9.95 else f"{value:.0f}{unit}"


def states_panel(state: LiveState, s: Snapshot) -> list[tuple[str, str]]:
    """Return the guest's states by the host's, and how many frames a guest second go into each of the guest's."""
    # the narrowest panel is 24 wide
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


def chain_lines(state: LiveState, s: Snapshot, width: int) -> list[Text]:
    """Return two lines: the stages with what flows between neighbours, and the arrows between others."""
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
        parts.append((short(s.stages[stage]), "bold"))
    others = [f"{_name(a)}{right}{_name(b)} {_mib_rate(n)}" for (a, b), n in flows.items() if n]
    if sum(len(text) for text, _ in parts) > width:  # then the rates go below: a stage is worth more
        parts = []
        for i, stage in enumerate(s.chain):
            parts.append((f" {right} " if i else " ", "yellow"))
            parts += [(f"{_name(stage)} ", "dim"), (short(s.stages[stage]), "bold")]
        others = [f"{_name(a)}{right}{_name(b)} {_mib_rate(n)}" for (a, b), n in every.items() if n]
    text = "  ".join(others) if others else "nothing else flows"
    return [text_line(parts), text_line([(f" MiB/s: {text}", "dim")])]


def panel_lines(columns: Sequence[tuple[int, Sequence[tuple[str, str]]]], lines: int) -> list[Text]:
    """Return columns (width, rows of label and value) side by side."""
    result = []
    for i in range(lines):
        parts: list[tuple[str, str]] = []
        for width, rows in columns:
            label, value = rows[i] if i < len(rows) else ("", "")
            text = f" {label} "
            parts.append((text[:width], "dim"))
            parts.append((value[: max(width - len(text), 0)].ljust(max(width - len(text), 0)), ""))
        result.append(text_line(parts))
    return result
