"""FileMapping: a file of the disk in a process's address space (filemap_fault, do_cow_fault, page_mkwrite).

A page that is read is mapped from the page cache: both have one frame, which counts as mapped and which drop_caches
leaves alone. Reclaim may take it all the same: it is taken out of the page tables first, and the next access faults it
in again. In a private mapping a page that is written becomes a copy of the process's own; in a shared one it becomes
dirty in the cache, at every write, since writeback cleans and protects it in between.

Faults read around: 16 pages before to 16 after the missing one (do_sync_mmap_readahead). An access beyond the file's
end is SIGBUS, here GuestError.

Whatever allocates may reclaim what was mapped a moment ago. So an operation goes in spans: it maps one, does its work
there, and only then looks at the next.
"""

from array import array
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from emu.errors import BadValue, DiscardFault, GuestError, OutOfMemory
from emu.frames import Cause
from emu.guest.free_area import lazy_bytes
from emu.guest.inode import Inode
from emu.guest.lock import as_current, in_kernel
from emu.guest.memory import Op
from emu.guest.page import Lookup, PageFlag
from emu.guest.pins import Pin, Pins
from emu.guest.readahead import RA_PAGES, Window
from emu.guest.vma import Mapping
from emu.ranges import Ranges
from emu.units import FRAME_SIZE, format_size

if TYPE_CHECKING:
    from emu.guest.kernel import GuestKernel
    from emu.guest.process import Process

__all__ = ["FileMapping"]

_SPAN = 256  # pages
_SHARED_SPAN = 32  # dirtied between two looks at the limits
_MAP, _MKWRITE, _COW, _PIN = map(Lookup.because, (Cause.MAP, Cause.MKWRITE, Cause.COW, Cause.PIN))


