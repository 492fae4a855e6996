"""FileCache: a file's pages in the page cache: found, held, read, given up (struct address_space; mm/filemap.c).

A read finds its pages in the cache, copies what lies in a row, and for the first that is missing asks readahead what to
read. A page comes into the cache when its content is there: frames are allocated, the disk's bytes go through a bounce
buffer, the frames are filled from it (missing ones are installed, not faulted first), and only then does the space name
them. So there are no locked pages that somebody waits for, and a read error leaves nothing behind.

Allocation may reclaim, and reclaim may take any clean page. So nothing that was looked up is used after an allocation:
each step looks up, copies, and forgets.
"""

import errno
from array import array
from typing import TYPE_CHECKING, Protocol

from emu.errors import DiscardFault, GuestIOError, OutOfMemory
from emu.guest.page import Lookup, PageFlag, Remove, Space
from emu.guest.pcp import spans
from emu.guest.readahead import ReadaheadState, Window, next_window
from emu.ranges import Ranges, runs_of
from emu.units import FRAME_SIZE
from emu.virtio.disk import DiskFile

if TYPE_CHECKING:
    from emu.guest.kernel import GuestKernel
    from emu.guest.pins import Pin

__all__ = ["BATCH", "FileCache", "Maps", "place"]

BATCH = 256  # pages of one disk request: the bounce buffer

_MARK = Lookup.MARK | Lookup.READAHEAD
_SKIP = _MARK | Lookup.SKIP_FIRST
_MARK_INT, _SKIP_INT = int(_MARK), int(_SKIP)  # an enum takes longer to combine and pass than a lookup


class Maps(Protocol):
    """A mapping of this file: what its page tables have of the cache can be taken out."""

    def unmap_file_pages(self, first: int, end: int, *, even_cows: bool = False, clean: bool = False) -> None:
        """Take pages [first, end) of the file out of the page table, where they are the cache's own, or all of them."""

    def pinned(self, first: int, end: int) -> "list[Pin]":
        """Return the pins of pages among [first, end)."""


def _cut_at(ranges: Ranges, end: int) -> tuple[Ranges, list[tuple[int, int]]]:
    # the frames for pages before `end`, and the others
    kept, left = Ranges(), []
    for gfn, count, index in ranges:
        n = min(count, max(end - index, 0))
        if n:
            kept.add(gfn, n, index)
        if n < count:
            left.append((gfn + n, count - n))
    return kept, left


def place(runs: list[tuple[int, int, int]], index: int) -> Ranges:
    """Return allocated runs as pages from `index` on.

    A run from a list's hot end may descend: its frames are taken ascending, so that neighbours in the file are
    neighbours in memory.
    """
    ranges = Ranges()
    for frame, count in spans(runs):
        ranges.add(frame, count, index)
        index += count
    return ranges


