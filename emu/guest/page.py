"""MemMap and Space: a guest's page descriptors, its LRU lists, and which page of which file a frame is (csrc/memmap.c,
pagecache.c, lru.c).

This is the seam to those three files and nothing more: handles, ranges, errors. They are in C since a read of a
megabyte from the cache is 256 lookups and marks; measured in Python, over arrays, those took longer than the copy
itself.

Frames go in and come out as `Ranges` whose keys are page indexes. All calls are made under the kernel lock.
"""

import enum
import errno
import os
import weakref
from array import array
from dataclasses import dataclass

from emu._native import ffi, lib
from emu.errors import EmuError, HostError
from emu.ranges import Ranges

__all__ = ["Insert", "Lookup", "Lru", "MemMap", "Owner", "PageFlag", "PageInfo", "Remove", "Space"]


class Owner(enum.IntEnum):
    """Whose a frame is. PCP and REPORTED are the allocator's to say: free frames on per-CPU lists, and reported
    ones."""

    FREE = lib.EMU_OWNER_FREE
    ANON = lib.EMU_OWNER_ANON
    SHMEM = lib.EMU_OWNER_SHMEM
    ACTIVE = lib.EMU_OWNER_ACTIVE
    INACTIVE = lib.EMU_OWNER_INACTIVE
    DIRTY = lib.EMU_OWNER_DIRTY
    WRITEBACK = lib.EMU_OWNER_WRITEBACK
    BALLOON = lib.EMU_OWNER_BALLOON
    HINTED = lib.EMU_OWNER_HINTED
    PCP = lib.EMU_OWNER_PCP
    REPORTED = lib.EMU_OWNER_REPORTED


_OWNERS = list(Owner)


class Lru(enum.IntEnum):
    """The lists, as enum lru_list has them."""

    INACTIVE_ANON = lib.EMU_LRU_INACTIVE_ANON
    ACTIVE_ANON = lib.EMU_LRU_ACTIVE_ANON
    INACTIVE_FILE = lib.EMU_LRU_INACTIVE_FILE
    ACTIVE_FILE = lib.EMU_LRU_ACTIVE_FILE
    UNEVICTABLE = lib.EMU_LRU_UNEVICTABLE


class PageFlag(enum.IntFlag):
    """PG_*. YOUNG is the accessed bit of a page's table entries, one for all of them."""

    REFERENCED = lib.EMU_PG_REFERENCED
    ACTIVE = lib.EMU_PG_ACTIVE
    DIRTY = lib.EMU_PG_DIRTY
    WRITEBACK = lib.EMU_PG_WRITEBACK
    LOCKED = lib.EMU_PG_LOCKED
    READAHEAD = lib.EMU_PG_READAHEAD
    WORKINGSET = lib.EMU_PG_WORKINGSET
    RECLAIM = lib.EMU_PG_RECLAIM
    YOUNG = lib.EMU_PG_YOUNG
    HANDED = lib.EMU_PG_HANDED
    WRITABLE = lib.EMU_PG_WRITABLE
    DISCARDED = lib.EMU_PG_DISCARDED


class Lookup(enum.IntFlag):
    """How Space.lookup() goes about it: PEEK leaves no trace."""

    PEEK = 0
    MARK = lib.EMU_LOOKUP_MARK
    SKIP_FIRST = lib.EMU_LOOKUP_SKIP_FIRST
    READAHEAD = lib.EMU_LOOKUP_READAHEAD
    GET = lib.EMU_LOOKUP_GET

    @staticmethod
    def because(cause: int) -> int:
        """Return what to add where pages are made stable for another cause than a lookup."""
        return cause << int(lib.EMU_LOOKUP_WHY)


class Insert(enum.IntFlag):
    """How pages come into a space: dirty; about to be overwritten, so that it is no refault."""

    CLEAN = 0
    DIRTY = lib.EMU_INSERT_DIRTY
    WRITE = lib.EMU_INSERT_WRITE


class Remove(enum.IntEnum):
    """Which pages Space.remove() takes: all; clean unmapped ones; of those, unreferenced ones, leaving shadows."""

    TRUNCATE = lib.EMU_REMOVE_TRUNCATE
    INVALIDATE = lib.EMU_REMOVE_INVALIDATE
    EVICT = lib.EMU_REMOVE_EVICT


@dataclass(frozen=True, slots=True)
class PageInfo:
    """A descriptor: the space and index it is cached at (space 0: not cached), how often mapped, flags, age stamp."""

    space: int
    index: int
    mapcount: int
    flags: PageFlag
    generation: int
    owner: Owner


