"""emu doctor: what this machine can do, found by trying, and what emu does instead."""

import functools
import json
from typing import Annotated

from cyclopts import Parameter
from rich.table import Table

from emu.cli.output import Output
from emu.clock import StepClock
from emu.errors import EmuError
from emu.machine import Machine
from emu.mechanisms import MECHANISMS
from emu.observe.environment import check_features, describe_limits, environment
from emu.units import format_size

__all__ = ["doctor"]


def _try(name: str) -> str:
    orders = "order" in MECHANISMS[name].parsers  # with the default order a guest as small as this reports nothing
    with Machine("64MiB", f"{name}:order=0" if orders else name, clock=StepClock()) as machine:
        memory = machine.guest.spawn("doctor").mmap("8MiB")
        memory.touch()
        peak = machine.rss_bytes
        memory.munmap()
        machine.guest.drain_pages()
        machine.run_for(60)
        after = machine.rss_bytes
    if name == "none" and after != peak:
        raise EmuError(f"RSS changed from {peak} to {after}")
    if orders and after:
        raise EmuError(f"{after} bytes stayed resident of {peak}")
    return f"RSS {format_size(peak)} -> {format_size(after)} after a free"


def doctor(*, as_json: Annotated[bool, Parameter(name="--json")] = False) -> int:
    """Say what this machine can do for emu, by trying it.

    Parameters
    ----------
    as_json
        Print one JSON object.
    """
    facts = environment()
    attempts = {name: functools.partial(_try, name) for name in MECHANISMS}
    checks = check_features(attempts)
    limits = describe_limits(facts)
    if as_json:
        print(
            json.dumps(
                {
                    "schema": "emu.doctor/1",
                    "environment": facts,
                    "checks": [
                        {"name": c.name, "ok": c.ok, "seen": c.seen, "instead": c.instead or None} for c in checks
                    ],
                    "limits": limits,
                },
                indent=2,
            )
        )
        return 0
    console = Output()
    swap = format_size(facts["swap_bytes"]) if facts["swap_bytes"] else "none"
    limit = "none" if facts["cgroup_limit_bytes"] is None else format_size(facts["cgroup_limit_bytes"])
    address = "unlimited" if facts["rlimit_as_bytes"] is None else format_size(facts["rlimit_as_bytes"])
    for name, value in (
        (
            "kernel",
            f"Linux {facts['kernel']} {facts['machine']}, {facts['cpus']} cores, {format_size(facts['memory_bytes'])}",
        ),
        ("userfaultfd", f"{facts['uffd_rung']}" + (f", by {facts['uffd_door']}" if facts["uffd_door"] else "")),
        ("", f"not higher because: {facts['uffd_why']}" if facts["uffd_why"] else ""),
        ("host THP", f"{facts['thp']} (guest RAM is MADV_NOHUGEPAGE: RSS is exact to the frame)"),
        ("swap", swap),
        ("cgroup limit", limit),
        ("overcommit", f"mode {facts['overcommit_memory']}"),
        ("RLIMIT_AS", address),
    ):
        if value:
            console.print(f"{name:13} {value}", soft_wrap=True)
    console.print()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("tried", "", "seen", "instead"):
        table.add_column(column, overflow="fold")
    for check in checks:
        mark = "[green]yes[/green]" if check.ok else "[yellow]no[/yellow]"
        table.add_row(check.name, mark, check.seen, check.instead)
    console.print(table)
    for note in limits:
        console.print(f"\nnote: {note}", soft_wrap=True)
    return 0
