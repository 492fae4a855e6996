"""The hypervisor of one guest: its RAM, what is done with returned memory, and the devices."""

from emu.host.balloon import Balloon
from emu.host.discard import Discard
from emu.ram import GuestRam
from emu.units import FRAME_SIZE

__all__ = ["Hypervisor"]


class Hypervisor:
    """Owns a GuestRam and what takes memory back from it."""

    def __init__(self, ram: GuestRam, *, on_return: str = "now") -> None:
        self.ram = ram
        self.discard = Discard(ram, on_return)
        self.balloon = Balloon(ram.frames, self.discard)

    def pressure(self) -> int:
        """Put lazily freed memory under pressure; return the bytes that the kernel dropped."""
        return self.discard.pressure() * FRAME_SIZE

    @property
    def footprint_bytes(self) -> int:
        """Bytes that the host really holds for this guest: its RSS and the host's tables for it."""
        return self.ram.rss_bytes + self.ram.table_bytes