class FileCache:
    """Base of Inode, which has the attributes."""

    _kernel: "GuestKernel"
    path: str
    size: int
    disk_size: int
    space: Space
    mappings: list[Maps]

    @property
    def pages(self) -> int:
        """Pages of the file."""
        return -(-self.size // FRAME_SIZE)

    def error(self, code: int, what: str, offset: int = 0) -> GuestIOError:
        """Return the error of a system call on this file."""
        return GuestIOError(code, self.path, what, offset=offset)

    def disk_file(self) -> DiskFile:
        """Return the open file on the disk."""
        raise NotImplementedError

    def dirtied(self) -> None:
        """It has a dirty page more."""
        raise NotImplementedError

    def cleaned(self) -> None:
        """It has no dirty page any more."""
        raise NotImplementedError

    def shrunk_behind_our_back(self) -> None:
        """The disk has less of the file than it had: so have we."""
        raise NotImplementedError

    # ---- page-cache references

    def get(self, first: int, count: int, how: int = 0) -> tuple[int, Ranges, bool]:
        """Look up pages to use them (find_get_page): Space.lookup(), with references where they count for something.

        What the host has taken is out of the cache then, and missing.
        """
        states = self._kernel.page_states
        if states is None or not states.gets:
            return self.space.lookup(first, count, how)
        return self.hold(first, count, how)

    def hold(self, first: int, count: int, how: int = 0) -> tuple[int, Ranges, bool]:
        """The same with references always, for MemMap.put(): to keep the pages."""
        n, frames, marker, gone = self.space.get(first, count, how)
        if gone:
            self.forget_discarded(first + n)
            self._kernel.vmstat["pgdiscard_stable"] += 1
        return n, frames, marker

    def put(self, frames: Ranges) -> None:
        """Drop them (put_page)."""
        states = self._kernel.page_states
        if states is not None and states.gets:
            self._kernel.memmap.put(frames)

    @property
    def may_be_dirty(self) -> bool:
        """Whether pages may be written through a mapping without the kernel's knowledge."""
        states = self._kernel.page_states
        if states is None or not states.storage_keys or not self.mappings:
            return False
        return self.space.find(0, self.pages, PageFlag.WRITABLE, PageFlag.WRITABLE)[0] > 0

    def collect_dirty(self, first: int = 0, end: int | None = None) -> None:
        """Ask the machine which pages were written through a mapping (page_test_and_clear_dirty)."""
        states, space = self._kernel.page_states, self.space
        if states is None or not states.storage_keys:
            return
        end = self.pages if end is None else min(end, self.pages)
        while first < end:
            found, at = space.find(first, end, PageFlag.WRITABLE, PageFlag.WRITABLE)
            if not found:
                return
            first = at.flat[2]
            n, frames, _ = self.get(first, found)  # stable first: who is clean may be taken between the two
            if n:
                dirty = states.test_and_clear_dirty(frames)
                for page in (first + k for k in range(n) if dirty[k]):
                    space.flag(page, page + 1, PageFlag.DIRTY)
                self.put(frames)
                if any(dirty):
                    self.dirtied()
            first += max(n, 1)

    # ---- reading

    def read(self, offset: int, into: memoryview, ra: ReadaheadState) -> int:
        """Copy bytes to `into`; return how many: fewer at the file's end (filemap_read). Raises GuestIOError."""
        done, end = 0, min(offset + len(into), self.size)
        readv, space = self._kernel.memory.readv, self.space
        while offset + done < end:
            at = offset + done
            index, within = at // FRAME_SIZE, at % FRAME_SIZE
            last = (end - 1) // FRAME_SIZE + 1
            # a page that the last read of this open file ended in was accessed then (filemap_read, pos_same_folio)
            same = (ra.prev_pos - 1) // FRAME_SIZE == index
            n, frames, marker = self.get(index, last - index, _SKIP if same else _MARK)
            if not n:
                self.read_ahead(index, last - index, ra)
                end = min(end, self.size)  # the disk may have less than it had
                continue
            part = min(end - at, n * FRAME_SIZE - within)
            try:
                readv(frames, within, into[done : done + part])
            except DiscardFault as fault:
                self._kernel.vfs.discarded(fault)
                continue
            finally:
                self.put(frames)
            done += part
            ra.prev_pos = offset + done
            if marker:
                space.flag(index + n - 1, index + n, 0, PageFlag.READAHEAD)
                self.read_ahead(index + n - 1, last - index - n + 1, ra, marked=True)
        return done

    def read_within(self, offset: int, n: int, ra: ReadaheadState) -> bytes | None:
        """Return n bytes that lie in one cached page; None: it isn't there. The short way of read()."""
        if self._kernel.page_states is not None:  # a reference is taken: the long way
            return None
        index = offset >> 12
        how = _SKIP_INT if ra.prev_pos - 1 >> 12 == index else _MARK_INT
        gfn = self.space.frame(index, how)
        if gfn >= 0:
            ra.prev_pos = offset + n
            try:
                return self._kernel.memory.read(gfn << 12 | offset & 0xFFF, n)
            except DiscardFault as fault:
                self._kernel.vfs.discarded(fault)
                return None
        if gfn == -1:
            return None
        try:
            data = self._kernel.memory.read(~gfn << 12 | offset & 0xFFF, n)
        except DiscardFault as fault:
            self._kernel.vfs.discarded(fault)
            return None
        ra.prev_pos = offset + n
        self.space.flag(index, index + 1, 0, PageFlag.READAHEAD)
        self.read_ahead(index, 1, ra, marked=True)
        return data

    def read_ahead(self, index: int, wanted: int, ra: ReadaheadState, *, marked: bool = False) -> None:
        """Read what readahead says of a miss at page `index`; page `index` itself is there afterwards, or it raises.

        What is read ahead of it fails silently, as long as that page can be had.
        """
        window = next_window(
            ra, index, wanted, marked=marked, cached=self.space.cached, cached_before=self.space.cached_before
        )
        if not marked:
            self.read_around(window or Window(index, 1, 0), index)
        elif window is not None:
            try:
                self._read_window(window, required=-1)
            except GuestIOError:
                pass

    def read_around(self, window: Window, index: int) -> None:
        """Read a window around page `index`, for a fault of a mapping; that page is there afterwards, or it raises."""
        try:
            self._read_window(window, required=index)
        except GuestIOError:
            pass
        if index < self.pages and not self.space.cached(index, 1):
            self._fill(index, index + 1, required=index)

    def _read_window(self, window: Window, required: int) -> None:
        # do_page_cache_ra(): not beyond the end of the file, and the marker where the window says
        end = min(window.start + window.count, self.pages)
        if window.start >= end:
            return
        marker = window.start + window.count - window.marker
        marks = window.marker and marker < end and self.space.absent(marker, 1)
        self._fill(window.start, end, required=required)
        if marks:
            self.space.flag(marker, marker + 1, PageFlag.READAHEAD)

    def _fill(self, first: int, end: int, *, required: int = -1) -> None:
        # Read the missing ones of pages [first, end) from the disk. `required` is worth reclaiming, and killing, for;
        # the others only take what reclaim gives easily.
        while first < end:
            first += self.space.cached(first, end - first)
            gap = self.space.absent(first, min(end - first, BATCH))
            if not gap or not self._fill_gap(first, first + gap, required):
                return
            first += gap

    def _fill_gap(self, first: int, end: int, required: int) -> bool:
        kernel = self._kernel
        must = first <= required < end
        runs = kernel.alloc_frames(end - first, owner=None, retry=False)
        got = sum(count for _, count, _ in runs)
        if must and got <= required - first:
            try:
                runs += kernel.alloc_frames(required + 1 - first - got, owner=None)
            except BaseException:
                kernel.free_pages(spans(runs))
                raise
            got = sum(count for _, count, _ in runs)
        if got < end - first:
            if must and got <= required - first:
                kernel.free_pages(spans(runs))
                raise self._no_frame(required, required + 1 - first - got)
            end = first + got
            if not got:
                return False
        ranges = place(runs, first)
        view = kernel.bounce[: got * FRAME_SIZE]
        try:
            self._read_disk(first * FRAME_SIZE, view)
            end = min(end, max(self.pages, first))  # it may be shorter than it was
            kernel.memory.writev(ranges, 0, view)
            kept, left = _cut_at(ranges, end)  # of what isn't in the file any more
            self.space.insert(kept)
        except BaseException as error:
            kernel.free_after_failure(spans(runs), error)
            raise
        kernel.free_pages(left)
        kernel.vmstat["pgpgin"] += (end - first) * (FRAME_SIZE // 1024)
        return True

    def _no_frame(self, index: int, wanted: int) -> OutOfMemory:
        free = self._kernel.free_bytes // FRAME_SIZE
        what = f"page {index} of {self.path} found no frame: nothing could be reclaimed"
        return OutOfMemory(what, order=0, wanted=wanted, free=free)

    def _read_disk(self, offset: int, view: memoryview) -> None:
        # the disk's bytes, and zeros where it has none
        wanted = min(len(view), max(self.disk_size - offset, 0))
        n = 0
        if wanted:
            whole = -(-wanted // FRAME_SIZE) * FRAME_SIZE
            try:
                n = min(self.disk_file().read(offset, view[:whole]), wanted)
            except OSError as error:
                raise self.error(error.errno or errno.EIO, "reading it failed", offset) from error
        if n < len(view):
            view[n:] = bytes(len(view) - n)
        if n < wanted:
            self.shrunk_behind_our_back()

    # ---- leaving the cache

    def invalidate(self) -> int:
        """Free the pages that are clean, unlocked, unmapped (invalidate_mapping_pages); return how many."""
        frames = self.space.remove(0, self.pages, Remove.INVALIDATE)
        self._free(frames)
        return len(frames)

    def drop(self) -> None:
        """Free all pages, dirty or not: nobody can reach the file any more (truncate_inode_pages_final)."""
        self._truncate_pages(0, self.pages)
        self.cleaned()

    def evict(self, index: int) -> int:
        """Take a clean page that is no longer mapped, for reclaim; return how many frames that freed."""
        frames = self.space.remove(index, index + 1, Remove.EVICT)
        self._free(frames)
        return len(frames)

    def forget_discarded(self, index: int) -> None:
        """Take a page out whose content the host has taken: out of the page tables, too. It was clean."""
        for mapping in self.mappings:
            mapping.unmap_file_pages(index, index + 1, clean=True)
        self._truncate_pages(index, index + 1)
        if not self.space.nr_dirty:  # it was marked by a write that hadn't come to its store
            self.cleaned()

    def unmap(self, index: int) -> None:
        """Take a page out of all page tables (try_to_unmap)."""
        for mapping in self.mappings:
            mapping.unmap_file_pages(index, index + 1)

    def _truncate_pages(self, first: int, end: int) -> None:
        for mapping in self.mappings:
            for pin in mapping.pinned(first, end):
                pin.unpin()
        self._free(self.space.remove(first, end, Remove.TRUNCATE))

    def _free(self, frames: "array[int]") -> None:
        self._kernel.free_pages(runs_of(frames))