@dataclass(frozen=True, slots=True)
class Shrunk:
    """What one look at a list's cold end came to. freed, mapped: frames; the others are numbers of pages."""

    freed: "array[int]"
    mapped: "array[int]"
    scanned: int
    dirty: int
    writeback: int
    activated: int
    deactivated: int


_RANGES = ffi.typeof("struct emu_range[]")
_MARKER, _GONE, _GET = lib.EMU_LOOKUP_MARKER, lib.EMU_LOOKUP_GONE, lib.EMU_LOOKUP_GET
_COUNT = ~(_MARKER | _GONE)
_RUNS = 1024  # of one lookup: four mebibytes in the worst case
_FLAGS = 0xFFF  # what PageFlag names; above it are memmap.h's own


def _check(err: int, what: str) -> None:
    if err < 0:
        raise _Broken(err, what)


class _Broken(EmuError):
    # A caller's mistake that would corrupt the books: these aren't for guests to catch.
    def __init__(self, err: int, what: str) -> None:
        super().__init__(f"{what}: {os.strerror(-err)}")
        self.errno = -err


class MemMap:
    """The descriptors of a guest's frames."""

    def __init__(self, frames: int) -> None:
        cell = ffi.new("struct emu_memmap **")
        err = lib.emu_memmap_create(frames, cell)
        if err:
            raise HostError(
                f"no descriptors for {frames} frames: {os.strerror(-err)} (RLIMIT_AS, overcommit_memory=2?)"
            )
        self.frames = frames
        self.native = cell[0]
        # with the last user of the memory: a late look through stats mustn't find it gone
        self._end = weakref.finalize(self, lib.emu_memmap_destroy, self.native)
        self.stats = self.native.stats
        # room for the answers of lookups
        self._flat = array("Q", bytes(24 * _RUNS))
        self.runs = ffi.from_buffer(_RANGES, self._flat)
        self.nr_runs = ffi.new("size_t *")
        self._shrink = ffi.new("struct emu_shrink *")
        self._aging = ffi.new("struct emu_aging *")
        self._info = ffi.new("struct emu_page_info *")

    def found(self) -> Ranges:
        """Return the runs that the last lookup found."""
        return Ranges(self._flat[: 3 * self.nr_runs[0]])

    def use(self, ranges: Ranges, owner: Owner) -> None:
        """Frames just allocated are somebody's (ANON, SHMEM, BALLOON, HINTED)."""
        err = lib.emu_pages_use(self.native, ffi.from_buffer(_RANGES, ranges.flat), len(ranges), owner)
        if err:
            _check(err, f"frames can't become {owner.name}")

    def release(self, ranges: Ranges) -> None:
        """Frames about to be freed are nobody's: off their lists."""
        flat = ffi.from_buffer(_RANGES, ranges.flat)
        _check(
            lib.emu_pages_release(self.native, flat, len(ranges)), "a frame that is freed is still in the page cache"
        )

    def map(self, ranges: Ranges, delta: int, *, young: bool) -> None:
        """Add to the frames' map counts; young: they are accessed by it."""
        flat = ffi.from_buffer(_RANGES, ranges.flat)
        _check(lib.emu_pages_map(self.native, flat, len(ranges), delta, young), "more unmapped than was mapped")

    def look(self, pfn: int) -> PageInfo:
        """Return a frame's descriptor."""
        info = self._info
        _check(lib.emu_page_look(self.native, pfn, info), f"pfn {pfn:#x}")
        return PageInfo(
            info.space, info.index, info.mapcount, PageFlag(info.flags & _FLAGS), info.gen, Owner(info.owner)
        )

    def count(self, owner: Owner) -> int:
        """Frames of an owner."""
        return int(self.stats.nr_owner[owner])

    def moved(self) -> dict[tuple[Owner, Owner], int]:
        """Return how many frames have gone from one owner to another, of the ways that any has gone."""
        moved = ffi.unpack(self.stats.moved, lib.EMU_NR_OWNERS**2)
        return {(_OWNERS[i // len(_OWNERS)], _OWNERS[i % len(_OWNERS)]): n for i, n in enumerate(moved) if n}

    def nr(self, lru: Lru) -> int:
        """Pages on a list."""
        return int(self.stats.nr_lru[lru])

    def shrink(self, lru: Lru, nr_to_scan: int) -> Shrunk:
        """Look at the cold end of INACTIVE_FILE or ACTIVE_FILE (shrink_list). Freed frames are out of the cache."""
        freed, mapped = array("I", bytes(4 * nr_to_scan)), array("I", bytes(4 * nr_to_scan))
        work = self._shrink
        work.nr_to_scan = nr_to_scan
        with ffi.from_buffer("uint32_t[]", freed) as a, ffi.from_buffer("uint32_t[]", mapped) as b:
            work.freed, work.mapped = a, b
            _check(lib.emu_lru_shrink(self.native, lru, work), f"{lru.name} can't be shrunk")
        return Shrunk(
            freed[: work.nr_freed],
            mapped[: work.nr_mapped],
            work.nr_scanned,
            work.nr_dirty,
            work.nr_writeback,
            work.nr_activated,
            work.nr_deactivated,
        )

    def age(
        self, sink_after: int, free_after: int, *, most: int = 0, hand_over: bool = False
    ) -> tuple["array[int]", int, int]:
        """Let file pages sink, or go, that weren't accessed for so many generations; (frames freed, scanned, sunk).

        most: how many may go; 0: no bound. hand_over: they stay in the cache, and are only told, each once until it is
        accessed again.
        """
        room = self.nr(Lru.INACTIVE_FILE) + self.nr(Lru.ACTIVE_FILE)
        freed = array("I", bytes(4 * max(room, 1)))
        work = self._aging
        work.sink_after, work.free_after = sink_after, free_after
        work.most, work.hand_over = most, hand_over
        with ffi.from_buffer("uint32_t[]", freed) as a:
            work.freed = a
            _check(lib.emu_lru_age(self.native, work), "aging")
        return freed[: work.nr_freed], work.nr_scanned, work.nr_sunk

    def allocated(self, ranges: Ranges) -> None:
        """Frames just allocated are about to be written: they must be kept (arch_alloc_page)."""
        _check(
            lib.emu_pages_allocated(self.native, ffi.from_buffer(_RANGES, ranges.flat), len(ranges)), "allocated frames"
        )

    def put(self, ranges: Ranges) -> None:
        """Drop the references that Space.get() took (put_page)."""
        _check(
            lib.emu_pages_put(self.native, ffi.from_buffer(_RANGES, ranges.flat), len(ranges)), "a put without a get"
        )

    def mlock(self, ranges: Ranges) -> None:
        """Take one more reference to pages that are held, for put(), and put them where reclaim doesn't look."""
        _check(
            lib.emu_pages_mlock(self.native, ffi.from_buffer(_RANGES, ranges.flat), len(ranges)),
            "an mlock without a get",
        )

    def writable(self, ranges: Ranges) -> None:
        """Pages that are held may be written through a page table from now on (page_mkwrite)."""
        _check(
            lib.emu_pages_writable(self.native, ffi.from_buffer(_RANGES, ranges.flat), len(ranges)), "writable pages"
        )

    def says_nothing(self) -> "array[int]":
        """Make all stable again, and end it, if the host has taken no page of the cache; else return those.

        They are to be dropped, and then this called again.
        """
        gone = array("I", bytes(4 * self.frames))
        with ffi.from_buffer("uint32_t[]", gone) as into:
            n = lib.emu_page_states_off(self.native, into, len(gone))
        return gone[:n]

    def next_generation(self) -> int:
        """Begin a generation: accesses stamp it from now on."""
        self.stats.gen = (self.stats.gen + 1) & 0xFFFF
        return int(self.stats.gen)

    def list(self, lru: Lru) -> "array[int]":
        """Return a list's frames, hottest first."""
        pfns = array("I", bytes(4 * max(self.nr(lru), 1)))
        with ffi.from_buffer("uint32_t[]", pfns) as into:
            n = lib.emu_lru_list(self.native, lru, into, len(pfns))
        return pfns[:n]


class Space:
    """Which frame holds which page of a file (struct address_space)."""

    def __init__(self, memmap: MemMap, pages: int) -> None:
        self._memmap = memmap
        self._map = memmap.native
        self._runs, self._nr_runs = memmap.runs, memmap.nr_runs
        cell = ffi.new("struct emu_space **")
        err = lib.emu_space_create(self._map, pages, cell)
        if err:
            raise HostError(f"no page cache for a file of {pages} pages: {os.strerror(-err)}")
        self.native = cell[0]
        self.id = int(self.native.id)

    def close(self) -> None:
        """Let go of it. It must be empty."""
        _check(lib.emu_space_destroy(self._map, self.native), "a space with pages is closed")
        self.native = ffi.NULL

    @property
    def nr_pages(self) -> int:
        """Pages in the cache."""
        return int(self.native.nr_pages) if self.native else 0  # none after close()

    @property
    def nr_dirty(self) -> int:
        """Dirty ones among them."""
        return int(self.native.nr_dirty)

    @property
    def nr_writeback(self) -> int:
        """Those that are being written."""
        return int(self.native.nr_writeback)

    @property
    def nr_shadows(self) -> int:
        """Shadows that evicted pages have left."""
        return int(self.native.nr_shadows)

    def resize(self, pages: int) -> None:
        """Make room for so many pages. Beyond that none may be cached."""
        err = lib.emu_space_resize(self._map, self.native, pages)
        if err == -errno.ENOMEM:
            raise HostError(f"no page cache for a file of {pages} pages: {os.strerror(-err)}")
        _check(err, "resizing a space")

    def lookup(self, first: int, count: int, how: Lookup | int = Lookup.PEEK) -> tuple[int, Ranges, bool]:
        """Return (n, frames, marker): the n pages in a row from `first` that are cached, and whether the last of them
        has the readahead flag."""
        n = lib.emu_space_lookup(self._map, self.native, first, count, how, self._runs, _RUNS, self._nr_runs)
        return n & ~_MARKER, self._memmap.found(), n & _MARKER != 0

    def get(self, first: int, count: int, how: Lookup | int = Lookup.PEEK) -> tuple[int, Ranges, bool, bool]:
        """Return (n, frames, marker, gone): as lookup() does, with a reference to each, until MemMap.put().

        They are stable (page_states.c). gone: the page after them is in the cache, and the host has taken it.
        """
        how |= _GET
        n = lib.emu_space_lookup(self._map, self.native, first, count, how, self._runs, _RUNS, self._nr_runs)
        _check(n, "a lookup")
        return n & _COUNT, self._memmap.found(), n & _MARKER != 0, n & _GONE != 0

    def frame(self, index: int, how: Lookup | int) -> int:
        """Return the frame of one page; -1: it isn't cached. ~frame, which is negative too: it has the readahead flag.

        A lookup without ranges. (Frame 0 with the flag is -1, and so looked up again: nothing is lost.)
        """
        n = lib.emu_space_lookup(self._map, self.native, index, 1, how, self._runs, 1, self._nr_runs)
        if n == 1:
            return self._runs[0].gfn  # type: ignore[no-any-return]
        return ~int(self._runs[0].gfn) if n else -1

    def cached(self, first: int, count: int) -> int:
        """Return how many pages in a row from `first` are cached, at most count."""
        return int(lib.emu_space_lookup(self._map, self.native, first, count, 0, ffi.NULL, 0, self._nr_runs))

    def absent(self, first: int, count: int) -> int:
        """Return how many pages in a row from `first` are not cached, at most count."""
        how = lib.EMU_LOOKUP_ABSENT
        return int(lib.emu_space_lookup(self._map, self.native, first, count, how, ffi.NULL, 0, self._nr_runs))

    def cached_before(self, first: int, count: int) -> int:
        """Return how many pages in a row from `first` down are cached, at most count."""
        how = lib.EMU_LOOKUP_BACKWARD
        return int(lib.emu_space_lookup(self._map, self.native, first, count, how, ffi.NULL, 0, self._nr_runs))

    def insert(self, ranges: Ranges, how: Insert = Insert.CLEAN) -> None:
        """Put frames in as the pages at their keys."""
        flat = ffi.from_buffer(_RANGES, ranges.flat)
        _check(lib.emu_space_insert(self._map, self.native, flat, len(ranges), how), "a page or frame is taken")

    def remove(self, first: int, end: int, how: Remove) -> "array[int]":
        """Take pages [first, end) out; return their frames, which are the caller's to free."""
        frames = array("I")
        part = array("I", bytes(4 * min(max(self.nr_pages, 1), 1 << 16)))
        while True:
            with ffi.from_buffer("uint32_t[]", part) as into:
                n = lib.emu_space_remove(self._map, self.native, first, end, how, into, len(part))
            _check(n, "a mapped page is truncated")
            if not n:
                return frames
            frames += part[:n]

    def flag(self, first: int, end: int, set_: PageFlag | int = 0, clear: PageFlag | int = 0) -> int:
        """Set and clear flags of the cached pages in [first, end); return how many that changed."""
        n = lib.emu_space_flag(self._map, self.native, first, end, set_, clear)
        _check(n, "flags")
        return int(n)

    def find(self, first: int, end: int, mask: PageFlag, value: PageFlag | int) -> tuple[int, Ranges]:
        """Return (n, frames) of the first run of pages in [first, end) whose flags under mask are value."""
        n = lib.emu_space_find(self._map, self.native, first, end, mask, value, self._runs, _RUNS, self._nr_runs)
        return int(n), self._memmap.found()
