"""The chain: how frames go from stage to stage, as a mechanism declares it, and how many have gone each way.

    host-owned -> free -> anonymous, inactive, dirty      dirty -> inactive <-> active      inactive -> free ->
    host-owned

The guest's side is exact: each change of a frame's owner is counted where it happens (csrc/memmap.c), so that what a
stage has gained is what came in less what went out. `free` is all memory that the guest doesn't use: per-CPU lists, and
what the host owns, are part of it; what goes between free and host-owned are frames that the host has taken, and given
again. Being written is no stop on the way: dirty -> inactive is counted when it is done. What the host has of a frame
of the page cache, whether it is aside, swapped or discarded, is no matter to the guest: its own arrows count it like
any other.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from emu.observe.pagemap import Stage

__all__ = [
    "ASIDE_ARROWS",
    "GUEST_ARROWS",
    "GUEST_CHAIN",
    "RETURN_ARROWS",
    "STATES_ARROWS",
    "SWAP_ARROWS",
    "Arrow",
    "Flow",
    "flows",
]


@dataclass(frozen=True, slots=True)
class Arrow:
    """A way from one stage to another, and the counters of frames that add up to what went it."""

    source: Stage
    target: Stage
    counters: tuple[str, ...]
    #: those that count another way, too
    less: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Flow:
    """Frames that have gone one way so far."""

    source: Stage
    target: Stage
    frames: int


def _moved(source: Stage, target: Stage, owners: str) -> Arrow:
    return Arrow(source, target, (f"moved_{owners}",))


#: what a guest without any mechanism has
GUEST_CHAIN = (Stage.ANONYMOUS, Stage.DIRTY, Stage.ACTIVE, Stage.INACTIVE, Stage.FREE)
GUEST_ARROWS = (
    _moved(Stage.FREE, Stage.ANONYMOUS, "free_anon"),
    _moved(Stage.ANONYMOUS, Stage.FREE, "anon_free"),
    _moved(Stage.FREE, Stage.SHMEM, "free_shmem"),
    _moved(Stage.SHMEM, Stage.FREE, "shmem_free"),
    _moved(Stage.FREE, Stage.INACTIVE, "free_inactive"),
    _moved(Stage.FREE, Stage.ACTIVE, "free_active"),
    _moved(Stage.FREE, Stage.DIRTY, "free_dirty"),
    _moved(Stage.INACTIVE, Stage.DIRTY, "inactive_dirty"),
    _moved(Stage.ACTIVE, Stage.DIRTY, "active_dirty"),
    _moved(Stage.DIRTY, Stage.INACTIVE, "writeback_inactive"),
    _moved(Stage.DIRTY, Stage.ACTIVE, "writeback_active"),
    _moved(Stage.INACTIVE, Stage.ACTIVE, "inactive_active"),
    _moved(Stage.ACTIVE, Stage.INACTIVE, "active_inactive"),
    _moved(Stage.INACTIVE, Stage.FREE, "inactive_free"),
    _moved(Stage.ACTIVE, Stage.FREE, "active_free"),
    _moved(Stage.DIRTY, Stage.FREE, "dirty_free"),
    Arrow(Stage.HOST_OWNED, Stage.FREE, ("copy_frames", "install_frames")),
    Arrow(Stage.FREE, Stage.HOST_OWNED, ("discard_frames", "lazydrop_frames"), ("balloon_inflate_taken",)),
)

#: of free memory that the policy on return sets aside
RETURN_ARROWS = (
    Arrow(Stage.FREE, Stage.ASIDE, ("aside_frames",), ("swap_out_frames",)),
    Arrow(Stage.ASIDE, Stage.FREE, ("aside_return", "aside_restored")),
    Arrow(Stage.ASIDE, Stage.HOST_OWNED, ("aside_dropped",)),
)
#: of page cache that the inactive queue hands over
ASIDE_ARROWS = (
    Arrow(Stage.INACTIVE, Stage.ASIDE, ("inactive_aside",)),
    Arrow(Stage.FREE, Stage.ASIDE, ("aside_frames",), ("inactive_aside",)),
    Arrow(Stage.ASIDE, Stage.INACTIVE, ("aside_return", "aside_restored")),
    Arrow(Stage.ASIDE, Stage.DISCARDED, ("aside_evicted",)),
    Arrow(Stage.DISCARDED, Stage.FREE, ("guest_pgdiscard_fault",)),
    Arrow(Stage.ASIDE, Stage.HOST_OWNED, ("aside_dropped",), ("aside_evicted",)),
)
SWAP_ARROWS = (
    Arrow(Stage.ANONYMOUS, Stage.SWAPPED, ("swap_out_frames",)),
    Arrow(Stage.SWAPPED, Stage.ANONYMOUS, ("swap_in_frames",)),
)

#: what the guest says of its pages, and what the host takes by it (potentially volatile is volatile here, and what was
#: active comes from inactive, too)
STATES_ARROWS = (
    Arrow(Stage.INACTIVE, Stage.VOLATILE, ("usage_s_v", "usage_s_p")),
    Arrow(Stage.VOLATILE, Stage.INACTIVE, ("usage_v_s", "usage_p_s")),
    Arrow(Stage.VOLATILE, Stage.FREE, ("usage_v_u", "usage_p_u"), ("said_discarded",)),
    Arrow(Stage.VOLATILE, Stage.DISCARDED, ("steal_volatile", "steal_potential")),
    Arrow(Stage.VOLATILE, Stage.SWAPPED, ("steal_preserved",)),
    Arrow(Stage.FREE, Stage.HOST_OWNED, ("steal_unused",)),
    Arrow(Stage.DISCARDED, Stage.FREE, ("guest_pgdiscard_fault", "guest_pgdiscard_stable")),
)


def flows(arrows: tuple[Arrow, ...], counters: Mapping[str, int]) -> tuple[Flow, ...]:
    """Return what has gone along each arrow."""
    return tuple(
        Flow(
            arrow.source,
            arrow.target,
            sum(counters.get(name, 0) for name in arrow.counters) - sum(counters.get(name, 0) for name in arrow.less),
        )
        for arrow in arrows
    )
