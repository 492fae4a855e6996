"""The chain: how frames go from stage to stage, as a mechanism declares it, and how many have gone each way.

    dirty -> inactive <-> active       inactive -> free -> host-owned -> anonymous

An arrow counts by counters that are there anyway (frames, since the machine started); two pictures make a flow of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from emu.observe.pagemap import Stage

__all__ = ["GUEST_ARROWS", "GUEST_CHAIN", "Arrow", "Flow", "flows"]


@dataclass(frozen=True, slots=True)
class Arrow:
    """A way from one stage to another, and the counters of frames that add up to what went it."""

    source: Stage
    target: Stage
    counters: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Flow:
    """Frames that have gone one way so far."""

    source: Stage
    target: Stage
    frames: int


#: what a guest without any mechanism has
GUEST_CHAIN = (Stage.ANONYMOUS, Stage.DIRTY, Stage.ACTIVE, Stage.INACTIVE, Stage.FREE)
GUEST_ARROWS = (
    Arrow(Stage.DIRTY, Stage.INACTIVE, ("guest_nr_written",)),
    Arrow(Stage.INACTIVE, Stage.ACTIVE, ("guest_pgactivate", "guest_workingset_activate_file")),
    Arrow(Stage.ACTIVE, Stage.INACTIVE, ("guest_pgdeactivate",)),
    Arrow(Stage.INACTIVE, Stage.FREE, ("guest_pgsteal_kswapd", "guest_pgsteal_direct", "guest_drop_pagecache_pages")),
    Arrow(Stage.HOST_OWNED, Stage.ANONYMOUS, ("copy_frames",)),
    Arrow(Stage.HOST_OWNED, Stage.INACTIVE, ("install_frames",)),
)


def flows(arrows: tuple[Arrow, ...], counters: Mapping[str, int]) -> tuple[Flow, ...]:
    """Return what has gone along each arrow."""
    return tuple(
        Flow(arrow.source, arrow.target, sum(counters.get(name, 0) for name in arrow.counters)) for arrow in arrows
    )
