"""Medians and how far to trust them, without assuming a distribution.

The interval of a median comes from order statistics: of n independent samples, x(k) and x(n+1-k) enclose the true
median unless fewer than k of them fell on one side of it, which is a matter of coin tosses (H. A. David, Order
Statistics, section 7.1). With 10 rounds, the second smallest and the second largest enclose it with 97.9 %.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

__all__ = ["CONFIDENCE", "Estimate", "estimate"]

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median, an interval that holds the true one, and the confidence of that (at least 0.95 from 6 samples on)."""

    median: float
    low: float
    high: float
    confidence: float

    @property
    def spread(self) -> float:
        """Half the interval, relative to the median; 0 where the median is."""
        return (self.high - self.low) / 2 / abs(self.median) if self.median else 0.0

    def overlaps(self, other: "Estimate") -> bool:
        """Whether the two intervals share a value."""
        return self.low <= other.high and other.low <= self.high


def estimate(samples: Sequence[float]) -> Estimate:
    """Return the median of the samples and the narrowest interval of CONFIDENCE, or the whole range if that is less.

    Raises ValueError without samples.
    """
    ordered = sorted(samples)
    n = len(ordered)
    if not n:
        raise ValueError("no samples")

    def confidence(k: int) -> float:
        # 1 - 2 * P(fewer than k of n on one side)
        return 1 - sum(math.comb(n, i) for i in range(k)) / float(2 ** (n - 1))

    k = 1
    while 2 * (k + 1) <= n + 1 and confidence(k + 1) >= CONFIDENCE:
        k += 1
    return Estimate(median(ordered), ordered[k - 1], ordered[n - k], max(confidence(k), 0.0))