class FileMapping(Mapping):
    """A mapping of the first pages of a file of the disk. shared: writes go to the file."""

    def __init__(self, kernel: "GuestKernel", process: "Process", size: int, inode: Inode, *, shared: bool) -> None:
        super().__init__(kernel, process, size, huge=False)
        self.inode = inode
        self.shared = shared
        # 1: the page-table entry is the cache's page
        self._cached = lazy_bytes(self.pages)
        self._pins: Pins | None = None  # until something is locked or pinned
        inode.mappings.append(self)

    def __repr__(self) -> str:
        kind = "shared" if self.shared else "private"
        return f"<FileMapping {kind} of {self.inode.path!r}, {format_size(self.present * FRAME_SIZE)} present>"

    # ---- access

    @as_current
    def touch(
        self, offset: int | str = 0, length: int | str | None = None, write: bool = True, threads: int = 1
    ) -> None:
        """Touch every page, reading or writing."""
        first, end = self._span(offset, length)
        op = Op.TOUCH_WRITE if write else Op.TOUCH_READ
        self._on_spans(
            first, end, write, lambda lo, hi: self._kernel.memory.vcpu(op, self._ranges(lo, hi), threads=threads)
        )

    @as_current
    def fill(self, *, seed: int, offset: int | str = 0, length: int | str | None = None, threads: int = 1) -> None:
        """Fill every page with content that follows from the seed and the page's place."""
        first, end = self._span(offset, length)
        self._on_spans(
            first,
            end,
            True,
            lambda lo, hi: self._kernel.memory.vcpu(Op.FILL, self._ranges(lo, hi), seed, threads=threads),
        )

    @as_current
    def verify(
        self, *, seed: int, offset: int | str = 0, length: int | str | None = None, threads: int = 1
    ) -> list[int]:
        """Return the byte offsets of pages that don't hold what fill() with this seed left there."""
        first, end = self._span(offset, length)
        bad: list[int] = []

        def verify(lo: int, hi: int) -> None:
            wrong = set(self._kernel.memory.vcpu(Op.VERIFY, self._ranges(lo, hi), seed, threads=threads))
            bad.extend(page * FRAME_SIZE for page in range(lo, hi) if self._frame[page] - 1 in wrong)

        self._on_spans(first, end, False, verify)
        return bad

    @as_current
    def read(self, offset: int | str, n: int) -> bytes:
        """Return n bytes."""
        start = self._offset(offset, n)
        result = bytearray(n)
        view = memoryview(result)

        def read(lo: int, hi: int) -> None:
            a, b = max(lo * FRAME_SIZE, start), min(hi * FRAME_SIZE, start + n)
            self._kernel.memory.readv(self._ranges(lo, hi), a - lo * FRAME_SIZE, view[a - start : b - start])

        self._on_spans(start // FRAME_SIZE, -(-(start + n) // FRAME_SIZE), False, read)
        return bytes(result)

    @as_current
    def write(self, offset: int | str, data: bytes | bytearray | memoryview) -> None:
        """Write data."""
        view = memoryview(data).cast("B")
        start = self._offset(offset, len(view))
        end = start + len(view)

        def write(lo: int, hi: int) -> None:
            a, b = max(lo * FRAME_SIZE, start), min(hi * FRAME_SIZE, end)
            self._kernel.memory.writev(self._ranges(lo, hi), a - lo * FRAME_SIZE, view[a - start : b - start])

        self._on_spans(start // FRAME_SIZE, -(-end // FRAME_SIZE), True, write)

    # ---- staying (pins.py)

    @as_current
    def mlock(self, offset: int | str = 0, length: int | str | None = None) -> None:
        """Fault pages in, and keep them: neither reclaim nor the host takes them (mlock).

        It marks the file for good: with page states none of its pages is called volatile from then on, nor after
        munlock() (the patches of 2009 have a sticky flag).
        """
        first, end = self._span(offset, length)
        pins = self._holding()
        pins.lock(first, end)
        for frames in self._hold(first, end, write=False, own=True):
            pins.mapped(frames)
            self._kernel.memmap.put(frames)

    @in_kernel
    def munlock(self, offset: int | str = 0, length: int | str | None = None) -> None:
        """Take that back. The file is marked for good all the same (CMM2): its pages are never volatile again."""
        first, end = self._span(offset, length)
        if self._pins is not None:
            self._pins.unlock(first, end)

    @as_current
    def pin(self, offset: int | str = 0, length: int | str | None = None, *, write: bool = False) -> Pin:
        """Pin the file's pages for a device until unpin() (pin_user_pages).

        A page that the process has copied isn't one of them: EFAULT.
        """
        first, end = self._span(offset, length)
        if write and not self.shared:
            raise BadValue("a private mapping's pages of the file can't be pinned for writing: map it shared")
        pins, held = self._holding(), Ranges()
        try:
            for frames in self._hold(first, end, write=write, own=False):
                for run in frames:
                    held.add(*run)
        except BaseException:
            self._kernel.memmap.put(held)
            raise
        pin = Pin(self, first, end - first, held, write=write)
        pins.pins.append(pin)
        return pin

    def _hold(self, first: int, end: int, *, write: bool, own: bool) -> Iterator[Ranges]:
        # Map pages, and take a reference to each that is the file's. Of the process's own, if they may be (own), nobody
        # takes any.
        while first < end:
            if self._frame[first] and not self._cached[first]:
                if not own:
                    raise GuestError(f"EFAULT: page {first} is a copy, not the file's")
                first += 1
                continue
            stop = self._map(first, min(end, first + _SPAN))
            if write and not (stop := self._make_writable(first, stop)):
                continue
            page = first
            while page < stop and self._cached[page]:
                page += 1
            n, frames, _ = self.inode.hold(first, page - first, _PIN)
            if n:  # else the host has taken it meanwhile: mapped again
                yield frames
            first += n

    @in_kernel
    def unpin(self, pin: Pin) -> None:
        """End a pin, if it hasn't ended."""
        if self._pins is not None:
            self._pins.end(pin)

    def pinned(self, first: int, end: int) -> list[Pin]:
        """Return the pins of pages among [first, end)."""
        return [] if self._pins is None else self._pins.overlapping(first, end)

    def frame_of(self, page: int) -> int:
        """Return the frame that the page table has for a page; -1: none."""
        return self._frame[page] - 1

    def _holding(self) -> Pins:
        if self._pins is None:
            self._pins = Pins(self)
        return self._pins

    # ---- faults

    def _on_spans(self, first: int, end: int, write: bool, work: Callable[[int, int], object]) -> None:
        # Work on spans of present pages; a span with a page that the host has taken is faulted in again.
        while first < end:
            for lo, hi in self._faulted(first, end, write):
                first = lo
                try:
                    work(lo, hi)
                except DiscardFault as fault:
                    self._kernel.vfs.discarded(fault)
                    break
                first = hi

    def _faulted(self, first: int, end: int, write: bool) -> Iterator[tuple[int, int]]:
        # Spans of pages [first, end) that are present, for writing if need be: each is good until the next one is asked
        # for.
        while first < end:
            stop = min(end, first + (_SHARED_SPAN if write and self.shared else _SPAN))
            if write and self.shared:
                self._kernel.writeback.check_limit(self.inode)
            if write and not self.shared:
                stop = self._own(first, stop)
            else:
                stop = self._map(first, stop)
                if write and not (stop := self._make_writable(first, stop)):
                    continue  # the host took the first one: mapped anew
            yield first, stop
            if write and self.shared:
                self._kernel.writeback.balance_dirty_pages((stop - first) * FRAME_SIZE)
            first = stop

    def _make_writable(self, first: int, end: int) -> int:
        # page_mkwrite(): returns the end of what may be written, 0: nothing. Where the machine tells what is dirty, it
        # is asked when it counts (Inode.collect_dirty); elsewhere the page is dirty from now on.
        inode, kernel = self.inode, self._kernel
        inode.written_through_mappings = True
        kernel.vmstat["pgmkwrite"] += end - first
        states = kernel.page_states
        if states is None or not states.gets:
            inode.space.flag(first, end, PageFlag.DIRTY)
            kernel.writeback.dirtied(inode)
            return end
        n, frames, _ = inode.get(first, end - first, _MKWRITE)
        if n:
            if states.storage_keys:
                states.begin_writable(inode, first, n, frames)
            kernel.memmap.writable(frames)
            if not states.storage_keys:
                inode.space.flag(first, first + n, PageFlag.DIRTY)
            kernel.writeback.dirtied(inode)
            inode.put(frames)
        return first + n if n else 0

    def _map(self, first: int, end: int) -> int:
        # Make pages from `first` on present for reading; returns where it stopped, after one page at least.
        kernel, page = self._kernel, first
        while page < end:
            if self._frame[page]:
                stop = page + 1
                while stop < end and self._frame[stop]:
                    stop += 1
                self._accessed(page, stop)
                page = stop
                continue
            stop = page + 1
            while stop < end and not self._frame[stop]:
                stop += 1
            n, frames, _ = self._look(page, stop - page)
            if not n:
                if page > first:
                    break  # reading it in may reclaim the ones before it: those first
                self._read_around(page)
                continue
            kernel.memmap.map(frames, 1, young=True)
            if self._pins is not None:
                self._pins.mapped(frames)
                kernel.memmap.put(frames)
            elif not self._minor:
                self.inode.put(frames)
            for gfn, count, index in frames:
                self._frame[index : index + count] = memoryview(array("I", range(gfn + 1, gfn + 1 + count)))
            self._cached[page : page + n] = b"\x01" * n
            self.present += n
            kernel.vmstat["pgfault"] += n
            kernel.vmstat["filemap_map_pages"] += n
            page += n
        return page

    def _look(self, page: int, count: int) -> tuple[int, Ranges, bool]:
        if self._pins is not None:
            return self.inode.hold(page, count, _MAP)
        if self._minor:
            return self.inode.space.lookup(page, count)
        return self.inode.get(page, count, _MAP)

    @property
    def _minor(self) -> bool:
        # whether a minor fault leaves the page as it is: a discard fault repairs what the host has taken
        states = self._kernel.page_states
        return states is not None and states.settings.minor

    def _read_around(self, page: int) -> None:
        inode = self.inode
        if page >= inode.pages:
            raise GuestError(
                f"SIGBUS: page {page} of a mapping of {inode.path} is beyond the file's end, {inode.size} bytes"
            )
        self._kernel.vmstat["pgmajfault"] += 1
        inode.read_around(Window(max(page - RA_PAGES // 2, 0), RA_PAGES, RA_PAGES // 4), page)

    def _accessed(self, first: int, end: int) -> None:
        cached = Ranges()
        for gfn, count, key in self._ranges(first, end):
            page = key - self._key
            if self._cached[page : page + count].tobytes().count(1) == count:
                cached.add(gfn, count, 0)
                continue
            for k in range(count):
                if self._cached[page + k]:
                    cached.add(gfn + k, 1, 0)
        if len(cached):
            self._kernel.memmap.map(cached, 0, young=True)

    def _own(self, first: int, end: int) -> int:
        # do_cow_fault(): pages of the process's own, copied from the cache's. Returns where it stopped.
        kernel, inode = self._kernel, self.inode
        page = first
        while page < end and self._frame[page] and not self._cached[page]:
            page += 1
        if page > first:
            return page
        while page < end and not (self._frame[page] and not self._cached[page]):
            page += 1
        if page > inode.pages:
            page = max(inode.pages, first + 1)
        # The frames first: what is looked up in the cache after this isn't reclaimed before it is copied.
        runs = kernel.alloc_frames(page - first)
        frames = array("I")
        for frame, count, step in runs:
            frames.extend(range(frame, frame + step * count, step))
        done = 0
        try:
            while done < len(frames):
                n, sources, _ = inode.get(first + done, len(frames) - done, _COW)
                if not n:
                    self._read_around(first + done)
                    continue
                copies, at = Ranges(), done
                for gfn, count, _index in sources:
                    for k in range(count):
                        copies.add(frames[at + k], 1, gfn + k)
                    at += count
                try:
                    kernel.memory.vcpu(Op.COPY, copies)
                except DiscardFault as fault:
                    kernel.vfs.discarded(fault)
                    continue
                finally:
                    inode.put(sources)
                done += n
        except BaseException as error:
            kernel.free_after_failure([(frame, 1) for frame in frames], error)
            raise
        if not done:
            raise OutOfMemory(
                f"process {self.process.pid} ({self.process.name}) found no frame to copy page {first} of {inode.path}",
                order=0,
                wanted=page - first,
                free=kernel.free_bytes // FRAME_SIZE,
            )
        self.unmap_file_pages(first, first + done)
        self._frame[first : first + done] = memoryview(array("I", [frame + 1 for frame in frames]))
        self.present += done
        kernel.vmstat["pgfault"] += done
        return first + done

    # ---- giving back

    def unmap_file_pages(self, first: int, end: int, *, even_cows: bool = False, clean: bool = False) -> None:
        """Take the cache's pages among [first, end) out of the page table (unmap_mapping_range).

        even_cows: the process's own copies of them go, too, as when the file is cut. clean: they can't be dirty.
        """
        end = min(end, self.pages)
        if self.shared and not clean:
            self.inode.collect_dirty(first, end)  # while they are mapped
        if even_cows and first < end:
            self._zap(first, end)
            return
        gone = Ranges()
        for page in range(first, end):
            if self._cached[page]:
                gone.add(self._frame[page] - 1, 1, 0)
                if self._pins is not None:
                    self._pins.unmapped(self._frame[page] - 1, page)
                self._cached[page] = 0
                self._frame[page] = 0
        if len(gone):
            self.present -= len(gone)
            self._kernel.memmap.map(gone, -1, young=False)

    def _zap(self, first: int, end: int) -> None:
        self.unmap_file_pages(first, end)
        super()._zap(first, end)

    @in_kernel
    def madvise_dontneed(self, offset: int | str = 0, length: int | str | None = None) -> None:
        """Free the frames of a part; it stays mapped and reads as the file. Locked parts are refused, as in Linux."""
        first, end = self._span(offset, length)
        if self._pins is not None and self._pins.locked(first, end):
            raise GuestError(f"EINVAL: pages among [{first}, {end}) are locked: munlock() them first")
        super().madvise_dontneed(offset, length)

    @in_kernel
    def munmap(self, offset: int | str = 0, length: int | str | None = None) -> None:
        """Unmap all, or a part. With the last part its pins end."""
        super().munmap(offset, length)
        if not self._mapped:
            for pin in self.pinned(0, self.pages):
                self.unpin(pin)
        if not self._mapped and self in self.inode.mappings:
            self.inode.mappings.remove(self)
            self._kernel.vfs.unmapped(self.inode)
