"""GuestKernel: zones, page allocation, processes and timers of one guest.

Page allocation is get_page_from_freelist() and the end of its slow path (mm/page_alloc.c, Linux 6.1): zones from the
highest down, first above their low watermarks, then above min, then once more after splitting half-unmapped huge pages
and draining the per-CPU lists; then there is no memory. Nothing can be reclaimed yet, so there is no kswapd between
the two.

Deviations: all RAM is managed (no kernel image, no struct pages: a guest that has done nothing uses nothing), the
zones are flat, and one CPU runs the kernel; `cpus` only shares the per-CPU lists' high mark out.
"""

import enum
import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

from emu.clock import Clock
from emu.errors import BadValue, ClosedError, GuestError, GuestMemoryError
from emu.guest.buddy import PAGEBLOCK_ORDER, Buddy, MigrateType
from emu.guest.lock import KernelLock, in_kernel
from emu.guest.memory import GuestMemory, Op
from emu.guest.process import Process
from emu.guest.ramfs import RamFile
from emu.guest.reporting import PageReporting
from emu.guest.timers import Timers
from emu.guest.vma import Mapping
from emu.guest.zone import Zone, zone_spans, zone_watermarks
from emu.ranges import Ranges
from emu.units import FRAME_SIZE, format_size

__all__ = ["GuestKernel", "PageOwner"]

Thp = Literal["always", "madvise", "never"]


class PageOwner(enum.IntEnum):
    """Who has a frame, as /proc/kpageflags would tell (ANON, BUDDY, REPORTED); per-CPU lists are not seen there."""

    ANON = 0
    FREE = 1
    REPORTED = 2
    PCP = 3
    FILE = 4


_MAX_FRAMES = 1 << 31  # page-table entries and free lists are 32 bits wide


