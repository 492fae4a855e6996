"""What the host does with memory that comes back, whatever mechanism brought it.

now            MADV_DONTNEED: RSS falls at once, the next touch faults a zero page in grace:SECONDS  the frames are set
aside: a touch, read or write, brings them back as they were; untouched for so long they
               go, and RSS falls
lazy           MADV_FREE: RSS stays until memory is wanted; a write before that costs nothing, and a read doesn't count
lazy:aside     set aside, without a time: RSS stays (in the footprint) until memory is wanted; a read counts, too

Memory is wanted when somebody says so (pressure()): then what came back first goes first.
"""

from collections import deque
from collections.abc import Callable
from typing import Literal, NamedTuple

from emu.errors import BadValue, HostError
from emu.host.aside import Aside
from emu.ram import GuestRam
from emu.ranges import Ranges
from emu.units import parse_duration

__all__ = ["RETURN_POLICIES", "Discard", "ReturnPolicy", "parse_return"]

#: as people write them
RETURN_POLICIES = ("now", "grace:SECONDS", "lazy", "lazy:aside")


class ReturnPolicy(NamedTuple):
    """A policy; keep: seconds, of grace."""

    kind: Literal["now", "grace", "lazy", "aside"]
    keep: float | None = None


def parse_return(text: str) -> ReturnPolicy:
    """Read a policy. Raises BadValue."""
    name, colon, rest = text.partition(":")
    if text in ("now", "lazy"):
        return ReturnPolicy(text)  # type: ignore[arg-type]
    if text == "lazy:aside":
        return ReturnPolicy("aside")
    if name == "grace" and colon:
        keep = parse_duration(rest, "grace")
        if not 0.01 <= keep <= 86400:
            raise BadValue(f"grace {rest!r} must be from 0.01 s to a day")
        return ReturnPolicy("grace", keep)
    raise BadValue(f"return policy {text!r} isn't known: {', '.join(RETURN_POLICIES)}")


class Discard:
    """Gives a RAM's frames back by one policy, and counts."""

    def __init__(self, ram: GuestRam, aside: Aside, policy: str = "now") -> None:
        self.policy = policy
        self._ram = ram
        self._aside = aside
        self._parsed = parse_return(policy)
        if self._parsed.kind in ("grace", "aside") and ram.aside_how == "none":
            raise HostError(
                f"return policy {policy} needs userfaultfd with UFFDIO_MOVE or write protection: emu doctor"
            )
        self._give_back: Callable[[Ranges], int] = {
            "now": ram.discard,
            "grace": self._set_aside,
            "aside": self._set_aside,
            "lazy": self.lazily,
        }[self._parsed.kind]
        self._lazy: deque[Ranges] = deque()
        #: frames offered, and of those the ones that held memory
        self.offered = 0
        self.taken = 0

    @property
    def keeps(self) -> bool:
        """Whether memory that came back is still there until somebody wants it."""
        return self._parsed.kind in ("lazy", "aside")

    @property
    def pending(self) -> bool:
        """Whether something waits for its time."""
        return self._parsed.kind == "grace" and self._aside.pending

    def frames(self, ranges: Ranges) -> int:
        """Give frames back; return how many held memory."""
        self.offered += ranges.frames
        taken = self._give_back(ranges)
        self.taken += taken
        return taken

    def _set_aside(self, ranges: Ranges) -> int:
        return self._aside.put(ranges, evict=False, keep=self._parsed.keep)

    def lazily(self, ranges: Ranges) -> int:
        """Free frames lazily whatever the policy: a write takes it back (free page hints). Returns how many."""
        taken = self._ram.lazy_free(ranges)
        if taken:
            self._lazy.append(ranges)
        return taken

    def drop(self, ranges: Ranges) -> int:
        """Take those of lazily freed frames that weren't written since; return how many."""
        self.offered += ranges.frames
        taken = self._ram.lazy_drop(ranges)
        self.taken += taken
        return taken

    def pressure(self, frames: int | None = None) -> int:
        """Have what came back, and wasn't taken back by a touch, go, the oldest first; return how many frames went.

        frames: how many are wanted; None: all that there is.
        """
        went = 0
        while self._lazy and (frames is None or went < frames):
            went += self._ram.lazy_drop(self._lazy.popleft())
        if frames is None and self._ram.stats()["nr_lazy"]:
            went += self._ram.lazy_drop()  # what MADV_PAGEOUT couldn't get at before
        if frames is None or went < frames:
            went += self._aside.shrink(None if frames is None else frames - went)
        return went
