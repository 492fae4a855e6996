"""All rows, in the order in which they are measured and printed."""

from emu.bench.rows import cache, faults, guest, reclaim

__all__ = ["ROWS"]

ROWS = [*faults.ROWS, *reclaim.ROWS, *cache.ROWS, *guest.ROWS]