class GuestKernel:
    """A guest's kernel over a guest's memory.

    thp: which processes get huge pages (and, unless never, the higher watermarks that khugepaged sets). page_poison:
    the byte that free frames are filled with, or None; 0 is init_on_free.
    """

    def __init__(
        self,
        memory: GuestMemory,
        clock: Clock,
        *,
        thp: Thp = "madvise",
        cpus: int = 1,
        page_poison: int | None = None,
    ) -> None:
        self.kernel_lock = KernelLock()
        if memory.frames > _MAX_FRAMES:
            raise BadValue(
                f"a guest of {format_size(memory.frames * FRAME_SIZE)} is more than this kernel can number: at most "
                f"{format_size(_MAX_FRAMES * FRAME_SIZE)}"
            )
        if thp not in ("always", "madvise", "never"):
            raise BadValue(f"thp {thp!r} isn't known: always, madvise or never")
        if not isinstance(cpus, int) or not 1 <= cpus <= 1024:
            raise BadValue(f"cpus {cpus!r} must be from 1 to 1024")
        if page_poison is not None and not 0 <= page_poison <= 255:
            raise BadValue(f"page poison {page_poison!r} isn't a byte")
        self.memory = memory
        self.clock = clock
        self.thp = thp
        self.page_poison = page_poison
        self.timers = Timers()
        self.reporting: PageReporting | None = None
        self.processes: list[Process] = []
        self.files: list[RamFile] = []
        #: mappings with huge pages of which a part is unmapped (split_queue of a node)
        self.deferred_split: list[Mapping] = []
        #: counters, named as in /proc/vmstat where it has them (pgalloc is the sum over its zones)
        self.vmstat = dict.fromkeys(
            (
                "pgalloc",
                "pgfree",
                "pgfault",
                "thp_fault_alloc",
                "thp_fault_fallback",
                "thp_split_pmd",
                "thp_deferred_split_page",
                "thp_split_page",
                "drain_all_pages",
            ),
            0,
        )
        #: counters of reporting workers that have ended
        self.ended: dict[str, int] = {}
        #: frames that the host has lost (GuestMemoryError): never allocated again, as with memory_failure()
        self.hwpoison: set[int] = set()
        self._pids = itertools.count(1)
        self._key = itertools.count(1)
        self._paused = 0
        self._closed = False
        spans = zone_spans(memory.frames)
        managed = [frames for _, _, frames in spans]
        marks = zone_watermarks(managed, thp=thp != "never")
        self.zones = [
            Zone(name, Buddy(frames, base=start), mark, above=sum(managed[i + 1 :]), cpus=cpus)
            for i, ((name, start, frames), mark) in enumerate(zip(spans, marks, strict=True))
        ]

    @in_kernel
    def close(self) -> None:
        """Let go of all tables and processes."""
        self._closed = True
        for process in self.processes:
            process.forget()
        self.processes.clear()
        self.files.clear()
        self.deferred_split.clear()
        for zone in self.zones:
            zone.buddy.on_free = None
            zone.buddy.release()
        self.reporting = None

    # ---- processes and time

    @in_kernel
    def spawn(self, name: str) -> Process:
        """Start a process."""
        self.check_running()
        process = Process(self, next(self._pids), name)
        self.processes.append(process)
        return process

    @in_kernel
    def create_file(self, size: int | str) -> RamFile:
        """Create a file that lives in the page cache alone. size: bytes or text, whole pages."""
        self.check_running()
        self.files.append(RamFile(self, size))
        return self.files[-1]

    def forget_file(self, file: RamFile) -> None:
        """Called by a file that is unlinked."""
        if file in self.files:
            self.files.remove(file)

    def new_key(self) -> int:
        """Return a content key space of 2^32 pages that no other mapping has."""
        return next(self._key) << 32

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the guest: meanwhile no guest code runs, neither timers nor calls of its processes (GuestError)."""
        with self.kernel_lock:  # whatever is under way ends first
            self._paused += 1
        try:
            yield
        finally:
            with self.kernel_lock:
                self._paused -= 1

    def check_running(self) -> None:
        """Raise GuestError while the guest is paused, ClosedError when it is gone."""
        if self._closed:
            raise ClosedError("this guest is closed")
        if self._paused:
            raise GuestError("the guest is paused")

    @in_kernel
    def run_timers(self) -> None:
        """Run what is due now, unless the guest is paused."""
        if not self._paused:
            self.timers.run_due(self.clock.now())

    @property
    def next_timer(self) -> float | None:
        """Guest time of the next timer; None when there is none, or while paused."""
        return None if self._paused else self.timers.next_due

    # ---- page allocation

    def zone_of(self, pfn: int) -> Zone:
        """Return the zone that holds a frame."""
        for zone in self.zones:
            if pfn < zone.buddy.base + zone.buddy.frames:
                return zone
        raise GuestError(f"pfn {pfn:#x} is outside the RAM")

    @in_kernel
    def alloc_frames(self, count: int, migratetype: MigrateType = MigrateType.MOVABLE) -> list[tuple[int, int, int]]:
        """Allocate single frames; return (pfn, count, step) runs, step +1 or -1, in the order of allocation.

        Fewer than asked for means out of memory: the caller has what there was above the min watermarks.
        """
        runs: list[tuple[int, int, int]] = []
        left = count
        for attempt in ("low", "min", "drained"):
            if attempt == "drained":
                for mapping in list(self.deferred_split):  # deferred_split_scan()
                    mapping.split_deferred()
                self.drain_pages()
            for i in range(len(self.zones) - 1, -1, -1):
                zone = self.zones[i]
                mark = zone.watermarks.low if attempt == "low" else zone.watermarks.min
                left = self._alloc_from(zone, left, migratetype, mark, runs)
            if not left:
                break
        self.vmstat["pgalloc"] += count - left
        return runs

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
                    return zone.pcp.alloc(PAGEBLOCK_ORDER, MigrateType.MOVABLE)[0]
        return None

    @in_kernel
    def free_pages(self, runs: Iterable[tuple[int, int]], order: int = 0) -> None:
        """Free runs of allocated blocks, (pfn, blocks) each, in order."""
        for pfn, count in runs:
            while count:
                zone = self.zone_of(pfn)
                part = min(count, max((zone.buddy.base + zone.buddy.frames - pfn) >> order, 1))
                if self.page_poison is None:
                    zone.pcp.free(pfn, order, part)
                else:
                    self._free_poisoned(zone, pfn, order, part, self.page_poison)
                self.vmstat["pgfree"] += part << order
                pfn += part << order  # noqa: PLW2901
                count -= part  # noqa: PLW2901

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

    # ---- watching

    @property
    def ram_bytes(self) -> int:
        return self.memory.frames * FRAME_SIZE

    @property
    def free_bytes(self) -> int:
        """Bytes on the free lists (MemFree)."""
        return sum(zone.buddy.free_frames for zone in self.zones) * FRAME_SIZE

    @property
    def pcp_bytes(self) -> int:
        """Bytes on per-CPU lists: freed, but neither in MemFree nor visible to reporting."""
        return sum(zone.pcp.count for zone in self.zones) * FRAME_SIZE

    @property
    def used_bytes(self) -> int:
        """Bytes that somebody in the guest holds; files that live in memory are among them."""
        return self.ram_bytes - self.free_bytes - self.pcp_bytes

    @property
    def cached_bytes(self) -> int:
        """Bytes of page cache. This guest has no disk: it is all of files that live in memory, and can't be dropped."""
        return sum(file.present for file in self.files) * FRAME_SIZE

    def page_owners(self) -> list[tuple[int, int, PageOwner]]:
        """Return who has the frames, ascending (pfn, count, owner), neighbours joined; what isn't named is anonymous.

        Takes a step a free block and a run on a list: some 10 ms where a gigabyte is free in single frames.
        """
        owners: list[tuple[int, int, PageOwner]] = []
        for zone in self.zones:
            for pfn, order, _, reported in zone.buddy.free_blocks():
                owners.append((pfn, 1 << order, PageOwner.REPORTED if reported else PageOwner.FREE))
            owners += ((pfn, count, PageOwner.PCP) for pfn, count in zone.pcp.spans())
        for file in self.files:
            owners += ((pfn, count, PageOwner.FILE) for pfn, count in file.spans())
        owners.sort()
        joined: list[tuple[int, int, PageOwner]] = []
        for pfn, count, owner in owners:
            if joined and joined[-1][2] is owner and joined[-1][0] + joined[-1][1] == pfn:
                joined[-1] = (joined[-1][0], joined[-1][1] + count, owner)
            else:
                joined.append((pfn, count, owner))
        return joined
