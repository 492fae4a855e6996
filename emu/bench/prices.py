"""What a page costs a process of this machine natively, and what a transition costs here, in ns.

The native prices are measured in C, without a guest (csrc/native.c), to be set beside counts of a guest's work in the
same run. A share of them is an estimate and marked so: the work of a real guest is more than its pages' native prices.
"""

import os
import tempfile
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from statistics import median
from time import perf_counter_ns

from emu._native import ffi, lib
from emu.errors import HostError
from emu.frames import Cause, Usage
from emu.ram import GuestRam
from emu.ranges import Ranges
from emu.units import FRAME_SIZE

__all__ = ["Prices", "measure_prices", "native_fault", "native_map", "native_read"]

_PAGES = 1 << 14
_CHUNK = 128 << 10  # bytes a call: what readahead reads at once, and cat(1), too
_ROUNDS = 10


@dataclass(frozen=True, slots=True)
class Prices:
    """ns of a 4 KiB page. Medians of some rounds.

    A write fault; giving it back; mapping it from the kernel's cache, as it maps those around it; reading it from
    there; what reading it in takes more, the disk's time among it (of the file system of TMPDIR; in one that is memory,
    nothing); a transition that is a compare-and-swap of its own, in a batch; and one of a page in a row of pages, eight
    a step.
    """

    fault: float
    free: float
    map: float
    read: float
    fill: float
    transition: float
    in_a_row: float

    def native(self, counters: Mapping[str, int]) -> float:
        """Return the native ns of a run's reads, faults and frees, and of reading in what wasn't cached."""
        return (
            counters["guest_pgaccess"] * self.read
            + (counters["guest_pgfault"] - counters["guest_filemap_map_pages"]) * self.fault
            + counters["guest_filemap_map_pages"] * self.map
            + counters["guest_pgfree"] * self.free
            + counters["guest_pgpgin"] // (FRAME_SIZE // 1024) * self.fill
        )


def _checked(err: int, what: str) -> None:
    if err:
        raise HostError(f"{what} can't be measured: {os.strerror(-err)}")


def native_fault(pages: int = _PAGES) -> tuple[float, float]:
    """Return the ns of a write fault of an anonymous 4 KiB page, and of giving it back."""
    fault, free = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    _checked(lib.emu_native_fault(pages, fault, free), "a fault")
    return fault[0] / pages, free[0] / pages


def native_map(fd: int, pages: int) -> float:
    """Return the ns of mapping a page that the kernel has cached and reading a byte of it, in order."""
    ns = ffi.new("uint64_t *")
    _checked(lib.emu_native_map(fd, pages, ns), "a mapping")
    return float(ns[0]) / pages


def native_read(fd: int, size: int, chunk: int = _CHUNK, times: int = 2) -> float:
    """Return the ns of reading a page of a file by pread() of `chunk` bytes, the last of some times: then it is
    cached."""
    ns = ffi.new("uint64_t *")
    for _ in range(times):
        _checked(lib.emu_native_read(fd, size, chunk, ns), "a read")
    return float(ns[0]) / (size / 4096)


def _transition(say: Callable[[Usage, Cause], object]) -> float:
    start = perf_counter_ns()
    say(Usage.VOLATILE, Cause.PUT)
    say(Usage.STABLE, Cause.LOOKUP)
    return (perf_counter_ns() - start) / (2 * _PAGES)


def measure_prices(rounds: int = _ROUNDS) -> Prices:
    """Measure all, by turns; some tenths of a second. Raises HostError where usages can't be said."""
    size = _PAGES * 4096
    faults, frees, maps, reads, fills, transitions, in_a_row = [], [], [], [], [], [], []
    with tempfile.TemporaryFile(prefix="emu-") as file, GuestRam(size) as ram:
        file.write(Random(1).randbytes(size))
        file.flush()
        os.fsync(file.fileno())  # what isn't on the disk stays in the cache
        ram.track_usages()
        ram.fill(0, _PAGES, seed=1)
        numbers, row = array("I", range(_PAGES)), Ranges.of([(0, _PAGES)])
        for _ in range(rounds):
            fault, free = native_fault()
            faults.append(fault)
            frees.append(free)
            reads.append(native_read(file.fileno(), size))
            maps.append(native_map(file.fileno(), _PAGES))
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            fills.append(max(native_read(file.fileno(), size, times=1) - reads[-1], 0.0))
            transitions.append(_transition(lambda usage, cause: ram.say_frames(numbers, usage, cause)))
            in_a_row.append(_transition(lambda usage, cause: ram.say(row, usage, cause)))
    return Prices(*map(median, (faults, frees, maps, reads, fills, transitions, in_a_row)))
