"""CMM2's price as tables: what is said, on any machine; what others do for the same memory; what it comes to here."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from emu.units import format_size, mib_text

__all__ = ["print_counts", "print_shares"]

Rows = Sequence[Mapping[str, Any]]
_COUNTS = ("reads", "faults", "maps", "mkwrites", "frees", "fills", "transitions")


def _table(first: str, heads: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1), header_style="bold")
    table.add_column(first, no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def _notes(lines: Sequence[str], console: Console) -> None:
    for line in lines:
        console.print(Text(line, style="dim"), soft_wrap=not console.is_terminal)
    console.print()


def _per_thousand(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or not value else f"{value:.1f}"


def _forms(works: Rows) -> dict[str, list[Mapping[str, Any]]]:
    return {form: [work for work in works if work["form"] == form] for form in dict.fromkeys(w["form"] for w in works)}


def print_counts(study: Mapping[str, Any], console: Console) -> None:
    """Print what doesn't depend on a machine."""
    table = _table("4 KiB pages", ("read", "faulted", "mapped", "wrote", "freed", "filled", "said", "of 1,000"))
    for form, works in _forms(study["work"]).items():
        table.add_row(Text(form, style="bold"))
        for work in works:
            counts = [
                f"{work[name]:,}" for name in ("reads", "faults", "maps", "mkwrites", "frees", "fills", "transitions")
            ]
            table.add_row(f" {work['workload']}", *counts, _per_thousand(work["transitions_per_1000"]))
    console.print(table)
    _notes(
        [
            "of 1,000: transitions of 1,000 operations: pages read from the cache, faulted in, written through a "
            "shared mapping, and freed. mapped: of those faulted in, pages of files as they are in the cache; filled: "
            "read from the disk. Stepped clock, seed 1: the same on any machine",
        ],
        console,
    )
    _print_kinds(study["work"], console)
    hooks, space = study["hooks"], study["space"]
    lines = [f"{len(hooks)} functions of the guest's kernel say something, and why:"]
    lines += [f"  {function}: {', '.join(causes)}" for function, causes in hooks.items()]
    lines.append(
        f"{space['bits']} bits a page, two of the guest's and two of the host's, in a byte that the host keeps anyway: "
        f"{space['bytes_per_gib']:,} bytes a GiB. {space['page_flags']} page flags more in the guest"
    )
    _notes(lines, console)
    _print_reclaim(study, console)


def _print_kinds(works: Rows, console: Console) -> None:
    # a table a form: causes and kinds by workload
    for form, mine in _forms(works).items():
        table = _table("of 1,000", [work["workload"] for work in mine])
        table.add_row(Text(form, style="bold"))
        kinds = sorted({(said["cause"], said["from"], said["to"]) for work in mine for said in work["said"]})
        of = [{(said["cause"], said["from"], said["to"]): said["per_1000"] for said in w["said"]} for w in mine]
        for kind in kinds:
            cells = [_per_thousand(said[kind]) if kind in said else "-" for said in of]
            table.add_row(f"  {kind[0]} {kind[1]}->{kind[2]}", *cells)
        console.print(table)
        console.print()


def _print_reclaim(study: Mapping[str, Any], console: Console) -> None:
    wanted, scenario = study["scenario"]["wanted"], study["scenario"]
    heads = ("before", "said", "scanned", "freed", "reported", "messages", "back", "read")
    table = _table(f"{format_size(wanted)} back", heads)
    for row in study["reclaim"]:
        counts = [f"{row[name]:,}" for name in ("before", "said", "scanned", "freed", "reported", "messages")]
        table.add_row(row["mechanism"], *counts, mib_text(row["back"]), mib_text(row["read_again"]))
    console.print(table)
    _notes(
        [
            f"A guest has read a tree of {mib_text(scenario['tree'])} MiB, and used a fifth of it for "
            f"{scenario['idle']:.0f} s. before: transitions until then.",
            "To give memory back: pages said of, scanned, freed, reported, messages; MiB that came back; and MiB that "
            "were read again when the guest read all once more.",
        ],
        console,
    )


def print_shares(study: Mapping[str, Any], console: Console) -> None:
    """Print what the counts come to at each price, of this machine's native work."""
    costs: Mapping[str, float] = study["costs"]
    table = _table("~ of native", list(costs))
    table.add_row("", *(Text(f"{ns:,.1f} ns" if ns < 100 else f"{ns:,.0f} ns", style="dim") for ns in costs.values()))
    for form, works in _forms(study["work"]).items():
        table.add_row(Text(form, style="bold"))
        for work in works:
            table.add_row(f"  {work['workload']}", *(_percent(work["shares"][name]) for name in costs))
    if not console.is_terminal:
        console.width = max(console.width, 20 + 14 * len(costs))
    console.print(table)
    prices, ghz = study["prices"], study["ghz"]
    cycles = "" if ghz is None else f"100 cycles at {ghz:.1f} GHz (s390's ESSA takes more), "
    _notes(
        [
            f"~: transitions x price, of what the same pages cost a native process here, in C: a fault "
            f"{prices['fault']:,.0f} ns, mapping a cached page {prices['map']:.0f}, freeing one {prices['free']:.0f}, "
            f"reading a cached one {prices['read']:.0f}, reading it in {prices['fill']:,.0f} more (the disk of "
            "TMPDIR). Writes through mappings have no price",
            "in a row, one by one: measured here, eight pages a step and one; exchange: a bare one, in memory. Models: "
            f"{cycles}hypercalls of 1 and 2 us",
        ],
        console,
    )


def _percent(share: float | None) -> str:
    if share is None:
        return "-"
    value = share * 100
    if not value:
        return "0"
    return f"~{value:,.0f} %" if value >= 100 else f"~{value:.1f} %" if value >= 1 else f"~{value:.2f} %"
