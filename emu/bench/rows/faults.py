"""Rows of the fault path: single write faults by each service, and how two vCPUs scale."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from time import perf_counter_ns
from typing import Literal

from emu.bench.row import Row, Sides
from emu.bench.stage import Stage
from emu.ram import GuestRam
from emu.units import FRAME_SIZE

__all__ = ["ROWS"]

_FRAMES = 16384
_FEWER = 2048  # where a fault takes 75 us
_MORE = 65536  # where two threads meet in the kernel's locks, or don't

Open = Callable[[Stage], AbstractContextManager[Sides]]


def _touch(ram: GuestRam, frames: int, threads: int = 1) -> float:
    start = perf_counter_ns()
    ram.touch(0, frames, threads=threads)
    return perf_counter_ns() - start


def _inline(frames: int = _FRAMES, threads: int = 1) -> float:
    with GuestRam(frames * FRAME_SIZE, service="inline") as ram:
        return _touch(ram, frames, threads) / frames


def fault_inline() -> Open:
    @contextmanager
    def open_(stage: Stage) -> Iterator[Sides]:
        yield Sides(_inline, lambda: stage.reference.measure("fault_inline", pages=_FRAMES) / _FRAMES)

    return open_


def fault_thread(where: Literal["same core", "other core"]) -> Open:
    @contextmanager
    def open_(stage: Stage) -> Iterator[Sides]:
        cpu = stage.cpu if where == "same core" else stage.second_cpu
        frames = _FRAMES if where == "same core" else _FEWER

        def ours() -> float:
            with GuestRam((frames + 1) * FRAME_SIZE, service="thread", service_cpu=cpu) as ram:
                ram.touch(frames)  # the service sleeps in poll by the time that the clock starts
                return _touch(ram, frames) / frames

        yield Sides(ours, lambda: stage.reference.measure("fault_thread", pages=frames + 1, cpu=cpu) / frames)

    return open_


def fault_kernel() -> Open:
    @contextmanager
    def open_(stage: Stage) -> Iterator[Sides]:
        def ours() -> float:
            with GuestRam(_FRAMES * FRAME_SIZE, uffd="off") as ram:
                return _touch(ram, _FRAMES) / _FRAMES

        yield Sides(ours, lambda: stage.reference.measure("fault_kernel", pages=_FRAMES) / _FRAMES)

    return open_


def scaling() -> Open:
    """Speed with two vCPUs over speed with one."""

    @contextmanager
    def open_(stage: Stage) -> Iterator[Sides]:
        def reference() -> float:
            alone, together = (
                stage.reference.measure("fault_inline", pages=_MORE, threads=threads) for threads in (1, 2)
            )
            return alone / together

        yield Sides(lambda: _inline(_MORE, 1) / _inline(_MORE, 2), reference)

    return open_


ROWS = [
    Row(
        "fault-write-inline",
        "one 4 KiB write fault: SIGBUS in the faulting thread, UFFDIO_COPY",
        "ns/fault",
        "lower",
        fault_inline(),
        target=1.10,
        service="inline",
    ),
    Row(
        "fault-write-inline+thread",
        "the same, another thread of the process running",
        "ns/fault",
        "lower",
        fault_inline(),
        service="inline",
        second_thread=True,
    ),
    Row(
        "fault-write-thread",
        "one 4 KiB write fault: poll, read, UFFDIO_COPY in a thread on the same core",
        "ns/fault",
        "lower",
        fault_thread("same core"),
        target=1.10,
        service="thread",
        placement="service on the vCPU's core",
    ),
    Row(
        "fault-write-thread-far",
        "the same, the thread on another core",
        "ns/fault",
        "lower",
        fault_thread("other core"),
        service="thread",
        placement="service on another core",
    ),
    Row(
        "fault-write-kernel",
        "one 4 KiB write fault without userfaultfd: the kernel zero-fills, the access keeps the books",
        "ns/fault",
        "lower",
        fault_kernel(),
        service="off",
    ),
    Row(
        "fault-scaling",
        "two vCPUs faulting inline: their speed over that of one",
        "x",
        "higher",
        scaling(),
        target=0.95,
        service="inline",
        placement="two cores",
        both=True,
    ),
]
