"""PageAllocator: single frames and blocks from the zones, and back (mm/page_alloc.c, Linux 6.1).

get_page_from_freelist() and its slow path: zones from the highest down, first above their low watermarks; then kswapd;
then above min; then direct reclaim, and once more with the per-CPU lists drained; then whoever may give memory back
before the OOM killer chooses; then the OOM killer (reclaim.py, oom.py). Many frames go in one call, as if one by one.

An allocation that breaks off, since its own process was killed, or a disk that reclaim waited for has failed, gives
back what it had.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from emu.errors import GuestError, GuestMemoryError, OomKilled, OutOfMemory
from emu.guest.buddy import PAGEBLOCK_ORDER, Buddy, MigrateType
from emu.guest.lock import KernelLock, in_kernel
from emu.guest.memory import GuestMemory, Op
from emu.guest.page import MemMap, Owner
from emu.guest.pcp import spans
from emu.guest.reclaim import MAX_RECLAIM_RETRIES, Reclaim
from emu.guest.zone import Zone, zone_spans, zone_watermarks
from emu.ranges import Ranges
from emu.units import FRAME_SIZE

if TYPE_CHECKING:
    from emu.guest.oom import OomKiller
    from emu.guest.page_states import PageStates
    from emu.guest.process import Process
    from emu.guest.vma import Mapping

__all__ = ["PageAllocator"]


class PageAllocator:
    """The zones of a guest, and whose their frames are. GuestKernel is one."""

    # the kernel's
    reclaim: Reclaim
    oom: "OomKiller"
    current: "Process | None"
    page_states: "PageStates | None"

    def __init__(
        self, memory: GuestMemory, vmstat: dict[str, int], *, thp: bool, cpus: int, page_poison: int | None
    ) -> None:
        self.kernel_lock = KernelLock()
        self.memory = memory
        self.vmstat = vmstat
        #: descriptors of all frames, and the LRU lists
        self.memmap = MemMap(memory.frames)
        self.page_poison = page_poison
        #: frames that the host has lost (GuestMemoryError): never allocated again, as with memory_failure()
        self.hwpoison: set[int] = set()
        #: mappings with huge pages of which a part is unmapped (split_queue of a node)
        self.deferred_split: list[Mapping] = []
        #: called when reclaim begins; they free what they hold for convenience
        self.shrinkers: list[Callable[[], None]] = [self.split_deferred]
        spans = zone_spans(memory.frames)
        managed = [frames for _, _, frames in spans]
        marks = zone_watermarks(managed, thp=thp)
        self.zones = [
            Zone(name, Buddy(frames, base=start), mark, above=sum(managed[i + 1 :]), cpus=cpus)
            for i, ((name, start, frames), mark) in enumerate(zip(spans, marks, strict=True))
        ]

    @property
    def free_bytes(self) -> int:
        """Bytes on the free lists (MemFree)."""
        return sum(zone.buddy.free_frames for zone in self.zones) * FRAME_SIZE

    def zone_of(self, pfn: int) -> Zone:
        """Return the zone that holds a frame."""
        for zone in self.zones:
            if pfn < zone.buddy.base + zone.buddy.frames:
                return zone
        raise GuestError(f"pfn {pfn:#x} is outside the RAM")

    @in_kernel
    def alloc_frames(
        self,
        count: int,
        migratetype: MigrateType = MigrateType.MOVABLE,
        *,
        owner: Owner | None = Owner.ANON,
        retry: bool = True,
    ) -> list[tuple[int, int, int]]:
        """Allocate single frames; return (pfn, count, step) runs, step +1 or -1, in the order of allocation.

        Zones from the highest down, above their low watermarks; kswapd; above min; direct reclaim; and, unless retry is
        False (__GFP_NORETRY), the OOM killer. owner: whose they are from now on; None: the caller says so later. Fewer
        than asked for means that there was nobody to kill, or, without retry, nothing to reclaim. Raises OomKilled when
        it was `current` that was killed: the process whose access this is.
        """
        runs: list[tuple[int, int, int]] = []
        try:
            left = self._alloc_slowly(count, migratetype, runs, retry=retry)
        except BaseException:  # the killed process itself; a disk, a hook or Ctrl-C in the middle of reclaim
            self.vmstat["pgalloc"] += sum(n for _, n, _ in runs)
            self.free_pages(spans(runs))
            raise
        self.vmstat["pgalloc"] += count - left
        if runs and (owner is not None or self.page_states is not None):
            used = Ranges()
            for pfn, n in spans(runs):
                used.add(pfn, n, 0)
            self._allocated(used, owner)
        return runs

    def _allocated(self, ranges: Ranges, owner: Owner | None) -> None:
        if self.page_states is not None:
            self.memmap.allocated(ranges)
        if owner is not None:
            self.memmap.use(ranges, owner)

    def _alloc_slowly(self, count: int, migratetype: int, runs: list[tuple[int, int, int]], *, retry: bool) -> int:
        # __alloc_pages_slowpath(), for many frames at a time; returns how many couldn't be had
        left = self._alloc_above("low", count, migratetype, runs)
        fruitless = 0
        while left:
            if self.reclaim.kswapd():
                left = self._alloc_above("low", left, migratetype, runs)
                continue
            left = self._alloc_above("min", left, migratetype, runs)
            if not left:
                break
            before, progress = left, self.reclaim.direct()
            left = self._alloc_above("min", left, migratetype, runs)
            if left:
                self.drain_pages()
                left = self._alloc_above("min", left, migratetype, runs)
            if progress or left < before:  # shrinkers free what isn't counted as reclaimed
                fruitless = 0
                continue
            fruitless += 1
            if not retry:
                break
            # should_reclaim_retry(): a second scan finds those unreferenced that the first one has spared
            if fruitless <= MAX_RECLAIM_RETRIES and self.reclaim.reclaimable_pages:
                continue
            process = self.current
            killed = self.oom.out_of_memory(process, count - left)
            if killed is None:
                break
            if killed is process and process is not None:
                raise OomKilled(
                    f"process {process.pid} ({process.name}) was killed: the guest is out of memory, and it had most",
                    pid=process.pid,
                    order=0,
                    wanted=left,
                    free=self.free_bytes // FRAME_SIZE,
                )
            fruitless = 0
        return left

    def _alloc_above(self, mark: str, left: int, migratetype: int, runs: list[tuple[int, int, int]]) -> int:
        # get_page_from_freelist(): the zones from the highest down; returns how many are still wanted
        for zone in reversed(self.zones):
            if not left:
                break
            left = self._alloc_from(zone, left, migratetype, getattr(zone.watermarks, mark), runs)
        return left

    def split_deferred(self) -> None:
        """Split the huge pages that are half unmapped (deferred_split_scan, a shrinker)."""
        for mapping in list(self.deferred_split):
            mapping.split_deferred()

    @staticmethod
    def _alloc_from(zone: Zone, left: int, migratetype: int, mark: int, runs: list[tuple[int, int, int]]) -> int:
        # One watermark check and one list access a frame, many frames at a time: a refill changes what the check sees,
        # taking from the list doesn't.
        pcp = zone.pcp
        while left:
            headroom = zone.headroom(mark, reserve=True)
            if headroom <= 0:
                break
            if not pcp.available(0, migratetype):
                batches = min(-(-left // pcp.batch), -(-headroom // pcp.batch))
                if not pcp.refill(0, migratetype, batches):
                    break
            take = min(left, pcp.available(0, migratetype))
            while take:
                run = pcp.alloc(0, migratetype, take)
                runs.append(run)
                take -= run[1]
                left -= run[1]
        return left

    @in_kernel
    def alloc_huge(self) -> int | None:
        """Allocate a block of order 9 for a huge page; None when there is none (the fault falls back to 4 KiB)."""
        for low in (True, False):
            for zone in reversed(self.zones):
                mark = zone.watermarks.low if low else zone.watermarks.min
                if not zone.watermark_ok(PAGEBLOCK_ORDER, mark, reserve=True):
                    continue
                if zone.pcp.available(PAGEBLOCK_ORDER, MigrateType.MOVABLE) or zone.pcp.refill(
                    PAGEBLOCK_ORDER, MigrateType.MOVABLE
                ):
                    self.vmstat["pgalloc"] += 1 << PAGEBLOCK_ORDER
                    frame = zone.pcp.alloc(PAGEBLOCK_ORDER, MigrateType.MOVABLE)[0]
                    self._allocated(Ranges.of([(frame, 1 << PAGEBLOCK_ORDER)]), Owner.ANON)
                    return frame
        return None

    @in_kernel
    def alloc_block(self, order: int, owner: Owner) -> int | None:
        """Allocate a block that doesn't go through the per-CPU lists, above min and without reclaim; None: no such."""
        for zone in reversed(self.zones):
            if zone.watermark_ok(order, zone.watermarks.min, reserve=True):
                try:
                    pfn = zone.buddy.alloc(order)
                except OutOfMemory:
                    continue
                self._allocated(Ranges.of([(pfn, 1 << order)]), owner)
                self.vmstat["pgalloc"] += 1 << order
                return pfn
        return None

    @in_kernel
    def free_pages(self, runs: Iterable[tuple[int, int]], order: int = 0) -> None:
        """Free runs of allocated blocks, (pfn, blocks) each, in order."""
        freed = Ranges()
        try:
            for pfn, count in runs:
                while count:
                    zone = self.zone_of(pfn)
                    part = min(count, max((zone.buddy.base + zone.buddy.frames - pfn) >> order, 1))
                    if not zone.pcp.allows(order):
                        for block in range(part):
                            zone.buddy.free(pfn + (block << order), order)
                    elif self.page_poison is None:
                        zone.pcp.free(pfn, order, part)
                    else:
                        self._free_poisoned(zone, pfn, order, part, self.page_poison)
                    freed.add(pfn, part << order, 0)
                    self.vmstat["pgfree"] += part << order
                    pfn += part << order  # noqa: PLW2901
                    count -= part  # noqa: PLW2901
        finally:
            if len(freed):
                self.memmap.release(freed)

    def _free_poisoned(self, zone: Zone, pfn: int, order: int, count: int, byte: int) -> None:
        # kernel_poison_pages(): before the allocator has them. A frame that the host has lost is kept out of it.
        # Checked here too, and not only by the lists: a double free must not overwrite what somebody uses.
        zone.buddy.check_blocks(pfn - zone.buddy.base, count, order)
        frames = Ranges.of([(pfn, count << order)])
        try:
            self.memory.vcpu(Op.SET, frames, byte)
        except GuestMemoryError as error:
            if order:
                for block in range(count):
                    zone.buddy.split(pfn + (block << order), order)
            self.hwpoison.add(error.gfn)
            end = pfn + (count << order)
            if error.gfn > pfn:
                zone.pcp.free(pfn, 0, error.gfn - pfn)
            if error.gfn + 1 < end:
                self._free_poisoned(zone, error.gfn + 1, 0, end - error.gfn - 1, byte)
            return
        zone.pcp.free(pfn, order, count)

    def free_after_failure(self, runs: Iterable[tuple[int, int]], error: BaseException) -> None:
        """Free single frames whose first use failed; one that the host has lost stays out, and counts as used."""
        bad = error.gfn if isinstance(error, GuestMemoryError) else None
        for pfn, count in runs:
            if bad is None or not pfn <= bad < pfn + count:
                self.free_pages([(pfn, count)])
                continue
            self.hwpoison.add(bad)
            self.free_pages([(a, b - a) for a, b in ((pfn, bad), (bad + 1, pfn + count)) if a < b])

    @in_kernel
    def drain_pages(self) -> None:
        """Give all per-CPU lists back to the buddy (drain_all_pages)."""
        self.vmstat["drain_all_pages"] += 1
        for zone in self.zones:
            zone.pcp.drain()
