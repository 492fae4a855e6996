"""The hypervisor of one guest.

Its RAM, what is done with returned memory, what is taken without asking, and the devices.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from emu.errors import BadValue
from emu.frames import StealPolicy
from emu.gate import Gate
from emu.host.aside import Aside
from emu.host.balloon import Balloon
from emu.host.discard import Discard
from emu.host.disk import DirectoryDisk, ImageDisk, open_disk
from emu.host.inactive import InactiveDevice
from emu.host.workingset import WorkingSet
from emu.ram import GuestRam
from emu.timers import Timers
from emu.units import FRAME_SIZE, parse_size

if TYPE_CHECKING:
    from emu.host.squeeze import Squeeze
    from emu.host.stealing import Stealing

__all__ = ["Hypervisor"]

_IDLE = object()  # whose timer the scan of accessed bits is


class Hypervisor:
    """Owns a GuestRam and what takes memory back from it. now: guest time in seconds; the host's timers go by it."""

    def __init__(self, ram: GuestRam, *, now: Callable[[], float], on_return: str = "now") -> None:
        self.ram = ram
        self.now = now
        self.timers = Timers()
        self.aside = Aside(ram, self.timers, now)
        self.discard = Discard(ram, self.aside, on_return)
        self.balloon = Balloon(ram.frames, self.discard)
        self.inactive = InactiveDevice(ram.frames, self.aside)
        #: guest seconds of an idle age: between two scans of accessed bits
        self.idle_period = 0.0
        self.working_set: WorkingSet | None = None
        #: what a mechanism holds the footprint to, and by
        self.gate: Gate | None = None
        self.squeeze: Squeeze | None = None
        self.stealing: Stealing | None = None
        self._disks: list[DirectoryDisk | ImageDisk] = []

    def close(self) -> None:
        """Let go of what outlives the RAM. After it is closed."""
        if self.gate is not None:
            self.gate.close()

    def run_timers(self) -> None:
        """Run what is due: the host's own work goes on while its guest is paused."""
        self.timers.run_due(self.now())

    @property
    def disks(self) -> list[DirectoryDisk | ImageDisk]:
        """The guest's disks."""
        return self._disks

    def add_disk(self, path: str | Path, *, read_only: bool = False) -> DirectoryDisk | ImageDisk:
        """Open a directory, or an image file, as a disk for the guest."""
        self._disks.append(open_disk(path, read_only=read_only))
        return self._disks[-1]

    def pressure(self, size: int | str | None = None) -> int:
        """Memory is wanted: what came back, or is aside, goes, oldest first; return the bytes that went.

        size: bytes or text; None: all that there is.
        """
        frames = None if size is None else -(-parse_size(size, "pressure") // FRAME_SIZE)
        return self.discard.pressure(frames) * FRAME_SIZE

    def swap_out(self, size: int | str) -> int:
        """Take memory from the guest without asking, what is idle longest first; return the bytes really taken.

        A store must be open (GuestRam.open_store, or a mechanism that has one). Without tracked accesses all frames
        count as alike, and are taken in turn.
        """
        wanted = parse_size(size, "swap_out") // FRAME_SIZE
        if wanted < 1:
            raise BadValue(f"swap_out {size!r} must be at least a frame, {FRAME_SIZE} bytes")
        taken = 0
        while taken < wanted:
            victims = self.ram.victims(min(wanted - taken, 16384))
            went = self.ram.swap_out(victims) if len(victims) else 0
            if not went:
                break
            taken += went
        return taken * FRAME_SIZE

    def steal(self, size: int | str, policy: StealPolicy | None = None) -> int:
        """Take memory by what the guest says of it: unused, volatile, clean potentially volatile. Return the bytes.

        No instruction of the guest runs for it. It needs a mechanism in which the guest says something (cmm2).
        """
        wanted = parse_size(size, "steal")
        if self.stealing is None:
            raise BadValue("the guest says nothing of its pages: use the mechanism cmm2")
        return self.stealing.steal(wanted, policy)

    def track_idle(self, period: float) -> None:
        """Scan accessed bits each so many guest seconds from now on, so that swap_out() takes what is idle longest."""
        self.ram.track_accesses()
        self.timers.cancel(_IDLE)
        self.idle_period = period

        def scan() -> None:
            self.ram.scan_ages()
            self.timers.at(self.now() + period, scan, _IDLE)

        self.timers.at(self.now() + period, scan, _IDLE)

    def end_idle(self) -> None:
        """Scan no more."""
        self.timers.cancel(_IDLE)

    def watch_working_set(self, **settings: float) -> WorkingSet:
        """Start estimating the guest's working set (emu.host.workingset)."""
        self.working_set = WorkingSet(self.ram, self.timers, self.now, **settings)
        return self.working_set

    @property
    def footprint_bytes(self) -> int:
        """Bytes that the host really holds for this guest: RSS, frames aside, the store's pool, the host's tables."""
        return self.ram.footprint_bytes
