"""A fleet as a table: a row a guest, the fleet's line, and a foot that says what was asked for, and when."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from emu.observe.fleet import FleetResult, GuestResult
from emu.units import format_size, mib_text

__all__ = ["print_fleet"]

_HEADS = ("guest", "ended", "start", "has it", "took", "peak RSS", "swap out", "swap in", "waited")
_UNITS = ("", "", "s", "s", "s", "MiB", "MiB", "MiB", "s")


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _stolen(result: FleetResult) -> str:
    return mib_text(sum(guest.stolen_bytes for guest in result.guests))


def _row(guest: GuestResult) -> tuple[str, ...]:
    return (
        guest.name,
        guest.state,
        _seconds(guest.started),
        _seconds(guest.admitted),
        _seconds(guest.seconds),
        mib_text(guest.peak_rss_bytes),
        mib_text(guest.swap_out_bytes),
        mib_text(guest.swap_in_bytes),
        f"{guest.throttled_seconds:.1f}",
    )


def _foot(result: FleetResult) -> list[str]:
    env, settings = result.environment, result.settings
    asked = [
        f"{name} {result.asked[name]:,} ({result.answered[name]:,} answered, {result.late[name]:,} late, "
        f"{format_size(result.freed[name])}; first at {result.first[name]:.1f} s)"
        for name in result.first
    ]
    mechanisms = ", ".join(sorted({guest.mechanism for guest in result.guests}))
    verified, corrupt = (sum(getattr(g, f"{what}_frames") for g in result.guests) for what in ("verified", "corrupt"))
    spread = "spread" if settings["spread"] else "at once"
    lines = [
        f"max {format_size(result.max_bytes)}: most charged at once {mib_text(result.peak_charged_bytes)} MiB, most "
        f"RSS {mib_text(result.peak_rss_bytes)} MiB (statuses of 0.1 s, added up); "
        f"{result.rss_byte_seconds / 2**30 / 60:.2f} GiB*min of RSS; stolen {_stolen(result)} MiB; "
        f"swap traffic {mib_text(result.swap_bytes)} MiB; "
        f"{result.seconds:.1f} s",
        f"asked for: {'; '.join(asked) or 'nothing'}",
        f"most in any second: {mib_text(int(result.peak_evicted_rate))} MiB of cache evicted, "
        f"{mib_text(int(result.peak_disk_rate))} MiB read from the guests' disks",
        f"{verified:,} frames checked, {corrupt} wrong",
        f"mechanisms {mechanisms}; lines of defence {settings['order']}, {spread}; clock {settings['speed']}; "
        f"Linux {env['kernel']}, {env['cpus']} cores; one process a guest",
        "start: after the fleet's; has it: from there to the first row that isn't the boot; waited: for memory, at the "
        "gate",
    ]
    believed = [guest.believed for guest in result.guests if guest.believed.samples]
    sampled = [one.sampled for one in believed if one.sampled_samples]
    if result.least_max_bytes is not None:
        lines.append(
            f"the host's cgroups: max was lowered to {format_size(result.least_max_bytes)} to stay below their limits"
        )
    if believed:
        balloon, rss = (sum(getattr(one, k) for one in believed) / len(believed) for k in ("balloon", "rss"))
        estimated = f"; random samples the touched memory by {sum(sampled) / len(sampled):.1%}" if sampled else ""
        lines.append(
            "what a host would believe, mean error, of the RAM: balloon statistics miss what processes hold by "
            f"{balloon:.1%}, RSS by {rss:.1%}{estimated}"
        )
    lines += [
        f"{guest.name}: {guest.state}: {guest.detail}; {format_size(guest.returned_bytes)} went back to the budget"
        for guest in result.guests
        if guest.state != "ok"
    ]
    lines += [
        f"{guest.name}: messages refused: {', '.join(f'{n} {reason}' for reason, n in guest.refused.items())}"
        for guest in result.guests
        if guest.refused
    ]
    lines += [
        f"{guest.name}: {guest.lies} statuses beyond what its process holds" for guest in result.guests if guest.lies
    ]
    if result.refused_peers:
        lines.append(f"{result.refused_peers} connections of strangers refused")
    return [*lines, *result.notes, f"again: {result.command}"]


def print_fleet(result: FleetResult, console: Console) -> None:
    """Print a fleet's result."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for i, head in enumerate(_HEADS):
        table.add_column(Text(f"{head}\n{_UNITS[i]}"), justify="left" if i < 2 else "right", no_wrap=True)
    for guest in result.guests:
        table.add_row(*(Text(cell) for cell in _row(guest)))
    console.print(table)
    for line in _foot(result):
        console.print(Text(line), soft_wrap=not console.is_terminal)
