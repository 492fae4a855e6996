"""MemoryDisk: a guest's disk in a dict, whose operations can be watched and made to fail.

disk = MemoryDisk({"a": b"..."})
disk.before = lambda op, path, offset: errno.EIO if op == "read" and offset >= 8192 else 0
"""

import errno
import os
from collections.abc import Callable, Mapping

from emu.virtio.disk import DirEntry

__all__ = ["MemoryDisk", "MemoryFile"]


class MemoryFile:
    """An open file of a MemoryDisk. See emu.virtio.disk.DiskFile."""

    access = "memory"
    fixed = False

    def __init__(self, disk: "MemoryDisk", path: str, *, writable: bool) -> None:
        self._disk = disk
        self._path = path
        self._content = disk.files[path]  # which an unlink leaves to us
        self.writable = writable
        self.key = (1, disk.numbers[path])

    def _begin(self, op: str, offset: int) -> bytearray:
        self._disk.log.append((op, self._path, offset))
        if self._disk.before is not None and (code := self._disk.before(op, self._path, offset)):
            raise OSError(code, os.strerror(code))
        return self._content

    def read(self, offset: int, into: memoryview) -> int:
        part = self._begin("read", offset)[offset : offset + len(into)]
        into[: len(part)] = part
        self._disk.counters["disk_reads"] += 1
        self._disk.counters["disk_read_bytes"] += len(part)
        return len(part)

    def write(self, offset: int, data: memoryview) -> None:
        if not self.writable:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        content = self._begin("write", offset)
        grown = max(offset + len(data) - len(content), 0)
        if self._disk.capacity is not None and self._disk.used + grown > self._disk.capacity:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        content.extend(bytes(max(offset - len(content), 0)))
        content[offset : offset + len(data)] = data
        self._disk.changed(self._path)
        self._disk.counters["disk_writes"] += 1
        self._disk.counters["disk_written_bytes"] += len(data)

    def truncate(self, size: int) -> None:
        content = self._begin("truncate", size)
        del content[size:]
        content.extend(bytes(size - len(content)))
        self._disk.changed(self._path)

    def sync(self) -> None:
        self._begin("sync", 0)

    def version(self) -> tuple[int, int]:
        return len(self._content), self._disk.versions[self._path]

    def close(self) -> None:
        self._disk.log.append(("close", self._path, 0))


class MemoryDisk:
    """Files by path. before(op, path, offset), if set, is asked first and returns an errno, or 0; capacity: bytes."""

    def __init__(
        self, files: Mapping[str, bytes] | None = None, *, read_only: bool = False, capacity: int | None = None
    ) -> None:
        self.files = {path: bytearray(content) for path, content in (files or {}).items()}
        self.numbers = {path: number for number, path in enumerate(self.files, start=1)}
        self.versions = dict.fromkeys(self.files, 0)
        self.read_only = read_only
        self.capacity = capacity
        self.before: Callable[[str, str, int], int] | None = None
        #: (operation, path, offset) of everything so far
        self.log: list[tuple[str, str, int]] = []
        self.counters = dict.fromkeys(("disk_reads", "disk_read_bytes", "disk_writes", "disk_written_bytes"), 0)

    @property
    def used(self) -> int:
        """Bytes in all files."""
        return sum(map(len, self.files.values()))

    def changed(self, path: str) -> None:
        """A file has changed: also for tests that change one behind the guest's back."""
        self.versions[path] += 1

    def open(self, path: str, *, write: bool = False, create: bool = False, exclusive: bool = False) -> MemoryFile:
        if self.read_only and (write or create):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if path not in self.files:
            if not create:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            self.files[path] = bytearray()
            self.numbers[path] = max(self.numbers.values(), default=0) + 1
            self.versions[path] = 0
        elif exclusive:
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        return MemoryFile(self, path, writable=write)

    def unlink(self, path: str) -> tuple[int, int] | None:
        if path not in self.files:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        del self.files[path]
        return (1, self.numbers[path])

    def listdir(self, path: str) -> list[DirEntry]:
        inside = {name.removeprefix(f"{path}/" if path else "") for name in self.files if name.startswith(path)}
        folders = {name.split("/")[0] for name in inside if "/" in name}
        entries = [DirEntry(name, True, 0) for name in folders]
        entries += [
            DirEntry(name, False, len(self.files[f"{path}/{name}" if path else name]))
            for name in inside
            if "/" not in name
        ]
        return sorted(entries, key=lambda entry: entry.name)

    def close(self) -> None:
        self.log.append(("close", "", 0))
