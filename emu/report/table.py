"""A run as a table: a row a phase, and a foot that says what was measured, how, and with which command."""

from collections.abc import Callable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from emu.observe.result import Phase, RunResult
from emu.units import format_size, mib_text, seconds_text

__all__ = ["print_run"]


def _served(service: str, where: str) -> str:
    return {
        "inline": "inline (SIGBUS in the faulting thread)",
        "thread": f"by a thread on {where}",
        "off": "by the kernel",
    }[service]


def _foot(result: RunResult) -> list[str]:
    machine, env = result.machine, result.environment
    service = machine["service"]
    where = "any core" if machine["service_cpu"] is None else f"core {machine['service_cpu']}"
    faults = f"faults {_served(service, where)}"
    settings = ",".join(
        f"{key}={'yes' if value is True else 'no' if value is False else value}"
        for key, value in result.settings.items()
        if value is not None
    )
    pcp = result.phases[-1].guest_pcp_bytes
    lines = [
        f"mechanism {result.mechanism}{' (' + settings + ')' if settings else ''}, return {machine['on_return']}; "
        f"RAM {format_size(result.ram_bytes)}; clock {machine['clock']}; seed {result.seed}; "
        f"1 run, {result.seconds:.1f} s",
        f"Linux {env['kernel']}, {env['cpus']} cores; userfaultfd {machine['uffd']}; {faults}, "
        f"fault_around {machine['fault_around']}",
        "used: what dropping caches doesn't give back. RSS, LazyFree: kernel (smaps). footprint = RSS + aside + pool + "
        "the host's tables; bloat = footprint / used. "
        f"RSS minus our books: {result.books_difference}",
        f"{result.verified_frames:,} frames checked, {result.corrupt_frames} wrong; "
        f"{result.counters['pgfault']:,} faults, {result.counters['discard_frames']:,} frames discarded",
    ]
    disk = {name: result.counters.get(f"disk_{name}_bytes", 0) for name in ("read", "written", "direct", "buffered")}
    if disk["read"] or disk["written"]:
        lines.append(
            f"{', '.join(machine['disks']) or 'no disk'}: {mib_text(disk['read'])} MiB read, "
            f"{mib_text(disk['written'])} written; past the host's cache (O_DIRECT) {mib_text(disk['direct'])}, "
            f"through it and dropped behind {mib_text(disk['buffered'])}; "
            f"{result.counters['guest_workingset_refault_file']:,} refaults"
        )
    if pcp:
        lines.append(
            f"per-CPU lists hold {mib_text(pcp)} MiB at the end: freed, but out of reporting's sight (as in Linux)"
        )
    if machine["on_return"] == "lazy":
        lines.append(
            f"{result.counters['lazyfree_frames']:,} frames lazily freed, "
            f"{result.counters['lazydrop_frames']:,} of them dropped"
        )
    if result.counters["aside_frames"] > result.counters["swap_out_frames"]:
        lines.append(
            f"{result.counters['aside_frames']:,} frames set aside; {result.counters['aside_return']:,} came back by a "
            f"touch, {result.counters['aside_restored']:,} without, {result.counters['aside_dropped']:,} dropped; "
            f"{result.counters['guest_pgdiscard_fault']:,} read again by the guest"
        )
    if result.counters["swap_out_frames"]:
        lines.append(
            f"swap: {result.counters['swap_out_frames']:,} frames out, {result.counters['swap_in_frames']:,} in "
            f"({result.counters['swap_readahead']:,} ahead), {result.counters['swap_same']:,} of one word, "
            f"{result.counters['swap_raw']:,} uncompressed, {result.counters['swap_failed']:,} not stored; "
            f"{result.counters['gate_throttled']:,} faults waited for memory; store: {machine['store']}"
        )
    if "usage_said" in result.counters:
        counters = result.counters
        causes = sorted(((n, name) for name, n in counters.items() if name.startswith("said_") and n), reverse=True)
        lines.append(
            f"{counters['usage_said']:,} transitions ("
            + ", ".join(f"{name.removeprefix('said_')} {n:,}" for n, name in causes)
            + f"); {counters['usage_gone']:,} found gone, {counters['usage_refused']:,} refused; the host took "
            + ", ".join(f"{counters[f'steal_{kind}']:,} {kind}" for kind in ("unused", "volatile", "potential"))
            + f", and stored {counters['steal_preserved']:,} dirty ones"
        )
    for view in result.faults:
        lines.append(
            f"{view.kind} faults: p50 {view.p50_ns / 1e3:.1f}, p99 {view.p99_ns / 1e3:.1f}, "
            f"max {view.max_ns / 1e3:.1f} us ({view.samples:,} timed: of each thread the first and every eighth; "
            f"served {_served(view.service, view.placement)})"
        )
    lines += _working_set(result)
    for measure in result.measures.values():
        lines.append(f"{measure.value:,.{0 if measure.value >= 100 else 2}f} {measure.unit}: {measure.what}")
    lines += result.notes
    lines.append(f"again: {result.command}")
    return lines


