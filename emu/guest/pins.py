"""Pins: pages of a mapped file that must stay where they are (mm/mlock.c, mm/gup.c).

mlock(2): the pages of a part are faulted in, and neither reclaim nor, with page states, the host takes them, until
munlock(). The kernel marks the part (VM_LOCKED), and each page table entry in it that names a page of the cache holds a
reference; so what is truncated and faulted in again is locked again. The file is marked for good: none of its pages is
called volatile from then on (the patches of 2009 have a sticky flag, since nobody counts who unlocks).

pin(): pages that a device is about to read or write (pin_user_pages): the frames' numbers, and a reference to each.

Deviations: a private mapping is locked as one for reading: writing its pages gives the process its own, which nobody
takes. A file can't be cut below a pinned page (EBUSY; Linux makes an orphan of it, and a file system with DAX waits),
and one that was changed or cut behind the guest's back keeps its pinned pages, as it keeps dirty ones. A pin ends with
its mapping; a page that was locked and is pinned stays off reclaim's lists until it is unpinned.
"""

from types import TracebackType
from typing import TYPE_CHECKING, Self

from emu.guest.free_area import lazy_bytes
from emu.guest.page import PageFlag
from emu.ranges import Ranges

if TYPE_CHECKING:
    from emu.guest.filemap import FileMapping

__all__ = ["Pin", "Pins"]


class Pin:
    """Frames of the file that stay, as (gfn, count, page of the file), until unpin(). A context manager."""

    def __init__(self, mapping: "FileMapping", first: int, pages: int, frames: Ranges, *, write: bool) -> None:
        self._mapping = mapping
        self.first = first
        self.pages = pages
        self.frames = frames
        self.write = write

    def unpin(self) -> None:
        """Let go of them; what a device may have written is dirty (unpin_user_pages_dirty_lock). Idempotent."""
        self._mapping.unpin(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.unpin()


class Pins:
    """What a mapping holds. Its pages are the file's, since a mapping starts at the file's start."""

    def __init__(self, mapping: "FileMapping") -> None:
        self._mapping = mapping
        self._memmap = mapping.process.kernel.memmap
        self._vm_locked = lazy_bytes(mapping.pages)
        # 1: the page table entry holds a reference
        self._held = lazy_bytes(mapping.pages)
        self.pins: list[Pin] = []

    def lock(self, first: int, end: int) -> None:
        """Pages [first, end) are to be locked as they come in."""
        self._vm_locked[first:end] = b"\x01" * (end - first)

    def mapped(self, frames: Ranges) -> None:
        """These pages, which the caller holds, are in the page table (mlock_vma_folio)."""
        locked = Ranges()
        for gfn, count, index in frames:
            for k in range(count):
                if self._vm_locked[index + k] and not self._held[index + k]:
                    locked.add(gfn + k, 1, index + k)
                    self._held[index + k] = 1
        if len(locked):
            self._memmap.mlock(locked)

    def unmapped(self, gfn: int, index: int) -> None:
        """This page leaves the page table (munlock_vma_folio)."""
        if self._held[index]:
            self._held[index] = 0
            self._memmap.put(Ranges.of([(gfn, 1)]))

    def locked(self, first: int, end: int) -> bool:
        """Return whether some page among [first, end) is to stay."""
        return any(self._vm_locked[first:end])

    def unlock(self, first: int, end: int) -> None:
        """Pages [first, end) needn't stay."""
        self._vm_locked[first:end] = bytes(end - first)
        for page in range(first, end):
            if self._held[page]:
                self.unmapped(self._mapping.frame_of(page), page)

    def overlapping(self, first: int, end: int) -> list[Pin]:
        """Return the pins of pages among [first, end)."""
        return [pin for pin in self.pins if pin.first < end and pin.first + pin.pages > first]

    def end(self, pin: Pin) -> None:
        """A pin is over."""
        if pin in self.pins:
            self.pins.remove(pin)
            if pin.write:
                self._mapping.inode.space.flag(pin.first, pin.first + pin.pages, PageFlag.DIRTY)
                self._mapping.process.kernel.writeback.dirtied(self._mapping.inode)
            self._memmap.put(pin.frames)
