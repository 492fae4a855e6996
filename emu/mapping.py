"""RamMapping: the address space that a guest RAM lives in.

Private anonymous memory (Python's default, MAP_SHARED, would keep the pages in shmem after a discard), aligned to 2
MiB so that guest and host agree on what a block is, with inaccessible guard pages on both sides so that it never
shares a VMA with a neighbour, MADV_NOHUGEPAGE so that RSS is exact to the frame, and MADV_DONTFORK.
"""

import errno
import mmap
import os
from typing import Any

from emu import _native, residency
from emu._native import ffi, lib
from emu.errors import HostError
from emu.units import FRAME_SIZE, format_size

__all__ = ["RamMapping"]

_ALIGN = 2 << 20
_inherited: list[mmap.mmap] = []  # mappings of a parent process, in its child


class RamMapping:
    """`size` bytes at `base`. Made first and mapped then, so that close() undoes whatever map() did."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.base = 0
        self._pid = os.getpid()
        self._mmap: mmap.mmap | None = None
        self._lease: Any = None

    def map(self) -> None:
        """Map it. Raises HostError with what may stand in the way."""
        length = self.size + 2 * _ALIGN
        _refuse_locked_mappings()
        try:
            self._mmap = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | lib.MAP_NORESERVE)
        except (OSError, OverflowError, ValueError) as error:
            raise HostError(
                f"can't map {format_size(self.size)} of address space: {error}; look at RLIMIT_AS (ulimit -v), "
                "vm.overcommit_memory (2 ignores NORESERVE) and the cgroup's limit: emu doctor"
            ) from error
        start, self._lease = _native.address_of(self._mmap)
        # at least one whole guard page on either side
        self.base = (start + FRAME_SIZE + _ALIGN - 1) & -_ALIGN
        offset = self.base - start
        # on the RAM alone: a guard with the same flags as a frame made inaccessible (poison) would merge with its VMA
        self._mmap.madvise(mmap.MADV_NOHUGEPAGE, offset, self.size)
        # the guards are inherited: the place stays marked in a child
        self._mmap.madvise(mmap.MADV_DONTFORK, offset, self.size)
        lib.munlock(ffi.cast("void *", self.base), self.size)  # mlockall(MCL_FUTURE | MCL_ONFAULT): can't be discarded
        _guard(start, offset)
        _guard(self.base + self.size, length - offset - self.size)

    def close(self) -> None:
        """Unmap it. A second call does nothing."""
        # each part is taken out first and let go then: two closers can't both let go of it
        lease, self._lease = self._lease, None
        if lease is not None:
            ffi.release(lease)
        mapping, self._mmap = self._mmap, None
        if mapping is None:
            return
        if os.getpid() != self._pid:
            # a forked child has a hole there, which may hold something of its own by now: never unmap it
            _inherited.append(mapping)
            return
        try:
            mapping.close()
        except BufferError:
            pass  # an interrupt hit between making the lease and storing it: the mapping goes with its last reference


def _refuse_locked_mappings() -> None:
    # mlockall(MCL_FUTURE) would populate the whole RAM in mmap(), and keep it
    # (no `with`: an interrupt between the two would find the page leased; it goes with its last reference)
    page = mmap.mmap(-1, FRAME_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address, _lease = _native.address_of(page)
    if residency.mincore_bytes(address, FRAME_SIZE):
        raise HostError("this process locks all its future mappings (mlockall): guest RAM could never be given back")


def _guard(start: int, length: int) -> None:
    """Make [start, start + length) inaccessible."""
    if lib.mprotect(ffi.cast("void *", start), length, 0):
        raise HostError(f"mprotect of the guard pages: {os.strerror(ffi.errno or errno.EINVAL)}")
