"""emu run WORKLOAD: one workload on one machine, as a table of phases."""

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter
from rich.console import Console

from emu.errors import BadValue, EmuError
from emu.machine import DEFAULT_SPEED, Machine
from emu.observe.result import RunResult
from emu.report.table import print_run
from emu.units import format_size, parse_ram_size
from emu.workloads import Workload
from emu.workloads.load import Load
from emu.workloads.memhog import Memhog
from emu.workloads.runner import run

__all__ = ["app"]

app = App(name="run", help="Run a workload on a machine and print a table of its phases.")


@Parameter(name="*")
@dataclass
class Common:
    """Flags common to all workloads."""

    mechanism: Annotated[str, Parameter(name=["--mechanism", "-m"])] = "reporting"
    "NAME[:key=value,...]: none, reporting (order, delay, poison, assigned_device)."
    on_return: Annotated[str, Parameter(name="--return")] = "now"
    "What the host does with returned memory: now (discard) or lazy (MADV_FREE)."
    ram: str = "1GiB"
    "Guest RAM."
    speed: str = f"{DEFAULT_SPEED:g}"
    "Guest seconds a second: a factor, real, or step (guest time passes only where nothing is done)."
    seed: int = 1
    "Seed of the content."
    service: Literal["auto", "inline", "thread"] = "auto"
    "Who serves faults."
    uffd: Literal["auto", "full", "user", "off"] = "auto"
    "The rung of the privilege ladder to stand on."
    guest_thp: Literal["always", "madvise", "never"] = "madvise"
    "The guest's transparent huge page setting."
    disable: str = ""
    "Switch features off, as EMU_DISABLE does: uffd,full,sigbus,poison,process_madvise,..."
    as_json: Annotated[bool, Parameter(name="--json")] = False
    "Print one JSON object."


def _run(workload: Workload, common: Common) -> RunResult:
    status = Console(stderr=True, highlight=False)
    command = "emu " + shlex.join(sys.argv[1:])
    with (
        Machine(
            common.ram,
            common.mechanism,
            on_return=common.on_return,
            speed=common.speed,
            guest_thp=common.guest_thp,
            service=common.service,
            uffd=common.uffd,
            disable=common.disable,
        ) as machine,
        status.status("starting") as line,
    ):
        step = "boot"

        def on_step(name: str) -> None:
            nonlocal step
            step = name

        return run(
            machine,
            workload,
            seed=common.seed,
            command=command,
            on_step=on_step,
            on_sample=lambda s: line.update(
                f"after {step}: guest uses {format_size(s.guest_used_bytes)}, RSS {format_size(s.rss_bytes)}"
            ),
        )


def _finish(result: RunResult, common: Common) -> int:
    if common.as_json:
        print(json.dumps(result.as_json(), indent=2))
    else:
        # a narrow terminal scrolls sideways rather than losing figures
        console = Console(highlight=False)
        console.width = max(console.width, 79)
        print_run(result, console)
    if result.corrupt_frames:
        raise EmuError(f"{result.corrupt_frames} of {result.verified_frames} frames held wrong bytes")
    return 0


@app.command
def memhog(
    common: Common | None = None,
    *,
    size: str = "512MiB",
    rounds: int = 2,
    hold: str = "40s",
    thp: bool = False,
) -> int:
    """Allocate, fill, check and free memory; wait; again, so that the freed frames fault back.

    Parameters
    ----------
    size
        Memory a round.
    rounds
        How often.
    hold
        Guest time to wait after each free.
    thp
        Ask for huge pages (MADV_HUGEPAGE).
    """
    common = common or Common()
    workload = Memhog(size, rounds, hold, common.seed, thp)
    if workload.size > parse_ram_size(common.ram):
        raise BadValue(f"--size {size} is larger than the RAM, {common.ram}")
    return _finish(_run(workload, common), common)


@app.command
def load(common: Common | None = None, *, path: Path, hold: str = "40s") -> int:
    """Read every file of a directory into guest memory, free half, fault back, and compare every SHA-256.

    Parameters
    ----------
    path
        A directory of this host.
    hold
        Guest time to wait after the free.
    """
    common = common or Common()
    workload = Load(path, hold)
    result = _run(workload, common)
    for what, paths in (
        ("unreadable, left out", workload.unreadable),
        ("changed on the disk meanwhile", workload.changed),
    ):
        if paths:
            result.notes.append(f"{len(paths)} files {what}: {paths[0]}{' ...' if len(paths) > 1 else ''}")
    return _finish(result, common)
