"""PageMap: who has the frames and what the host holds of them, counted by cells of the RAM.

Each frame is in one stage. The host's view comes first: what it doesn't hold costs nothing, whoever the guest says has
it. Of what it holds, the guest says who uses it; and frames that are free there and resident here are what giving back
is about.
"""

import enum
from dataclasses import dataclass

from emu.frames import FrameState
from emu.guest.kernel import GuestKernel, PageOwner
from emu.ram import GuestRam

__all__ = ["PageMap", "Stage", "take_page_map"]


class Stage(enum.IntEnum):
    """Where a frame is. The order is that of the counts in a cell."""

    HOST = 0  # nothing resident: never touched, given back, or the shared zero page
    ANON = 1
    FILE = 2
    PCP = 3  # freed, on a per-CPU list: out of reporting's sight
    FREE = 4  # free, and still resident
    REPORTED = 5  # free and reported, and still resident
    LAZY = 6  # lazily freed: the kernel may take it
    LOST = 7


_OF_OWNER = {
    PageOwner.ANON: Stage.ANON,
    PageOwner.FILE: Stage.FILE,
    PageOwner.PCP: Stage.PCP,
    PageOwner.FREE: Stage.FREE,
    PageOwner.REPORTED: Stage.REPORTED,
}
_OF_STATE = {
    FrameState.ZERO: Stage.HOST,
    FrameState.ZEROMAP: Stage.HOST,
    FrameState.LAZY: Stage.LAZY,
    FrameState.LOST: Stage.LOST,
}
# [owner][state] -> stage; RESIDENT and BUSY are the owner's
_STAGE = [[_OF_STATE.get(state, _OF_OWNER[owner]) for state in FrameState] for owner in PageOwner]


@dataclass(frozen=True, slots=True)
class PageMap:
    """Frames by cell and stage. The last cell may be shorter than cell_frames."""

    frames: int
    cell_frames: int
    #: of each cell, frames by Stage
    cells: tuple[tuple[int, ...], ...]

    @property
    def totals(self) -> tuple[int, ...]:
        """Frames by Stage in all of the RAM."""
        return tuple(map(sum, zip(*self.cells, strict=True)))


def cell_frames(frames: int, cells: int) -> int:
    """Return the frames of a cell: the smallest power of two with which at most `cells` cells cover the RAM."""
    return 1 << max(-(-frames // max(cells, 1)) - 1, 0).bit_length()


def take_page_map(guest: GuestKernel, ram: GuestRam, cells: int) -> PageMap:
    """Count all frames by cell: a step in Python a free block, and one in C eight frames or a block of zeros."""
    size = cell_frames(ram.frames, cells)
    owners, states, stages = len(PageOwner), len(FrameState), len(Stage)
    flat = ram.tally(guest.page_owners(), size, owners)
    per_cell = owners * states
    order = [stage for row in _STAGE for stage in row]
    counted = []
    for at in range(0, len(flat), per_cell):
        cell = [0] * stages
        for stage, n in zip(order, flat[at : at + per_cell], strict=True):
            if n:
                cell[stage] += n
        counted.append(tuple(cell))
    return PageMap(ram.frames, size, tuple(counted))
