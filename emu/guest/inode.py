"""Inode: a file of a disk, and its pages in the page cache (struct inode and address_space; mm/filemap.c).

A read finds its pages in the cache, copies what lies in a row, and for the first that is missing asks readahead what to
read. A page comes into the cache when its content is there: frames are allocated, the disk's bytes go through a bounce
buffer, the frames are filled from it (missing ones are installed, not faulted first), and only then does the space name
them. So there are no locked pages that somebody waits for, and a read error leaves nothing behind.

A write that covers a page wholly needs nothing of the disk; one that doesn't reads the page first. The page is dirty
from then on, and the writer pays for the disk when too much is (writeback.py).

Allocation may reclaim, and reclaim may take any clean page. So nothing that was looked up is used after an allocation:
each step looks up, copies, and forgets.

The end of the file. `size` is the guest's; `disk_size` what the disk has. Between the two lie bytes that were written
or left out here and aren't on the disk yet: they are read as zeros without asking it. A read below disk_size that comes
back short means that somebody has cut the file behind our back: then it is as long as the disk says.
"""

import errno
from array import array
from typing import TYPE_CHECKING, Protocol

from emu.errors import DiscardFault, GuestError, GuestIOError, GuestMemoryError, OutOfMemory
from emu.guest.page import Insert, Lookup, PageFlag, Remove, Space
from emu.guest.pcp import spans
from emu.guest.readahead import ReadaheadState, Window, next_window
from emu.ranges import Ranges, runs_of
from emu.units import FRAME_SIZE
from emu.virtio.disk import DiskFile

if TYPE_CHECKING:
    from emu.guest.kernel import GuestKernel
    from emu.guest.pins import Pin

__all__ = ["Inode"]

_BATCH = 256  # pages of one disk request: the bounce buffer
_WRITE_BATCH = 32  # pages that a writer dirties between two looks at the limits
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


def _place(runs: list[tuple[int, int, int]], index: int) -> Ranges:
    # Allocated runs as pages from `index` on. A run from a list's hot end may descend: its frames are taken ascending,
    # so that neighbours in the file are neighbours in memory.
    ranges = Ranges()
    for frame, count in spans(runs):
        ranges.add(frame, count, index)
        index += count
    return ranges


