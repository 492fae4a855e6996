"""emu run WORKLOAD: one workload on one machine, as a table of phases."""

import contextlib
import json
from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import App, Parameter
from rich.console import Console

from emu.cli.command import again, whole
from emu.cli.fleet import fleet
from emu.cli.live import open_view
from emu.cli.output import Output
from emu.errors import BadValue, EmuError, GuestError
from emu.machine import DEFAULT_SPEED, Machine
from emu.mechanisms import MECHANISMS
from emu.observe.result import RunResult
from emu.report.table import print_run
from emu.units import format_size, parse_ram_size
from emu.workloads import Workload
from emu.workloads.build import Build
from emu.workloads.cache import Cache
from emu.workloads.fio import Fio
from emu.workloads.grep import Grep
from emu.workloads.load import Load
from emu.workloads.memhog import Memhog
from emu.workloads.page_fault import PageFault, PageFault1, PageFault2
from emu.workloads.runner import run

__all__ = ["app"]

app = App(name="run", help="Run a workload on a machine, or a fleet of them, and print a table.")
app.default(fleet)


def _mechanisms_help() -> str:
    known = (f"{name} ({', '.join(cls.parsers)})" if cls.parsers else name for name, cls in MECHANISMS.items())
    return f"NAME[:key=value,...]: {', '.join(known)}."


Whole = Annotated[int, Parameter(converter=whole)]
Size = Annotated[str, Parameter(allow_leading_hyphen=True)]


@Parameter(name="*")
@dataclass(kw_only=True)
class Common:
    """Flags common to all workloads."""

    mechanism: Annotated[str, Parameter(name=["--mechanism", "-m"], help=_mechanisms_help())] = "reporting"
    on_return: Annotated[str, Parameter(name="--return")] = "now"
    "What the host does with returned memory: now, grace:SECONDS (aside so long), lazy (MADV_FREE), lazy:aside."
    ram: Size = "1GiB"
    "Guest RAM."
    speed: str = f"{DEFAULT_SPEED:g}"
    "Guest seconds a second: a factor, real, or step (guest time passes only where nothing is done)."
    seed: Whole = 1
    "Seed of the content."
    service: Literal["auto", "inline", "thread"] = "auto"
    "Who serves faults."
    uffd: Literal["auto", "full", "user", "off"] = "auto"
    "The rung of the privilege ladder to stand on."
    guest_thp: Literal["always", "madvise", "never"] = "madvise"
    "The guest's transparent huge page setting."
    disable: str = ""
    "Switch features off, as EMU_DISABLE does: uffd,full,sigbus,poison,process_madvise,move,wp,lz4,..."
    cpus: Whole = 1
    "The guest's CPUs: they share the per-CPU lists' high mark out."
    workingset: bool = False
    "Estimate the guest's working set as a host can, and show it beside the truth."
    live: bool = False
    "Watch it: a map of the RAM, curves, rates; ? shows the keys. In a pipe, a line a second."
    as_json: Annotated[bool, Parameter(name="--json")] = False
    "Print one JSON object."


def _run(workload: Workload, common: Common) -> RunResult:
    if common.live and common.as_json:
        raise BadValue("--live draws where --json prints: give one of the two")
    status = Console(stderr=True, highlight=False)
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
            cpus=common.cpus,
        ) as machine,
        contextlib.ExitStack() as stack,
    ):
        if common.workingset:
            machine.host.watch_working_set(seed=common.seed)
        if common.live:
            view = stack.enter_context(open_view(machine, f"emu run {workload.name}", Output()))
            result = run(
                machine, workload, seed=common.seed, command=again(), on_step=view.on_step, on_sample=view.on_sample
            )
            view.ended()
            return result
        line = stack.enter_context(status.status("starting"))
        step = "boot"

        def on_step(name: str) -> None:
            nonlocal step
            step = name

        return run(
            machine,
            workload,
            seed=common.seed,
            command=again(),
            on_step=on_step,
            on_sample=lambda s: line.update(
                f"after {step}: guest uses {format_size(s.guest_used_bytes)}, RSS {format_size(s.rss_bytes)}"
            ),
        )


def _finish(result: RunResult, common: Common) -> int:
    if common.as_json:
        print(json.dumps(result.as_json(), indent=2))
    else:
        print_run(result, Output())
    if result.error is not None:
        raise GuestError(result.error)
    if result.corrupt_frames:
        raise EmuError(f"{result.corrupt_frames} of {result.verified_frames} frames held wrong bytes")
    return 0


