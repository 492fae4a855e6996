"""A disk as guest and host see it: what the guest's kernel needs, and `emu.host.disk` has; tests bring their own, with
errors.

All of these raise OSError with the errno that the guest's system call will fail with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["DirEntry", "Disk", "DiskFile"]


@dataclass(frozen=True, slots=True)
class DirEntry:
    """A name in a directory. size: bytes, of a regular file. Symbolic links are left out."""

    name: str
    is_dir: bool
    size: int


class DiskFile(Protocol):
    """An open file of a disk. Reads and writes start at a multiple of the page size."""

    #: the file itself, whatever its name: (device, inode)
    key: tuple[int, int]
    writable: bool
    #: whether it keeps its size, as a disk's image does
    fixed: bool
    #: how it is read and written: "direct", "buffered" (and dropped behind), "memory"
    access: str

    def read(self, offset: int, into: memoryview) -> int:
        """Read bytes; return how many: fewer only at the end of the file. `into` is page-aligned, in whole pages."""

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of data, page-aligned in memory."""

    def truncate(self, size: int) -> None:
        """Cut it, or extend it with a hole."""

    def sync(self) -> None:
        """Return when everything written is on the disk."""

    def version(self) -> tuple[int, int]:
        """Return (size in bytes, time of the last change): changes behind the guest's back show in it."""

    def close(self) -> None:
        """Let go of it."""


class Disk(Protocol):
    """A tree of files. Paths are relative to its root, and never lead out of it (EXDEV)."""

    read_only: bool
    #: counters, named disk_*
    counters: dict[str, int]

    def open(self, path: str, *, write: bool = False, create: bool = False, exclusive: bool = False) -> DiskFile:
        """Open a regular file."""

    def unlink(self, path: str) -> tuple[int, int] | None:
        """Remove a name; return the key of the file that has none any more. A link's name isn't its file's."""

    def listdir(self, path: str) -> Sequence[DirEntry]:
        """Return the names of a directory, sorted; special files are left out."""

    def close(self) -> None:
        """Let go of it."""
