"""A guest's disk: a directory tree of the host, or an image file, read past the host's own page cache.

What the guest reads twice must come from the guest's cache, or from the disk: a copy in the host's cache would make
every reread look free. So files are opened with O_DIRECT where the file system has it. Where it hasn't (tmpfs, most
overlays, some FUSE), and for the bytes at a file's end that don't fill a block, the host's cache is used and dropped
behind (POSIX_FADV_DONTNEED). Which one was used is chosen and said per file: `access`, and the counters by bytes.

A directory's paths are resolved by the host's kernel below the root and nowhere else (csrc/disk.c).
"""

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path

from emu._native import ffi, lib
from emu.errors import BadValue, HostError
from emu.host.mounts import IN_MEMORY, filesystem
from emu.units import FRAME_SIZE
from emu.virtio.disk import DirEntry

__all__ = ["DirectoryDisk", "HostFile", "ImageDisk", "open_disk"]

_COUNTERS = ("reads", "read_bytes", "writes", "written_bytes", "syncs", "direct_bytes", "buffered_bytes")
_IMAGE = "vda"  # as Linux calls the first virtio-blk disk


def _counters() -> dict[str, int]:
    return dict.fromkeys((f"disk_{name}" for name in _COUNTERS), 0)


class HostFile:
    """An open file of the host that a guest's disk consists of. See emu.virtio.disk.DiskFile."""

    def __init__(self, fd: int, *, writable: bool, align: tuple[int, int], counters: dict[str, int]) -> None:
        self._fd = fd
        self.writable = writable
        self.fixed = False
        self._counters = counters
        self._buffered_writes = False
        status = os.fstat(fd)
        self.key = (status.st_dev, status.st_ino)
        # tmpfs takes the flag since 6.6, and is memory all the same
        self.access = "memory" if filesystem(fd) in IN_MEMORY else "direct" if self._go_direct(align) else "buffered"
        if self.access != "direct":
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no readahead of the host's

    def _go_direct(self, align: tuple[int, int]) -> bool:
        # (0, 0): Linux before 6.1 can't tell, and trying does; or 6.1 and newer say that there is none
        if max(align) > FRAME_SIZE:
            return False
        try:
            self._set_direct(True)
        except OSError:
            return False
        return True

    def _set_direct(self, on: bool) -> None:
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)

    def _give_up_direct(self) -> None:
        # the file system had taken the flag, and didn't mean it
        self._set_direct(False)
        self.access = "buffered"

    def read(self, offset: int, into: memoryview) -> int:
        done = 0
        while done < len(into):
            try:
                n = os.preadv(self._fd, [into[done:]], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or self.access != "direct":
                    raise
                self._give_up_direct()
                continue
            if not n:
                break
            done += n
            if self.access == "direct" and n % FRAME_SIZE:  # the file's end: another read there would be misaligned
                break
        self._counters["disk_reads"] += 1
        self._counters["disk_read_bytes"] += done
        self._done(offset, done)
        return done

    def write(self, offset: int, data: memoryview) -> None:
        body = len(data) // FRAME_SIZE * FRAME_SIZE if self.access == "direct" else len(data)
        self._write_all(offset, data[:body])
        if body < len(data):  # the last bytes, which O_DIRECT would round up
            self._set_direct(False)
            try:
                self._write_all(offset + body, data[body:], direct=False)
            finally:
                self._set_direct(self.access == "direct")
        self._counters["disk_writes"] += 1

    def _write_all(self, offset: int, data: memoryview, *, direct: bool = True) -> None:
        done = 0
        while done < len(data):
            try:
                done += os.pwritev(self._fd, [data[done:]], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or self.access != "direct":
                    raise
                self._give_up_direct()
        self._counters["disk_written_bytes"] += done
        direct = direct and self.access == "direct"
        self._counters["disk_direct_bytes" if direct else "disk_buffered_bytes"] += done
        self._buffered_writes |= bool(done) and not direct

    def _done(self, offset: int, n: int) -> None:
        direct = self.access == "direct"
        self._counters["disk_direct_bytes" if direct else "disk_buffered_bytes"] += n
        if not direct and n:
            os.posix_fadvise(self._fd, offset, n, os.POSIX_FADV_DONTNEED)

    def truncate(self, size: int) -> None:
        if self.fixed:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        os.ftruncate(self._fd, size)

    def sync(self) -> None:
        os.fsync(self._fd)
        self._counters["disk_syncs"] += 1
        if self._buffered_writes:  # only what is on the disk can be dropped
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            self._buffered_writes = False

    def version(self) -> tuple[int, int]:
        status = os.fstat(self._fd)
        return status.st_size, status.st_ctime_ns

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            if self._buffered_writes:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


class DirectoryDisk:
    """A directory of the host as a disk. read_only: nothing in it is ever opened for writing."""

    def __init__(self, root: str | Path, *, read_only: bool = False) -> None:
        self.read_only = read_only
        self.root = Path(root)
        self.counters = _counters()
        try:
            self._fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise BadValue(f"disk {str(root)!r} can't be opened as a directory: {error.strerror}") from None

    def __repr__(self) -> str:
        kind = filesystem(self._fd) if self._fd >= 0 else "closed"
        return f"disk {self.root} ({kind}{', read-only' if self.read_only else ''})"

    def _open_fd(self, path: str, flags: int) -> tuple[int, tuple[int, int]]:
        if "\0" in path:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        info = ffi.new("struct emu_file_info *")
        fd = lib.emu_file_open(self._fd, os.fsencode(path or "."), flags, 0o666, info)
        if fd == -errno.ENOSYS:
            raise HostError(
                "a guest's disk needs openat2 (Linux 5.6), and this kernel, or its seccomp filter, hasn't it"
            )
        if fd < 0:
            raise OSError(-fd, os.strerror(-fd))
        return fd, (info.dio_mem_align, info.dio_offset_align)

    def open(self, path: str, *, write: bool = False, create: bool = False, exclusive: bool = False) -> HostFile:
        if (write or create) and self.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        flags = (os.O_RDWR if write else os.O_RDONLY) | (os.O_CREAT if create else 0)
        # O_NONBLOCK: a FIFO in the tree must not hold the open up
        fd, align = self._open_fd(path, flags | (os.O_EXCL if exclusive else 0) | os.O_NONBLOCK)
        try:
            mode = os.fstat(fd).st_mode
            if not stat.S_ISREG(mode):
                code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
                raise OSError(code, os.strerror(code))
            return HostFile(fd, writable=write, align=align, counters=self.counters)
        except BaseException:
            os.close(fd)
            raise

    def _folder(self, path: str) -> int:
        return self._open_fd(path, os.O_RDONLY | os.O_DIRECTORY)[0]

    def unlink(self, path: str) -> tuple[int, int] | None:
        if self.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        folder, _, name = path.rpartition("/")
        fd = self._folder(folder)
        try:
            if name in ("", ".", ".."):
                raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            os.unlink(name, dir_fd=fd)
            last = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
            return (status.st_dev, status.st_ino) if last else None
        finally:
            os.close(fd)

    def listdir(self, path: str) -> list[DirEntry]:
        fd = self._folder(path)
        try:
            with os.scandir(fd) as entries:
                return sorted(filter(None, map(self._entry, entries)), key=lambda entry: entry.name)
        finally:
            os.close(fd)

    @staticmethod
    def _entry(entry: "os.DirEntry[str]") -> DirEntry | None:
        try:
            status = entry.stat(follow_symlinks=False)
        except OSError:
            return None  # gone since
        if stat.S_ISDIR(status.st_mode):
            return DirEntry(entry.name, True, 0)
        return DirEntry(entry.name, False, status.st_size) if stat.S_ISREG(status.st_mode) else None

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class ImageDisk:
    """An image file of the host as a disk without a file system: one file, `vda`, of the image's size."""

    def __init__(self, path: str | Path, *, read_only: bool = False) -> None:
        self.read_only = read_only
        self.path = Path(path)
        self.counters = _counters()
        self._disk = DirectoryDisk(self.path.parent, read_only=read_only)
        self._disk.counters = self.counters
        try:
            self._disk.open(self.path.name, write=not read_only).close()
        except OSError as error:
            self._disk.close()
            raise BadValue(f"disk image {str(path)!r} can't be opened: {error.strerror}") from None

    def __repr__(self) -> str:
        return f"disk image {self.path}{' (read-only)' if self.read_only else ''}"

    def open(self, path: str, *, write: bool = False, create: bool = False, exclusive: bool = False) -> HostFile:
        if path != _IMAGE:
            raise OSError(errno.ENOENT, f"a disk image has one file, {_IMAGE}")
        if exclusive:
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        file = self._disk.open(self.path.name, write=write)
        file.fixed = True
        return file

    def unlink(self, path: str) -> tuple[int, int] | None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def listdir(self, path: str) -> list[DirEntry]:
        if path:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return [DirEntry(_IMAGE, False, self.path.stat().st_size)]

    def close(self) -> None:
        self._disk.close()


_DISKS: tuple[tuple[Callable[[Path], bool], type[DirectoryDisk] | type[ImageDisk]], ...] = (
    (Path.is_dir, DirectoryDisk),
    (Path.is_file, ImageDisk),
)


def open_disk(path: str | Path, *, read_only: bool = False) -> DirectoryDisk | ImageDisk:
    """Return a directory, or an image file, as a disk. Raises BadValue."""
    for fits, kind in _DISKS:
        if fits(Path(path)):
            return kind(path, read_only=read_only)
    raise BadValue(f"disk {str(path)!r} is neither a directory nor a file")
