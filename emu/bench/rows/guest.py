"""Rows of the guest's kernel and of watching it: absolute, since nothing else does the same work.

The allocator is Python, and its speed isn't a guest's; what these rows guard is that it doesn't drown what is real.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from time import perf_counter_ns

from rich.console import Console, Group

from emu.bench.row import Row, Sides
from emu.bench.stage import Stage
from emu.clock import StepClock
from emu.guest.buddy import Buddy
from emu.machine import Machine
from emu.report.live import LiveState, compose, map_cells
from emu.units import FRAME_SIZE
from emu.workloads.page_fault import PageFault1

__all__ = ["ROWS"]

_PAIRS = 20000
_RESIDENT = 4 << 30
_WINDOW = 2.1  # seconds: longer than reporting's delay, so that each round has a pass

Open = Callable[[Stage], AbstractContextManager[Sides]]


def _pairs(work: Callable[[Buddy, int], None], *, held: bool = False) -> Open:
    @contextmanager
    def open_(stage: Stage) -> Iterator[Sides]:
        buddy = Buddy(1 << 18)
        if held:
            buddy.alloc(0)

        def ours() -> float:
            start = perf_counter_ns()
            work(buddy, _PAIRS)
            return _PAIRS * 1e6 / (perf_counter_ns() - start)

        yield Sides(ours)

    return open_


def _one_by_one(buddy: Buddy, n: int) -> None:
    alloc, free = buddy.alloc, buddy.free
    for _ in range(n):
        free(alloc(0), 0)


def _all_then_all(buddy: Buddy, n: int) -> None:
    alloc, free = buddy.alloc, buddy.free
    pfns = [alloc(0) for _ in range(n)]
    for pfn in pfns:
        free(pfn, 0)


@contextmanager
def kernel_pairs(stage: Stage) -> Iterator[Sides]:
    with Machine("1GiB", "none", clock=StepClock(), uffd="off") as machine:
        alloc, free = machine.guest.alloc_frames, machine.guest.free_pages

        def ours() -> float:
            start = perf_counter_ns()
            for _ in range(_PAIRS):
                pfn, count, _ = alloc(1)[0]
                free([(pfn, count)])
            return _PAIRS * 1e6 / (perf_counter_ns() - start)

        yield Sides(ours)


@contextmanager
def bulk(stage: Stage) -> Iterator[Sides]:
    """Allocate and free 1 GiB of frames, by block: the frames of both count."""
    buddy = Buddy(1 << 18)

    def ours() -> float:
        start = perf_counter_ns()
        buddy.free_bulk(buddy.alloc_bulk(1 << 18))
        return (2 << 18) * 1e3 / (perf_counter_ns() - start)

    yield Sides(ours)


@contextmanager
def snapshot(stage: Stage) -> Iterator[Sides]:
    """A 64 GiB guest with 4 GiB resident, of which 32 MiB were given back and touched since the last one."""
    with Machine("64GiB", "reporting", clock=StepClock(), fault_around=512) as machine:  # to fill it sooner
        machine.ram.touch(0, _RESIDENT >> 12)
        machine.snapshot()

        def ours() -> float:
            machine.ram.discard([(0, 8192)])
            machine.ram.touch(0, 8192)
            start = perf_counter_ns()
            machine.snapshot()
            return (perf_counter_ns() - start) / 1e6

        yield Sides(ours)


@contextmanager
def look(stage: Stage) -> Iterator[Sides]:
    """What the live view does each time: a snapshot with a map, composed for 100 x 30, and written to nowhere."""
    width, height = 100, 30
    with Machine("1GiB", "reporting", clock=StepClock()) as machine, open(os.devnull, "w") as nowhere:
        memory = machine.guest.spawn("bench").mmap("512MiB")
        memory.touch()
        memory.madvise_dontneed("100MiB", "200MiB")
        console = Console(file=nowhere, width=width, height=height, force_terminal=True)
        state = LiveState("bench")

        def ours() -> float:
            start = perf_counter_ns()
            for _ in range(10):
                state.add(machine.snapshot(cells=map_cells(width, height)))
                console.print(Group(*compose(state, width, height)))
            return (perf_counter_ns() - start) / 1e7

        yield Sides(ours)


@contextmanager
def page_fault1(stage: Stage) -> Iterator[Sides]:
    """Iterations for two seconds, in which reporting makes a pass, in a guest with reporting and in one without."""
    with Machine("1GiB", "reporting", speed="real") as with_it, Machine("1GiB", "none", speed="real") as without:

        def side(machine: Machine) -> Callable[[], float]:
            workload = PageFault1("128MiB")
            process, file = workload.prepare(machine)

            def measure() -> float:
                pages = took = 0.0
                while took < _WINDOW:
                    start = perf_counter_ns()
                    workload.iterate(machine, process, file)
                    machine.run_for(0)  # reporting's pass, when it is due
                    took += (perf_counter_ns() - start) / 1e9
                    pages += workload.mapped // FRAME_SIZE
                return took * 1e9 / pages

            return measure

        yield Sides(side(with_it), side(without))


ROWS = [
    Row("buddy-pair", "alloc and free of one frame, by turns, out of a block of order 10 (nobody looks at the splits)",
        "k pairs/s", "higher", _pairs(_one_by_one), target=400, own_process=True),
    Row("buddy-pair-held", "the same while a neighbour is allocated: neither splits nor merges",
        "k pairs/s", "higher", _pairs(_one_by_one, held=True), target=400, own_process=True),
    Row("kernel-pair", "the way that a guest's pages go: one frame from the per-CPU list and back, through the kernel",
        "k pairs/s", "higher", kernel_pairs, own_process=True),
    Row("buddy-batch", "20,000 single frames allocated, then freed in the same order",
        "k pairs/s", "higher", _pairs(_all_then_all), target=400, own_process=True),
    Row("buddy-bulk", "1 GiB of frames allocated and freed, by block",
        "M frames/s", "higher", bulk, target=200, own_process=True),
    Row("snapshot-64GiB", "a snapshot of a 64 GiB guest, 4 GiB of it resident, 32 MiB given back and touched since",
        "ms", "lower", snapshot, target=2.0, own_process=True),
    Row("live-look", "one look of the live view at 100 x 30: snapshot, map, lines",
        "ms", "lower", look, own_process=True),
    Row("page_fault1-reporting", "page_fault1 (128 MiB an iteration, Python and all) with reporting on, beside off",
        "ns/page", "lower", page_fault1, service="inline", difference=True),
]  # fmt: skip
