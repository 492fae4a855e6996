"""Processes: what maps memory, and gives all of it back when it ends."""

from typing import TYPE_CHECKING

from emu.errors import BadValue, GuestError
from emu.guest.file import File
from emu.guest.filemap import FileMapping
from emu.guest.lock import in_kernel
from emu.guest.ramfs import RamFile
from emu.guest.vma import Mapping
from emu.units import FRAME_SIZE, format_size, parse_ram_size

if TYPE_CHECKING:
    from emu.guest.kernel import GuestKernel

__all__ = ["Process"]


class Process:
    """A guest process."""

    def __init__(self, kernel: "GuestKernel", pid: int, name: str) -> None:
        self.kernel = kernel
        self.kernel_lock = kernel.kernel_lock
        self.pid = pid
        self.name = name
        self.mappings: list[Mapping] = []
        #: thousandths of all memory that the OOM killer adds to its size; -1000: it isn't killed
        self.oom_score_adj = 0
        self._gone = False
        self._killed = False

    def check_alive(self) -> None:
        """Raise GuestError if it was killed."""
        if self._killed:
            raise GuestError(f"process {self.pid} ({self.name}) was killed by the OOM killer")

    @in_kernel
    def mmap(
        self, size: int | str, *, thp: bool = False, file: RamFile | File | None = None, shared: bool = False
    ) -> Mapping:
        """Map anonymous memory, or the start of a file.

        Privately, unless shared: a write gets a copy of its page. thp: MADV_HUGEPAGE on it, for a guest whose setting
        is madvise; a file's pages are small. A mapping keeps its file, whether that stays open or not.
        """
        self.kernel.check_running()
        self.check_alive()
        if self._gone:
            raise GuestError(f"process {self.pid} has exited")
        huge = self.kernel.thp == "always" or (thp and self.kernel.thp == "madvise")
        length = parse_ram_size(size, "mapping size")
        if shared and not isinstance(file, File):
            raise BadValue("only a file of the disk can be mapped shared")
        if isinstance(file, File):
            if file.closed:
                raise GuestError(f"{file.inode.path} is closed")
            if shared and not file.writable:
                raise BadValue(f"{file.inode.path} is open for reading only: map it privately")
            if length > -(-file.size // FRAME_SIZE) * FRAME_SIZE:
                raise BadValue(f"a mapping of {length} bytes is larger than the file, {file.size}")
            mapped = FileMapping(self.kernel, self, length, file.inode, shared=shared)
            self.mappings.append(mapped)
            return mapped
        if file is not None and length > file.size:
            raise BadValue(f"a mapping of {length} bytes is larger than the file, {file.size}")
        mapping = Mapping(self.kernel, self, length, huge and file is None, file)
        self.mappings.append(mapping)
        return mapping

    @in_kernel
    def exit(self) -> None:
        """End the process: all its memory is freed."""
        if not self._gone:
            for hook in list(self.kernel.exit_hooks.values()):
                hook(self)
        for mapping in list(self.mappings):
            mapping.munmap()
        self._gone = True
        if self in self.kernel.processes:
            self.kernel.processes.remove(self)

    def kill(self) -> None:
        """End it from outside (SIGKILL, and the OOM reaper): all its memory is freed, its calls raise from now on."""
        self.exit()
        self._killed = True

    def forget(self) -> None:
        """Drop everything without freeing: the guest itself is going away."""
        self.mappings.clear()

    @property
    def rss_bytes(self) -> int:
        """Bytes of frames that the process has mapped, as the guest counts them."""
        return sum(mapping.present for mapping in self.mappings) * FRAME_SIZE

    def __repr__(self) -> str:
        return f"<Process {self.pid} {self.name!r} {format_size(self.rss_bytes)}>"
