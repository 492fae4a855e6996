"""RamFile: a file that lives in memory only, as one of ramfs or tmpfs without swap (fs/ramfs, mm/shmem.c).

Its pages are page cache with nothing behind it: they come into being at the first access, zeroed, and stay until the
file is unlinked and nobody maps it any more. They are on the unevictable list, can't be dropped, and so count as used.
"""

from array import array
from typing import TYPE_CHECKING

from emu._native import content
from emu.errors import GuestError, OutOfMemory
from emu.guest.free_area import lazy_bytes
from emu.guest.lock import in_kernel
from emu.guest.memory import Op
from emu.guest.page import Owner
from emu.guest.pcp import spans
from emu.ranges import Ranges, runs_of
from emu.units import FRAME_SIZE, format_size, parse_ram_size

if TYPE_CHECKING:
    from emu.guest.kernel import GuestKernel

__all__ = ["RamFile"]


class RamFile:
    """A file of a fixed size. Made by GuestKernel.create_file()."""

    def __init__(self, kernel: "GuestKernel", size: int | str) -> None:
        self._kernel = kernel
        self.kernel_lock = kernel.kernel_lock
        self.size = parse_ram_size(size, "file size")
        self.pages = self.size // FRAME_SIZE
        #: pages in the cache
        self.present = 0
        #: mappings of it; and whether its name is gone
        self.mapped = 0
        self.unlinked = False
        self._key = kernel.new_key()
        self._frame = lazy_bytes(4 * self.pages).cast("I")  # frame + 1; 0 = not there yet

    def __repr__(self) -> str:
        return f"<RamFile of {format_size(self.size)}, {format_size(self.present * FRAME_SIZE)} cached>"

    def populate(self, first: int, end: int) -> None:
        """Bring pages [first, end) into the cache, zeroed. Raises OutOfMemory."""
        page = first
        while page < end:
            if self._frame[page]:
                page += 1
                continue
            stop = page + 1
            while stop < end and not self._frame[stop]:
                stop += 1
            runs = self._kernel.alloc_frames(stop - page, owner=Owner.SHMEM)
            taken = spans(runs)
            try:
                self._kernel.memory.vcpu(Op.SET, Ranges.of(taken), 0)
            except BaseException as error:
                self._kernel.free_after_failure(taken, error)
                raise
            for frame, count, step in runs:
                entries = array("I", range(frame + 1, frame + 1 + step * count, step))
                self._frame[page : page + count] = memoryview(entries)
                page += count
                self.present += count
            if page < stop:
                free = self._kernel.free_bytes // FRAME_SIZE
                raise OutOfMemory(
                    f"page {page} of a file of {format_size(self.size)} found no frame above the min watermark",
                    order=0,
                    wanted=stop - page,
                    free=free,
                )

    def frames(self, first: int, end: int) -> "array[int]":
        """Return the frames of pages [first, end), which must be in the cache."""
        return array("I", [entry - 1 for entry in self._frame[first:end]])

    def spans(self) -> list[tuple[int, int]]:
        """Return the frames in the cache as (pfn, count), in the pages' order."""
        frames = array("I", [entry - 1 for entry in self._frame if entry]) if self.present else array("I")
        return list(runs_of(frames))

    @in_kernel
    def fill(self, *, seed: int) -> None:
        """Fill the file with content that follows from the seed and each page's place."""
        self._kernel.check_running()
        if self.unlinked:
            raise GuestError("the file was unlinked")
        self.populate(0, self.pages)
        self._kernel.memory.vcpu(Op.FILL, Ranges.of_frames(self.frames(0, self.pages), self._key), seed)

    def content(self, offset: int, n: int, *, seed: int) -> bytes:
        """Return the bytes that fill() with this seed has left at an offset, both whole pages. Nothing is read."""
        first, end = offset // FRAME_SIZE, (offset + n) // FRAME_SIZE
        return b"".join(content(seed, self._key + page) for page in range(first, end))

    @in_kernel
    def unlink(self) -> None:
        """Take the name away: the pages go with the last mapping (iput_final)."""
        self._kernel.check_running()
        self.unlinked = True
        self._release()

    def map(self) -> None:
        """One more mapping. Raises GuestError when the file has no name any more."""
        if self.unlinked:
            raise GuestError("the file was unlinked: it can't be mapped any more")
        self.mapped += 1

    def unmap(self) -> None:
        """One less."""
        self.mapped -= 1
        self._release()

    def _release(self) -> None:
        if not self.unlinked or self.mapped:
            return
        spans = self.spans()
        self._frame[:] = memoryview(bytes(4 * self.pages)).cast("I")
        self.present = 0
        self._kernel.forget_file(self)
        self._kernel.free_pages(spans)
