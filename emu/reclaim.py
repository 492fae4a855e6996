"""Reclaim: every way by which frames leave a guest RAM, and those by which they come back without a touch.

    discard                content gone, memory gone at once
    lazy_free, lazy_drop   content and memory go when the kernel wants memory, unless written before
    set_aside              memory stays, outside the guest: any touch, read or write, brings the frame back;
                           drop_aside lets it go, bring_back returns it
    steal                  what the guest calls unused, or volatile, goes, without a word to it
    swap_out               content goes to a store, memory goes; a touch, or swap_back, brings it back
    poison, unpoison       a memory error, and its undoing

Ranges are [(gfn, count), ...] in frames and must not overlap. A frame that isn't in a state to be taken is left alone.
"""

import os
import stat
import tempfile
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emu import _native, residency
from emu._native import lib
from emu.errors import BadValue, HostError
from emu.frames import StealPolicy, Usage
from emu.mapping import RamMapping
from emu.ranges import Ranges
from emu.uffd import Features, Mode, Userfaultfd
from emu.units import parse_size

__all__ = ["DEFAULT_READAHEAD", "Reclaim", "StoreInfo"]

Frames = Iterable[Sequence[int]] | Ranges
_STEALABLE = (Usage.UNUSED, Usage.VOLATILE, Usage.POTENTIALLY_VOLATILE)
DEFAULT_READAHEAD = 8  # pages, as Linux's page_cluster of 3


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """What is in a RAM's store. Bytes, but for the pages.

    same: pages that are one word all over; raw: those kept uncompressed. object_bytes: of all others together.
    pool_bytes: memory taken for them, in slabs of 64 KiB, and resident of it by the kernel. file_bytes: of the file in
    use. error: errno of the last page that couldn't be stored or read, 0: none.
    """

    pages: int
    same: int
    raw: int
    object_bytes: int
    pool_bytes: int
    pool_resident: int
    file_bytes: int
    error: int
    lz4: bool


def _open_store_file(path: Path) -> tuple[int, bool]:
    # A file without a name in a directory; or an empty file, or a block device, to use. O_DIRECT where the file system
    # has it.
    flags = os.O_RDWR | os.O_CLOEXEC
    if not path.is_dir():
        try:
            fd, direct = os.open(path, flags | os.O_DIRECT), True
        except OSError:
            fd, direct = os.open(path, flags), False
        status = os.fstat(fd)
        if stat.S_ISBLK(status.st_mode) or (stat.S_ISREG(status.st_mode) and not status.st_size):
            return fd, direct
        os.close(fd)
        raise HostError(f"{path} isn't for a store: it must be a directory, an empty file, or a block device")
    for how in (os.O_DIRECT, 0):
        try:
            return os.open(path, flags | how | os.O_TMPFILE, 0o600), bool(how)
        except OSError:
            continue
    fd, name = tempfile.mkstemp(prefix="emu-store-", dir=path)
    os.unlink(name)
    return fd, False


