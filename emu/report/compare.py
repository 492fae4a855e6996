"""Runs of one workload under several mechanisms, side by side: phase by phase, then what each came to."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from emu.units import format_size, mib_text

__all__ = ["print_compare"]

Rows = Sequence[Mapping[str, Any]]
Line = tuple[str, dict[str, str] | None]  # a heading, or a name and its cells by column
_SHORT = ("used", "cached", "RSS", "bloat", "read")


def _bloat(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _phase_cells(phase: Mapping[str, Any], before: Mapping[str, Any] | None) -> dict[str, str]:
    read = phase["disk_read_bytes"] - (before["disk_read_bytes"] if before else 0)
    cells = {
        head: mib_text(phase[f"guest_{name}_bytes"])
        for head, name in (("used", "used"), ("cached", "cached"), ("per-CPU", "pcp"), ("balloon", "ballooned"))
    }
    cells |= {"free": mib_text(phase["guest_free_bytes"]), "RSS": mib_text(phase["rss_bytes"])}
    cells |= {"footprint": mib_text(phase["footprint_bytes"]), "bloat": _bloat(phase["bloat"])}
    return cells | {"read": mib_text(read)}


#: frames that the host got: handed back, dropped from aside, stolen
_BACK = ("return_taken", "aside_evicted", "steal_unused", "steal_volatile", "steal_potential", "steal_preserved")


#: pages that the guest handled to give memory back: scanned for it, dropped, into the balloon and out, reported
_WORKED = (
    "aging_scanned",
    "inactive_scanned",
    "epoch_scanned",
    "guest_balloon_scanned",
    "guest_balloon_inflate",
    "guest_balloon_deflate",
    "guest_drop_pagecache_pages",
    "report_pages",
)


def _share(row: Mapping[str, Any]) -> str:
    share = row.get("said_share")
    return "-" if share is None else f"~{share:.1%}".replace("%", " %")


def _total_cells(row: Mapping[str, Any]) -> dict[str, str]:
    counters = row["counters"]

    def sum_of(*names: str) -> str:
        return f"{sum(counters.get(name, 0) for name in names):,}"

    return {
        "GiB*s": f"{row['footprint_byte_seconds'] / (1 << 30):,.1f}",
        "bloat": _bloat(row["bloat"]),
        "read": mib_text(counters.get("disk_read_bytes", 0)),
        "refaults": sum_of("guest_workingset_refault_file"),
        "faults": sum_of("pgfault"),
        "installs": sum_of("install_frames"),
        "back": mib_text(sum(counters.get(name, 0) for name in _BACK) * 4096),
        "swap out": mib_text(counters.get("swap_out_frames", 0) * 4096),
        "swap in": mib_text(counters.get("swap_in_frames", 0) * 4096),
        "scanned": sum_of("guest_pgscan_kswapd", "guest_pgscan_direct", "aging_scanned"),
        "reports": sum_of("reports"),
        "worked": sum_of(*_WORKED),
        "said": f"{counters.get('usage_said', 0) - counters.get('said_other', 0):,}",
        "of native": _share(row),
        "requests": sum_of("balloon_inflate_requests", "balloon_deflate_requests"),
        "OOM kills": sum_of("guest_oom_kill"),
        "seconds": f"{row['wall_seconds']:.1f}" if row["machine"]["clock"] == "real" else "-",
        "wrong": f"{row['corrupt_frames']:,}",
    }


def _tables(first: str, lines: Sequence[Line], width: int, only: Sequence[str] = ()) -> list[Table]:
    # Of columns in which something isn't zero, as many tables as it takes for none to be wider than the terminal: names
    # may be cut there, digits never.
    every = [cells for _, cells in lines if cells is not None]
    heads = [head for head in every[0] if any(cells[head] not in ("0", "0.0", "-") for cells in every)]
    left = [head for head in heads if not only or head in only] or heads[:1]
    wide = {head: max(len(head), *(len(cells[head]) for cells in every)) for head in left}
    name_width = max(len(first), *(len(name) for name, _ in lines))
    tables: list[Table] = []
    while left:
        part, used = [left[0]], name_width + 1 + wide[left.pop(0)]
        while left and used + 1 + wide[left[0]] <= width:
            used += 1 + wide[left[0]]
            part.append(left.pop(0))
        table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1), header_style="bold")
        table.add_column(first, no_wrap=True, overflow="ellipsis")
        for head in part:
            table.add_column(head, justify="right", no_wrap=True, min_width=wide[head])
        for name, cells in lines:
            if cells is None:
                table.add_row(Text(name, style="bold"))
            else:
                table.add_row(name, *(cells[head] for head in part))
        tables.append(table)
    return tables


def _phase_lines(rows: Rows) -> list[Line]:
    lines: list[Line] = []
    for i, name in enumerate(phase["name"] for phase in max((row["phases"] for row in rows), key=len)):
        lines.append((name, None))
        for row in rows:
            phases = row["phases"]
            if i < len(phases):
                other = "" if phases[i]["name"] == name else f": {phases[i]['name']}"
                lines.append((f"  {row['label']}{other}", _phase_cells(phases[i], phases[i - 1] if i else None)))
    return lines


def print_compare(
    rows: Sequence[Mapping[str, Any]], command: str, console: Console, prices: Mapping[str, float] | None = None
) -> None:
    """Print runs (the objects of `emu run --json`, each with its label). A narrow terminal loses columns, not
    digits."""
    if not console.is_terminal:
        console.width = 160
    totals = [(f"{row['label']}{' (failed)' if row['error'] else ''}", _total_cells(row)) for row in rows]
    for table in (
        *_tables("phase / mechanism", _phase_lines(rows), console.width, _SHORT if console.width < 100 else ()),
        *_tables("over the run", totals, console.width),
    ):
        console.print(table)
        console.print()
    first = rows[0]
    env, machine = first["environment"], first["machine"]
    seconds = sum(row["wall_seconds"] for row in rows)
    foot = [
        "MiB; used: what dropping caches doesn't give back; read: from the disk, in that phase; "
        "bloat: footprint / used",
        "faults, installs: frames that the host had to give (again), to a fault or whole with their bytes",
        "back: given back, or taken; scanned: pages that reclaim or aging looked at; reports, requests: to the balloon "
        "device; worked: pages that the guest scanned, dropped, reported or ballooned for the host",
        f"Linux {env['kernel']}, {env['cpus']} cores; userfaultfd {machine['uffd']}, faults {machine['service']}; "
        f"return {machine['on_return']}; RAM {format_size(first['ram_bytes'])}; clock {machine['clock']}; "
        f"seed {first['seed']}; 1 run each, in a process of its own, {seconds:.0f} s",
        "frames checked: " + " / ".join(f"{row['verified_frames']:,}" for row in rows),
    ]
    if prices is not None:
        foot.append(
            f"said: transitions of page states, but for those of switching them on; of native: each alone, at "
            f"{prices['transition']:.1f} ns, of what the guest's reads from the cache ({prices['read']:.0f} ns a page)"
            f", faults ({prices['fault']:,.0f}; of mapped files {prices['map']:.0f}), frees ({prices['free']:.0f}) and "
            f"reading in ({prices['fill']:,.0f}, the disk with it) take natively here (docs/cmm2-overhead.md)"
        )
    foot += [f"{row['label']}: {row['error']}" for row in rows if row["error"]]
    foot += sorted({f"{row['label']}: {note}" for row in rows for note in row["notes"]})
    foot.append(f"again: {command}")
    for line in foot:
        console.print(Text(line, style="dim"), soft_wrap=not console.is_terminal)
