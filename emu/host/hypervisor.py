"""The hypervisor of one guest: its RAM, what is done with returned memory, and the devices."""

from pathlib import Path

from emu.host.balloon import Balloon
from emu.host.discard import Discard
from emu.host.disk import DirectoryDisk, ImageDisk, open_disk
from emu.ram import GuestRam
from emu.units import FRAME_SIZE

__all__ = ["Hypervisor"]


class Hypervisor:
    """Owns a GuestRam and what takes memory back from it."""

    def __init__(self, ram: GuestRam, *, on_return: str = "now") -> None:
        self.ram = ram
        self.discard = Discard(ram, on_return)
        self.balloon = Balloon(ram.frames, self.discard)
        self._disks: list[DirectoryDisk | ImageDisk] = []

    @property
    def disks(self) -> list[DirectoryDisk | ImageDisk]:
        """The guest's disks."""
        return self._disks

    def add_disk(self, path: str | Path, *, read_only: bool = False) -> DirectoryDisk | ImageDisk:
        """Open a directory, or an image file, as a disk for the guest."""
        self._disks.append(open_disk(path, read_only=read_only))
        return self._disks[-1]

    def pressure(self) -> int:
        """Put lazily freed memory under pressure; return the bytes that the kernel dropped."""
        return self.discard.pressure() * FRAME_SIZE

    @property
    def footprint_bytes(self) -> int:
        """Bytes that the host really holds for this guest: its RSS and the host's tables for it."""
        return self.ram.rss_bytes + self.ram.table_bytes
