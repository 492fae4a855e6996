"""Inode: a file of a disk: what is written to it, where it ends, and bringing it to the disk (struct inode).

Its pages in the cache, and reading, are FileCache's (filecache.py).

A write that covers a page wholly needs nothing of the disk; one that doesn't reads the page first. The page is dirty
from then on, and the writer pays for the disk when too much is (writeback.py).

The end of the file. `size` is the guest's; `disk_size` what the disk has. Between the two lie bytes that were written
or left out here and aren't on the disk yet: they are read as zeros without asking it. A read below disk_size that comes
back short means that somebody has cut the file behind our back: then it is as long as the disk says.
"""

import errno
from typing import TYPE_CHECKING

from emu.errors import DiscardFault, GuestError, GuestMemoryError
from emu.guest.filecache import BATCH, FileCache, Maps, place
from emu.guest.page import Insert, PageFlag, Space
from emu.guest.pcp import spans
from emu.ranges import Ranges
from emu.units import FRAME_SIZE
from emu.virtio.disk import DiskFile

if TYPE_CHECKING:
    from emu.guest.kernel import GuestKernel

__all__ = ["Inode"]

_WRITE_BATCH = 32  # pages that a writer dirties between two looks at the limits


class Inode(FileCache):
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

    def dirtied(self) -> None:
        """It has a dirty page more."""
        self._kernel.writeback.dirtied(self)

    def cleaned(self) -> None:
        """It has no dirty page any more."""
        self._kernel.writeback.cleaned(self)

    def disk_file(self) -> DiskFile:
        """Return the open file on the disk: there is one while somebody uses the inode, and while it is dirty."""
        if self.file is None:
            raise GuestError(f"{self.path} is used after its last close")
        return self.file

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
            self.dirtied()
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
        ranges = place(runs, index)
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
            self.cleaned()

    def shrunk_behind_our_back(self) -> None:
        self._kernel.vmstat["disk_file_shrunk"] += 1
        self.stale = True
        self.disk_size, self.changed = self.disk_file().version()
        # the page with the new end in it, too
        beyond, _ = self.space.find(self.disk_size // FRAME_SIZE, self.pages, PageFlag.DIRTY, PageFlag.DIRTY)
        pinned = any(mapping.pinned(self._pages(self.disk_size), self.pages) for mapping in self.mappings)
        if not beyond and not pinned:  # what we have written beyond it and not yet brought there still counts
            self._cut(self.disk_size)

    def revalidate(self, file: DiskFile) -> None:
        """Compare with the disk at an open: what was changed behind our back is read again, unless it is dirty here."""
        size, changed = file.version()
        if (size, changed) == (self.disk_size, self.changed) and not self.stale:
            return
        self._kernel.vmstat["disk_file_changed"] += 1
        self.stale = False
        for mapping in self.mappings:
            mapping.unmap_file_pages(0, self.pages)
        pins = [pin for mapping in self.mappings for pin in mapping.pinned(0, self.pages)]
        for pin in pins:
            if pin.write:  # a device may have
                self.space.flag(pin.first, pin.first + pin.pages, PageFlag.DIRTY)
                self.dirtied()
        if self.space.nr_dirty or pins:  # ours stay, and what is dirty will be written over what is there
            self.invalidate()
            self.stale = bool(pins)  # what is pinned is older than the disk: looked at again
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
                n = min(n, most - written, BATCH)
                index = frames.flat[2]
                self._write_run(index, n, frames)
                index += n
                written += n
        finally:
            self._busy = False
            kernel.vmstat["pgpgout"] += written * (FRAME_SIZE // 1024)
            kernel.vmstat["nr_written"] += written
        if not space.nr_dirty:
            self.cleaned()
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
