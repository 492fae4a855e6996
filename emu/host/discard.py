"""What the host does with memory that comes back, whatever mechanism brought it.

now    MADV_DONTNEED: RSS falls at once, the next touch faults a zero page in
lazy   MADV_FREE: RSS stays until the kernel needs memory, a write before that costs nothing. Under pressure, which
       MADV_PAGEOUT makes on demand, the pages that weren't written go
"""

from collections.abc import Callable

from emu.errors import BadValue
from emu.ram import GuestRam
from emu.ranges import Ranges

__all__ = ["RETURN_POLICIES", "Discard"]

#: name -> what GuestRam does
RETURN_POLICIES: dict[str, Callable[[GuestRam, Ranges], int]] = {
    "now": GuestRam.discard,
    "lazy": GuestRam.lazy_free,
}


class Discard:
    """Gives a RAM's frames back by one policy, and counts."""

    def __init__(self, ram: GuestRam, policy: str = "now") -> None:
        if policy not in RETURN_POLICIES:
            raise BadValue(f"return policy {policy!r} isn't known: {', '.join(RETURN_POLICIES)}")
        self.policy = policy
        self._ram = ram
        self._give_back = RETURN_POLICIES[policy]
        #: frames offered, and of those the ones that held memory
        self.offered = 0
        self.taken = 0

    def frames(self, ranges: Ranges) -> int:
        """Give frames back; return how many held memory."""
        self.offered += ranges.frames
        taken = self._give_back(self._ram, ranges)
        self.taken += taken
        return taken

    def lazily(self, ranges: Ranges) -> int:
        """Free frames lazily whatever the policy: a write takes it back (free page hints). Returns how many."""
        return self._ram.lazy_free(ranges)

    def drop(self, ranges: Ranges) -> int:
        """Take those of lazily freed frames that weren't written since; return how many."""
        self.offered += ranges.frames
        taken = self._ram.lazy_drop(ranges)
        self.taken += taken
        return taken

    def pressure(self) -> int:
        """Make the kernel take what was lazily freed and not written since; return the frames that went."""
        return self._ram.lazy_drop()
