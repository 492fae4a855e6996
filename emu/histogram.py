"""Histogram: latencies of the C loops (csrc/stats.c)."""

from emu._native import ffi, lib

__all__ = ["Histogram"]


class Histogram:
    """Latencies in ns, eight buckets an octave; several runs may add to one."""

    def __init__(self) -> None:
        self.native = ffi.new("struct emu_hist *")

    @property
    def count(self) -> int:
        return int(self.native.count)

    @property
    def mean(self) -> float:
        """Mean in ns; 0 when empty."""
        return float(self.native.sum / self.native.count) if self.native.count else 0.0

    @property
    def max(self) -> int:
        return int(self.native.max)

    def percentile(self, percent: float) -> int:
        """Return the floor, in ns, of the bucket that the percentile falls into."""
        left = self.native.count * percent / 100
        for bucket, count in enumerate(self.native.bucket):
            left -= count
            if left <= 0 and count:
                return int(lib.emu_hist_floor(bucket))
        return self.max