def _working_set(result: RunResult) -> list[str]:
    seen = result.working_set
    if not seen:
        return []
    last = seen[-1]
    written = "" if last["written"] is None else f", written {mib_text(last['written'])}"

    truth = sum(e["truth"] for e in seen)

    def error(name: str) -> str:
        return f"{sum(abs(e[name] - e['truth']) for e in seen) / truth:.0%}" if truth else "-"

    return [
        f"working set in the last of {len(seen)} periods: truth {mib_text(last['truth'])} MiB; by random frames set "
        f"aside {mib_text(last['sampled'])}, by idle age {mib_text(last['idle_age'])}{written}; mean error, of "
        f"the truth: {error('sampled')}, {error('idle_age')} (--json has each period)"
    ]


# column: heading, unit, text of a phase, given the one before. Those at the end of _EXPENDABLE go first on a narrow
# terminal.
_COLUMNS: dict[str, tuple[str, Callable[[Phase, Phase | None], str]]] = {
    "t": ("h:m:s", lambda p, before: seconds_text(p.t)),
    "used": ("MiB", lambda p, before: mib_text(p.guest_used_bytes)),
    "cached": ("MiB", lambda p, before: mib_text(p.guest_cached_bytes)),
    "per-CPU": ("MiB", lambda p, before: mib_text(p.guest_pcp_bytes)),
    "balloon": ("MiB", lambda p, before: mib_text(p.guest_ballooned_bytes)),
    "free": ("MiB", lambda p, before: mib_text(p.guest_free_bytes)),
    "RSS": ("MiB", lambda p, before: mib_text(p.rss_bytes)),
    "LazyFree": ("MiB", lambda p, before: mib_text(p.lazyfree_bytes)),
    "aside": ("MiB", lambda p, before: mib_text(p.aside_bytes)),
    "swapped": ("MiB", lambda p, before: mib_text(p.swapped_bytes)),
    "pool": ("MiB", lambda p, before: mib_text(p.pool_bytes)),
    "footprint": ("MiB", lambda p, before: mib_text(p.footprint_bytes)),
    "bloat": ("x", lambda p, before: "-" if p.bloat is None else f"{p.bloat:.2f}"),
    "read": ("MiB", lambda p, before: mib_text(p.disk_read_bytes - (before.disk_read_bytes if before else 0))),
}
_EXPENDABLE = ("pool", "LazyFree", "free", "per-CPU", "balloon", "footprint", "bloat", "t", "read")


def _unused(phases: list[Phase]) -> set[str]:
    # columns that would be all zeros, or that nobody asks for without a page cache
    unused = set()
    if not any(p.lazyfree_bytes for p in phases):
        unused.add("LazyFree")
    if not any(p.guest_ballooned_bytes for p in phases):
        unused.add("balloon")
    if not any(p.aside_bytes for p in phases):
        unused.add("aside")
    if not any(p.swapped_bytes for p in phases):
        unused |= {"swapped", "pool"}
    if not any(p.guest_cached_bytes or p.disk_read_bytes for p in phases):
        unused |= {"cached", "read"}
        if "balloon" in unused:
            unused |= {"free", "per-CPU"}
    return unused


