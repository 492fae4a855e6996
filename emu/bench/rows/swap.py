"""Rows of taking from a running guest: set aside, swap out and in beside the kernel's own zram, a budget's decision."""

import ctypes
import mmap
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from time import perf_counter_ns

from emu import _native
from emu._native import ffi
from emu.bench.row import Row, Sides
from emu.bench.stage import Stage
from emu.errors import EmuError, HostError
from emu.host.budget import Budget, GuestView, Limits, Request
from emu.ram import GuestRam
from emu.ranges import Ranges
from emu.units import FRAME_SIZE

__all__ = ["ROWS"]

_PAGES = 16384  # 64 MiB
_ALL = Ranges.of([(0, _PAGES)])
_ZRAM = Path("/sys/class/zram-control")
_MADV_PAGEOUT = 21
_MADV_COLLAPSE = 25

Open = Callable[[Stage], AbstractContextManager[Sides]]


def _content(noise: float) -> bytes:
    """Pages of which LZ4 leaves about `noise`: so much of each is random, the rest a short period."""
    rng = random.Random(1)
    period = b"emu, a guest's memory on a desk. "
    tail = (period * 128)[: FRAME_SIZE - int(noise * FRAME_SIZE)]
    return b"".join(rng.randbytes(FRAME_SIZE - len(tail)) + tail for _ in range(_PAGES))


@contextmanager
def _zram() -> Iterator[None]:
    """A swap device of our own, in memory, by lz4. Raises HostError where it can't be had."""
    if os.geteuid():
        raise HostError("the reference is swap on zram, which only root can set up")
    if not (_ZRAM / "hot_add").exists() or not (mkswap := shutil.which("mkswap", path="/usr/sbin:/sbin:/usr/bin:/bin")):
        raise HostError("the reference is swap on zram, and this kernel has no zram-control, or there is no mkswap")
    libc = ctypes.CDLL(None, use_errno=True)
    number = int((_ZRAM / "hot_add").read_text())
    block, device = Path(f"/sys/block/zram{number}"), f"/dev/zram{number}"
    try:
        (block / "comp_algorithm").write_text("lz4")
        (block / "disksize").write_text(str(4 * _PAGES * FRAME_SIZE))
        if not Path(device).exists():
            os.mknod(device, 0o660 | 0o060000, os.makedev(*map(int, (block / "dev").read_text().split(":"))))
        subprocess.run([mkswap, device], check=True, capture_output=True)
        if libc.swapon(device.encode(), 0):
            raise HostError(f"swapon {device}: {os.strerror(ctypes.get_errno())}")
        try:
            yield
        finally:
            libc.swapoff(device.encode())
    except (OSError, subprocess.CalledProcessError) as error:
        raise HostError(f"no swap on zram: {error}") from error
    finally:
        (block / "reset").write_text("1")
        (_ZRAM / "hot_remove").write_text(str(number))


