"""Memories without faults, for tests of guest code: a bytearray, and a dict of pages as the oracle.

Both have the guest kernel's GuestMemory protocol and must show a guest the same bytes as a GuestRam does.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

from emu import _native
from emu.errors import RangeError
from emu.frames import Op
from emu.ranges import Ranges
from emu.units import FRAME_SIZE, parse_ram_size

__all__ = ["BytesMemory", "ReferenceMemory"]

_ZEROS = bytes(FRAME_SIZE)


class _Vectored(ABC):
    # readv and writev, in terms of read and write

    @abstractmethod
    def read(self, gpa: int, n: int) -> bytes:
        """Return n bytes from guest physical address gpa."""

    @abstractmethod
    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Write data at guest physical address gpa."""

    def readv(self, ranges: Ranges, skip: int, into: bytearray | memoryview) -> None:
        """Fill `into` from the ranges' frames, one after another, from byte `skip` of them on."""
        view = memoryview(into).cast("B")
        for gpa, at, n in self._parts(ranges, skip, len(view)):
            view[at : at + n] = self.read(gpa, n)

    def writev(self, ranges: Ranges, skip: int, data: bytes | bytearray | memoryview) -> None:
        """Write data to the ranges' frames likewise."""
        view = memoryview(data).cast("B")
        for gpa, at, n in self._parts(ranges, skip, len(view)):
            self.write(gpa, view[at : at + n])

    @staticmethod
    def _parts(ranges: Ranges, skip: int, length: int) -> Iterator[tuple[int, int, int]]:
        if skip + length > ranges.frames * FRAME_SIZE:
            raise RangeError(f"{length} bytes from byte {skip} on are more than the ranges have")
        done = 0
        for gfn, count, _ in ranges:
            size = count * FRAME_SIZE
            if skip >= size:
                skip -= size
                continue
            n = min(size - skip, length - done)
            if n:
                yield gfn * FRAME_SIZE + skip, done, n
            done += n
            skip = 0


class ReferenceMemory(_Vectored):
    """A dict of pages: what is in it is resident, what isn't reads as zero. The oracle of the stateful tests."""

    def __init__(self, size: int | str) -> None:
        self.frames = parse_ram_size(size) // FRAME_SIZE
        self.pages: dict[int, bytes] = {}

    def vcpu(self, op: Op, ranges: Ranges, arg: int = 0, *, threads: int = 1) -> list[int]:
        ranges.check(self.frames, disjoint=False)
        bad = []
        for first, count, key in ranges:
            for gfn in range(first, first + count):
                if op is Op.TOUCH_WRITE:
                    self.pages.setdefault(gfn, _ZEROS)
                elif op is Op.SET:
                    self.pages[gfn] = bytes([arg]) * FRAME_SIZE
                elif op is Op.FILL:
                    self.pages[gfn] = _native.content(arg, key + gfn - first)
                elif op is Op.COPY:
                    self.pages[gfn] = self.pages.get(key + gfn - first, _ZEROS)
                elif op is Op.VERIFY and self.pages.get(gfn, _ZEROS) != _native.content(arg, key + gfn - first):
                    bad.append(gfn)
        return bad

    def read(self, gpa: int, n: int) -> bytes:
        self._check(gpa, n)
        first, last = gpa // FRAME_SIZE, -(-(gpa + n) // FRAME_SIZE)
        joined = b"".join(self.pages.get(gfn, _ZEROS) for gfn in range(first, last))
        return joined[gpa % FRAME_SIZE : gpa % FRAME_SIZE + n]

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data).cast("B")
        self._check(gpa, len(view))
        while len(view):
            gfn, within = divmod(gpa, FRAME_SIZE)
            part = min(len(view), FRAME_SIZE - within)
            page = self.pages.get(gfn, _ZEROS)
            self.pages[gfn] = page[:within] + bytes(view[:part]) + page[within + part :]
            gpa += part
            view = view[part:]

    def discard(self, ranges: Ranges) -> int:
        """Give frames back; return how many held memory."""
        taken = 0
        for first, count, _ in ranges:
            taken += sum(self.pages.pop(gfn, None) is not None for gfn in range(first, first + count))
        return taken

    @property
    def rss_bytes(self) -> int:
        """What would be resident."""
        return len(self.pages) * FRAME_SIZE

    def _check(self, gpa: int, n: int) -> None:
        if gpa < 0 or n < 0 or gpa + n > self.frames * FRAME_SIZE:
            raise RangeError(f"bytes [{gpa}, {gpa + n}) are outside the RAM", frames=self.frames)


class BytesMemory(_Vectored):
    """A bytearray: everything is resident from the start."""

    def __init__(self, size: int | str) -> None:
        self.data = bytearray(parse_ram_size(size))
        self.frames = len(self.data) // FRAME_SIZE

    def vcpu(self, op: Op, ranges: Ranges, arg: int = 0, *, threads: int = 1) -> list[int]:
        ranges.check(self.frames, disjoint=False)
        bad = []
        for first, count, key in ranges:
            for gfn in range(first, first + count):
                page = slice(gfn * FRAME_SIZE, (gfn + 1) * FRAME_SIZE)
                if op is Op.SET:
                    self.data[page] = bytes([arg]) * FRAME_SIZE
                elif op is Op.FILL:
                    self.data[page] = _native.content(arg, key + gfn - first)
                elif op is Op.COPY:
                    start = (key + gfn - first) * FRAME_SIZE
                    self.data[page] = self.data[start : start + FRAME_SIZE]
                elif op is Op.VERIFY and self.data[page] != _native.content(arg, key + gfn - first):
                    bad.append(gfn)
        return bad

    def read(self, gpa: int, n: int) -> bytes:
        self._check(gpa, n)
        return bytes(self.data[gpa : gpa + n])

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data).cast("B")
        self._check(gpa, len(view))
        self.data[gpa : gpa + len(view)] = view

    def _check(self, gpa: int, n: int) -> None:
        if gpa < 0 or n < 0 or gpa + n > len(self.data):
            raise RangeError(f"bytes [{gpa}, {gpa + n}) are outside the RAM", frames=self.frames)