@app.command
def memhog(
    *,
    size: Size = "512MiB",
    rounds: Whole = 2,
    hold: str = "40s",
    thp: bool = False,
    common: Common | None = None,
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


def _page_fault(workload: PageFault, common: Common | None) -> int:
    common = common or Common()
    workload.check_fits(parse_ram_size(common.ram))
    return _finish(_run(workload, common), common)


@app.command(name="page_fault1")
def page_fault1(
    *,
    size: Size = "128MiB",
    iterations: Whole = 10,
    threads: Whole = 1,
    hold: str = "10s",
    common: Common | None = None,
) -> int:
    """Map anonymous memory, touch each page, unmap, over and over (will-it-scale's page_fault1).

    Parameters
    ----------
    size
        Memory a thread.
    iterations
        How often.
    threads
        vCPUs that touch, each its own share.
    hold
        Guest time to wait at the end.
    """
    return _page_fault(PageFault1(size, iterations, threads, hold), common)


@app.command(name="page_fault2")
def page_fault2(
    *,
    size: Size = "128MiB",
    iterations: Whole = 10,
    threads: Whole = 1,
    hold: str = "10s",
    common: Common | None = None,
) -> int:
    """The same over a private mapping of a file in the page cache: each write copies its page (page_fault2).

    Parameters
    ----------
    size
        Memory a thread, and of the file.
    iterations
        How often.
    threads
        vCPUs that touch, each its own share.
    hold
        Guest time to wait at the end.
    """
    return _page_fault(PageFault2(size, iterations, threads, hold), common)


@app.command
def load(*, path: str, hold: str = "40s", common: Common | None = None) -> int:
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
    return _finish(result, common)


@app.command
def cache(
    *,
    path: str,
    working_set: float = 0.2,
    every: str = "5s",
    hold: str = "150s",
    memory: Size = "64MiB",
    common: Common | None = None,
) -> int:
    """Read a real tree, go on using part of it, and read all of it again; every byte is compared with the file.

    Parameters
    ----------
    path
        A directory of this host; it is only read.
    working_set
        The share of it that is read every few seconds; 0: the guest is idle.
    every
        Guest time between two readings of the working set.
    hold
        Guest time that it is used, after each reading of everything.
    memory
        Anonymous memory that the guest holds besides.
    """
    common = common or Common()
    workload = Cache(path, working_set, every=every, hold=hold, memory=memory, seed=common.seed)
    return _finish(_run(workload, common), common)


@app.command
def grep(
    *,
    path: str,
    pattern: str = "include",
    passes: Whole = 1,
    hold: str = "60s",
    memory: Size = "0",
    common: Common | None = None,
) -> int:
    """Search every file of a tree for a text; the matches are compared with those in the files themselves.

    Parameters
    ----------
    path
        A directory of this host; it is only read.
    pattern
        What to search for, as it stands.
    passes
        How often.
    hold
        Guest time to wait at the end.
    memory
        Anonymous memory that the guest holds besides.
    """
    common = common or Common()
    return _finish(_run(Grep(path, pattern, passes, hold, memory=memory, seed=common.seed), common), common)


@app.command
def build(
    *,
    path: str | None = None,
    jobs: Whole = 100,
    memory: Size = "32MiB",
    program: Size = "0",
    hold: str = "60s",
    common: Common | None = None,
) -> int:
    """The shape of a compiler run: short processes, sources read, objects written, a link, clean, and idle.

    Parameters
    ----------
    path
        A directory of this host with sources, which are only read; made up without it.
    jobs
        How many processes.
    memory
        Anonymous memory of the largest.
    program
        Bytes of the compiler, which each process maps and runs through once; 0: none.
    hold
        Guest time to wait after the link, and after clean.
    """
    common = common or Common()
    return _finish(_run(Build(path, jobs, memory, program=program, hold=hold, seed=common.seed), common), common)


@app.command
def fio(
    *,
    size: Size = "256MiB",
    block: Size = "4KiB",
    ops: Whole = 20000,
    reads: float = 0.7,
    zipf: float = 0.0,
    hold: str = "60s",
    folder: str | None = None,
    common: Common | None = None,
) -> int:
    """Random reads and writes of blocks over one large file, checked in the guest and on the disk.

    Parameters
    ----------
    size
        Of the file.
    block
        Of an operation.
    ops
        How many.
    reads
        The share of reads.
    zipf
        How uneven: 0 draws all blocks alike, 1 and more some far more often.
    hold
        Guest time to wait at the end.
    folder
        Where on this host the file is made, and removed again; the system's temporary folder by default.
    """
    common = common or Common()
    workload = Fio(size, block, ops, reads=reads, zipf=zipf, hold=hold, folder=folder, seed=common.seed)
    return _finish(_run(workload, common), common)
