"""The device side of the inactive queue: what a guest hands over is set aside, and dropped when it hasn't been wanted.

What came back by a touch is the guest's as before, without a word. What was dropped is told by a discard fault at the
guest's next access: so the guest never finds stale bytes or zeros. Ranges are the guest's word: wrong ones are counted
and ignored.
"""

from collections.abc import Sequence

from emu.host.aside import Aside
from emu.ranges import Ranges

__all__ = ["InactiveDevice"]


class InactiveDevice:
    """One guest's device. keep: seconds that a frame stays aside; None: until memory is wanted."""

    def __init__(self, frames: int, aside: Aside) -> None:
        self._frames = frames
        self._aside = aside
        self.keep: float | None = None
        self.counters = dict.fromkeys(("inactive_offered", "inactive_aside", "inactive_ignored"), 0)

    def hand_over(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Set frames aside."""
        valid = Ranges()
        for gfn, count in ranges:
            if gfn >= 0 and count > 0 and gfn + count <= self._frames:
                valid.add(gfn, count, 0)
            else:
                self.counters["inactive_ignored"] += 1
        self.counters["inactive_offered"] += valid.frames
        if len(valid):
            self.counters["inactive_aside"] += self._aside.put(valid, evict=True, keep=self.keep)
