"""All rows, in the order in which they are measured and printed."""

from emu.bench.rows import cache, cmm2, faults, guest, reclaim, swap

__all__ = ["ROWS"]

ROWS = [*faults.ROWS, *reclaim.ROWS, *swap.ROWS, *cache.ROWS, *cmm2.ROWS, *guest.ROWS]
