"""The file system layer: mounted disks, the inodes that are in memory, opening, names, drop_caches.

One file of the disk is one inode, by (disk, device, inode number), whatever its names. It is in memory while somebody
has it open, or maps it, or has pages of it cached; an empty one stays for its shadows, until there are many. Its file
on the host is open while somebody uses it *or it is dirty*: so its number can't become another file's, and its bytes
have a place to go to whatever becomes of its name. Dirty files that nobody uses are written early when there are many
of them, since a process has so many descriptors only. A clean one is closed; at the next open its size and its time of
change are compared with the disk's (as network file systems do), and what was changed there is read anew.

drop_caches (fs/drop_caches.c): 1 frees the clean, unlocked, unmapped pages of all inodes, 2 lets go of inodes that are
there for nothing (the slab of a guest without slab pages), 3 does both, 4 only stops Linux's log message. Then the
per-CPU lists are drained, which is seen of real guests: what was freed reaches the buddy, and free page reporting.
"""

import errno
import resource
from collections.abc import Iterator
from typing import TYPE_CHECKING

from emu.errors import BadValue, DiscardFault, GuestError, GuestIOError
from emu.guest.file import File
from emu.guest.inode import Inode
from emu.units import format_size
from emu.virtio.disk import DirEntry, Disk

if TYPE_CHECKING:
    from emu.guest.kernel import GuestKernel

__all__ = ["Vfs"]

#: mode -> (for writing, created if missing, must be new, emptied)
_MODES = {
    "r": (False, False, False, False),
    "r+": (True, False, False, False),
    "w": (True, True, False, True),
    "w+": (True, True, False, True),
    "x": (True, True, True, False),
    "a": (True, True, False, False),
}
_INODES = 4096  # from so many on, empty ones are let go of
_MAX_SIZE = 1 << 43  # a page's index has 32 bits


