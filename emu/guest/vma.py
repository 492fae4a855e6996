"""Mapping: a VMA of a process and its page table: demand faults, copy on write, munmap of parts, madvise.

A page gets its frame at its first write (do_anonymous_page), cleared, or a whole huge page where the mapping may have
them and an aligned 2 MiB of it has none yet (do_huge_pmd_anonymous_page). A read of a page that was never written
finds the guest's zero page and takes no frame.

Unmapping part of a huge page splits its mapping only (__split_huge_pmd): its frames stay allocated as one, until all of
them are unmapped, or until memory is short and the page itself is split (deferred_split_folio). So a huge page with one
page in use keeps 2 MiB from free page reporting.

A page-table entry is written after its frame was cleared. Were it the other way round, a clear that stops in the middle
(a lost frame, Ctrl-C) would leave pages that show what another process wrote.

fill() and verify() seed a page's content by its place in its mapping, not by its frame: a page that got mixed up with
another one is found.

A private mapping of a file shows the cache's pages until it writes, and then its copies (do_cow_fault). Deviation: a
page that is only read has no entry here, so it counts neither as a fault nor in the process's RSS (Linux: RssFile).

Sizes and offsets are bytes or text, whole pages.
"""

from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

from emu.errors import BadValue, OutOfMemory
from emu.guest.buddy import PAGEBLOCK_ORDER
from emu.guest.free_area import lazy_bytes
from emu.guest.lock import as_current, in_kernel
from emu.guest.memory import Op
from emu.guest.pcp import spans
from emu.guest.ramfs import RamFile
from emu.ranges import Ranges, runs_of
from emu.units import FRAME_SIZE, format_size, parse_size

if TYPE_CHECKING:
    from emu.guest.kernel import GuestKernel
    from emu.guest.process import Process

__all__ = ["Mapping"]

_HUGE = 1 << PAGEBLOCK_ORDER


