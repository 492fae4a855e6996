"""What a page costs a process of this machine natively, and what a transition costs here, in ns.

The native prices are measured in C, without a guest (csrc/native.c), to be set beside counts of a guest's work in the
same run. A share of them is an estimate and marked so: the work of a real guest is more than its pages' native prices.
"""

import os
import tempfile
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from statistics import median
from time import perf_counter_ns

from emu._native import ffi, lib
from emu.errors import HostError
from emu.frames import Cause, Usage
from emu.ram import GuestRam

__all__ = ["Prices", "measure_prices", "native_fault", "native_read"]

_PAGES = 1 << 14
_CHUNK = 128 << 10  # bytes a call: what readahead reads at once, and cat(1), too
_ROUNDS = 10


@dataclass(frozen=True, slots=True)
class Prices:
    """ns of a 4 KiB page: a write fault, giving it back, reading it from the kernel's cache; and of a transition, each
    a compare-and-swap of its own, in a batch. Medians of some rounds."""

    fault: float
    free: float
    read: float
    transition: float

    def native(self, counters: Mapping[str, int]) -> float:
        """Return the ns that the cached reads, faults and frees of a run would take natively; its disk left out."""
        return (
            counters["guest_pgaccess"] * self.read
            + counters["guest_pgfault"] * self.fault
            + counters["guest_pgfree"] * self.free
        )


def _checked(err: int, what: str) -> None:
    if err:
        raise HostError(f"{what} can't be measured: {os.strerror(-err)}")


def native_fault(pages: int = _PAGES) -> tuple[float, float]:
    """Return the ns of a write fault of an anonymous 4 KiB page, and of giving it back."""
    fault, free = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    _checked(lib.emu_native_fault(pages, fault, free), "a fault")
    return fault[0] / pages, free[0] / pages


def native_read(fd: int, size: int, chunk: int = _CHUNK) -> float:
    """Return the ns of reading a page of a file that the kernel has cached, by pread() of `chunk` bytes: the second
    time of two."""
    ns = ffi.new("uint64_t *")
    for _ in range(2):
        _checked(lib.emu_native_read(fd, size, chunk, ns), "a read")
    return float(ns[0]) / (size / 4096)


def _transition(ram: GuestRam, numbers: "array[int]") -> float:
    start = perf_counter_ns()
    ram.say_frames(numbers, Usage.VOLATILE, Cause.PUT)
    ram.say_frames(numbers, Usage.STABLE, Cause.LOOKUP)
    return (perf_counter_ns() - start) / (2 * len(numbers))


def measure_prices(rounds: int = _ROUNDS) -> Prices:
    """Measure all, by turns; some tenths of a second. Raises HostError where usages can't be said."""
    size = _PAGES * 4096
    faults, frees, reads, transitions = [], [], [], []
    with tempfile.TemporaryFile(prefix="emu-") as file, GuestRam(size) as ram:
        file.write(Random(1).randbytes(size))
        file.flush()
        ram.track_usages()
        ram.fill(0, _PAGES, seed=1)
        numbers = array("I", range(_PAGES))
        for _ in range(rounds):
            fault, free = native_fault()
            faults.append(fault)
            frees.append(free)
            reads.append(native_read(file.fileno(), size))
            transitions.append(_transition(ram, numbers))
    return Prices(median(faults), median(frees), median(reads), median(transitions))