class StoreFile:
    """The file of a store: open, and without a name if emu made it. One that has a name is left empty."""

    def __init__(self, path: str | Path) -> None:
        if not str(path):
            raise BadValue("store file '' is no path: name a directory, an empty file, or a block device")
        self.path = Path(path)
        try:
            self.fd, self.direct = _open_store_file(self.path)
        except OSError as error:
            raise HostError(f"no store file at {path}: {error.strerror}") from error

    def close(self) -> None:
        """Close it. A second call does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                os.ftruncate(fd, 0)
            os.close(fd)


class Reclaim:
    """The host's hold on a RAM: base of GuestRam."""

    size: int
    frames: int
    service: str
    _off: frozenset[str]
    _uffd: Userfaultfd | None
    _side: RamMapping | None
    _side_lock: threading.Lock
    _store_file: StoreFile | None
    _has_store = False
    #: memory, file, file_size, readahead, as given to open_store()
    store_settings: tuple[int | str | None, str | None, int | str | None, int] | None = None

    @property
    def _core(self) -> _native.Region:
        raise NotImplementedError

    # ---- given up

    def discard(self, ranges: Frames) -> int:
        """Give frames back at once (MADV_DONTNEED); return how many held memory. They read as zero afterwards.

        What is aside or in the store of them goes from there.
        """
        return self._reclaim(lib.emu_discard, ranges)

    def lazy_free(self, ranges: Frames) -> int:
        """Let the kernel take frames when it needs memory (MADV_FREE); return how many, anew or again.

        RSS doesn't show it.
        """
        return self._reclaim(lib.emu_lazy_free, ranges)

    def lazy_drop(self, ranges: Frames | None = None) -> int:
        """Put the lazily freed frames under pressure now (MADV_PAGEOUT); return how many the kernel dropped.

        Frames written since stay. A few may hide from it in another CPU's batch (31 pages each), and stay lazy.
        """
        return self._reclaim(lib.emu_lazy_drop, self._all(ranges))

    def poison(self, ranges: Frames) -> int:
        """Lose frames as a memory error would: their content is gone and accesses fail. Return how many."""
        return self._reclaim(lib.emu_poison, ranges)

    def unpoison(self, ranges: Frames) -> int:
        """Make lost frames usable again, as zeros; return how many. The only way out of LOST."""
        return self._reclaim(lib.emu_unpoison, ranges)

    # ---- aside

    @property
    def aside_how(self) -> str:
        """How frames are set aside here: "move" (UFFDIO_MOVE), "wp" (write-protect and copy), or "none"."""
        return ("none", "wp", "move")[self._core.aside_how]

    @property
    def can_evict(self) -> bool:
        """Whether drop_aside(evict=True) can be had: an access must be able to fail, rather than find zeros."""
        marker = self._uffd is not None and Features.POISON in self._uffd.features and "poison" not in self._off
        return self.aside_how != "none" and (self.service == "inline" or marker)

    def set_aside(self, ranges: Frames, stamp: int = 0) -> int:
        """Take frames out of the guest and keep them; return how many. Any touch, read or write, brings one back.

        stamp: a number from 0 to 65534 by which drop_aside() tells what was set aside when. Frames that have no page of
        their own, or are lazily freed, are left alone. Raises HostError where neither way is open.
        """
        if not 0 <= stamp <= lib.EMU_STAMP_MAX:
            raise BadValue(f"stamp {stamp!r} must be from 0 to {lib.EMU_STAMP_MAX}")
        self._need_side()
        return self._reclaim(lib.emu_set_aside, ranges, stamp)

    def bring_back(self, ranges: Frames | None = None, stamp: int | None = None) -> int:
        """Return frames that are aside (with that stamp, if one is given) to the guest without a touch.

        Return how many.
        """
        if self._side is None:
            return 0
        return self._reclaim(lib.emu_bring_back, self._all(ranges), -1 if stamp is None else stamp)

    def drop_aside(self, ranges: Frames | None = None, stamp: int | None = None, *, evict: bool = False) -> int:
        """Let go of those frames that are still aside (with that stamp, if one is given); return how many.

        They read as zero afterwards, which is right for memory that the guest has given up. evict: an access raises
        DiscardFault instead, for what the guest still has use for and can make anew.
        """
        if self._side is None:
            return 0
        return self._reclaim(lib.emu_aside_drop, self._all(ranges), -1 if stamp is None else stamp, int(evict))

    @property
    def side_bytes(self) -> int:
        """Resident bytes of frames aside, and of copies not yet swept up, from the kernel."""
        self._core.check()
        side = self._side
        if side is None:
            return 0
        seen = None if "pagemap_scan" in self._off else residency.scan(side.base, self.size)
        return residency.read_smaps(side.base, self.size).rss if seen is None else seen.rss

    def sweep(self) -> None:
        """Drop the copies that frames which came back have left aside. It also happens by itself, 32 at a time."""
        self._core.sweep()

    def _need_side(self) -> None:
        if self._side is not None:
            return
        self._core.check()
        with self._side_lock:
            if self._side is not None:
                return
            if self._uffd is None or not self._core.aside_how:
                raise HostError(
                    "frames can't be set aside here: that needs userfaultfd with UFFDIO_MOVE (Linux 6.8) and "
                    "/proc/self/pagemap, or with write protection (5.7), not switched off: see emu doctor"
                )
            side = RamMapping(self.size)
            try:
                side.map()
                self._uffd.register(side.base, self.size, Mode.MISSING)
                self._core.lend_side(side.base)
            except BaseException:
                side.close()
                raise
            self._side = side

    # ---- by what the guest says

    def steal(
        self,
        frames: int,
        usages: Sequence[Usage] = _STEALABLE,
        policy: StealPolicy = StealPolicy.AGE,
        *,
        seed: int = 1,
    ) -> int:
        """Take up to so many frames without a word to the guest: unused ones first, then volatile ones, then clean
        ones that are potentially volatile; dirty ones of these go to the store, if there is one. Return how many.

        Ages are those of scan_ages(); without it all are alike.
        """
        if frames < 0:
            raise BadValue(f"steal of {frames!r} frames: give 0 or more")
        wanted = 0
        for usage in usages:
            if usage not in _STEALABLE:
                raise BadValue(f"{usage!r} frames can't be stolen: {', '.join(u.name.lower() for u in _STEALABLE)} can")
            wanted |= 1 << usage
        if Usage.POTENTIALLY_VOLATILE in usages and self.aside_how != "none":
            self._need_side()
        return self._core.steal(frames, wanted, policy, seed)

    # ---- the store

    def open_store(
        self,
        memory: int | str | None = None,
        *,
        file: str | Path | None = None,
        file_size: int | str | None = None,
        readahead: int = DEFAULT_READAHEAD,
    ) -> None:
        """Open the store that swap_out() needs; once.

        memory: bytes or text of the pool for compressed pages, by default as much as the RAM; 0: none. file: a
        directory of the host, in which a file without a name is made, or an empty file or a block device to use; taken
        when the pool is full. file_size: what it may grow to, by default the RAM's size. readahead: pages, 1 to 32.
        Raises HostError.
        """
        pool = self.size if memory is None else parse_size(memory, "store memory")
        limit = 0 if file is None else self.size if file_size is None else parse_size(file_size, "store file")
        if not 1 <= readahead <= 32:
            raise BadValue(f"readahead {readahead!r} must be from 1 to 32 pages")
        self._need_side()
        opened = None if file is None else StoreFile(file)
        try:
            self._core.swap_on(
                memory=pool,
                fd=-1 if opened is None else opened.fd,
                file=limit,
                readahead=readahead,
                disable=self._off,
            )
        except BaseException:
            if opened is not None:
                opened.close()
            raise
        self._store_file = opened
        self._has_store = True
        self.store_settings = (memory, None if file is None else str(file), file_size, readahead)

    def swap_out(self, ranges: Frames) -> int:
        """Take frames out of the guest and keep their content in the store; return how many went.

        Fewer than were there: a touch came first, or the store was full or failed (`store.error`); those stay.
        """
        return self._reclaim(lib.emu_swap_out, ranges)

    def swap_back(self, ranges: Frames | None = None) -> int:
        """Return frames that are in the store to the guest without a touch; return how many."""
        return self._reclaim(lib.emu_swap_back, self._all(ranges))

    @property
    def has_store(self) -> bool:
        """Whether open_store() has opened one."""
        return self._has_store

    @property
    def store(self) -> StoreInfo:
        """What is in the store: zeros without one."""
        info = self._core.store_info()
        names = ("pages", "same", "raw", "object_bytes", "pool_bytes", "pool_resident", "file_bytes", "error")
        return StoreInfo(**{name: int(getattr(info, name)) for name in names}, lz4=bool(info.lz4))

    @property
    def store_text(self) -> str:
        """How the store is made, for people."""
        file = self._store_file
        pages = "LZ4" if self.store.lz4 else "no compression"
        if file is None:
            return f"memory, {pages}"
        return f"memory, then {file.path} ({'O_DIRECT' if file.direct else 'through the page cache'}), {pages}"

    def corrupt_stored(self, gfn: int, byte: int = 0) -> None:
        """Flip a bit of a frame's content in the store's memory: for tests of what happens then."""
        self._core.corrupt(gfn, byte)

    def start_swapd(self) -> None:
        """Start the thread that swaps the frames idle longest, when it is told to, or when a charge has to wait."""
        self._core.swapd(lib.emu_swapd_start)

    def kick_swapd(self, frames: int, *, wait: bool = False) -> None:
        """Have it take so many; wait: return when it has, or can't."""
        if frames < 0:
            raise BadValue(f"frames {frames!r} must be 0 or more")
        self._core.swapd(lib.emu_swapd_kick, frames)
        if wait:
            self._core.swapd(lib.emu_swapd_drain)

    # ---- use

    def track_accesses(self) -> None:
        """Have every call that touches guest memory leave accessed and dirty bits from now on."""
        self._core.track()

    def harvest(self, gfn: int = 0, count: int | None = None, bits: int = lib.EMU_ACCESSED | lib.EMU_DIRTIED) -> bytes:
        """Return and clear the frames' bits, a byte each.

        1 accessed, 2 written, 4 accessed (which no scan clears). An access under way leaves its own.
        """
        count = self.frames - gfn if count is None else count
        return self._core.harvest(gfn, count, bits)

    def scan_ages(self) -> list[int]:
        """Make every frame in memory a scan older that wasn't accessed since the last scan.

        Return frames by age, 0-255.
        """
        return self._core.scan()

    def stealable(self, usages: Sequence[Usage] = _STEALABLE) -> list[int]:
        """Return frames of these usages that steal() might take, by age, 0-255; of potentially volatile ones the dirty,
        too."""
        return self._core.ages(sum(1 << usage for usage in set(usages)))

    def victims(self, frames: int, *, min_age: int = 0, ranges: int = 1024) -> Ranges:
        """Return up to so many frames with a page of their own, idle longest, in at most `ranges` ranges."""
        return self._core.victims(min_age, frames, ranges)

    def written_pages(self) -> int:
        """Return how many pages were written since the last call, by the kernel's word.

        It starts anew (write_tracking).
        """
        return self._core.written()

    # ---- the inside

    def _all(self, ranges: Frames | None) -> Frames:
        return Ranges.of([(0, self.frames)]) if ranges is None else ranges

    def _reclaim(self, function: Any, ranges: Frames, *more: int) -> int:
        core = self._core
        core.check()
        batch = ranges if isinstance(ranges, Ranges) else Ranges.of(ranges)
        batch.check(self.frames, disjoint=True)
        return core.reclaim(function, batch, *more)
