"""GuestKernel: processes, files, drivers and timers of one guest, over its page allocator (page_alloc.py).

Deviations: all RAM is managed (no kernel image, no struct pages: a guest that has done nothing uses nothing), the
zones are flat, and one CPU runs the kernel; `cpus` only shares the per-CPU lists' high mark out.
"""

import itertools
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from emu.clock import Clock
from emu.errors import BadValue, ClosedError, GuestError
from emu.guest.aging import Aging
from emu.guest.balloon import BalloonDevice, BalloonDriver
from emu.guest.file import File
from emu.guest.inactive import Inactive
from emu.guest.lock import in_kernel
from emu.guest.memory import GuestMemory
from emu.guest.oom import OomKiller
from emu.guest.page import Lru, Owner
from emu.guest.page_alloc import PageAllocator
from emu.guest.page_states import PageStates
from emu.guest.pressure import PressureDriver
from emu.guest.process import Process
from emu.guest.ramfs import RamFile
from emu.guest.reclaim import Reclaim
from emu.guest.reporting import PageReporting
from emu.guest.vfs import Vfs
from emu.guest.writeback import Writeback
from emu.timers import Timers
from emu.units import FRAME_SIZE, format_size
from emu.virtio.disk import DirEntry, Disk

__all__ = ["GuestKernel"]

Thp = Literal["always", "madvise", "never"]


# counters, named as in /proc/vmstat where it has them (pgalloc is the sum over its zones)
_VMSTAT = (
    "pgalloc",
    "pgfree",
    "pgfault",
    "pgmajfault",
    "filemap_map_pages",  # of the faults, pages of files that were mapped as they were in the cache
    "pgmkwrite",  # pages that a shared mapping began to write (page_mkwrite)
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
    "balloon_scanned",  # pages that reclaim looked at to fill it
    "disk_file_shrunk",
    "disk_file_changed",
    "pgdiscard_fault",
    "pgdiscard_stable",  # found gone when a reference was taken
    "thp_fault_alloc",
    "thp_fault_fallback",
    "thp_split_pmd",
    "thp_deferred_split_page",
    "thp_split_page",
    "drain_all_pages",
)
_BOUNCE = 1 << 20  # bytes: the largest request to a disk
_MAX_FRAMES = (1 << 31) - 1  # a slot of the page cache has one bit more, for shadows


class GuestKernel(PageAllocator):
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
        if memory.frames > _MAX_FRAMES:
            raise BadValue(
                f"a guest of {format_size(memory.frames * FRAME_SIZE)} is more than this kernel can number: it must be "
                f"less than {format_size((_MAX_FRAMES + 1) * FRAME_SIZE)}"
            )
        if thp not in ("always", "madvise", "never"):
            raise BadValue(f"thp {thp!r} isn't known: always, madvise or never")
        if not isinstance(cpus, int) or not 1 <= cpus <= 1024:
            raise BadValue(f"cpus {cpus!r} must be from 1 to 1024")
        if page_poison is not None and not 0 <= page_poison <= 255:
            raise BadValue(f"page poison {page_poison!r} isn't a byte")
        super().__init__(memory, dict.fromkeys(_VMSTAT, 0), thp=thp != "never", cpus=cpus, page_poison=page_poison)
        #: page-aligned, for bytes on their way between disk and memory
        self.bounce = memoryview(mmap.mmap(-1, _BOUNCE))
        self.clock = clock
        self.thp = thp
        self.timers = Timers()
        self.reporting: PageReporting | None = None
        self.balloon: BalloonDriver | None = None
        self.aging: Aging | None = None
        self.inactive: Inactive | None = None
        self.page_states: PageStates | None = None
        self.pressure: PressureDriver | None = None
        #: by name: called with a process that is about to end
        self.exit_hooks: dict[str, Callable[[Process], None]] = {}
        self.processes: list[Process] = []
        #: whose access to memory is under way: the one that the OOM killer's choice must reach at once
        self.current: Process | None = None
        self.files: list[RamFile] = []
        #: counters of workers that have ended
        self.ended: dict[str, int] = {}
        self._pids = itertools.count(1)
        self._key = itertools.count(1)
        self._paused = 0
        self._closed = False
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

    def end_worker(self, worker: PageReporting | Aging | Inactive | PressureDriver) -> None:
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

    # ---- watching

    @property
    def ram_bytes(self) -> int:
        return self.memory.frames * FRAME_SIZE

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
