"""GuestKernel: zones, page allocation, processes, files and timers of one guest.

Page allocation is get_page_from_freelist() and its slow path (mm/page_alloc.c, Linux 6.1): zones from the highest down,
first above their low watermarks; then kswapd; then above min; then direct reclaim, and once more with the per-CPU lists
drained; then whoever may give memory back before the OOM killer chooses; then the OOM killer (reclaim.py, oom.py).

Deviations: all RAM is managed (no kernel image, no struct pages: a guest that has done nothing uses nothing), the
zones are flat, and one CPU runs the kernel; `cpus` only shares the per-CPU lists' high mark out.
"""

import itertools
import mmap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

from emu.clock import Clock
from emu.errors import BadValue, ClosedError, GuestError, GuestMemoryError, OomKilled, OutOfMemory
from emu.guest.aging import Aging
from emu.guest.balloon import BalloonDevice, BalloonDriver
from emu.guest.buddy import PAGEBLOCK_ORDER, Buddy, MigrateType
from emu.guest.file import File
from emu.guest.lock import KernelLock, in_kernel
from emu.guest.memory import GuestMemory, Op
from emu.guest.oom import OomKiller
from emu.guest.page import Lru, MemMap, Owner
from emu.guest.process import Process
from emu.guest.ramfs import RamFile
from emu.guest.reclaim import MAX_RECLAIM_RETRIES, Reclaim
from emu.guest.reporting import PageReporting
from emu.guest.timers import Timers
from emu.guest.vfs import Vfs
from emu.guest.vma import Mapping
from emu.guest.writeback import Writeback
from emu.guest.zone import Zone, zone_spans, zone_watermarks
from emu.ranges import Ranges
from emu.units import FRAME_SIZE, format_size
from emu.virtio.disk import DirEntry, Disk

__all__ = ["GuestKernel"]

Thp = Literal["always", "madvise", "never"]


