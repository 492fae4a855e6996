"""Rows of taking back and of bulk access: discard, install, touch on resident memory, a pass of free page reporting."""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from mmap import mmap
from time import perf_counter_ns

from emu.bench.row import Row, Sides
from emu.bench.stage import Stage
from emu.clock import StepClock
from emu.errors import EmuError
from emu.machine import Machine
from emu.ram import GuestRam
from emu.ranges import Ranges
from emu.units import FRAME_SIZE

__all__ = ["ROWS", "bare_discard"]

_LARGE = 131072  # frames: 512 MiB
_SCATTERED = 4096
_INSTALLED = 16384
_TOUCHED = 65536  # 256 MiB: with less, what the caches keep of it from round to round is a matter of luck
_TIMES = 24
_REPORT_ORDER = 10
_WHOLE = Ranges.of([(0, _LARGE)])
_EVERY_OTHER = Ranges.of((gfn, 1) for gfn in range(0, 2 * _SCATTERED, 2))

Open = Callable[[Stage], AbstractContextManager[Sides]]


def _discard(ram: GuestRam, ranges: Ranges) -> float:
    start = perf_counter_ns()
    taken = ram.discard(ranges)
    took = perf_counter_ns() - start
    if taken != ranges.frames:
        raise EmuError(f"discard took {taken} frames of {ranges.frames}")
    return took / taken


def bare_discard(stage: Stage, ram: GuestRam, ranges: Ranges) -> float:
    """Discard ranges of a RAM by a madvise each; return the ns a frame."""
    # behind the RAM's back; its books are put right afterwards, which costs nothing here
    pages = (ctypes.c_uint64 * len(ranges.flat)).from_buffer(ranges.flat)
    start = perf_counter_ns()
    err = stage.reference.loops.discard(ctypes.c_void_p(ram.address), pages, ctypes.c_size_t(len(ranges)))
    took = perf_counter_ns() - start
    if err:
        raise EmuError(f"madvise: {os.strerror(err)}")
    ram.discard(ranges)
    return took / ranges.frames


def discard(ranges: Ranges, frames: int) -> Open:
    """Discard ranges of a RAM that is resident, by one call of ours and by a madvise each."""

    @contextmanager
    def open_(stage: Stage) -> Iterator[Sides]:
        with GuestRam(frames * FRAME_SIZE) as ram:

            def side(work: Callable[[], float]) -> Callable[[], float]:
                def measure() -> float:
                    ram.touch(0, frames)
                    return work()

                return measure

            yield Sides(side(lambda: _discard(ram, ranges)), side(lambda: bare_discard(stage, ram, ranges)))

    return open_


def install(run: int) -> Open:
    @contextmanager
    def open_(stage: Stage) -> Iterator[Sides]:
        buffer = mmap(-1, run * FRAME_SIZE)  # page-aligned, as the reference's
        buffer.write(bytes(range(256)) * (len(buffer) // 256))
        batches = [range(start, start + run) for start in range(0, _INSTALLED, run)]

        def ours() -> float:
            with GuestRam(_INSTALLED * FRAME_SIZE) as ram:
                start = perf_counter_ns()
                for gfns in batches:
                    ram.install(gfns, buffer)
                return (perf_counter_ns() - start) / _INSTALLED

        yield Sides(ours, lambda: stage.reference.measure("install", pages=_INSTALLED, run=run) / _INSTALLED)

    return open_


def touch(write: bool, loop_name: str) -> Open:
    @contextmanager
    def open_(stage: Stage) -> Iterator[Sides]:
        loop = getattr(stage.reference.loops, loop_name)
        with GuestRam(_TOUCHED * FRAME_SIZE) as ram:
            ram.touch(0, _TOUCHED)
            pages = ctypes.c_void_p(ram.address), ctypes.c_uint64(_TOUCHED)

            def timed(work: Callable[[], object]) -> float:
                start = perf_counter_ns()
                for _ in range(_TIMES):
                    work()
                return _TOUCHED * _TIMES * 1e3 / (perf_counter_ns() - start)

            yield Sides(lambda: timed(lambda: ram.touch(0, _TOUCHED, write=write)), lambda: timed(lambda: loop(*pages)))

    return open_


@contextmanager
def report_pass(stage: Stage) -> Iterator[Sides]:
    """One pass over freed memory: two reports of 32 blocks of order 10, all resident, 256 MiB."""
    with (
        Machine("1GiB", f"reporting:order={_REPORT_ORDER}", clock=StepClock()) as machine,
        GuestRam("1GiB") as bare,
    ):
        guest = machine.guest
        memory = guest.spawn("bench").mmap("768MiB")
        while machine.guest.reporting is not None and guest.next_timer is not None:
            machine.run_for(2)  # what was free at boot
        frames = 0

        def ours() -> float:
            nonlocal frames
            memory.touch()
            memory.madvise_dontneed()
            guest.drain_pages()
            before = machine.ram.stats()["discard_frames"]
            # the step clock stands still: run_for() is the pass and nothing else
            start = perf_counter_ns()
            machine.run_for(2)
            took = perf_counter_ns() - start
            frames = machine.ram.stats()["discard_frames"] - before
            while guest.next_timer is not None:
                machine.run_for(2)
            return took / frames

        def reference() -> float:
            block = 1 << _REPORT_ORDER
            ranges = Ranges.of((start, block) for start in range(0, frames // block * block, block))
            bare.touch(0, ranges.frames)
            return bare_discard(stage, bare, ranges)

        ours()  # how many frames a pass takes
        yield Sides(ours, reference)


ROWS = [
    Row("discard-large", "one discard of 512 MiB, beside one madvise(MADV_DONTNEED)", "ns/frame", "lower",
        discard(_WHOLE, _LARGE), target=1.05),
    Row("discard-large+thread", "the same, another thread of the process running", "ns/frame", "lower",
        discard(_WHOLE, _LARGE), target=1.05, second_thread=True),
    Row("discard-scattered", "4,096 single frames in one call, beside a loop of madvise", "ns/frame", "lower",
        discard(_EVERY_OTHER, 2 * _SCATTERED), target=0.5),
    Row("discard-scattered+thread", "the same, another thread of the process running", "ns/frame", "lower",
        discard(_EVERY_OTHER, 2 * _SCATTERED), target=0.5, second_thread=True),
    Row("install-512", "install of 512 frames a call, beside UFFDIO_COPY of as many", "ns/frame", "lower",
        install(512), target=1.1),
    Row("touch-write", "touching resident frames, beside a C loop of atomic ORs (ours asks ahead for lines)",
        "frames/us", "higher", touch(True, "touch_write"), target=0.9),
    Row("touch-write-ahead", "the same, beside a C loop that asks ahead for lines, too", "frames/us", "higher",
        touch(True, "touch_write_ahead"), target=0.9),
    Row("touch-read", "reading resident frames, beside a C loop of loads", "frames/us", "higher",
        touch(False, "touch_read"), target=0.9),
    Row("report-pass", "a pass of free page reporting (order 10), Python and all, beside its madvise calls",
        "ns/frame", "lower", report_pass, target=1.5),
    Row("report-pass+thread", "the same, another thread of the process running", "ns/frame", "lower",
        report_pass, target=1.5, second_thread=True),
]  # fmt: skip
