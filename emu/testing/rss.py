"""rss_delta: how many pages became resident, or stopped being so, while a block ran.

    with rss_delta(buffer) as d:
        ...
    assert d.pages == 0

For a GuestRam the figure is smaps' Rss of its mapping. For a buffer (an mmap, a bytearray, anything with the buffer
protocol) it is PAGEMAP_SCAN of exactly the pages that the buffer lies in, without the shared zero page; before Linux
6.7 it is mincore, which counts zero pages as well. For a pid it is the whole process by smaps_rollup: there, expect
noise of some hundred KiB from everything else that the process does.

A huge page counts as 512 pages, and a partly discarded one leaves the count at once though its memory stays in use
until the kernel splits it: test with MADV_NOHUGEPAGE, or look at MemFree.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from emu import residency
from emu._native import ffi
from emu.errors import BadValue
from emu.ram import GuestRam
from emu.units import FRAME_SIZE

__all__ = ["RssDelta", "rss_delta"]


def _probe(target: Any) -> Callable[[], int]:
    if isinstance(target, GuestRam):
        return lambda: target.rss_bytes
    if isinstance(target, bool):
        raise BadValue("rss_delta needs a GuestRam, a buffer or a pid, not a bool")
    if isinstance(target, int):
        return lambda: residency.rollup(target).rss
    try:
        ffi.release(ffi.from_buffer(target))
    except (TypeError, BufferError) as error:
        raise BadValue(f"rss_delta needs a GuestRam, a buffer or a pid, not {type(target).__name__}") from error

    def measure() -> int:
        # leased for the moment only: a lease held over the block would forbid closing or resizing the buffer in it
        with ffi.from_buffer(target) as lease:
            start = int(ffi.cast("uintptr_t", lease))
            first = start & -FRAME_SIZE
            length = (start + len(lease) + FRAME_SIZE - 1 & -FRAME_SIZE) - first
            if not len(lease):
                return 0
            scan = residency.scan(first, length)
            return residency.mincore_bytes(first, length) if scan is None else scan.rss

    return measure


class RssDelta:
    """The difference: since the block began while it runs, over the block when it has ended."""

    def __init__(self, target: Any) -> None:
        self._measure = _probe(target)
        self.before = 0
        self._after: int | None = None

    def __enter__(self) -> Self:
        self._after = None
        self.before = self._measure()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self._after = self._measure()

    @property
    def after(self) -> int:
        """Resident bytes at the end of the block; now, while it runs."""
        return self._measure() if self._after is None else self._after

    @property
    def bytes(self) -> int:
        """Bytes that became resident; negative for bytes given back."""
        return self.after - self.before

    @property
    def pages(self) -> int:
        """The same in pages of 4 KiB."""
        return self.bytes // FRAME_SIZE

    def __repr__(self) -> str:
        return f"<RssDelta {self.pages:+d} pages>"


def rss_delta(target: Any) -> RssDelta:
    """Return a context manager that measures a GuestRam, a buffer, or a process by its pid."""
    return RssDelta(target)
