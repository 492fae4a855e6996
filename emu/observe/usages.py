"""UsageView: what a guest says of its frames against what the host holds of them (CMM2), as counts.

Three columns as the field writes them: r, in memory (aside is memory, too); p, preserved in the store; z, nothing
behind it: never touched, given back, or discarded. Of twelve pairs eight can be (csrc/usage.c).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from emu.frames import Cause, FrameState, Usage
from emu.ram import GuestRam

__all__ = ["LETTERS", "UsageView", "take_usage_view"]

#: as the papers and patches call them
LETTERS = {Usage.STABLE: "S", Usage.UNUSED: "U", Usage.POTENTIALLY_VOLATILE: "P", Usage.VOLATILE: "V"}

_R = {FrameState.ZEROMAP, FrameState.RESIDENT, FrameState.LAZY, FrameState.ASIDE, FrameState.BUSY}


@dataclass(frozen=True, slots=True)
class UsageView:
    """Frames by usage as (r, p, z), and transitions since the RAM was opened."""

    frames: dict[Usage, tuple[int, int, int]]
    #: all causes together
    moved: dict[tuple[Usage, Usage], int]
    by_cause: dict[Cause, int]
    #: found discarded when made stable; asked for what may not be
    gone: int
    refused: int

    def said(self, usage: Usage) -> int:
        """Transitions to a usage."""
        return sum(n for (_, to), n in self.moved.items() if to is usage)

    @property
    def counters(self) -> Mapping[str, int]:
        """For the flat table: usage_FROM_TO, by letter; said_CAUSE; usage_said, all; usage_gone, usage_refused."""
        counters = {
            f"usage_{LETTERS[a]}_{LETTERS[b]}".lower(): self.moved.get((a, b), 0)
            for a in LETTERS
            for b in LETTERS
            if a is not b
        }
        counters |= {f"said_{cause.name.lower()}": n for cause, n in self.by_cause.items()}
        counters["usage_said"] = sum(self.moved.values())
        counters["usage_gone"] = self.gone
        counters["usage_refused"] = self.refused
        return counters

    def as_json(self) -> dict[str, dict[str, int]]:
        """Return frames by letter, and r, p or z."""
        return {LETTERS[usage]: dict(zip("rpz", self.frames[usage], strict=True)) for usage in LETTERS}


def take_usage_view(ram: GuestRam) -> UsageView | None:
    """Count; None where nothing is said (no cmm2). A walk over the frames' bytes, eight a step."""
    if not ram.tracks_usages:
        return None
    frames = {usage: [0, 0, 0] for usage in Usage}
    for (usage, state), n in ram.usage_matrix().items():
        column = 0 if state in _R else 1 if state is FrameState.PRESERVED else 2
        frames[usage][column] += n
    said = ram.transitions()
    moved: dict[tuple[Usage, Usage], int] = {}
    for kinds in said.moved.values():
        for kind, n in kinds.items():
            moved[kind] = moved.get(kind, 0) + n
    return UsageView(
        {usage: (r, p, z) for usage, (r, p, z) in frames.items()},
        moved,
        {cause: sum(kinds.values()) for cause, kinds in said.moved.items()},
        sum(said.gone.values()),
        sum(sum(kinds.values()) for kinds in said.refused.values()),
    )
