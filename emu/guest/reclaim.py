"""Reclaim: making free memory out of page cache (mm/vmscan.c, Linux 6.1, without swap).

    free frames fall below low      kswapd wakes, and reclaims until a zone is above high
    below min                       the allocation reclaims by itself, 32 pages at a time (direct reclaim)
    and nothing can be reclaimed    the OOM killer (oom.py)

A round scans a share of each list, size >> priority; priority begins at 12 and falls, so that each round looks at twice
as much as the one before. Clean unmapped pages at the inactive tail go; mapped ones are unmapped first; dirty ones wait
for the flusher, which is woken when a round meets nothing else. The active list is scanned, that is, sinks, only while
the inactive one is short, by inactive_ratio, or while refaults say that a new working set is being established.

Without swap anonymous pages can't be reclaimed, so their lists are kept and not scanned (get_scan_count, SCAN_FILE). A
swap of the guest's own would scan them in `_shrink_lruvec`.

kswapd is a thread in Linux, and here runs to its end at the moment it is woken: as on another CPU that is idle and fast
enough. So direct reclaim is what is left when kswapd couldn't: an allocation meets it later than in a busy guest.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import isqrt
from typing import TYPE_CHECKING

from emu.guest.page import Lru
from emu.ranges import runs_of
from emu.units import FRAME_SIZE

if TYPE_CHECKING:
    from emu.guest.kernel import GuestKernel

__all__ = ["Reclaim", "inactive_is_low"]

SWAP_CLUSTER_MAX = 32
DEF_PRIORITY = 12
MAX_RECLAIM_RETRIES = 16

_PAGES_A_GIB = (1 << 30) // FRAME_SIZE


def inactive_is_low(inactive: int, active: int) -> bool:
    """Whether the inactive list is too short for the active one (inactive_is_low): up to 1 GiB half, later a lesser
    share.

    1:1 below a gigabyte, 1:3 from one on, 1:10 at ten: the square root of ten times the gigabytes.
    """
    gib = (inactive + active) // _PAGES_A_GIB
    ratio = isqrt(10 * gib) if gib else 1
    return inactive * ratio < active


class Reclaim:
    """kswapd and direct reclaim of one guest."""

    def __init__(self, kernel: "GuestKernel") -> None:
        self._kernel = kernel
        self._running = False
        self._failures = 0  # pgdat->kswapd_failures
        self._refaults = 0  # lruvec->refaults[WORKINGSET_FILE]: activations when reclaim was here last

    # ---- who wants memory

    def balanced(self) -> bool:
        """Whether some zone has more than its high watermark free (pgdat_balanced)."""
        return any(zone.headroom(zone.watermarks.high, reserve=True) > 0 for zone in self._kernel.zones)

    def kswapd(self) -> bool:
        """Wake kswapd (balance_pgdat); return whether it freed anything."""
        if self._running or self._failures >= MAX_RECLAIM_RETRIES or self.balanced():
            return False
        vmstat = self._kernel.vmstat
        vmstat["kswapd_wake"] += 1
        target = sum(max(zone.watermarks.high, SWAP_CLUSTER_MAX) for zone in self._kernel.zones)
        priority, freed = DEF_PRIORITY, 0
        with self._active():
            while priority >= 1 and not self.balanced():
                scanned, part = self._shrink_node(priority, target, kswapd=True)
                freed += part
                if scanned < target or not part:
                    priority -= 1
        if freed:
            self._failures = 0
        else:
            self._failures += 1
        return freed > 0

    def direct(self) -> bool:
        """Reclaim for an allocation that found nothing above min (try_to_free_pages); return whether it freed
        anything."""
        if self._running:
            return False
        vmstat = self._kernel.vmstat
        vmstat["allocstall"] += 1
        freed = 0
        with self._active():
            for force in (False, True):  # the second time with the active list, whatever its share
                for priority in range(DEF_PRIORITY, -1, -1):
                    freed += self._shrink_node(priority, SWAP_CLUSTER_MAX, kswapd=False, force=force)[1]
                    if freed >= SWAP_CLUSTER_MAX:
                        break
                if freed:
                    break
        if freed:
            self._failures = 0
        return freed > 0

    def proactive(self, pages: int) -> int:
        """Free so many pages of cache without need, as a write to memory.reclaim does; return how many went."""
        freed = 0
        if self._running:
            return 0
        with self._active():
            for priority in range(DEF_PRIORITY, -1, -1):
                while freed < pages and (
                    part := self._shrink_node(priority, pages - freed, kswapd=False, force=priority == 0)[1]
                ):
                    freed += part
        return freed

    @property
    def reclaimable_pages(self) -> int:
        """Pages that reclaim could look at (zone_reclaimable_pages)."""
        return self._kernel.memmap.nr(Lru.INACTIVE_FILE) + self._kernel.memmap.nr(Lru.ACTIVE_FILE)

    @contextmanager
    def _active(self) -> Iterator[None]:
        # Not reentrant: what is freed, unmapped or written in here must not reclaim in its turn (PF_MEMALLOC).
        self._running = True
        for zone in self._kernel.zones:
            zone.pcp.reclaim_active = True
        try:
            for shrink in list(self._kernel.shrinkers):
                shrink()
            yield
        finally:
            for zone in self._kernel.zones:
                zone.pcp.reclaim_active = False
            self._running = False
            self._refaults = int(self._kernel.memmap.stats.workingset_activate)

    # ---- one round

    def _shrink_node(self, priority: int, target: int, *, kswapd: bool, force: bool = False) -> tuple[int, int]:
        # (pages scanned, pages freed)
        memmap = self._kernel.memmap
        inactive, active = memmap.nr(Lru.INACTIVE_FILE), memmap.nr(Lru.ACTIVE_FILE)
        # refaults that were activated: a new working set, so that stale active pages should sink fast
        deactivate = (
            force or int(memmap.stats.workingset_activate) != self._refaults or inactive_is_low(inactive, active)
        )
        who = "kswapd" if kswapd else "direct"
        vmstat = self._kernel.vmstat
        left = {Lru.ACTIVE_FILE: active >> priority if deactivate else 0, Lru.INACTIVE_FILE: inactive >> priority}
        scanned = freed = 0
        while any(left.values()):
            dirty = taken = 0
            for lru in (Lru.ACTIVE_FILE, Lru.INACTIVE_FILE):
                part = min(left[lru], SWAP_CLUSTER_MAX)
                left[lru] -= part
                if not part:
                    continue
                done = memmap.shrink(lru, part)
                if lru is Lru.ACTIVE_FILE:
                    continue
                scanned += done.scanned
                taken += done.scanned
                dirty += done.dirty
                stolen = len(done.freed)
                self._kernel.free_pages(runs_of(done.freed))
                for pfn in done.mapped:
                    stolen += self._unmap_and_free(pfn)
                freed += stolen
                vmstat[f"pgscan_{who}"] += done.scanned
                vmstat[f"pgsteal_{who}"] += stolen
            if dirty and dirty == taken:  # nothing but dirty pages at the list's end
                self._kernel.writeback.wakeup_flusher()
            if freed >= target:
                break
        return scanned, freed

    def _unmap_and_free(self, pfn: int) -> int:
        # try_to_unmap(), then the page like any other
        info = self._kernel.memmap.look(pfn)
        inode = self._kernel.vfs.inode_of(info.space)
        inode.unmap(info.index)
        return inode.evict(info.index)
