"""PressureDriver: the guest's side of a host that is short of memory: epochs, and the purge request.

An epoch asks for cache that was last used before a point in time. The guest stamps each access with a generation
(csrc/lru.c) that lasts a second of guest time, and keeps nothing else: a request is a walk of the two file lists from
their cold ends, which lets what is old sink and then go, up to a bound. What is freed is drained off the per-CPU lists
at once, and reported after reporting's delay.

A purge writes what is dirty, drops all clean cache, splits what is half unmapped, and makes reporting's passes without
their delay. Both run in the guest's kernel: they wait for what it is doing.
"""

from typing import TYPE_CHECKING

from emu.errors import BadValue, GuestIOError
from emu.guest.lock import in_kernel
from emu.ranges import runs_of
from emu.units import FRAME_SIZE

if TYPE_CHECKING:
    from emu.guest.kernel import GuestKernel

__all__ = ["PressureDriver"]

_TICK = 1.0  # guest seconds a generation
_OLDEST = 32767  # generations that can be told apart


class PressureDriver:
    """The driver."""

    def __init__(self, kernel: "GuestKernel") -> None:
        self._kernel = kernel
        self.kernel_lock = kernel.kernel_lock
        self.counters = dict.fromkeys(("epochs", "epoch_scanned", "epoch_freed", "purges", "purge_freed"), 0)
        self._tick()

    def _tick(self) -> None:
        self._kernel.memmap.next_generation()
        self._kernel.timers.at(self._kernel.clock.now() + _TICK, self._tick, self)

    @in_kernel
    def epoch(self, age: float, most: int) -> int:
        """Free clean unmapped cache that wasn't used for `age` guest seconds, at most `most` bytes.

        Return the bytes.
        """
        if age < 0 or most < 0:
            raise BadValue(f"epoch of age {age!r} s and {most!r} bytes: both must be 0 or more")
        kernel = self._kernel
        kernel.check_running()
        generations = min(int(age / _TICK) + 1, _OLDEST)
        freed, scanned, _ = kernel.memmap.age(generations, generations, most=max(most // FRAME_SIZE, 1))
        self.counters["epochs"] += 1
        self.counters["epoch_scanned"] += scanned
        self.counters["epoch_freed"] += len(freed)
        if freed:
            kernel.free_pages(runs_of(freed))
            kernel.drain_pages()
        return len(freed) * FRAME_SIZE

    @in_kernel
    def purge(self) -> int:
        """Free all cache that can go, and report all that is free; return the bytes of cache freed."""
        kernel = self._kernel
        kernel.check_running()
        try:
            kernel.sync()
        except GuestIOError:
            pass  # what couldn't be written stays
        freed = kernel.drop_caches(1)
        for mapping in list(kernel.deferred_split):
            mapping.split_deferred()
        kernel.drain_pages()
        if kernel.reporting is not None:
            kernel.reporting.report_now()
        self.counters["purges"] += 1
        self.counters["purge_freed"] += freed
        return freed * FRAME_SIZE

    def stop(self) -> None:
        """End it."""
        self._kernel.timers.cancel(self)
