"""Runs of one workload under several mechanisms, side by side: phase by phase, then what each came to."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from emu.units import mib_text

__all__ = ["print_compare"]

_HEADS = ("used", "cached", "free", "RSS", "footprint", "bloat", "read")
_SHORT = ("used", "cached", "RSS", "bloat", "read")


def _bloat(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _phase_row(phase: Mapping[str, Any], before: Mapping[str, Any] | None) -> dict[str, str]:
    read = phase["disk_read_bytes"] - (before["disk_read_bytes"] if before else 0)
    return {
        "used": mib_text(phase["guest_used_bytes"]),
        "cached": mib_text(phase["guest_cached_bytes"]),
        "free": mib_text(phase["guest_free_bytes"]),
        "RSS": mib_text(phase["rss_bytes"]),
        "footprint": mib_text(phase["footprint_bytes"]),
        "bloat": _bloat(phase["bloat"]),
        "read": mib_text(read),
    }


def _title(row: Mapping[str, Any]) -> str:
    return str(row["label"])


def _phases(rows: Sequence[Mapping[str, Any]], heads: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1), header_style="bold")
    table.add_column("phase / mechanism", no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    names = [phase["name"] for phase in max((row["phases"] for row in rows), key=len)]
    for i, name in enumerate(names):
        table.add_row(Text(name, style="bold"))
        for row in rows:
            phases = row["phases"]
            if i >= len(phases):
                table.add_row(f"  {_title(row)}", "(ended)")
                continue
            cells = _phase_row(phases[i], phases[i - 1] if i else None)
            other = "" if phases[i]["name"] == name else f": {phases[i]['name']}"
            table.add_row(f"  {_title(row)}{other}", *(cells[head] for head in heads))
    return table


def _totals(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1), header_style="bold")
    table.add_column("over the run", no_wrap=True)
    for head in (
        "GiB*s",
        "bloat",
        "read MiB",
        "refaults",
        "faults",
        "installs",
        "back MiB",
        "scanned",
        "reports",
        "requests",
        "OOM kills",
        "wrong",
    ):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        counters = row["counters"]
        scanned = sum(counters.get(n, 0) for n in ("guest_pgscan_kswapd", "guest_pgscan_direct", "aging_scanned"))
        table.add_row(
            _title(row),
            f"{row['footprint_byte_seconds'] / (1 << 30):,.1f}",
            _bloat(row["bloat"]),
            mib_text(counters.get("disk_read_bytes", 0)),
            f"{counters.get('guest_workingset_refault_file', 0):,}",
            f"{counters['pgfault']:,}",
            f"{counters['install_frames']:,}",
            mib_text(counters["return_taken"] * 4096),
            f"{scanned:,}",
            f"{counters.get('reports', 0):,}",
            f"{counters['balloon_inflate_requests'] + counters['balloon_deflate_requests']:,}",
            f"{counters.get('guest_oom_kill', 0):,}",
            f"{row['corrupt_frames']:,}",
        )
    return table


def print_compare(rows: Sequence[Mapping[str, Any]], command: str, console: Console) -> None:
    """Print runs (the objects of `emu run --json`, each with its label). A narrow terminal loses columns, not
    digits."""
    heads: Sequence[str] = _HEADS
    if console.is_terminal and console.width < 100:
        heads = _SHORT
    if not console.is_terminal:
        console.width = max(console.width, 160)
    console.print(_phases(rows, heads))
    console.print()
    console.print(_totals(rows))
    console.print()
    first = rows[0]
    env, machine = first["environment"], first["machine"]
    seconds = sum(row["wall_seconds"] for row in rows)
    foot = [
        "MiB; used: what dropping the cache doesn't give back; read: from the disk, in that phase; "
        "bloat: footprint / used",
        "faults, installs: frames that the host had to give (again), to a fault or for the disk's bytes; back: given "
        "back; "
        "scanned: pages that reclaim or aging looked at; reports, requests: to the balloon device",
        f"Linux {env['kernel']}, {env['cpus']} cores; userfaultfd {machine['uffd']}, faults {machine['service']}; "
        f"return {machine['on_return']}; RAM {first['ram_bytes'] >> 20} MiB; clock {machine['clock']}; "
        f"seed {first['seed']}; 1 run each, in a process of its own, {seconds:.0f} s",
        "frames checked: " + ", ".join(f"{row['verified_frames']:,}" for row in rows),
    ]
    foot += [f"{_title(row)}: {row['error']}" for row in rows if row["error"]]
    foot += sorted({f"{_title(row)}: {note}" for row in rows for note in row["notes"]})
    foot.append(f"again: {command}")
    for line in foot:
        console.print(Text(line, style="dim"), soft_wrap=not console.is_terminal)
