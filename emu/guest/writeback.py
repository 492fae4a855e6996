"""Dirty pages: who writes them, when, and who has to wait (mm/page-writeback.c, fs/fs-writeback.c).

All limits are shares of *dirtyable* memory: what is free beyond the reserves, and the file pages on the lists.

    expiry       a flusher that wakes every 5 s writes the inodes that became dirty more than 30 s ago
    background   above 10 % dirty it writes on, oldest inode first, until below
    throttling   above half-way between 10 and 20 % a writer is held up until the disk has caught up

A writer is asked every 32 pages. Held up means that its write doesn't return before the flusher has brought dirty
memory below the ceiling: Linux lets the writer sleep for up to 200 ms at a time while the flusher's thread works, here
the one thread does the flusher's work meanwhile, so that the wait is the disk's own time. So dirty memory doesn't pass
20 %; and when the disk fails, so that it can't fall, writers get the disk's error instead (Linux gives the pages up;
here they stay dirty, for a later fsync). A file whose writeback has failed isn't tried again for 5 s, but by fsync and
sync.

The flusher's timer runs while there is something dirty. Deviations: no bandwidth estimate, no per-device shares, and
sync's integrity pass isn't a thread of its own.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from emu.errors import GuestIOError
from emu.guest.page import Lru, Owner
from emu.units import FRAME_SIZE

if TYPE_CHECKING:
    from emu.guest.inode import Inode
    from emu.guest.kernel import GuestKernel

__all__ = ["Writeback"]

_RATELIMIT = 32  # pages between two checks (ratelimit_pages starts at 32)
_MIN_PAGES = 1024  # MIN_WRITEBACK_PAGES: 4 MiB of an inode at a time


class Writeback:
    """The flusher, and the limits. Ratios are per cent of dirtyable memory, times are seconds (vm.dirty_*)."""

    def __init__(self, kernel: "GuestKernel", now: Callable[[], float]) -> None:
        self._kernel = kernel
        self._now = now
        self.dirty_background_ratio = 10
        self.dirty_ratio = 20
        self.writeback_interval = 5.0  # dirty_writeback_centisecs
        self.expire_interval = 30.0  # dirty_expire_centisecs
        self._inodes: dict[Inode, None] = {}  # dirty ones, in the order in which they became so
        self._queued = False
        self._writing = False
        self._unchecked = 0

    # ---- limits

    @property
    def dirtyable_pages(self) -> int:
        """Memory that may be dirty (global_dirtyable_memory), in pages."""
        kernel, memmap = self._kernel, self._kernel.memmap
        free = sum(zone.free_frames for zone in kernel.zones)
        free -= min(free, kernel.totalreserve_pages)
        return free + memmap.nr(Lru.INACTIVE_FILE) + memmap.nr(Lru.ACTIVE_FILE) + 1

    @property
    def limits(self) -> tuple[int, int]:
        """(background limit, limit) in pages (domain_dirty_limits)."""
        dirtyable = self.dirtyable_pages
        limit = self.dirty_ratio * dirtyable // 100
        background = self.dirty_background_ratio * dirtyable // 100
        return (limit // 2 if background >= limit else background), limit

    @property
    def nr_dirty(self) -> int:
        """Pages that are dirty or being written."""
        memmap = self._kernel.memmap
        return memmap.count(Owner.DIRTY) + memmap.count(Owner.WRITEBACK)

    # ---- who is dirty

    def dirtied(self, inode: "Inode") -> None:
        """An inode has dirty pages, or may have."""
        if inode.dirtied_at is None and (inode.space.nr_dirty or inode.may_be_dirty):
            inode.dirtied_at = self._now()
            self._inodes[inode] = None
            self._queue(self.writeback_interval)

    def cleaned(self, inode: "Inode") -> None:
        """It has none, as far as is known."""
        inode.dirtied_at = None
        self._inodes.pop(inode, None)
        if inode.may_be_dirty:  # asked again, when it is its turn
            self.dirtied(inode)

    def dirty_inodes(self) -> "list[Inode]":
        """Inodes with dirty pages, the longest dirty first."""
        return list(self._inodes)

    # ---- the flusher

    def _queue(self, delay: float) -> None:
        if not self._queued:
            self._queued = True
            self._kernel.timers.at(self._now() + delay, self._work, self)

    def _work(self) -> None:
        # wb_workfn()
        self._queued = False
        self.flush_expired()
        self.flush_background()
        if self._inodes:
            self._queue(self.writeback_interval)

    def flush_expired(self) -> int:
        """Write the inodes that have been dirty for longer than 30 s (wb_check_old_data_flush); return the pages."""
        oldest = self._now() - self.expire_interval
        return self._write(lambda inode: inode.dirtied_at is not None and inode.dirtied_at <= oldest, lambda: True)

    def flush_background(self) -> int:
        """Write while more than the background limit is dirty, the oldest inode first; return the pages."""
        return self._write(lambda inode: True, lambda: self.nr_dirty > self.limits[0])

    def _write(self, which: "Callable[[Inode], bool]", more: Callable[[], bool]) -> int:
        if self._writing:  # called from within, by reclaim
            return 0
        self._writing = True
        written = 0
        try:
            now = self._now()
            rested = [i for i in self._inodes if i.failed_at is None or now - i.failed_at >= self.writeback_interval]
            for inode in [inode for inode in rested if which(inode)]:
                inode.collect_dirty()
                if not inode.space.nr_dirty:
                    self.cleaned(inode)
                while inode.space.nr_dirty and more():
                    try:
                        part = inode.write_back(_MIN_PAGES)
                    except GuestIOError:
                        # Kept for fsync. Its pages stay dirty, and it goes behind the others (redirty_tail).
                        if inode in self._inodes:
                            del self._inodes[inode]
                            inode.dirtied_at = self._now()
                            self._inodes[inode] = None
                        break
                    written += part
                    if not part:
                        break
                self._kernel.vfs.written(inode)
        finally:
            self._writing = False
        return written

    def write_out(self, inode: "Inode") -> int:
        """Write one inode, whatever its age; an error stays with it. Returns the pages."""
        return self._write(lambda other: other is inode, lambda: True)

    def wakeup_flusher(self) -> int:
        """Reclaim has met nothing but dirty pages: write some (wakeup_flusher_threads); return the pages."""
        self._kernel.vmstat["flusher_woken"] += 1
        return self._write(lambda inode: True, lambda: True)

    # ---- writers

    def check_limit(self, inode: "Inode") -> None:
        """Raise GuestIOError if dirty memory is at its limit and the inode's disk doesn't take any of it."""
        dirty = self.nr_dirty  # every write comes here: what is below the floor needs no limits
        if self._writing or dirty < _RATELIMIT or dirty < self._most():
            return
        self._write(lambda other: True, lambda: self.nr_dirty >= self._most())
        if self.nr_dirty < self._most():
            return
        disk = inode.cache_key[0]
        for failed in [i for i in self._inodes if i.failed_at is not None and i.cache_key[0] == disk]:
            failed.failed_at = None  # perhaps it works again
            if not self.write_out(failed) and failed.failed_at is not None:
                raise inode.error(failed.write_errno, "dirty memory is at its limit, and can't be written")
            return

    def _most(self) -> int:
        # in a guest whose memory is all anonymous the limit is nothing at all: a writer gets on by small steps
        return max(self.limits[1], _RATELIMIT)

    def balance_dirty_pages(self, n: int) -> None:
        """A writer has dirtied n bytes: perhaps it has to wait (balance_dirty_pages_ratelimited)."""
        self._unchecked += -(-n // FRAME_SIZE)
        if self._unchecked < _RATELIMIT or self._writing:
            return
        self._unchecked = 0
        background, limit = self.limits
        dirty = self.nr_dirty
        if dirty <= background:
            return
        ceiling = (background + limit) // 2  # dirty_freerun_ceiling()
        if dirty <= ceiling:
            if self._queued:  # the flusher is woken, and works when the writer has returned
                self._kernel.timers.cancel(self)
                self._queued = False
            self._queue(0.0)
            return
        self._kernel.vmstat["balance_dirty_pages"] += 1
        written = self._write(lambda inode: True, lambda: self.nr_dirty > ceiling)
        self._kernel.vmstat["nr_throttled_written"] += written
