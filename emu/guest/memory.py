"""GuestMemory: what the guest kernel needs of the memory it runs on. `GuestRam` has it; so has testing.BytesMemory."""

from typing import Protocol

from emu.frames import Op
from emu.ranges import Ranges

__all__ = ["GuestMemory", "Op"]


class GuestMemory(Protocol):
    """Frames of 4 KiB, numbered from 0."""

    @property
    def frames(self) -> int:
        """How many there are."""

    def vcpu(self, op: Op, ranges: Ranges, arg: int = 0, *, threads: int = 1) -> list[int]:
        """Run op over the frames of the ranges; return those that VERIFY found different."""

    def read(self, gpa: int, n: int) -> bytes:
        """Return n bytes from guest physical address gpa."""

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Write data at guest physical address gpa."""

    def readv(self, ranges: Ranges, skip: int, into: bytearray | memoryview) -> None:
        """Fill `into` from the ranges' frames, one after another, from byte `skip` of them on (preadv)."""

    def writev(self, ranges: Ranges, skip: int, data: bytes | bytearray | memoryview) -> None:
        """Write data to the ranges' frames likewise (pwritev)."""
