"""Inactive: the guest hands over clean page cache that nobody has used for a while, and keeps calling it its own.

What the linux-mm thread on free page reporting called the inactive queue (January 2020). The pages stay in the cache:
for the guest nothing changes, MemFree and MemAvailable among them. The host takes their frames aside; a touch brings
one back as long as it is there, and when it has been dropped, the access is a discard fault: the page leaves the cache
and is read from the disk again (vfs.py, discarded()).

Age goes by generations as in aging.py, on the same lists: at the end of each a walk lets what wasn't accessed for half
of `seconds` sink to the inactive list, and hands over what wasn't accessed for `seconds`, clean and unmapped, once
until it is accessed again. Nothing is freed here: no guest code runs when the host takes the memory.
"""

from typing import TYPE_CHECKING

from emu.errors import BadValue
from emu.guest.aging import GENERATIONS
from emu.ranges import runs_of
from emu.units import FRAME_SIZE
from emu.virtio.inactive import InactiveQueue

if TYPE_CHECKING:
    from emu.guest.kernel import GuestKernel

__all__ = ["Inactive"]


class Inactive:
    """The driver. seconds: guest seconds without an access until a page is handed over."""

    def __init__(self, kernel: "GuestKernel", queue: InactiveQueue, *, seconds: float) -> None:
        if not 0.4 <= seconds <= 86400:
            raise BadValue(f"inactive seconds {seconds!r} must be from 0.4 to 86400")
        self._kernel = kernel
        self._queue = queue
        self.seconds = seconds
        #: guest time of the next walk
        self.next_walk = 0.0
        self.counters = dict.fromkeys(("inactive_walks", "inactive_scanned", "inactive_sunk", "inactive_handed"), 0)
        kernel.memmap.next_generation()
        self._again()

    def _again(self) -> None:
        self.next_walk = self._kernel.clock.now() + self.seconds / GENERATIONS
        self._kernel.timers.at(self.next_walk, self._work, self)

    def _work(self) -> None:
        memmap = self._kernel.memmap
        memmap.next_generation()
        frames, scanned, sunk = memmap.age(GENERATIONS // 2, GENERATIONS, hand_over=True)
        self.counters["inactive_walks"] += 1
        self.counters["inactive_scanned"] += scanned
        self.counters["inactive_sunk"] += sunk
        self.counters["inactive_handed"] += len(frames)
        if frames:
            self._queue.hand_over(list(runs_of(sorted(frames))))
        self._again()

    @property
    def pending(self) -> bool:
        """Whether there may be cache that gets older and hasn't been handed over."""
        return self._kernel.cached_bytes // FRAME_SIZE > self.counters["inactive_handed"]

    def stop(self) -> None:
        """End it: what was handed over stays the host's to take."""
        self._kernel.timers.cancel(self)