def stage_lines(phases: list[Phase]) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of MiB by stage, of the stages that ever held something; and between rows what flowed."""
    names = [name for name in phases[0].stages if any(p.stages[name] for p in phases)]
    return names, [[mib_text(p.stages[name]) for name in names] for p in phases]


def flow_text(before: Phase | None, now: Phase) -> str:
    """Return what went along the arrows between two phases, in MiB; arrows without any are left out."""
    then = {} if before is None else {(f["from"], f["to"]): f["bytes"] for f in before.flows_since_start}
    moved = [(f["from"], f["to"], f["bytes"] - then.get((f["from"], f["to"]), 0)) for f in now.flows_since_start]
    return ", ".join(f"{a} -> {b} {mib_text(size)}" for a, b, size in moved if size > 0)


_PAIRS = ("Sr", "Sp", "Sz", "Ur", "Uz", "Pr", "Vr", "Vz")


def state_rows(phases: list[Phase]) -> list[list[str]]:
    """Return rows of frames by the eight pairs of page states, in memory, and the volatile share of those, a phase."""
    rows = []
    for usages in (p.usages for p in phases if p.usages is not None):
        resident = sum(held["r"] for held in usages.values())
        share = f"{usages['V']['r'] / resident:.1%}".replace("%", " %") if resident else "-"
        rows.append([*(f"{usages[pair[0]][pair[1]]:,}" for pair in _PAIRS), f"{resident:,}", share])
    return rows


def _print_states(phases: list[Phase], console: Console) -> None:
    rows = state_rows(phases)
    if not rows:
        return
    console.print()
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1), header_style="bold")
    table.add_column("4 KiB pages by state", no_wrap=True, overflow="ellipsis")
    heads = (*_PAIRS, "resident", "Vr / resident")
    # on a narrow terminal without pairs that no page was ever in
    shown = [i for i in range(len(heads)) if not console.is_terminal or any(row[i] != "0" for row in rows)]
    for i in shown:
        wide = max(len(heads[i]), *(len(r[i]) for r in rows))
        table.add_column(heads[i], justify="right", no_wrap=True, min_width=wide)
    for phase, row in zip((p for p in phases if p.usages is not None), rows, strict=True):
        table.add_row(phase.name, *(row[i] for i in shown))
    console.print(table)
    legend = "guest: S stable, U unused, P potentially volatile, V volatile; host: r in memory, p stored, z nothing"
    console.print(Text(legend, style="dim"), soft_wrap=not console.is_terminal)


def print_run(result: RunResult, console: Console) -> None:
    """Print a result. A terminal that is too narrow loses columns, never digits; a file gets all of them."""
    unused = _unused(result.phases)
    columns = {name: column for name, column in _COLUMNS.items() if name not in unused}
    rows: list[list[str]] = []

    def layout() -> int:
        befores = [None, *result.phases[:-1]]
        rows[:] = [
            [p.name, *(text(p, before) for _, text in columns.values())]
            for p, before in zip(result.phases, befores, strict=True)
        ]
        heads = ["phase", *columns]
        return sum(max(len(row[i]) for row in [heads, *rows]) + 1 for i in range(len(heads))) - 1

    for name in _EXPENDABLE:
        if not console.is_terminal or layout() <= console.width:
            break
        columns.pop(name, None)
    if not console.is_terminal:
        console.width = max(console.width, layout())
    layout()
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1), header_style="bold")
    table.add_column("phase", no_wrap=True, overflow="ellipsis")
    for i, name in enumerate(columns, start=1):
        widest = max([len(name), *(len(row[i]) for row in rows)])
        table.add_column(name, justify="right", no_wrap=True, min_width=widest)
    table.add_row("", *(Text(unit, style="dim") for unit, _ in columns.values()))
    for row in rows:
        table.add_row(*row)
    console.print(table)
    _print_chain(result.phases, console)
    _print_states(result.phases, console)
    for line in _foot(result):
        console.print(Text(line, style="dim"), soft_wrap=not console.is_terminal)


def _print_chain(phases: list[Phase], console: Console) -> None:
    # the stages of all frames at each phase, and what has flowed since the one before
    names, rows = stage_lines(phases)
    wide = max(len(p.name) for p in phases) + sum(
        max(len(n), *(len(r[i]) for r in rows)) + 1 for i, n in enumerate(names)
    )
    if console.is_terminal and wide > console.width:
        names = []
    console.print()
    if names:
        table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1), header_style="bold")
        table.add_column("MiB by stage", no_wrap=True)
        for i, name in enumerate(names):
            table.add_column(name, justify="right", no_wrap=True, min_width=max(len(name), *(len(r[i]) for r in rows)))
        for phase, row in zip(phases, rows, strict=True):
            table.add_row(phase.name, *row)
        console.print(table)
    before = None
    for phase in phases:
        if text := flow_text(before, phase):
            console.print(Text(f"until {phase.name}: {text} MiB", style="dim"), soft_wrap=not console.is_terminal)
        before = phase
