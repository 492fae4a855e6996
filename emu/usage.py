"""Usages: what a guest says of its frames (CMM2). What the host takes by it: emu.reclaim, steal().

    stable                 needed: the host keeps it. Frames that nobody says anything of
    unused                 worthless: the host may drop it
    volatile               the guest can have it again: the host may discard it; an access then raises DiscardFault
    potentially volatile   the same while it is clean; dirty, the host keeps it

A frame's usage and its state share a byte; csrc/usage.c has the table of what may follow what. The bytes aren't a
boundary against a guest that lies: it harms itself alone.
"""

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from emu import _native
from emu.frames import Cause, FrameState, Usage
from emu.ranges import Ranges

__all__ = ["Sayer", "Transitions", "Usages"]


@dataclass(frozen=True, slots=True)
class Transitions:
    """Frames since the RAM was opened, by cause.

    moved: from one usage to another (what it became: nothing that is called potentially volatile is volatile); refused:
    by what was asked for; gone: found discarded when it should have been made stable.
    """

    moved: dict[Cause, dict[tuple[Usage, Usage], int]]
    refused: dict[Cause, dict[Usage, int]]
    gone: dict[Cause, int]

    @property
    def total(self) -> int:
        """All that changed."""
        return sum(sum(kinds.values()) for kinds in self.moved.values())


class Sayer(NamedTuple):
    """Put a frame's number in gfn[0], then call say(): Said, or -errno. For one thread; tens of ns over an empty call.

    say() is the core's own function, and has no argument: each takes longer than the work. Nothing is raised: -ERANGE,
    -EOPNOTSUPP (track_usages() first), -ESHUTDOWN once the RAM is closed, or in a forked child.
    """

    gfn: "array[int]"
    say: Callable[[], int]


class Usages:
    """Base of GuestRam."""

    frames: int

    @property
    def _core(self) -> _native.Region:
        raise NotImplementedError

    def track_usages(self) -> None:
        """From now on usages may be said. Raises HostError where a page that is gone can't be told from zeros."""
        self._core.track_usages()

    @property
    def tracks_usages(self) -> bool:
        """Whether that was called."""
        return self._core.tracks_usages

    def say(
        self, ranges: Iterable[Sequence[int]] | Ranges, usage: Usage, cause: Cause = Cause.OTHER
    ) -> "tuple[int, array[int]]":
        """Say a usage of frames; return how many changed, and, for STABLE, those that were discarded meanwhile.

        Those stay volatile, and each access to them raises DiscardFault, until they are said to be UNUSED, or wholly
        overwritten. One caller at a time for a frame.
        """
        batch = ranges if isinstance(ranges, Ranges) else Ranges.of(ranges)
        batch.check(self.frames, disjoint=False)
        return self._core.say(batch, usage, cause)

    def say_frames(self, gfns: "array[int]", usage: Usage, cause: Cause = Cause.OTHER) -> "tuple[int, array[int]]":
        """Say a usage of frames by number (an array of "I"): as say(), for frames of no order."""
        return self._core.say_frames(gfns, usage, cause)

    @property
    def bytes_address(self) -> int:
        """Where the frames' bytes are, for who measures. Whoever writes there breaks the books."""
        return self._core.bytes_address

    def sayer(self, usage: Usage, cause: Cause = Cause.OTHER) -> "Sayer":
        """Return what says this usage of one frame at a time, for who can't batch."""
        gfn = array("Q", [0])
        return Sayer(gfn, self._core.sayer(gfn, usage, cause))

    def page_states(self, memmap: Any, bits: int) -> None:
        """Let the guest's kernel say what its pages are worth (csrc/page_states.c). memmap: its descriptors, native."""
        self._core.page_states(memmap, bits)

    def usages(self, gfn: int = 0, count: int | None = None) -> bytes:
        """Return one Usage byte a frame."""
        count = self.frames - gfn if count is None else count
        Ranges.of([(gfn, count)]).check(self.frames, disjoint=False)
        return self._core.usages(gfn, count)

    def usage_matrix(self) -> dict[tuple[Usage, FrameState], int]:
        """Return frames by usage and state, where there are any."""
        rows = self._core.usage_matrix()
        return {(Usage(u), FrameState(s)): n for u, row in enumerate(rows) for s, n in enumerate(row) if n}

    def transitions(self) -> Transitions:
        """Return what was said so far."""
        counts = self._core.usage_counts()
        moved = {
            cause: {(a, b): n for a in Usage for b in Usage if (n := int(counts.moved[cause][a][b]))} for cause in Cause
        }
        refused = {cause: {u: n for u in Usage if (n := int(counts.refused[cause][u]))} for cause in Cause}
        return Transitions(
            {cause: kinds for cause, kinds in moved.items() if kinds},
            {cause: kinds for cause, kinds in refused.items() if kinds},
            {cause: n for cause in Cause if (n := int(counts.gone[cause]))},
        )
