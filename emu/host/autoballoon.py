"""A rule for the balloon: let every guest keep a share of its memory available, and take the rest.

The shape that automatic ballooning has in the field (oVirt's MOM and others): poll the guest's statistics, compare what
is available with what it should be, move the target by at most a step, and not for trifles. The constants are MOM's
defaults: 20 % to be kept, steps of 5 % of the RAM, no change below 0.25 %. It is a poll and not a reservation: what a
guest needs between two polls has to come from what was kept.
"""

from emu.errors import BadValue
from emu.host.balloon import Balloon
from emu.virtio.balloon import StatTag

__all__ = ["AutoBalloon"]


class AutoBalloon:
    """keep: the share of the RAM that is to stay available, 0 to 1; step, least: shares of the RAM."""

    def __init__(
        self, balloon: Balloon, ram_bytes: int, *, keep: float, step: float = 0.05, least: float = 0.0025
    ) -> None:
        if not 0 <= keep < 1:
            raise BadValue(f"balloon keep {keep!r} must be from 0 to below 1: a share of the RAM")
        self._balloon = balloon
        self._ram = ram_bytes
        self.keep, self.step, self.least = keep, step, least
        #: what the guest said last, in bytes
        self.available = 0

    def poll(self) -> None:
        """Ask, and move the target."""
        self.available = self._balloon.request_stats()[StatTag.AVAIL]
        spare = self.available - int(self.keep * self._ram)
        most = int(self.step * self._ram)
        change = max(-most, min(most, spare))
        if abs(change) < self.least * self._ram:
            return
        # from what the guest has now, not from a target that it may never reach
        held = self._ram - self._balloon.size_bytes
        self._balloon.guest_target = max(min(held - change, self._ram), 0)