class Inode:
    """A file. Made by the file system (vfs.py), one for each file of the disk, whatever its names."""

    def __init__(self, kernel: "GuestKernel", path: str, file: DiskFile) -> None:
        self._kernel = kernel
        self.kernel_lock = kernel.kernel_lock
        #: the name that it was opened by last, for messages
        self.path = path
        #: where the file system keeps it
        self.cache_key = (0, *file.key)
        self.access = file.access
        self.fixed = file.fixed
        self.file: DiskFile | None = file
        self.disk_size, self.changed = file.version()
        self.size = self.disk_size
        self.space = Space(kernel.memmap, self._pages(self.size))
        self.mappings: list[Maps] = []
        self.written_through_mappings = False
        #: open files of it, and whether its name is gone
        self.openers = 0
        self.unlinked = False
        #: guest time since when it has been dirty; None: it isn't
        self.dirtied_at: float | None = None
        #: errors of writeback: how many so far, and the last one's errno (errseq_t)
        self.write_errors = 0
        self.write_errno = 0
        #: guest time of the last writeback, if it failed
        self.failed_at: float | None = None
        #: somebody has changed the file on the disk, and clean pages may be older
        self.stale = False
        self._busy = False

    def __repr__(self) -> str:
        return f"<Inode {self.path!r}, {self.size} bytes, {self.space.nr_pages} pages cached>"

    @staticmethod
    def _pages(size: int) -> int:
        return -(-size // FRAME_SIZE)

    @property
    def pages(self) -> int:
        """Pages of the file."""
        return self._pages(self.size)

    def error(self, code: int, what: str, offset: int = 0) -> GuestIOError:
        """Return the error of a system call on this file."""
        return GuestIOError(code, self.path, what, offset=offset)

    def disk_file(self) -> DiskFile:
        """Return the open file on the disk: there is one while somebody uses the inode, and while it is dirty."""
        if self.file is None:
            raise GuestError(f"{self.path} is used after its last close")
        return self.file

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
                    self._kernel.writeback.dirtied(self)
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
            gap = self.space.absent(first, min(end - first, _BATCH))
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
        ranges = _place(runs, first)
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
            self._shrunk_behind_our_back()

    def _shrunk_behind_our_back(self) -> None:
        self._kernel.vmstat["disk_file_shrunk"] += 1
        self.stale = True
        self.disk_size, self.changed = self.disk_file().version()
        # the page with the new end in it, too
        beyond, _ = self.space.find(self.disk_size // FRAME_SIZE, self.pages, PageFlag.DIRTY, PageFlag.DIRTY)
        if not beyond:  # what we have written beyond it and not yet brought there still counts
            self._cut(self.disk_size)

    # ---- writing

    def write(self, offset: int, data: memoryview) -> None:
        """Put data into the cache, dirty; the file grows if need be (generic_perform_write). Raises GuestIOError."""
        self._kernel.vfs.check_size(self, offset + len(data))
        kernel, space = self._kernel, self.space
        if offset + len(data) > self.size:
            self._clear_tail()
        space.resize(max(self._pages(offset + len(data)), self.pages))
        done = 0
        while done < len(data):
            kernel.writeback.check_limit(self)
            at = offset + done
            index, within = at // FRAME_SIZE, at % FRAME_SIZE
            if within or len(data) - done < FRAME_SIZE:
                n = self._write_part(index, within, data[done : done + FRAME_SIZE - within])
            else:
                n = self._write_whole(index, data[done : done + _WRITE_BATCH * FRAME_SIZE])
            done += n
            self.size = max(self.size, at + n)
            kernel.writeback.dirtied(self)
            kernel.writeback.balance_dirty_pages(n)

    def _write_part(self, index: int, within: int, data: memoryview) -> int:
        # part of one page: what is around it must be there first
        space, memory = self.space, self._kernel.memory
        if not space.cached(index, 1):
            if index * FRAME_SIZE < self.disk_size:
                self._fill(index, index + 1, required=index)
            if not space.cached(index, 1):  # beyond what the disk has
                page = bytearray(FRAME_SIZE)  # not the bounce buffer: an allocation may write back through it
                page[within : within + len(data)] = data
                self._add(index, memoryview(page))
                return len(data)
        n, frames, _ = self.get(index, 1)
        if not n:
            return self._write_part(index, within, data)
        try:
            memory.writev(frames, within, data)
            space.flag(index, index + 1, PageFlag.DIRTY)
        except DiscardFault as fault:  # what is around the data was the host's to take: from the disk again
            self._kernel.vfs.discarded(fault)
            return self._write_part(index, within, data)
        finally:
            self.put(frames)
        return len(data)

    def _write_whole(self, index: int, data: memoryview) -> int:
        # whole pages: those in the cache are overwritten, missing ones come into being with the data
        space, pages = self.space, len(data) // FRAME_SIZE
        n, frames, _ = self.get(index, pages)
        if n:
            try:
                self._kernel.memory.writev(frames, 0, data[: n * FRAME_SIZE])
                space.flag(index, index + n, PageFlag.DIRTY)
            finally:
                self.put(frames)
            return n * FRAME_SIZE
        return self._add(index, data[: space.absent(index, pages) * FRAME_SIZE])

    def _add(self, index: int, data: memoryview) -> int:
        # new dirty pages with data; as many as there is memory for, at least one
        kernel, pages = self._kernel, len(data) // FRAME_SIZE
        runs = kernel.alloc_frames(pages, owner=None)
        got = sum(count for _, count, _ in runs)
        if not got:
            raise self._no_frame(index, pages)
        ranges = _place(runs, index)
        try:
            kernel.memory.writev(ranges, 0, data[: got * FRAME_SIZE])
            # what was read meanwhile may have shown that the file is shorter
            self.space.resize(max(index + got, self.pages))
            self.space.insert(ranges, Insert.DIRTY | Insert.WRITE)
        except BaseException as error:
            kernel.free_after_failure(spans(runs), error)
            raise
        return got * FRAME_SIZE

    # ---- the end of the file

    def truncate(self, size: int) -> None:
        """Cut or extend it, here and on the disk (vfs truncate). Raises GuestIOError."""
        self._kernel.vfs.check_size(self, size)
        file = self.disk_file()
        for mapping in self.mappings:
            if mapping.pinned(self._pages(size), self.pages):
                raise self.error(errno.EBUSY, f"truncating it to {size} bytes would cut off pinned pages", size)
        try:
            self._look_before_we_change(file)
            file.truncate(size)
        except OSError as error:
            raise self.error(error.errno or errno.EIO, f"truncating it to {size} bytes failed") from error
        self.disk_size, self.changed = file.version()
        if size < self.size:
            self._cut(size)
        else:
            self._clear_tail()
            self.space.resize(self._pages(size))
            self.size = size

    def _look_before_we_change(self, file: DiskFile) -> None:
        # Our change moves the time of change: what somebody else has changed before mustn't hide behind it.
        self.stale = self.stale or file.version() != (self.disk_size, self.changed)

    def _clear_tail(self) -> None:
        # A shared mapping may have written beyond the end, into the last page: that isn't the file's, and mustn't
        # become so when the file grows (pagecache_isize_extended).
        if self.written_through_mappings:
            self._zero_tail()

    def _zero_tail(self) -> None:
        # what lies beyond the file's end in its last page, if that is cached
        within = self.size % FRAME_SIZE
        n, frames, _ = self.get(self.pages - 1, 1) if within else (0, Ranges(), False)
        if n:
            try:
                self._kernel.memory.writev(frames, within, bytes(FRAME_SIZE - within))
            except DiscardFault as fault:
                self._kernel.vfs.discarded(fault)  # read again, it ends where the file does
            finally:
                self.put(frames)

    def _cut(self, size: int) -> None:
        pages = self._pages(size)
        for mapping in self.mappings:
            mapping.unmap_file_pages(pages, self.pages, even_cows=True)
        self._truncate_pages(pages, self.pages)
        self.space.resize(pages)
        self.size = size
        self._zero_tail()  # what a later extension must not bring back
        if not self.space.nr_dirty:
            self._kernel.writeback.cleaned(self)

    def invalidate(self) -> int:
        """Free the pages that are clean, unlocked, unmapped (invalidate_mapping_pages); return how many."""
        frames = self.space.remove(0, self.pages, Remove.INVALIDATE)
        self._free(frames)
        return len(frames)

    def drop(self) -> None:
        """Free all pages, dirty or not: nobody can reach the file any more (truncate_inode_pages_final)."""
        self._truncate_pages(0, self.pages)
        self._kernel.writeback.cleaned(self)

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
            self._kernel.writeback.cleaned(self)

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

    def revalidate(self, file: DiskFile) -> None:
        """Compare with the disk at an open: what was changed behind our back is read again, unless it is dirty here."""
        size, changed = file.version()
        if (size, changed) == (self.disk_size, self.changed) and not self.stale:
            return
        self._kernel.vmstat["disk_file_changed"] += 1
        self.stale = False
        for mapping in self.mappings:
            mapping.unmap_file_pages(0, self.pages)
        if self.space.nr_dirty:  # ours stay, and will be written over what is there
            self.invalidate()
            self.disk_size, self.changed = size, changed
            self.size = max(self.size, size)
            self.space.resize(self.pages)
            return
        for mapping in self.mappings:
            mapping.unmap_file_pages(self._pages(size), self.pages, even_cows=True)
        self._truncate_pages(0, self.pages)
        self.disk_size, self.changed = size, changed
        self.space.resize(self._pages(size))
        self.size = size

    # ---- writing back

    def write_back(self, most: int) -> int:
        """Write up to `most` dirty pages, ascending; return how many. An error leaves its pages dirty and is raised."""
        written, index = 0, 0
        kernel, space = self._kernel, self.space
        if self._busy:  # the disk has called back into the kernel in the middle of this
            return 0
        self._busy = True
        try:
            while written < most:
                n, frames = space.find(
                    index, self.pages, PageFlag.DIRTY | PageFlag.WRITEBACK | PageFlag.LOCKED, PageFlag.DIRTY
                )
                if not n:
                    break
                n = min(n, most - written, _BATCH)
                index = frames.flat[2]
                self._write_run(index, n, frames)
                index += n
                written += n
        finally:
            self._busy = False
            kernel.vmstat["pgpgout"] += written * (FRAME_SIZE // 1024)
            kernel.vmstat["nr_written"] += written
        if not space.nr_dirty:
            kernel.writeback.cleaned(self)
        return written

    def _write_run(self, index: int, n: int, frames: Ranges) -> None:
        space = self.space
        start = index * FRAME_SIZE
        data = self._kernel.bounce[: min(n * FRAME_SIZE, self.size - start)]
        file = self.disk_file()
        # clean before it is read: a write from now on makes it dirty again (clear_page_dirty_for_io)
        space.flag(index, index + n, PageFlag.WRITEBACK, PageFlag.DIRTY)
        try:
            self._kernel.memory.readv(frames, 0, data)
            self._look_before_we_change(file)
            try:
                file.write(start, data)
            finally:  # also of a write that was half done
                self.disk_size, self.changed = file.version()
        except BaseException as error:
            space.flag(index, index + n, PageFlag.DIRTY, PageFlag.WRITEBACK)
            if not isinstance(error, OSError | GuestMemoryError):
                raise
            self.write_errors += 1
            # a frame that the host has lost is an I/O error to the guest (memory_failure)
            self.write_errno = errno.EIO if isinstance(error, GuestMemoryError) else error.errno or errno.EIO
            self.failed_at = self._kernel.clock.now()
            self._kernel.vmstat["nr_write_errors"] += 1
            raise self.error(self.write_errno, "writing it back failed", start) from error
        self.failed_at = None
        space.flag(index, index + n, 0, PageFlag.WRITEBACK)

    def sync(self) -> None:
        """Write all dirty pages and wait for the disk. Raises GuestIOError."""
        self.collect_dirty()
        while self.space.nr_dirty:
            if not self.write_back(1 << 30):
                raise GuestError(f"{self.path}: fsync in the middle of its own writeback")
        try:
            self.disk_file().sync()
        except OSError as error:
            self.write_errors += 1
            self.write_errno = error.errno or errno.EIO
            raise self.error(self.write_errno, "fsync failed") from error
