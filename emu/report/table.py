"""A run as a table: a row a phase, and a foot that says what was measured, how, and with which command."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from emu.observe.result import RunResult
from emu.units import format_size, seconds_text

__all__ = ["print_run"]


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.1f}"


def _foot(result: RunResult) -> list[str]:
    machine, env = result.machine, result.environment
    service = machine["service"]
    if service == "thread":
        where = "any core" if machine["service_cpu"] is None else f"core {machine['service_cpu']}"
        faults = f"faults by a thread on {where}"
    elif service == "inline":
        faults = "faults inline (SIGBUS in the faulting thread)"
    else:
        faults = "faults by the kernel"
    settings = ",".join(f"{key}={value}" for key, value in result.settings.items() if value is not None)
    pcp = result.phases[-1].guest_pcp_bytes
    lines = [
        f"mechanism {result.mechanism}{' (' + settings + ')' if settings else ''}, return {machine['on_return']}; "
        f"RAM {format_size(result.ram_bytes)}; clock {machine['clock']}; seed {result.seed}; "
        f"1 run, {result.seconds:.1f} s",
        f"Linux {env['kernel']}, {env['cpus']} cores; userfaultfd {machine['uffd']}; {faults}, "
        f"fault_around {machine['fault_around']}",
        "RSS, LazyFree: kernel (smaps). footprint = RSS + the host's tables. "
        f"RSS minus our books: {result.books_difference}",
        f"{result.verified_frames:,} frames checked, {result.corrupt_frames} wrong; "
        f"{result.counters['pgfault']:,} faults, {result.counters['discard_frames']:,} frames discarded",
    ]
    if pcp:
        lines.append(
            f"per-CPU lists hold {_mib(pcp)} MiB at the end: freed, but out of reporting's sight (as in Linux)"
        )
    lines += result.notes
    lines.append(f"again: {result.command}")
    return lines


def print_run(result: RunResult, console: Console) -> None:
    """Print a result."""
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1), header_style="bold")
    table.add_column("phase", no_wrap=True)
    for name in ("t", "used", "RSS", "LazyFree", "footprint", "bloat"):
        table.add_column(name, justify="right", no_wrap=True)
    units = ["", "min:s", "MiB", "MiB", "MiB", "MiB", "x"]
    table.add_row(*(Text(unit, style="dim") for unit in units))
    for phase in result.phases:
        table.add_row(
            phase.name,
            seconds_text(phase.t),
            _mib(phase.guest_used_bytes),
            _mib(phase.rss_bytes),
            _mib(phase.lazyfree_bytes),
            _mib(phase.footprint_bytes),
            "-" if phase.bloat is None else f"{phase.bloat:.2f}",
        )
    console.print(table)
    for line in _foot(result):
        console.print(Text(line, style="dim"), soft_wrap=True)