class Vfs:
    """A guest's mounts and inodes."""

    def __init__(self, kernel: "GuestKernel") -> None:
        self._kernel = kernel
        self._mounts: dict[str, Disk] = {}
        self.inodes: dict[tuple[int, int, int], Inode] = {}
        #: by the space's number: whose page a frame is
        self._by_space: dict[int, Inode] = {}
        #: dirty ones that nobody uses, the longest first: their files on the host are open
        self._dirty_unused: dict[Inode, None] = {}
        self._most_dirty_unused = min(256, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        self._trim_at = _INODES

    # ---- mounts and names

    def mount(self, disk: Disk, at: str = "") -> None:
        """Mount a disk: its files are at `at`/..., or, for "", at the root."""
        at = at.strip("/")
        if at in self._mounts:
            raise GuestError(f"something is mounted at {at or '/'!r} already")
        self._mounts[at] = disk

    @property
    def disks(self) -> list[Disk]:
        """What is mounted."""
        return list(self._mounts.values())

    def _resolve(self, path: str) -> tuple[Disk, str]:
        # the longest mount point that the path begins with
        if not isinstance(path, str):
            raise BadValue(f"path {path!r} isn't text")
        head = path.strip("/")
        while True:
            if head in self._mounts:
                return self._mounts[head], path.strip("/")[len(head) :].strip("/")
            if not head:
                break
            head = head.rpartition("/")[0]
        if not self._mounts:
            raise GuestError("this guest has no disk: Machine(disk=...)")
        raise GuestIOError(errno.ENOENT, path, "nothing is mounted there")

    @staticmethod
    def _error(error: OSError, path: str, what: str) -> GuestIOError:
        code = error.errno or errno.EIO
        if code == errno.EXDEV:
            what += ": the path leads out of the disk"
        return GuestIOError(code, path, what)

    def _find(self, path: str, *, write: bool, create: bool, exclusive: bool) -> Inode:
        disk, inside = self._resolve(path)
        if write and len(self._dirty_unused) > 2 * self._most_dirty_unused:
            raise GuestIOError(errno.ENFILE, path, "opening it: so many dirty files wait for a disk that fails")
        try:
            file = disk.open(inside, write=write or create, create=create, exclusive=exclusive)
        except OSError as error:
            raise self._error(error, path, "opening it failed") from error
        key = (id(disk), *file.key)
        inode = self.inodes.get(key)
        if inode is None:
            self._trim()
            try:
                inode = Inode(self._kernel, path, file)
            except BaseException:
                file.close()
                raise
            inode.cache_key = key
            self.inodes[key] = self._by_space[inode.space.id] = inode
            return inode
        self._dirty_unused.pop(inode, None)
        inode.unlinked = False  # the host has given it a name again
        inode.revalidate(file)
        inode.path = path
        if inode.file is None or (file.writable and not inode.file.writable):
            inode.file, file = file, inode.file
        if file is not None:
            file.close()
        return inode

    def open(self, path: str, mode: str = "r") -> File:
        """Open a file. mode: r, r+, w (or w+: emptied), x (must be new), a (made if missing). All are binary."""
        try:
            write, create, exclusive, empty = _MODES[mode.replace("b", "")]
        except KeyError:
            raise BadValue(f"mode {mode!r} isn't one of {', '.join(_MODES)}") from None
        inode = self._find(path, write=write, create=create, exclusive=exclusive)
        file = File(self._kernel, inode, writable=write)
        if empty and inode.size:
            try:
                inode.truncate(0)
            except BaseException:
                file.close()
                raise
        return file

    def closed(self, inode: Inode) -> None:
        """One open file of an inode is closed."""
        inode.openers -= 1
        if inode.cache_key in self.inodes:  # not so when the machine is closed before its files are
            self._release(inode)

    def _release(self, inode: Inode) -> None:
        if inode.openers or inode.mappings:
            return
        if inode.unlinked:
            inode.drop()
        self.written(inode)
        if not inode.space.nr_pages and (inode.unlinked or not inode.space.nr_shadows):
            self._forget(inode)
        elif inode.file is not None:
            self._dirty_unused[inode] = None
            for first in list(self._dirty_unused)[: -self._most_dirty_unused]:
                self._kernel.writeback.write_out(first)  # and written() takes it out; or it couldn't be
                if first in self._dirty_unused:
                    self._dirty_unused[first] = self._dirty_unused.pop(first)

    def unmapped(self, inode: Inode) -> None:
        """A mapping of an inode is gone."""
        self._release(inode)

    def written(self, inode: Inode) -> None:
        """Some of an inode was written: if all is clean, and nobody uses it, its file on the host is closed."""
        if inode.openers or inode.mappings or inode.space.nr_dirty or inode.space.nr_writeback:
            return
        self._dirty_unused.pop(inode, None)
        if inode.file is not None:
            inode.file.close()
            inode.file = None

    def _trim(self) -> None:
        # Inodes whose pages have all gone: kept for their shadows, but not without end.
        if len(self.inodes) < self._trim_at:
            return
        for inode in list(self.inodes.values()):
            if not (inode.space.nr_pages or inode.openers or inode.mappings):
                self._forget(inode)
        self._trim_at = max(_INODES, 2 * len(self.inodes))

    def _forget(self, inode: Inode) -> None:
        del self.inodes[inode.cache_key]
        self._by_space.pop(inode.space.id, None)
        self._kernel.writeback.cleaned(inode)
        self._dirty_unused.pop(inode, None)
        if inode.file is not None:
            inode.file.close()
            inode.file = None
        inode.space.close()

    def unlink(self, path: str) -> None:
        """Remove a name. The pages go when nobody has the file open or mapped."""
        disk, inside = self._resolve(path)
        try:
            gone = disk.unlink(inside)
        except OSError as error:
            raise self._error(error, path, "unlinking it failed") from error
        # its last name, and no link to it
        inode = None if gone is None else self.inodes.get((id(disk), *gone))
        if inode is not None:
            inode.unlinked = True
            self._release(inode)

    def listdir(self, path: str = "") -> list[DirEntry]:
        """Return the names in a directory."""
        disk, inside = self._resolve(path)
        try:
            return list(disk.listdir(inside))
        except OSError as error:
            raise self._error(error, path or "/", "listing it failed") from error

    def walk(self, path: str = "") -> Iterator[tuple[str, int]]:
        """Yield (path, bytes) of all regular files below a directory, in the order of their names."""
        for entry in self.listdir(path):
            name = f"{path}/{entry.name}" if path else entry.name
            if entry.is_dir:
                try:
                    yield from self.walk(name)
                except GuestIOError as error:
                    if error.errno != errno.EACCES:
                        raise
            else:
                yield name, entry.size

    @staticmethod
    def check_size(inode: Inode, size: int) -> None:
        """Raise GuestIOError for a size that no file can have (EFBIG), or not this one (ENOSPC: a disk's image)."""
        if inode.fixed and size > inode.size:
            raise inode.error(errno.ENOSPC, "it keeps its size")
        if size > _MAX_SIZE:
            raise inode.error(errno.EFBIG, f"a file of {format_size(size)} can't be cached")

    # ---- memory

    def discarded(self, fault: DiscardFault) -> None:
        """The host has taken a page that was handed over: it leaves the cache, and its next reader reads it again.

        Raises the fault again if the frame isn't a page of the cache: then it wasn't the host's to take.
        """
        info = self._kernel.memmap.look(fault.gfn)
        if not info.space:
            raise fault
        inode = self.inode_of(info.space)
        inode.forget_discarded(info.index)
        self._kernel.vmstat["pgdiscard_fault"] += 1

    def collect_dirty(self) -> None:
        """Ask the machine which pages were written through mappings."""
        for inode in list(self.inodes.values()):
            inode.collect_dirty()

    def inode_of(self, space: int) -> Inode:
        """Return the inode that a space belongs to."""
        return self._by_space[space]

    def drop_caches(self, what: int) -> int:
        """Do what a write to /proc/sys/vm/drop_caches does; return how many pages were freed."""
        if what not in (1, 2, 3, 4) or isinstance(what, bool):
            raise BadValue(f"drop_caches {what!r} must be 1 (page cache), 2 (inodes), 3 (both) or 4")
        freed = 0
        if what & 1:
            self._kernel.vmstat["drop_pagecache"] += 1
            for inode in list(self.inodes.values()):
                freed += inode.invalidate()
            self._kernel.vmstat["drop_pagecache_pages"] += freed
        if what & 2:
            self._kernel.vmstat["drop_slab"] += 1
            for inode in list(self.inodes.values()):
                if not (inode.space.nr_pages or inode.openers or inode.mappings):
                    self._forget(inode)
        if what != 4:
            self._kernel.drain_pages()
        return freed

    def sync(self) -> None:
        """Write all dirty pages of all files and wait for the disks (sync). Raises the first GuestIOError, after
        all."""
        first: GuestIOError | None = None
        self.collect_dirty()
        for inode in self._kernel.writeback.dirty_inodes():
            try:
                inode.sync()
            except GuestIOError as error:
                first = first or error
            finally:
                self.written(inode)
        if first is not None:
            raise first

    def close(self) -> None:
        """Let go of everything, unwritten: the machine is gone. Nothing of the host's stays open."""
        for inode in self.inodes.values():
            if inode.file is not None:
                inode.file.close()
        self.inodes.clear()
        self._by_space.clear()
        for disk in self._mounts.values():
            disk.close()
        self._mounts.clear()
