"""The inactive queue: a guest hands over frames that it has no use for now, and keeps calling its own.

No such queue is in the virtio specification. It was proposed on linux-mm in the thread on free page reporting (January
2020): the guest puts clean inactive page cache on it, the host keeps the pages aside and may drop them, and a touch
brings back what is still there. Deviation from a real one: handing over is a call, and its return the acknowledgement.
"""

from collections.abc import Sequence
from typing import Protocol

__all__ = ["InactiveQueue"]


class InactiveQueue(Protocol):
    """What a device that has the queue does for its driver."""

    def hand_over(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Take note of (first frame, frames) ranges. Their content can be had again from the guest's disk."""