class _Kernel:
    """The same content in a plain mapping, which the kernel swaps."""

    def __init__(self, stage: Stage, content: bytes) -> None:
        self._loops = stage.reference.loops
        self._content = content
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._map = mmap.mmap(-1, len(content), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self.address, self._lease = _native.address_of(self._map)

    def fill(self) -> None:
        """Make all of it resident, written."""
        ctypes.memmove(self.address, self._content, len(self._content))

    def out(self) -> float:
        """Swap it out; return ns a page."""
        start = perf_counter_ns()
        err = self._libc.madvise(ctypes.c_void_p(self.address), ctypes.c_size_t(len(self._content)), _MADV_PAGEOUT)
        took = perf_counter_ns() - start
        if err:
            raise EmuError(f"MADV_PAGEOUT: {os.strerror(ctypes.get_errno())}")
        return took / _PAGES

    def touch(self, order: "ctypes.Array[ctypes.c_uint64]") -> float:
        """Read a byte of each page in this order; return ns a page."""
        start = perf_counter_ns()
        self._loops.touch_list(ctypes.c_void_p(self.address), order, ctypes.c_size_t(_PAGES))
        return (perf_counter_ns() - start) / _PAGES

    def close(self) -> None:
        ffi.release(self._lease)
        self._map.close()


@contextmanager
def _both(stage: Stage, noise: float, readahead: int) -> Iterator[tuple[GuestRam, _Kernel, Callable[[], None]]]:
    content = _content(noise)
    with _zram(), GuestRam(_PAGES * FRAME_SIZE) as ram:
        ram.open_store(readahead=readahead)
        kernel = _Kernel(stage, content)
        try:
            yield ram, kernel, lambda: ram.install(range(_PAGES), content)
        finally:
            kernel.close()


def _swap_out(ram: GuestRam) -> float:
    start = perf_counter_ns()
    went = ram.swap_out(_ALL)
    took = perf_counter_ns() - start
    if went != _PAGES:
        raise EmuError(f"{went} of {_PAGES} frames were swapped out")
    return took / _PAGES


def swap_out(noise: float) -> Open:
    """All of 64 MiB, by one call and one thread, into a store that is warm."""

    @contextmanager
    def open_(stage: Stage) -> Iterator[Sides]:
        with _both(stage, noise, 8) as (ram, kernel, fill):

            def ours() -> float:
                fill()
                took = _swap_out(ram)
                ram.swap_back()
                return took / 1e3

            def reference() -> float:
                kernel.fill()
                return kernel.out() / 1e3

            yield Sides(ours, reference)

    return open_


def swap_in(*, sequential: bool) -> Open:
    """All of it touched again, in order with readahead of 32, or in no order with none."""
    order = list(range(_PAGES))
    if not sequential:
        random.Random(2).shuffle(order)

    @contextmanager
    def open_(stage: Stage) -> Iterator[Sides]:
        pages = (ctypes.c_uint64 * _PAGES)(*order)
        ranges = Ranges.of((gfn, 1) for gfn in order)
        with _both(stage, 0.5, 32 if sequential else 1) as (ram, kernel, fill):

            def ours() -> float:
                fill()
                _swap_out(ram)
                start = perf_counter_ns()
                ram.touch_ranges(ranges)
                return (perf_counter_ns() - start) / _PAGES / 1e3

            def reference() -> float:
                kernel.fill()
                kernel.out()
                return kernel.touch(pages) / 1e3

            yield Sides(ours, reference)

    return open_


@contextmanager
def set_aside(stage: Stage) -> Iterator[Sides]:
    """64 MiB in one call: runs of 2,048 frames."""
    with GuestRam(_PAGES * FRAME_SIZE) as ram:

        def ours() -> float:
            ram.touch(0, _PAGES)
            start = perf_counter_ns()
            taken = ram.set_aside(_ALL)
            took = perf_counter_ns() - start
            if taken != _PAGES:
                raise EmuError(f"{taken} of {_PAGES} frames were set aside")
            ram.bring_back()
            return took / _PAGES

        yield Sides(ours)


@contextmanager
def set_aside_huge(stage: Stage) -> Iterator[Sides]:
    """64 MiB of huge pages in one call. Guest RAM has none of its own, so its mapping is collapsed behind its back."""
    libc = ctypes.CDLL(None, use_errno=True)
    with GuestRam(_PAGES * FRAME_SIZE) as ram:

        def advise(advice: int) -> None:
            if libc.madvise(ctypes.c_void_p(ram.address), ctypes.c_size_t(ram.size), advice):
                raise HostError(f"no huge pages to be had: madvise({advice}): {os.strerror(ctypes.get_errno())}")

        def ours() -> float:
            ram.touch(0, _PAGES)
            start = perf_counter_ns()
            taken = ram.set_aside(_ALL)
            took = perf_counter_ns() - start
            if taken != _PAGES or (huge := _huge_bytes()) < ram.size:
                raise EmuError(f"{taken} of {_PAGES} frames were set aside, {huge} bytes of them as huge pages")
            ram.bring_back()
            return took / (_PAGES // 512) / 1e3

        advise(mmap.MADV_HUGEPAGE)
        ram.touch(0, _PAGES)
        advise(_MADV_COLLAPSE)
        yield Sides(ours)


def _huge_bytes() -> int:
    smaps = Path("/proc/self/smaps_rollup").read_text()
    return next(int(line.split()[1]) << 10 for line in smaps.splitlines() if line.startswith("AnonHugePages:"))


@contextmanager
def decide(stage: Stage) -> Iterator[Sides]:
    """64 guests, above high: epochs and purges under way, all turns due."""
    limits = Limits(40 << 30, 44 << 30, 64 << 30)
    guests = [GuestView(f"g{i}", (700 + i) << 20, frozenset(Request)) for i in range(64)]

    def ours() -> float:
        budget = Budget(limits, spread=False)
        now, most = 0.0, 0
        for _ in range(40):
            now += 0.05
            start = perf_counter_ns()
            asks = budget.decide(now, guests)
            most = max(most, perf_counter_ns() - start)
            for ask in asks:
                budget.answered(ask, 0)
        return most / 1e6

    yield Sides(ours)


ROWS = [
    Row("set-aside", "UFFDIO_MOVE out of the guest, runs of 2,048 frames", "ns/page", "lower", set_aside, 150),
    Row(
        "set-aside+thread", "the same, with a second thread running", "ns/page", "lower", set_aside, second_thread=True
    ),
    Row("set-aside-huge", "the same of 2 MiB huge pages", "us/block", "lower", set_aside_huge, 5.0),
    Row(
        "set-aside-huge+thread",
        "the same, with a second thread running",
        "us/block",
        "lower",
        set_aside_huge,
        20.0,
        second_thread=True,
    ),
    *(
        Row(
            f"swap-out-{int(noise * 100)}",
            f"64 MiB of pages that LZ4 brings to {noise:.0%}, one worker; MADV_PAGEOUT to zram, lz4",
            "us/page",
            "lower",
            swap_out(noise),
            1 / 1.5,
        )
        for noise in (0.25, 0.5, 0.75)
    ),
    Row(
        "swap-in-random",
        "4 KiB touches in no order, no readahead; of zram",
        "us/page",
        "lower",
        swap_in(sequential=False),
        1.2,
        "inline",
        "the faulting vCPU's core",
    ),
    Row(
        "swap-in-sequential",
        "touches in order, readahead 32; of zram",
        "us/page",
        "lower",
        swap_in(sequential=True),
        1 / 1.8,
        "inline",
        "the faulting vCPU's core",
    ),
    Row("budget-64", "a budget's slowest decision for 64 guests", "ms", "lower", decide, 5.0, own_process=True),
]
