"""Rows of CMM2's price: what it takes to say something of a frame, to take by it, and what share it is of native work.

A transition is a compare-and-swap of the frame's byte, so its reference is a bare atomic exchange over the same bytes.
From Python the reference is a call of the core that does nothing. The shares are what a guest's kernel does more to say
what its pages are worth, measured where it does it (the same C loop over a page cache, or over frames, with page states
on and without them), beside what the work itself costs a native process (csrc/native.c): a fault and its page given
back; a page read from a file that the kernel has cached, 128 KiB a call.
"""

import ctypes
import tempfile
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from time import perf_counter_ns
from typing import Any

from emu._native import ffi, lib
from emu.bench.prices import native_fault, native_read
from emu.bench.row import Row, Sides
from emu.bench.stage import Stage
from emu.clock import StepClock
from emu.errors import EmuError
from emu.frames import Cause, FrameState, Said, Usage
from emu.guest.file import File
from emu.guest.pcp import spans
from emu.guest.readahead import Window
from emu.machine import Machine
from emu.ram import GuestRam
from emu.ranges import Ranges

__all__ = ["ROWS"]

_FRAMES = 1 << 16
_TURNS = 8  # there and back
_PYTHON = 1 << 14
_FILE = 64 << 20
_PIECE = 256  # pages of a lookup: what a read of a megabyte finds
_HELD = 1 << 15  # frames


@contextmanager
def _said_and_exchanged(stage: Stage | None) -> Iterator[tuple[GuestRam, Callable[[], float]]]:
    # a RAM whose frames are resident and stable, and the exchange over its bytes, ns a frame
    with GuestRam(_FRAMES * 4096) as ram:
        ram.track_usages()
        ram.fill(0, _FRAMES, seed=1)
        numbers = array("I", range(_FRAMES))

        def exchange() -> float:
            assert stage is not None
            loop = stage.reference.loops.exchange
            at, n = ctypes.c_void_p(ram.bytes_address), ctypes.c_size_t(len(numbers))
            gfns = ctypes.c_void_p(numbers.buffer_info()[0])
            start = perf_counter_ns()
            for _ in range(_TURNS):
                for usage in (Usage.VOLATILE, Usage.STABLE):
                    loop(at, gfns, n, int(usage) << lib.EMU_USAGE_SHIFT | FrameState.RESIDENT)
            return (perf_counter_ns() - start) / (2 * _TURNS * _FRAMES)

        yield ram, exchange


@contextmanager
def by_number(stage: Stage | None) -> Iterator[Sides]:
    """Frames by number, each a step of its own; two calls a turn."""
    with _said_and_exchanged(stage) as (ram, exchange):
        numbers = array("I", range(_FRAMES))

        def ours() -> float:
            start = perf_counter_ns()
            for _ in range(_TURNS):
                ram.say_frames(numbers, Usage.VOLATILE, Cause.PUT)
                ram.say_frames(numbers, Usage.STABLE, Cause.LOOKUP)
            return (perf_counter_ns() - start) / (2 * _TURNS * _FRAMES)

        yield Sides(ours, None if stage is None else exchange)


@contextmanager
def in_ranges(stage: Stage) -> Iterator[Sides]:
    """One range: eight frames a step."""
    with _said_and_exchanged(stage) as (ram, exchange):
        ranges = Ranges.of([(0, _FRAMES)])

        def ours() -> float:
            start = perf_counter_ns()
            for _ in range(_TURNS):
                ram.say(ranges, Usage.VOLATILE, Cause.PUT)
                ram.say(ranges, Usage.STABLE, Cause.LOOKUP)
            return (perf_counter_ns() - start) / (2 * _TURNS * _FRAMES)

        yield Sides(ours, exchange)


@contextmanager
def from_python(stage: Stage) -> Iterator[Sides]:
    """A frame a call, and a call that does nothing; both in a loop over frames."""
    with GuestRam(_PYTHON * 4096) as ram:
        ram.track_usages()
        ram.fill(0, _PYTHON, seed=1)
        sayers = [ram.sayer(Usage.VOLATILE, Cause.PUT), ram.sayer(Usage.STABLE, Cause.LOOKUP)]
        frames = range(_PYTHON)

        def ours() -> float:
            said = 0
            start = perf_counter_ns()
            for gfn, say in sayers:
                for frame in frames:
                    gfn[0] = frame
                    said |= say()
            took = perf_counter_ns() - start
            if said != Said.CHANGED:
                raise EmuError("not every frame changed")
            return took / (2 * _PYTHON)

        def reference() -> float:
            nothing, said = lib.emu_stats_count, 0
            start = perf_counter_ns()
            for _ in sayers:
                for _frame in frames:
                    said |= nothing()
            return (perf_counter_ns() - start) / (2 * _PYTHON)

        yield Sides(ours, reference)


@contextmanager
def steal(stage: Stage | None) -> Iterator[Sides]:
    """Volatile frames in ranges, taken by turns; millions a second."""
    with GuestRam(_FRAMES * 4096) as ram:
        ram.track_usages()

        def ours() -> float:
            ram.say([(0, _FRAMES)], Usage.STABLE)
            ram.fill(0, _FRAMES, seed=1)
            ram.say([(0, _FRAMES)], Usage.VOLATILE)
            start = perf_counter_ns()
            taken = ram.steal(_FRAMES)
            took = perf_counter_ns() - start
            if taken != _FRAMES:
                raise EmuError(f"{taken} of {_FRAMES} frames were taken")
            return taken * 1e3 / took

        yield Sides(ours)


