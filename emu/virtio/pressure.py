"""The pressure queue: what a host that is short of memory asks of a guest.

No such queue is in the virtio specification. Two requests, as the linux-mm thread on free page reporting has them
(January 2020). An epoch is a point in time: page cache that was last used before it may go; a host that is short moves
it forward. A purge is the last thing that is asked: everything that can go is to go, now.
"""

from typing import Protocol

__all__ = ["PressureDriver"]


class PressureDriver(Protocol):
    """What a guest's driver does for its device. Both return the bytes of page cache that were freed."""

    def epoch(self, age: float, most: int) -> int:
        """Free clean cache that wasn't used for `age` guest seconds, the oldest first, at most `most` bytes."""

    def purge(self) -> int:
        """Write what is dirty, free all clean cache, and report everything free at once."""
