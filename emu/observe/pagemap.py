"""PageMap: the stage of every frame, from whose it is in the guest and what the host holds of it, counted by cells.

Each frame is in one stage, and the stages add up to the RAM. The guest's view comes first where it uses a frame; of
free frames the host's view decides: what the host doesn't hold costs nothing. So the kernel's RSS is the sum of the
stages in RESIDENT, but for pages that it has dropped from LAZY without telling.
"""

import enum
from dataclasses import dataclass

from emu.frames import FrameState
from emu.guest.kernel import GuestKernel
from emu.guest.page import Owner
from emu.ram import GuestRam

__all__ = ["LABELS", "RESIDENT", "PageMap", "Stage", "take_page_map"]


class Stage(enum.IntEnum):
    """Where a frame is. The order is that of the counts in a cell."""

    HOST_OWNED = 0  # free in the guest and not resident: never touched, given back, or the shared zero page
    ANONYMOUS = 1
    SHMEM = 2  # files that live in memory alone
    DIRTY = 3  # page cache
    WRITEBACK = 4
    ACTIVE = 5  # clean
    INACTIVE = 6
    PCP = 7  # freed, on a per-CPU list: out of reporting's sight
    FREE = 8  # free, and still resident
    REPORTED = 9  # free and reported, and still resident
    LAZY = 10  # lazily freed: the kernel may take it
    HINTED = 11  # held by the balloon driver for a hinting run, and still resident
    INFLATED = 12  # in the balloon, and still resident: the host can't take part of a huge page
    BALLOONED = 13  # in the balloon, and gone
    LOST = 14
    ASIDE = 15  # taken out of the guest and kept: not in its RSS, but in the footprint
    SWAPPED = 16  # its content is in the store
    DISCARDED = 17  # in the guest's cache, and taken by the host: the next access is a discard fault
    VOLATILE = 18  # clean cache in memory that the guest lets the host take (CMM2)


#: as people call them
LABELS = {
    Stage.HOST_OWNED: "host-owned",
    Stage.ANONYMOUS: "anonymous",
    Stage.SHMEM: "shmem",
    Stage.DIRTY: "dirty",
    Stage.WRITEBACK: "writeback",
    Stage.ACTIVE: "active",
    Stage.INACTIVE: "inactive",
    Stage.PCP: "per-CPU",
    Stage.FREE: "free",
    Stage.REPORTED: "reported",
    Stage.LAZY: "lazy",
    Stage.HINTED: "hinted",
    Stage.INFLATED: "inflated",
    Stage.BALLOONED: "ballooned",
    Stage.LOST: "lost",
    Stage.ASIDE: "aside",
    Stage.SWAPPED: "swapped",
    Stage.DISCARDED: "discarded",
    Stage.VOLATILE: "volatile",
}

#: stages whose frames are resident
RESIDENT = frozenset(Stage) - {
    Stage.HOST_OWNED,
    Stage.BALLOONED,
    Stage.LOST,
    Stage.ASIDE,
    Stage.SWAPPED,
    Stage.DISCARDED,
}

_USED = {
    Owner.ANON: Stage.ANONYMOUS,
    Owner.SHMEM: Stage.SHMEM,
    Owner.DIRTY: Stage.DIRTY,
    Owner.WRITEBACK: Stage.WRITEBACK,
    Owner.ACTIVE: Stage.ACTIVE,
    Owner.INACTIVE: Stage.INACTIVE,
}
_FREE = {
    Owner.FREE: Stage.FREE,
    Owner.PCP: Stage.PCP,
    Owner.REPORTED: Stage.REPORTED,
    Owner.HINTED: Stage.HINTED,
    Owner.BALLOON: Stage.INFLATED,
}


def _stage(owner: Owner, state: FrameState) -> Stage:
    if state is FrameState.LOST:
        return Stage.LOST
    if state is FrameState.ASIDE:
        return Stage.ASIDE
    if state is FrameState.PRESERVED:
        return Stage.SWAPPED
    if state is FrameState.DISCARDED and owner in _USED:
        return Stage.DISCARDED
    if state in (FrameState.ZERO, FrameState.ZEROMAP, FrameState.DISCARDED):
        return Stage.BALLOONED if owner is Owner.BALLOON else Stage.HOST_OWNED
    if owner in _USED:  # LAZY, too: it was written since, which takes the lazy free back
        return _USED[owner]
    # on a per-CPU list: it was somebody's since, and written
    return Stage.LAZY if state is FrameState.LAZY and owner is not Owner.PCP else _FREE[owner]


# [owner][state]; and where the guest calls what is in memory volatile. No other owner's frames are called so, but by a
# guest that lies.
_STAGE = [
    [
        *(_stage(owner, state) for state in FrameState),
        Stage.VOLATILE if owner in _USED else _stage(owner, FrameState.RESIDENT),
    ]
    for owner in Owner
]


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


def take_page_map(guest: GuestKernel, ram: GuestRam, cells: int = 1) -> PageMap:
    """Count all frames by cell: a step in C for eight frames, or a block that nobody has touched."""
    size = cell_frames(ram.frames, cells)
    flat = ram.tally(guest.memmap.native, guest.listed_frames(), size)
    per_cell = sum(map(len, _STAGE))
    order = [stage for row in _STAGE for stage in row]
    counted = []
    for at in range(0, len(flat), per_cell):
        cell = [0] * len(Stage)
        for stage, n in zip(order, flat[at : at + per_cell], strict=True):
            if n:
                cell[stage] += n
        counted.append(tuple(cell))
    return PageMap(ram.frames, size, tuple(counted))
