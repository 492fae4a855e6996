"""page_fault1, page_fault2: map, touch each page, unmap, over and over (will-it-scale's tests of these names).

page_fault1 maps anonymous memory; page_fault2 maps a file privately, so that each write copies a page of the cache. It
is by page_fault1 that free page reporting's cost was measured when it was proposed for Linux.

What is timed is the guest's work, apart: the C loops (clearing or copying the frame, in which the host's fault happens,
and the touch), and the guest kernel in Python around them. At the end, untimed, one more iteration over memory that
held something else is checked: anonymous pages must read as zero, private ones as the file.
"""

import time
from collections.abc import Iterator
from typing import Any, ClassVar

from emu.errors import BadValue
from emu.guest.process import Process
from emu.guest.ramfs import RamFile
from emu.guest.vma import Mapping
from emu.machine import Machine
from emu.observe.result import Measure
from emu.units import FRAME_SIZE, format_size, parse_duration, parse_ram_size
from emu.workloads import Step

__all__ = ["PageFault", "PageFault1", "PageFault2"]

_SEED = 0x5EED
_PART = 1 << 20


class PageFault:
    """size: bytes or text a thread; iterations; threads: vCPUs, each with its own share; hold: guest seconds at the
    end."""

    name: ClassVar[str]
    of_file: ClassVar[bool]

    def __init__(
        self, size: int | str = "128MiB", iterations: int = 10, threads: int = 1, hold: float | str = 10.0
    ) -> None:
        self.size = parse_ram_size(size, f"{self.name} size")
        if not 1 <= iterations <= 1_000_000:
            raise BadValue(f"iterations {iterations!r} must be from 1 to 1000000")
        if not 1 <= threads <= 1024:
            raise BadValue(f"threads {threads!r} must be from 1 to 1024")
        self.iterations = iterations
        self.threads = threads
        self.hold = parse_duration(hold, "hold")
        self.verified_frames = 0
        self.corrupt_frames = 0
        self.seconds = 0.0
        self.pages = 0
        self._native_ns = 0
        self._faults = 0

    @property
    def mapped(self) -> int:
        """Bytes that an iteration maps."""
        return self.size * self.threads

    def parameters(self) -> dict[str, Any]:
        return {"size": self.size, "iterations": self.iterations, "threads": self.threads, "hold": self.hold}

    def check_fits(self, ram_bytes: int) -> None:
        """Raise BadValue unless a guest of that RAM can do it."""
        needed = self.mapped * (2 if self.of_file else 1)
        if needed > ram_bytes:
            raise BadValue(
                f"{self.name} of {self.threads} x {format_size(self.size)} needs {format_size(needed)}: "
                f"the RAM has {format_size(ram_bytes)}"
            )

    def notes(self) -> list[str]:
        """Nothing."""
        return []

    def prepare(self, machine: Machine) -> tuple[Process, RamFile | None]:
        """Return the process, and the file that it maps."""
        self.check_fits(machine.guest.ram_bytes)
        process = machine.guest.spawn(self.name)
        file = None
        if self.of_file:
            file = machine.guest.create_file(self.mapped)
            file.fill(seed=_SEED)
        return process, file

    def iterate(self, machine: Machine, process: Process, file: RamFile | None) -> float:
        """Do one iteration; return the seconds it took."""
        before = machine.ram.stats()
        start = time.perf_counter()
        memory = process.mmap(self.mapped, file=file)
        memory.touch(threads=self.threads)
        memory.munmap()
        took = time.perf_counter() - start
        after = machine.ram.stats()
        self.seconds += took
        self.pages += memory.pages
        self._native_ns += after["vcpu_ns"] - before["vcpu_ns"]
        self._faults += after["pgfault"] - before["pgfault"]
        return took

    def steps(self, machine: Machine) -> Iterator[Step]:
        yield Step("boot")
        process, file = self.prepare(machine)
        if file is not None:
            yield Step(f"file of {format_size(file.size)}")
        tenth = max(self.iterations // 10, 1)
        for done in range(1, self.iterations + 1):
            self.iterate(machine, process, file)
            machine.run_for(0)  # the guest's timers run between iterations, if they are due
            if done % tenth == 0 or done == self.iterations:
                yield Step(f"iteration {done}")
        self._check(process, file)
        process.exit()
        if file is not None:
            file.unlink()
        yield Step("exited")
        if self.hold:
            yield Step(f"exited, {self.hold:g} s later", wait=self.hold)

    def _check(self, process: Process, file: RamFile | None) -> None:
        dirty = process.mmap(self.mapped)
        dirty.fill(seed=_SEED + 1)
        dirty.munmap()
        memory = process.mmap(self.mapped, file=file)
        memory.touch(threads=self.threads)
        self.verified_frames += memory.pages
        self.corrupt_frames += self._wrong(memory, file)
        memory.munmap()

    @staticmethod
    def _wrong(memory: Mapping, file: RamFile | None) -> int:
        wrong = 0
        for at in range(0, memory.size, _PART):
            n = min(_PART, memory.size - at)
            wanted = bytes(n) if file is None else file.content(at, n, seed=_SEED)
            got = memory.read(at, n)
            if got != wanted:
                wrong += sum(got[i : i + FRAME_SIZE] != wanted[i : i + FRAME_SIZE] for i in range(0, n, FRAME_SIZE))
        return wrong

    def measures(self) -> dict[str, Measure]:
        """Costs per page touched. C is the wall time of the vCPU loops, however many threads ran in them."""
        if not self.pages:
            return {}
        return {
            "iterations": Measure(
                self.pages * FRAME_SIZE / self.mapped / self.seconds,
                "iterations/s",
                "wall time, reporting's passes left out",
            ),
            "page": Measure(
                self.seconds * 1e9 / self.pages, "ns/page", "map, touch, unmap: wall time over all threads' pages"
            ),
            "page_c": Measure(self._native_ns / self.pages, "ns/page", "of that, C: clear or copy, fault, touch"),
            "page_python": Measure(
                (self.seconds * 1e9 - self._native_ns) / self.pages, "ns/page", "of that, the guest kernel in Python"
            ),
            "host_faults": Measure(self._faults / self.pages, "faults/page", "faults that the host served"),
        }


class PageFault1(PageFault):
    """Anonymous memory."""

    name: ClassVar[str] = "page_fault1"
    of_file: ClassVar[bool] = False


class PageFault2(PageFault):
    """A private mapping of a file that is in the page cache."""

    name: ClassVar[str] = "page_fault2"
    of_file: ClassVar[bool] = True