_VMSTAT = (
    "pgalloc",
    "pgfree",
    "pgfault",
    "pgmajfault",
    "pgpgin",  # KiB, as Linux counts them
    "pgpgout",
    "pgscan_kswapd",
    "pgscan_direct",
    "pgsteal_kswapd",
    "pgsteal_direct",
    "kswapd_wake",
    "allocstall",
    "oom_kill",
    "drop_pagecache",
    "drop_slab",
    "drop_pagecache_pages",
    "nr_written",
    "nr_write_errors",
    "nr_throttled_written",
    "balance_dirty_pages",
    "flusher_woken",
    "balloon_inflate",
    "balloon_deflate",
    "balloon_out_of_puff",
    "disk_file_shrunk",
    "disk_file_changed",
    "thp_fault_alloc",
    "thp_fault_fallback",
    "thp_split_pmd",
    "thp_deferred_split_page",
    "thp_split_page",
    "drain_all_pages",
)
_BOUNCE = 1 << 20  # bytes: the largest request to a disk
_MAX_FRAMES = (1 << 31) - 1  # a slot of the page cache has one bit more, for shadows


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
        #: descriptors of all frames, and the LRU lists
        self.memmap = MemMap(memory.frames)
        #: page-aligned, for bytes on their way between disk and memory
        self.bounce = memoryview(mmap.mmap(-1, _BOUNCE))
        self.clock = clock
        self.thp = thp
        self.page_poison = page_poison
        self.timers = Timers()
        self.reporting: PageReporting | None = None
        self.balloon: BalloonDriver | None = None
        self.aging: Aging | None = None
        #: by name: called with a process that is about to end
        self.exit_hooks: dict[str, Callable[[Process], None]] = {}
        #: called when reclaim begins; they free what they hold for convenience
        self.shrinkers: list[Callable[[], None]] = [self.split_deferred]
        self.processes: list[Process] = []
        #: whose access to memory is under way: the one that the OOM killer's choice must reach at once
        self.current: Process | None = None
        self.files: list[RamFile] = []
        #: mappings with huge pages of which a part is unmapped (split_queue of a node)
        self.deferred_split: list[Mapping] = []
        #: counters, named as in /proc/vmstat where it has them (pgalloc is the sum over its zones)
        self.vmstat = dict.fromkeys(_VMSTAT, 0)
        #: counters of workers that have ended
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
        self.vfs = Vfs(self)
        self.writeback = Writeback(self, clock.now)
        self.reclaim = Reclaim(self)
        self.oom = OomKiller(self)

    @in_kernel
    def close(self) -> None:
        """Let go of all tables and processes."""
        self._closed = True
        for process in self.processes:
            process.forget()
        self.processes.clear()
        self.files.clear()
        self.deferred_split.clear()
        self.vfs.close()
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

    @in_kernel
    def mount(self, disk: Disk, at: str = "") -> None:
        """Mount a disk at a path of the guest's; "" is the root."""
        self.check_running()
        self.vfs.mount(disk, at)

    @in_kernel
    def open(self, path: str, mode: str = "r") -> File:
        """Open a file of the disk. path: relative to the disk's root; mode: r, r+, w, w+, x, a. Raises GuestIOError."""
        self.check_running()
        return self.vfs.open(path, mode)

    @in_kernel
    def unlink(self, path: str) -> None:
        """Remove a file's name. Raises GuestIOError."""
        self.check_running()
        self.vfs.unlink(path)

    @in_kernel
    def listdir(self, path: str = "") -> list[DirEntry]:
        """Return the names in a directory of the disk. Raises GuestIOError."""
        self.check_running()
        return self.vfs.listdir(path)

    def walk(self, path: str = "") -> Iterator[tuple[str, int]]:
        """Yield (path, bytes) of all regular files of the disk below a directory, by name. Raises GuestIOError."""
        self.check_running()
        return self.vfs.walk(path)

    @in_kernel
    def drop_caches(self, what: int = 3) -> int:
        """Do what writing 1, 2 or 3 to /proc/sys/vm/drop_caches does; return how many pages were freed.

        Dirty, locked and mapped pages stay: sync() first.
        """
        self.check_running()
        return self.vfs.drop_caches(what)

    @in_kernel
    def sync(self) -> None:
        """Write everything that is dirty, and wait for the disks. Raises GuestIOError."""
        self.check_running()
        self.vfs.sync()

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
    def probe_balloon(self, device: BalloonDevice) -> BalloonDriver:
        """Bind the balloon driver to a device; page_poison is told to it."""
        if self.balloon is not None:
            raise GuestError("a balloon driver is bound already")
        self.balloon = BalloonDriver(self, device, poison=self.page_poison)
        return self.balloon

    @in_kernel
    def remove_balloon(self) -> None:
        """Unbind it: what it held is free again."""
        if self.balloon is not None:
            self.balloon.remove()
            self.balloon = None

    def end_worker(self, worker: PageReporting | Aging) -> None:
        """Stop a worker, and keep its counters."""
        worker.stop()
        for name, value in worker.counters.items():
            self.ended[name] = self.ended.get(name, 0) + value

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
            self.free_pages([(pfn if step > 0 else pfn - n + 1, n) for pfn, n, step in runs])
            raise
        self.vmstat["pgalloc"] += count - left
        if owner is not None and runs:
            used = Ranges()
            for pfn, n, step in runs:
                used.add(pfn if step > 0 else pfn - n + 1, n, 0)
            self.memmap.use(used, owner)
        return runs

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
                    self.memmap.use(Ranges.of([(frame, 1 << PAGEBLOCK_ORDER)]), Owner.ANON)
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
                self.memmap.use(Ranges.of([(pfn, 1 << order)]), owner)
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
    def total_bytes(self) -> int:
        """MemTotal: the RAM, without what the balloon driver has taken off it."""
        return self.ram_bytes - (0 if self.balloon is None else self.balloon.taken_off_total_bytes)

    @property
    def used_bytes(self) -> int:
        """Bytes that processes, and files that live in memory, hold: what dropping the page cache doesn't give back."""
        return self.ram_bytes - self.free_bytes - self.pcp_bytes - self.cached_bytes - self.ballooned_bytes

    @property
    def cached_bytes(self) -> int:
        """Bytes of the disk's files in the page cache, dirty ones among them. Not: files that live in memory alone."""
        return (self.memmap.nr(Lru.INACTIVE_FILE) + self.memmap.nr(Lru.ACTIVE_FILE)) * FRAME_SIZE

    @property
    def ballooned_bytes(self) -> int:
        """Bytes that the balloon driver holds: inflated, or hinted."""
        return (self.memmap.count(Owner.BALLOON) + self.memmap.count(Owner.HINTED)) * FRAME_SIZE

    @property
    def totalreserve_pages(self) -> int:
        """Frames that allocations must leave alone (calculate_totalreserve_pages)."""
        return sum(min(zone.buddy.frames, zone.lowmem_reserve + zone.watermarks.high) for zone in self.zones)

    @property
    def available_bytes(self) -> int:
        """What could be allocated without swapping (si_mem_available, MemAvailable)."""
        free = self.free_bytes // FRAME_SIZE - self.totalreserve_pages
        cache = self.cached_bytes // FRAME_SIZE
        low = sum(zone.watermarks.low for zone in self.zones)
        return max(free + cache - min(cache // 2, low), 0) * FRAME_SIZE

    def listed_frames(self) -> list[tuple[int, int, Owner]]:
        """Return the free frames on per-CPU lists and in reported blocks, ascending (pfn, count, owner).

        What isn't named is whose `memmap` says. Takes a step a run on a list and a reported block.
        """
        listed = [(pfn, count, Owner.PCP) for zone in self.zones for pfn, count in zone.pcp.spans()]
        for zone in self.zones:
            listed += ((pfn, 1 << order, Owner.REPORTED) for pfn, order in zone.buddy.reported_blocks())
        listed.sort()
        return listed
