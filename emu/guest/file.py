"""File: an open file of the guest, with a readahead window and an error cursor of its own (struct file)."""

import errno
from types import TracebackType
from typing import TYPE_CHECKING, Self

from emu.errors import BadValue, ClosedError
from emu.guest.inode import Inode
from emu.guest.lock import in_kernel
from emu.guest.readahead import ReadaheadState
from emu.units import parse_size

if TYPE_CHECKING:
    from emu.guest.kernel import GuestKernel

__all__ = ["File"]


class File:
    """An open file. Made by GuestKernel.open(). Offsets and sizes are bytes, or text such as "4KiB"."""

    def __init__(self, kernel: "GuestKernel", inode: Inode, *, writable: bool) -> None:
        self._kernel = kernel
        self.kernel_lock = kernel.kernel_lock
        self.inode = inode
        self.writable = writable
        self.readahead = ReadaheadState()
        self.closed = False
        self._seen_errors = inode.write_errors
        inode.openers += 1

    def __repr__(self) -> str:
        return f"<File {self.inode.path!r}{', closed' if self.closed else ''}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Bytes, as the guest sees them."""
        return self.inode.size

    @property
    def cached_bytes(self) -> int:
        """Bytes of its pages in the page cache."""
        return self.inode.space.nr_pages * 4096

    @property
    def access(self) -> str:
        """How the host reads and writes it: direct (O_DIRECT), buffered (and dropped behind), memory (tmpfs)."""
        return self.inode.access

    def _check(self, *, write: bool = False) -> None:
        self._kernel.check_running()
        if self.closed:
            raise ClosedError(f"{self.inode.path} is closed")
        if write and not self.writable:
            raise self.inode.error(errno.EBADF, "it was opened for reading only")

    @in_kernel
    def read(self, offset: int | str, n: int | str) -> bytes:
        """Return up to n bytes from an offset; fewer at the file's end. Raises GuestIOError, OutOfMemory."""
        self._check()
        if offset.__class__ is not int or n.__class__ is not int:
            offset, n = parse_size(offset, "offset"), parse_size(n, "length")
        if offset < 0 or n < 0:
            raise BadValue(f"offset {offset!r} and length {n!r} must be 0 or more")
        if offset & 0xFFF <= 4096 - n and 0 < n <= self.inode.size - offset:
            data = self.inode.read_within(offset, n, self.readahead)
            if data is not None:
                return data
        buffer = bytearray(max(min(n, self.inode.size - offset), 0))
        done = self.inode.read(offset, memoryview(buffer), self.readahead)
        return bytes(buffer) if done == len(buffer) else bytes(buffer[:done])

    @in_kernel
    def readinto(self, offset: int | str, buffer: bytearray | memoryview) -> int:
        """Fill a buffer from an offset; return how many bytes: fewer at the file's end. Raises as read()."""
        self._check()
        view = memoryview(buffer).cast("B")
        return self.inode.read(parse_size(offset, "offset"), view, self.readahead)

    @in_kernel
    def write(self, offset: int | str, data: bytes | bytearray | memoryview) -> int:
        """Write data at an offset, into the cache; return its length. Raises GuestIOError, OutOfMemory."""
        self._check(write=True)
        view = memoryview(data).cast("B")
        if len(view):
            self.inode.write(parse_size(offset, "offset"), view)
        return len(view)

    @in_kernel
    def truncate(self, size: int | str) -> None:
        """Cut or extend the file, on the disk at once. Raises GuestIOError."""
        self._check(write=True)
        self.inode.truncate(parse_size(size, "size"))

    @in_kernel
    def fsync(self) -> None:
        """Return when all of the file is on the disk.

        Raises GuestIOError if something couldn't be written, now or since the last fsync of this open file: its pages
        stay dirty, and the next fsync tries again.
        """
        self._check()
        inode = self.inode
        try:
            inode.sync()
        finally:
            before, self._seen_errors = self._seen_errors, inode.write_errors
        if (
            before != inode.write_errors
        ):  # somebody else's attempt failed, and a later one didn't (errseq_check_and_advance)
            raise inode.error(inode.write_errno, "an earlier writeback failed")

    @in_kernel
    def close(self) -> None:
        """Close it. Dirty pages stay in the cache, for the flusher. A second call does nothing."""
        if not self.closed:
            self.closed = True
            self._kernel.vfs.closed(self.inode)
