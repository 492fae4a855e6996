"""PageStates: the guest says what its pages are worth, and the host takes what isn't needed (CMM2; csrc/page_states.c).

The places that say it are where the patches of 2009 had them: the allocator, the page cache, the page tables. This is
the switch, and the settings:

    light          only stable and unused, by the allocator: what was merged for s390 in 2008
    dirty          "page": the machine has a dirty bit a page (s390's storage key), so a page that may be written
                   through a mapping is potentially volatile; "mapping": one a page-table entry (x86), so it is stable
    minor          a minor fault says nothing: what the host has taken meanwhile is repaired by the discard fault
    buffers        pages that were written keep private data, which keeps them stable (max_buffer_heads isn't 0)
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from emu._native import lib
from emu.errors import GuestError
from emu.guest.lock import in_kernel
from emu.guest.page import PageFlag
from emu.ranges import Ranges

if TYPE_CHECKING:
    from emu.guest.inode import Inode
    from emu.guest.kernel import GuestKernel

__all__ = ["PageStates", "StatesSettings"]


@dataclass(frozen=True, slots=True)
class StatesSettings:
    """See above."""

    light: bool = False
    dirty: Literal["page", "mapping"] = "page"
    minor: bool = False
    buffers: bool = False

    @property
    def bits(self) -> int:
        """As the core wants them."""
        return (
            (lib.EMU_STATES_LIGHT if self.light else 0)
            | (lib.EMU_STATES_PER_MAPPING if self.dirty == "mapping" else 0)
            | (lib.EMU_STATES_MINOR if self.minor else 0)
            | (lib.EMU_STATES_BUFFERS if self.buffers else 0)
        )


class PageStates:
    """Switched on for as long as it is the kernel's `page_states`."""

    def __init__(self, kernel: "GuestKernel", settings: StatesSettings) -> None:
        self._kernel = kernel
        self.kernel_lock = kernel.kernel_lock
        self.settings = settings
        #: what a page-cache hit takes a reference for
        self.gets = not settings.light
        #: whether a page may be dirty without the kernel's knowledge
        self.storage_keys = not settings.light and settings.dirty == "page"

    @in_kernel
    def begin(self) -> None:
        """Say of all frames what they are worth now. Raises HostError where that can't be had."""
        memory = self._kernel.memory
        page_states = getattr(memory, "page_states", None)
        if page_states is None:
            raise GuestError("page states need a host: GuestRam has one, plain bytes haven't")
        page_states(self._kernel.memmap.native, self.settings.bits)
        self._kernel.page_states = self

    def test_and_clear_dirty(self, frames: Ranges) -> bytes:
        """Return one byte a frame, not 0 where it was written since the last time, in the ranges' order."""
        harvest = self._kernel.memory.harvest  # type: ignore[attr-defined]
        return b"".join(harvest(gfn, count, lib.EMU_DIRTIED) for gfn, count, _ in frames)

    def begin_writable(self, inode: "Inode", first: int, n: int, frames: Ranges) -> None:
        """Pages [first, first + n) are held, and get their first writable entry: what came from the disk is clean."""
        found, _ = inode.space.find(first, first + n, PageFlag.WRITABLE, 0)
        if found:
            dirty = self.test_and_clear_dirty(frames)
            for k in range(n):
                if dirty[k] and inode.space.find(first + k, first + k + 1, PageFlag.WRITABLE, PageFlag.WRITABLE)[0]:
                    inode.space.flag(first + k, first + k + 1, PageFlag.DIRTY)

    @in_kernel
    def end(self) -> None:
        """All is stable again; what the host has taken leaves the cache.

        Whatever interrupts it: what hasn't left is told at each use, and the next end() goes on.
        """
        kernel = self._kernel
        kernel.vfs.collect_dirty()
        while gone := kernel.memmap.says_nothing():
            for pfn in gone:
                info = kernel.memmap.look(pfn)
                kernel.vfs.inode_of(info.space).forget_discarded(info.index)
        kernel.page_states = None