class Mapping:
    """Memory of a process, anonymous or private of a file: one VMA."""

    def __init__(
        self, kernel: "GuestKernel", process: "Process", size: int, huge: bool, file: RamFile | None = None
    ) -> None:
        self._kernel = kernel
        self.kernel_lock = kernel.kernel_lock
        self.process = process
        self.size = size
        self.pages = size // FRAME_SIZE
        self.huge = huge
        self.file = file
        if file is not None:
            file.map()
        #: pages that have a frame
        self.present = 0
        self._key = kernel.new_key()
        # page table: frame + 1, 0 = not present; and per 2 MiB of the mapping whether it is one huge page
        self._frame = lazy_bytes(4 * self.pages).cast("I")
        self._huge: set[int] = set()
        # huge pages of which a part is unmapped: first frame -> pages of it still mapped
        self._partial: dict[int, int] = {}
        self._mapped = [(0, self.pages)]  # what munmap has left, ascending

    def __repr__(self) -> str:
        return f"<Mapping of {format_size(self.size)}, {format_size(self.present * FRAME_SIZE)} present>"

    # ---- access

    @as_current
    def touch(
        self, offset: int | str = 0, length: int | str | None = None, write: bool = True, threads: int = 1
    ) -> None:
        """Touch every page. A write gives it a frame; a read leaves a page that was never written without one.

        Raises OutOfMemory when the guest has no frames left: the pages before that have theirs.
        """
        first, end = self._span(offset, length)
        if write:
            self._populate(first, end, threads=threads)
        elif self.file is not None:  # do_read_fault(): the cache's own page is mapped
            self.file.populate(first, end)
            shared = array("I")
            for lo, hi in self._absent(first, end):
                shared += self.file.frames(lo, hi)
            self._kernel.memory.vcpu(Op.TOUCH_READ, Ranges.of_frames(shared), threads=threads)
        self._kernel.memory.vcpu(Op.TOUCH_WRITE if write else Op.TOUCH_READ, self._ranges(first, end), threads=threads)

    @as_current
    def fill(self, *, seed: int, offset: int | str = 0, length: int | str | None = None, threads: int = 1) -> None:
        """Fill every page with content that follows from the seed and the page's place."""
        first, end = self._span(offset, length)
        self._populate(first, end, threads=threads)
        self._kernel.memory.vcpu(Op.FILL, self._ranges(first, end), seed, threads=threads)

    @as_current
    def verify(
        self, *, seed: int, offset: int | str = 0, length: int | str | None = None, threads: int = 1
    ) -> list[int]:
        """Return the byte offsets of pages that don't hold what fill() with this seed left there."""
        first, end = self._span(offset, length)
        wrong = self._kernel.memory.vcpu(Op.VERIFY, self._ranges(first, end), seed, threads=threads)
        bad = {frame + 1 for frame in wrong}
        # a page without a frame reads as zeros, or as the file: not what a fill of this mapping leaves
        return [page * FRAME_SIZE for page in range(first, end) if (entry := self._frame[page]) == 0 or entry in bad]

    @as_current
    def read(self, offset: int | str, n: int) -> bytes:
        """Return n bytes."""
        start = self._offset(offset, n)
        parts = []
        while n:
            page, within = divmod(start, FRAME_SIZE)
            part = min(n, FRAME_SIZE - within)
            entry = self._frame[page]
            if not entry and self.file is not None:
                self.file.populate(page, page + 1)
                entry = self.file.frames(page, page + 1)[0] + 1
            parts.append(self._kernel.memory.read((entry - 1) * FRAME_SIZE + within, part) if entry else bytes(part))
            start += part
            n -= part
        return b"".join(parts)

    @as_current
    def write(self, offset: int | str, data: bytes | bytearray | memoryview) -> None:
        """Write data. Pages that it covers wholly and that have no frame get one that isn't cleared first."""
        view = memoryview(data).cast("B")
        start = self._offset(offset, len(view))
        end = start + len(view)
        if start % FRAME_SIZE:
            self._populate(start // FRAME_SIZE, start // FRAME_SIZE + 1)
        if end % FRAME_SIZE and end > start:
            self._populate(end // FRAME_SIZE, end // FRAME_SIZE + 1)
        done = self._populate(-(-start // FRAME_SIZE), end // FRAME_SIZE, start=start, data=view)
        page = start // FRAME_SIZE
        for first, last in [*done, (-(-end // FRAME_SIZE),) * 2]:  # the gaps between what was filled just now
            self._store(page, first, start, view)
            page = last

    def _store(self, first: int, last: int, start: int, view: memoryview) -> None:
        # the part of `view`, the bytes at `start` of the mapping, that lies in present pages [first, last)
        for gfn, count, key in self._ranges(first, last):
            page = key - self._key
            lo, hi = max(page * FRAME_SIZE, start), min((page + count) * FRAME_SIZE, start + len(view))
            self._kernel.memory.write(gfn * FRAME_SIZE + lo % FRAME_SIZE, view[lo - start : hi - start])

    @as_current
    def mlock(self, offset: int | str = 0, length: int | str | None = None) -> None:
        """Give every page its frame (mlock). The guest has no swap of its own: it stays until it is unmapped."""
        first, end = self._span(offset, length)
        self._populate(first, end)

    @in_kernel
    def munlock(self, offset: int | str = 0, length: int | str | None = None) -> None:
        """Take that back."""
        self._span(offset, length)

    # ---- giving back

    @in_kernel
    def munmap(self, offset: int | str = 0, length: int | str | None = None) -> None:
        """Unmap all, or a part: its frames are freed, and the part can't be used any more."""
        first, end = self._span(offset, length, whole=False)
        self._zap(first, end)
        rest: list[tuple[int, int]] = []
        for lo, hi in self._mapped:
            rest += [(a, b) for a, b in ((lo, min(hi, first)), (max(lo, end), hi)) if a < b]
        self._mapped = rest
        if not rest and self in self.process.mappings:
            self.process.mappings.remove(self)
            if self.file is not None:
                self.file.unmap()

    @in_kernel
    def madvise_dontneed(self, offset: int | str = 0, length: int | str | None = None) -> None:
        """Free the frames of a part; it stays mapped and reads as zero, or as the file."""
        first, end = self._span(offset, length)
        self._zap(first, end)

    # ---- the inside

    def _offset(self, offset: int | str, n: int) -> int:
        self._kernel.check_running()
        self.process.check_alive()
        start = parse_size(offset, "offset")
        if n < 0 or start + n > self.size:
            raise BadValue(f"bytes [{start}, {start + n}) are outside the mapping of {self.size} bytes")
        self._check_mapped(start // FRAME_SIZE, -(-(start + n) // FRAME_SIZE))
        return start

    def _span(self, offset: int | str, length: int | str | None, *, whole: bool = True) -> tuple[int, int]:
        self._kernel.check_running()
        self.process.check_alive()
        start = parse_size(offset, "offset")
        size = self.size - start if length is None else parse_size(length, "length")
        if start % FRAME_SIZE or size % FRAME_SIZE:
            raise BadValue(f"offset {start} and length {size} must be multiples of the page size, {FRAME_SIZE}")
        if size < 0 or start + size > self.size:
            raise BadValue(f"bytes [{start}, {start + size}) are outside the mapping of {self.size} bytes")
        first, end = start // FRAME_SIZE, (start + size) // FRAME_SIZE
        if whole:
            self._check_mapped(first, end)
        return first, end

    def _check_mapped(self, first: int, end: int) -> None:
        if first < end and not any(lo <= first and end <= hi for lo, hi in self._mapped):
            raise BadValue(f"pages [{first}, {end}) aren't mapped any more")

    def _ranges(self, first: int, end: int) -> Ranges:
        # present pages as frame ranges, keyed by their place
        ranges = Ranges()
        start = following = -1
        key = 0
        table = self._frame
        for page in range(first, end):
            entry = table[page]
            if entry == following and entry:
                following += 1
                continue
            if start > 0:
                ranges.add(start - 1, following - start, key)
            start, following, key = entry, entry + 1 if entry else 0, self._key + page
        if start > 0:
            ranges.add(start - 1, following - start, key)
        return ranges

    def _absent(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        # runs of pages without a frame
        if self.present == 0:
            yield first, end
            return
        table = self._frame
        start = -1
        for page in range(first, end):
            if table[page]:
                if start >= 0:
                    yield start, page
                    start = -1
            elif start < 0:
                start = page
        if start >= 0:
            yield start, end

    def _populate(
        self, first: int, end: int, *, start: int = 0, data: memoryview | None = None, threads: int = 1
    ) -> list[tuple[int, int]]:
        # Give pages their frames. With data (the bytes at `start` of the mapping), small pages get it instead of zeros;
        # returns the spans of pages that did.
        filled = []
        for lo, hi in list(self._absent(first, end)):
            page = lo
            while page < hi:
                if self.huge and self._fault_huge(page):
                    page = (page // _HUGE + 1) * _HUGE
                    continue
                # up to the next place where a huge page may be tried
                stop = min(hi, (page // _HUGE + 1) * _HUGE) if self.huge else hi
                part = None if data is None else data[page * FRAME_SIZE - start : stop * FRAME_SIZE - start]
                self._fault_small(page, stop, part, threads)
                if data is not None:
                    filled.append((page, stop))
                page = stop
        return filled

    def _fault_huge(self, page: int) -> bool:
        block = page // _HUGE
        first = block * _HUGE
        if not any(lo <= first and first + _HUGE <= hi for lo, hi in self._mapped):
            return False
        if self._frame[first : first + _HUGE].tobytes().count(0) != 4 * _HUGE:
            return False  # part of it has small pages: khugepaged's business
        frame = self._kernel.alloc_huge()
        if frame is None:
            self._kernel.vmstat["thp_fault_fallback"] += 1
            return False
        try:
            self._kernel.memory.vcpu(Op.SET, Ranges.of([(frame, _HUGE)]), 0)
        except BaseException as error:
            self._kernel.zone_of(frame).buddy.split(frame, PAGEBLOCK_ORDER)
            self._kernel.free_after_failure([(frame, _HUGE)], error)
            raise
        self._kernel.vmstat["pgfault"] += 1
        self._kernel.vmstat["thp_fault_alloc"] += 1
        self._frame[first : first + _HUGE] = memoryview(array("I", range(frame + 1, frame + 1 + _HUGE)))
        self._huge.add(block)
        self.present += _HUGE
        return True

    def _fault_small(self, first: int, end: int, data: memoryview | None, threads: int) -> None:
        memory = self._kernel.memory
        if self.file is not None and data is None:
            self.file.populate(first, end)
        runs = self._kernel.alloc_frames(end - first)
        taken = spans(runs)
        try:
            if data is None and self.file is not None:  # do_cow_fault()
                memory.vcpu(Op.COPY, self._copies(first, runs), threads=threads)
            elif data is None:  # clear_user_highpage(): what the frame held belongs to somebody else
                memory.vcpu(Op.SET, Ranges.of(taken), 0, threads=threads)
            else:
                at = 0
                for frame, count, step in runs:
                    if step > 0:
                        memory.write(frame * FRAME_SIZE, data[at : at + count * FRAME_SIZE])
                        at += count * FRAME_SIZE
                        continue
                    for k in range(count):
                        memory.write((frame - k) * FRAME_SIZE, data[at : at + FRAME_SIZE])
                        at += FRAME_SIZE
        except BaseException as error:
            self._kernel.free_after_failure(taken, error)
            raise
        page = first
        for frame, count, step in runs:
            entries = range(frame + 1, frame + 1 + step * count, step)
            self._frame[page : page + count] = memoryview(array("I", entries))
            page += count
        self.present += page - first
        self._kernel.vmstat["pgfault"] += page - first
        if page < end:
            free = self._kernel.free_bytes
            raise OutOfMemory(
                f"process {self.process.pid} ({self.process.name}) is out of memory: page {page} of a mapping of "
                f"{format_size(self.size)} found no frame above the min watermark ({format_size(free)} free of "
                f"{format_size(self._kernel.ram_bytes)})",
                order=0,
                wanted=end - page,
                free=free // FRAME_SIZE,
            )

    def _copies(self, first: int, runs: list[tuple[int, int, int]]) -> Ranges:
        # (frame, count, the file's frame that it is a copy of): runs that ascend on both sides
        assert self.file is not None
        ranges = Ranges()
        source = iter(self.file.frames(first, first + sum(count for _, count, _ in runs)))
        last_to = last_from = count = 0
        for frame, n, step in runs:
            for to, of in zip(range(frame, frame + step * n, step), source, strict=False):
                if count and to == last_to + count and of == last_from + count:
                    count += 1
                    continue
                if count:
                    ranges.add(last_to, count, last_from)
                last_to, last_from, count = to, of, 1
        if count:
            ranges.add(last_to, count, last_from)
        return ranges

    def _zap(self, first: int, end: int) -> None:
        # zap_page_range(): huge pages that lie wholly inside go as such, of others the mapping is split first
        vmstat = self._kernel.vmstat
        for block in sorted(b for b in self._huge if b * _HUGE < end and (b + 1) * _HUGE > first):
            lo, frame = block * _HUGE, self._frame[block * _HUGE] - 1
            self._huge.remove(block)
            if first <= lo and lo + _HUGE <= end:
                self._frame[lo : lo + _HUGE] = memoryview(bytes(4 * _HUGE)).cast("I")
                self.present -= _HUGE
                self._kernel.free_pages([(frame, 1)], PAGEBLOCK_ORDER)
            else:
                vmstat["thp_split_pmd"] += 1
                vmstat["thp_deferred_split_page"] += 1
                self._partial[frame] = _HUGE
                if self not in self._kernel.deferred_split:
                    self._kernel.deferred_split.append(self)
        entries = self._frame[first:end]
        frames = array("I", [entry - 1 for entry in entries if entry])
        if not frames:
            return
        entries[:] = memoryview(bytes(4 * (end - first))).cast("I")
        self.present -= len(frames)
        if self._partial:
            frames = self._unmap_from_partial(frames)
        self._kernel.free_pages(runs_of(frames))

    def _unmap_from_partial(self, frames: "array[int]") -> "array[int]":
        # Those of the frames that belong to no half-unmapped huge page; one that has lost its last page is freed whole.
        single = array("I")
        for frame in frames:
            head = frame & -_HUGE
            if head not in self._partial:
                single.append(frame)
                continue
            self._partial[head] -= 1
            if not self._partial[head]:
                del self._partial[head]
                self._kernel.free_pages([(head, 1)], PAGEBLOCK_ORDER)
        if not self._partial:
            self._kernel.deferred_split.remove(self)
        return single

    def split_deferred(self) -> None:
        """Split the huge pages of which a part is unmapped, and free those parts (under memory pressure)."""
        mapped = {entry - 1 for entry in self._frame if entry} if self._partial else set()
        for head in sorted(self._partial):
            self._kernel.zone_of(head).buddy.split(head, PAGEBLOCK_ORDER)
            self._kernel.vmstat["thp_split_page"] += 1
            self._kernel.free_pages(
                runs_of(array("I", [frame for frame in range(head, head + _HUGE) if frame not in mapped]))
            )
        self._partial.clear()
        if self in self._kernel.deferred_split:
            self._kernel.deferred_split.remove(self)