def _allocate_and_free(machine: Machine) -> Callable[[], float]:
    # What page states add to, of a fault and an unmap: the hooks of the allocator over frames that it gave, one by one,
    # as faults come.
    guest = machine.guest
    native = guest.memmap.native
    frames = [frame + k for frame, count in spans(guest.alloc_frames(_HELD, owner=None)) for k in range(count)]
    runs = Ranges.of((frame, 1, 0) for frame in frames)
    flat = ffi.from_buffer("struct emu_range[]", runs.flat)

    def measure() -> float:
        start = perf_counter_ns()
        for _ in range(_TURNS):
            lib.emu_pages_allocated(native, flat, len(runs))
            lib.emu_pages_use(native, flat, len(runs), lib.EMU_OWNER_ANON)
            lib.emu_pages_release(native, flat, len(runs))
        return (perf_counter_ns() - start) / (_TURNS * _HELD)

    return measure


def _get_and_put(machine: Machine) -> Callable[[], float]:
    # of a read of cached pages: the lookup that takes references, and the end of them
    buffer = bytearray(1 << 20)
    file = machine.guest.open("data")
    for at in range(0, _FILE, len(buffer)):
        file.readinto(at, buffer)
    return _lookups(machine, file)


def _get_and_put_scattered(machine: Machine) -> Callable[[], float]:
    # the same of a file whose pages came in by chance, so that neighbours in it lie anywhere in memory
    file = machine.guest.open("data")
    pages = list(range(_FILE // 4096))
    Random(1).shuffle(pages)
    for page in pages:
        file.inode.read_around(Window(page, 1, 0), page)
    return _lookups(machine, file)


def _lookups(machine: Machine, file: File) -> Callable[[], float]:
    guest = machine.guest
    native, space = guest.memmap.native, file.inode.space.native
    runs, nr_runs = ffi.new("struct emu_range[]", _PIECE), ffi.new("size_t *")
    how = lib.EMU_LOOKUP_GET | lib.EMU_LOOKUP_MARK
    pages = _FILE // 4096

    def measure() -> float:
        start = perf_counter_ns()
        for first in range(0, pages, _PIECE):
            if lib.emu_space_lookup(native, space, first, _PIECE, how, runs, _PIECE, nr_runs) != _PIECE:
                raise EmuError("a cached page isn't found")
            lib.emu_pages_put(native, runs, nr_runs[0])
        return (perf_counter_ns() - start) / pages

    return measure


def _share(prepare: Callable[[Machine], Callable[[], float]], native: Callable[[Path], float]) -> Any:
    @contextmanager
    def open_(stage: Stage) -> Iterator[Sides]:
        with tempfile.TemporaryDirectory(prefix="emu-bench-") as folder, ExitStack() as stack:
            Path(folder, "data").write_bytes(Random(1).randbytes(_FILE))
            machines = [
                stack.enter_context(Machine("256MiB", name, disk=folder, disk_read_only=True, clock=StepClock()))
                for name in ("cmm2", "none")
            ]
            with_states, without = map(prepare, machines)

            def ours() -> float:
                # the smallest of some: what disturbs either side is larger than what they differ by
                return min(with_states() for _ in range(8)) - min(without() for _ in range(8))

            yield Sides(ours, lambda: native(Path(folder, "data")))

    return open_


def _fault_and_free(_data: Path) -> float:
    return sum(native_fault())


def _cached_read(data: Path) -> float:
    with open(data, "rb", buffering=0) as file:
        return native_read(file.fileno(), _FILE)


ROWS = [
    Row("cmm2-batched", "transitions by frame number in one C call, beside a bare atomic exchange over the same bytes",
        "ns/frame", "lower", by_number, target=4.0),
    Row("cmm2-transition", "the same alone", "ns/frame", "lower", by_number, target=20.0, own_process=True),
    Row("cmm2-range", "transitions of a range in one C call, eight frames a step, beside the same exchange",
        "ns/frame", "lower", in_ranges, target=4.0),
    Row("cmm2-python", "one transition a call from Python, beside a call of the core that does nothing",
        "ns/call", "lower", from_python, target=2.0),
    Row("cmm2-steal", "volatile frames taken, in ranges", "M frames/s", "higher", steal, target=1.0, own_process=True),
    Row("cmm2-page_fault1", "transitions of a page's allocation and free, page by page, beside a native fault and free",
        "ns/page", "lower", _share(_allocate_and_free, _fault_and_free), target=0.01),
    Row("cmm2-grep", "transitions of a cached page's read, eight in a row, beside a native read of a cached page",
        "ns/page", "lower", _share(_get_and_put, _cached_read), target=0.02),
    Row("cmm2-scattered", "the same where a file's pages lie anywhere in memory, so that each is a step of its own",
        "ns/page", "lower", _share(_get_and_put_scattered, _cached_read)),
]  # fmt: skip
